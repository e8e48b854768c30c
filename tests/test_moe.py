"""Layers with experts: routing, dispatch, names of quantizers, experts without tokens, exports. Logits and the golden exports are in
test_runtime.py and test_presets_native.py."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import modelq
import modelq._core as core
import modelq.quantization as mtq
from golden_data import read_safetensors
from modelq.checkpoint.config import runtime_config
from modelq.export import export_hf_checkpoint
from modelq.rules import fits as means
from modelq.summary import summary_lines

FAMILIES = Path(__file__).parent / "data" / "families"
MOE = ["mixtral", "qwen3_moe"]
IDS = np.random.default_rng(3).integers(0, 64, (4, 20))
EXPERT = {"mixtral": "model.layers.1.block_sparse_moe.experts.{}.{}", "qwen3_moe": "model.layers.1.mlp.experts.{}.{}"}
LINEARS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


EVERY_EXPERT = ("FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")


def load(family, compute="float32"):
    return modelq.load(FAMILIES / family, compute=compute)


def loop(model):
    for row in IDS:
        model(row[None])


def logits(model, ids=IDS, mask=None):
    return np.asarray(model(ids, attention_mask=mask).logits)


class Passes:
    """A runtime and its tensors, layer by layer."""

    def __init__(self, family, compute="float32"):
        self.tensors = read_safetensors(FAMILIES / family)
        self.runtime = core.Runtime(*runtime_config(json.loads((FAMILIES / family / "config.json").read_text())), compute)

    def pick(self, names):
        return {name: self.tensors[name] for name in names}

    def expert(self, run, layer, expert):
        run.expert(layer, expert, self.pick(self.runtime.expert_tensors(layer, expert)))

    def reach(self, layer, ids=IDS, mask=None, **options):
        """(run, what its call of layer returned), with this layer's first half done."""
        run = self.runtime.start([ids], None if mask is None else [mask], **options)
        run.embed(self.pick(self.runtime.embed_tensors()))
        for index in range(layer + 1):
            self.runtime.load_layer(index, self.pick(self.runtime.layer_tensors(index)))
            tokens = run.layer(index)
            if index == layer:
                return run, tokens
            for expert in () if tokens is None else np.flatnonzero(tokens[:, 0]).tolist():
                self.expert(run, index, expert)


# The runtime -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", MOE)
def test_every_token_goes_to_its_experts(family):
    """The counts, against softmax and sorting in NumPy; padding is counted apart."""
    passes = Passes(family)
    mask = np.ones_like(IDS)
    mask[1:, 15:] = 0
    run, tokens = passes.reach(1, mask=mask)
    router = passes.tensors[EXPERT[family].format("", "").replace("experts..", "gate.weight")].astype(np.float32)
    norm = passes.tensors["model.layers.1.post_attention_layernorm.weight"].astype(np.float32)
    hidden = run.hidden(0).reshape(-1, 32)
    normed = hidden / np.sqrt((hidden ** 2).mean(-1, keepdims=True) + (1e-5 if family == "mixtral" else 1e-6)) * norm
    chosen = np.argsort(-(normed @ router.T), axis=1)[:, :passes.runtime.config["num_experts_per_tok"]]
    wanted = [np.bincount(rows.ravel(), minlength=len(router)) for rows in (chosen, chosen[mask.ravel() == 1])]
    np.testing.assert_array_equal(tokens, np.stack(wanted, axis=1))


def router_input(passes, family, run):
    """float32 [tokens, 32]: what experts of layer 1 read."""
    norm = passes.tensors["model.layers.1.post_attention_layernorm.weight"].astype(np.float32)
    hidden = run.hidden(0).reshape(-1, 32)
    return hidden / np.sqrt((hidden ** 2).mean(-1, keepdims=True) + (1e-5 if family == "mixtral" else 1e-6)) * norm


def chosen_by(passes, family, rows, count):
    router = passes.tensors[EXPERT[family].format("", "").replace("experts..", "gate.weight")].astype(np.float32)
    return np.argsort(-(rows @ router.T), axis=1, kind="stable")[:, :count]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MOE)
def test_more_experts_look_on_and_change_nothing(family, compute):
    """moe_calib_experts_ratio: the next best experts see a token too; what comes out has the bits of the model's own choice."""
    passes, mask = Passes(family, compute), np.ones_like(IDS)
    mask[1:, 15:] = 0
    own = passes.runtime.config["num_experts_per_tok"]
    for experts in range(passes.runtime.config["num_experts"] + 1):
        run, tokens = passes.reach(1, mask=mask, experts=experts)
        assert tokens.sum() == max(own, experts) * (IDS.size + mask.sum())
        if compute == "float32":
            chosen = chosen_by(passes, family, router_input(passes, family, run), max(own, experts))
            np.testing.assert_array_equal(tokens[:, 0], np.bincount(chosen.ravel(), minlength=len(tokens)))
        for expert in np.flatnonzero(tokens[:, 0]).tolist():
            passes.expert(run, 1, expert)
        hidden = run.hidden(0)
        assert experts == 0 or np.array_equal(hidden, before)
        before = hidden
    with pytest.raises(RuntimeError, match="only look on"):
        run.backward({})
    with pytest.raises(ValueError, match="experts is 99"):
        passes.reach(0, experts=99)


@pytest.mark.parametrize("family", MOE)
def test_statistics_are_of_all_experts_that_look_on(family):
    """The largest input of every down projection of layer 1, in NumPy, over the experts that a ratio of 0.75 names."""
    model, passes = load(family), Passes(family)
    config = {**mtq.FP8_DEFAULT_CFG, "algorithm": {"method": "max", "moe_calib_experts_ratio": 0.75}}
    mtq.quantize(model, config, lambda model: model(IDS))
    experts = passes.runtime.config["num_experts"]
    run, _ = passes.reach(1)
    rows = router_input(passes, family, run)
    chosen = chosen_by(passes, family, rows, round(experts * 0.75))
    largest = 0.0
    for expert in range(experts):
        gate, up = (passes.tensors[f"{EXPERT[family].format(expert, name)}.weight"].astype(np.float32) for name in LINEARS[family][:2])
        seen = rows[(chosen == expert).any(1)]
        inner = seen @ gate.T
        largest = max(largest, np.abs(inner / (1 + np.exp(-inner)) * (seen @ up.T)).max(initial=0))
    container = next(row["name"] for row in model.modules if row["kind"] == "experts" and row["layer"] == 1)
    assert float(model.quantizers[f"{container}.down_proj_input_quantizer"].amax) == pytest.approx(largest, rel=1e-4)
    assert model.expert_tokens[1].sum() == chosen.size
    assert any("fewest, median, most" in line for line in summary_lines(model))
    plain = load(family)
    mtq.quantize(plain, mtq.FP8_DEFAULT_CFG, lambda model: model(IDS))
    assert plain.expert_tokens[1].sum() == IDS.size * passes.runtime.config["num_experts_per_tok"]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MOE)
def test_bits_do_not_depend_on_threads_nor_on_batches(family, compute):
    model, whole = load(family, compute), None
    for threads in (1, 2, 3):
        core.set_threads(threads)
        found = logits(model)
        apart = np.concatenate([logits(model, row[None]) for row in IDS])
        assert whole is None or np.array_equal(found, whole)
        assert np.array_equal(found, apart)
        whole = found


def test_experts_come_in_order_and_after_their_layer():
    passes = Passes("mixtral")
    with pytest.raises(RuntimeError, match="not what comes next"):
        run, _ = passes.reach(0)
        passes.expert(run, 1, 0)
    run, tokens = passes.reach(0)
    assert tokens[:, 0].all()
    with pytest.raises(RuntimeError, match="expert 0 comes next"):
        passes.expert(run, 0, 1)
    with pytest.raises(RuntimeError, match="its expert 0 comes next"):
        run.layer(0)
    with pytest.raises(IndexError, match="expert 4 of layer 0, which has 4"):
        run.expert(0, 4, {})
    with pytest.raises(ValueError, match="experts.1.w1.weight is not a tensor"):
        run.expert(0, 0, passes.pick(passes.runtime.expert_tensors(0, 1)))
    with pytest.raises(RuntimeError):
        run.logits(0, passes.pick(passes.runtime.head_tensors()))
    for expert in range(4):
        assert run.next_layer == 0
        passes.expert(run, 0, expert)
    assert run.next_layer == 1
    with pytest.raises(RuntimeError, match="not what comes next"):
        passes.expert(run, 0, 3)


def test_a_failed_expert_can_be_given_again():
    """A damaged weight is named, and nothing of the run is lost."""
    passes = Passes("mixtral")
    run, _ = passes.reach(0)
    tensors = passes.pick(passes.runtime.expert_tensors(0, 0))
    name = "model.layers.0.block_sparse_moe.experts.0.w3.weight"
    broken = tensors[name].copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="experts.0.w3.weight contains NaN"):
        run.expert(0, 0, tensors | {name: broken})
    for expert in range(4):
        passes.expert(run, 0, expert)
    again, _ = passes.reach(1)
    assert np.array_equal(run.hidden(0), Passes("mixtral").reach(0)[0].hidden(0)) is False
    passes.runtime.load_layer(1, passes.pick(passes.runtime.layer_tensors(1)))
    run.layer(1)
    assert np.array_equal(run.hidden(0), again.hidden(0))


def test_a_layer_without_experts_has_none():
    runtime = Passes("qwen3_moe").runtime
    assert [runtime.experts(layer) for layer in (0, 1)] == [0, 6]
    with pytest.raises(IndexError, match="expert 0 of layer 0, which has 0"):
        runtime.expert_tensors(0, 0)
    kinds = {row["name"]: row["kind"] for row in runtime.modules}
    assert kinds["model.layers.0.mlp.gate_proj"] == "linear" and kinds["model.layers.1.mlp.gate"] == "router"


@pytest.mark.parametrize("change, message", [
    ({"num_local_experts": 0}, None), ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7, expected 1 to 6"),
    ({"num_local_experts": 5000}, "num_experts is 5000"), ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"), ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1"),
    ({"norm_topk_prob": 1}, "norm_topk_prob is 1")])
def test_configs(change, message):
    config = json.loads((FAMILIES / "qwen3_moe/config.json").read_text()) | change
    if message is None:
        assert runtime_config(config)[1].get("num_experts", 0) == 0
        return
    with pytest.raises(ValueError, match=message):
        core.Runtime(*runtime_config(config), "float32")


# Quantizers ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("pattern, fits", [
    ("*mlp.experts*", "gdiI"), ("*.experts.*", "gdiI"), ("*gate_up_proj_weight_quantizer", "g"), ("*experts*input_quantizer", "iI"),
    ("*.down_proj.*", "dI"), ("*.w2.*", "dI"), ("*experts.1.*weight_quantizer", "1"), ("*experts.1.*input_quantizer", ""),
    ("*block_sparse_moe*", "gdiI"), ("*.gate_proj.weight_quantizer", "g"), ("*mlp.gate.*", "")])
def test_rules_name_experts_as_in_memory_and_as_on_disk(family, pattern, fits):
    """g, d: every expert's gate_up and down; 1: those of expert 1 alone; i, I: the inputs of both."""
    if any(word in pattern for word in ({"mixtral": ("down_proj.", "gate_proj."), "qwen3_moe": ("block", "w2")}[family])):
        fits = ""    # what this family's tensors are not called
    model = load(family)
    found = {name for name, slot in model.slots.items() if slot.parent == "Experts" and slot.layer == 1 and means(pattern, slot)}
    prefix, experts = "model.layers.1.mlp.experts.", range(model.runtime.experts(1))
    wanted = set()
    for letter, matrix in (("g", "gate_up"), ("d", "down")):
        wanted |= {f"{prefix}{matrix}_proj_weight_quantizers.{e}" for e in experts if letter in fits or ("1" in fits and e == 1)}
    for letter, matrix in (("i", "gate_up"), ("I", "down")):
        wanted |= {f"{prefix}{matrix}_proj_input_quantizer"} if letter in fits else set()
    assert found == wanted


@pytest.mark.parametrize("family", MOE)
def test_gate_and_up_share_a_scale_and_all_inputs_one(family, tmp_path):
    """Even plain FP8; the router is left alone, and the export says so."""
    model = mtq.quantize(load(family, "bfloat16"), mtq.FP8_DEFAULT_CFG, loop)
    tensors = read_safetensors(export_hf_checkpoint(model, tmp_path / "out", dtype="bfloat16"))
    source = read_safetensors(FAMILIES / family)
    experts = range(model.runtime.experts(1))
    gate, up, down = ({e: {what: tensors[f"{EXPERT[family].format(e, linear)}.{what}"] for what in ("weight_scale", "input_scale", "weight")}
                       for e in experts} for linear in LINEARS[family])
    for e in experts:
        largest = max(np.abs(source[f"{EXPERT[family].format(e, linear)}.weight"].astype(np.float32)).max() for linear in LINEARS[family][:2])
        assert gate[e]["weight_scale"] == up[e]["weight_scale"] == largest / np.float32(448)
        assert gate[e]["input_scale"] == up[e]["input_scale"] == gate[0]["input_scale"]
        assert down[e]["input_scale"] == down[0]["input_scale"] != gate[0]["input_scale"]
        assert gate[e]["weight"].dtype == ml_dtypes.float8_e4m3fn
    assert len({float(gate[e]["weight_scale"]) for e in experts}) > 1
    router = EXPERT[family].format("", "").replace("experts..", "gate")
    assert tensors[f"{router}.weight"].dtype == ml_dtypes.bfloat16
    assert router in json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]


@pytest.mark.parametrize("config", EVERY_EXPERT)
@pytest.mark.parametrize("family", MOE)
def test_a_reopened_export_computes_the_same(family, config, tmp_path):
    model = mtq.quantize(load(family, "bfloat16"), getattr(mtq, config), loop)
    before, plain = logits(model), logits(load(family, "bfloat16"))
    again = modelq.load(export_hf_checkpoint(model, tmp_path / "out", dtype="bfloat16"), compute="bfloat16")
    assert np.array_equal(logits(again), before) and not np.array_equal(plain, before)
    assert len(again.stored_layers) == sum(row["kind"] == "linear" and row["layer"] >= 0 for row in model.modules)


def test_padding_counts_in_no_statistic():
    mask = np.ones_like(IDS)
    mask[1:, 12:] = 0
    other = np.where(mask == 1, IDS, (IDS + 11) % 64)
    amax = [{name: q.amax for name, q in mtq.quantize(load("qwen3_moe"), mtq.FP8_DEFAULT_CFG, lambda m, ids=ids: m(ids, attention_mask=mask))
             .quantizers.items() if "experts" in name and "input" in name} for ids in (IDS, other)]
    whole = mtq.quantize(load("qwen3_moe"), mtq.FP8_DEFAULT_CFG, lambda m: m(other)).quantizers
    assert amax[0] == amax[1] and len(amax[0]) == 2
    assert any(whole[name].amax != value for name, value in amax[0].items())


def starved(tmp_path):
    """mixtral, whose layer 1 sends every token to experts 0 and 2."""
    from safetensors.numpy import save_file

    shutil.copytree(FAMILIES / "mixtral", tmp_path / "starved")
    tensors = read_safetensors(tmp_path / "starved")
    norm = "model.layers.1.post_attention_layernorm.weight"
    router = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[norm] = np.abs(tensors[norm])
    tensors[router] = np.zeros_like(tensors[router])    # all equal: the first ones
    save_file(tensors, tmp_path / "starved/model.safetensors")
    return modelq.load(tmp_path / "starved", compute="bfloat16")


def test_experts_without_tokens_are_calibrated_from_their_weights_and_named(tmp_path):
    model = starved(tmp_path)
    with pytest.warns(UserWarning, match=r"experts that saw no token \(layer 1: 2 of 4\)"):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop)
    line = next(line for line in summary_lines(model) if "2 of 4" in line)
    assert line.split() == ["model.layers.1.mlp.experts", "2", "of", "4:", "2,", "3"]
    tensors = read_safetensors(export_hf_checkpoint(model, tmp_path / "out", dtype="bfloat16"))
    scales = [tensors[f"{EXPERT['mixtral'].format(e, linear)}.{what}_scale"] for e in range(4) for linear in LINEARS["mixtral"]
              for what in ("weight", "input")]
    assert all(np.isfinite(scale) and scale > 0 for scale in scales)
    mtq.quantize(model, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)     # nothing ran: nothing to say
    assert not any("no token" in line for line in summary_lines(model))


def test_a_part_of_the_experts_may_stay_in_high_precision(tmp_path):
    """By the names on disk; what stays is excluded by name."""
    config = {"quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], {"quantizer_name": "*experts.5.*", "enable": False}], "algorithm": "max"}
    model = mtq.quantize(load("qwen3_moe", "bfloat16"), config, loop)
    tensors = read_safetensors(export_hf_checkpoint(model, tmp_path / "out", dtype="bfloat16"))
    kept = {name for name, tensor in tensors.items() if ".experts." in name and tensor.dtype == ml_dtypes.bfloat16}
    assert kept == {f"{EXPERT['qwen3_moe'].format(5, linear)}.weight" for linear in LINEARS["qwen3_moe"]}
    excluded = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert "model.layers.1.mlp.experts.5*" in excluded
    assert np.array_equal(logits(modelq.load(tmp_path / "out", compute="bfloat16")), logits(model))


@pytest.mark.parametrize("config", ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_MLP_ONLY_CFG", "NVFP4_EXPERTS_ONLY_CFG"])
@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_what_the_reference_cannot_export(golden, config, dialect, tmp_path):
    """Each expert is written as a dense linear of its shape would be."""
    golden_model = golden["qwen3moe"]
    model = modelq.load(golden_model.source, compute="bfloat16")
    mtq.quantize(model, getattr(mtq, config), lambda m: [m(row[None]) for row in golden_model.calib])
    folder = export_hf_checkpoint(model, tmp_path / "out", dialect=dialect)
    tensors, source = read_safetensors(folder), read_safetensors(golden_model.source)
    again = modelq.load(folder, compute="bfloat16")
    assert np.array_equal(logits(again, golden_model.calib[:2]), logits(model, golden_model.calib[:2]))
    assert all(f"model.layers.{layer}.mlp.experts.{e}.{linear}" in again.stored_layers
               for layer in range(2) for e in range(4) for linear in LINEARS["qwen3_moe"])
    if dialect == "modelopt" and config.startswith("INT4"):
        name = "model.layers.1.mlp.experts.3.up_proj"
        parts = core.quantize(source[f"{name}.weight"], "int4", amax=core.amax(source[f"{name}.weight"], block=128), block_size=128)
        assert all(np.array_equal(tensors[f"{name}.{role}"], part) for role, part in parts.items())


# Memory ----------------------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, warnings, numpy as np, ml_dtypes, tqdm
import modelq, modelq.quantization as mtq
from modelq.measure import peak_memory, reset_peak_memory
warnings.simplefilter("ignore")
model = modelq.load(sys.argv[1], compute="bfloat16")
ids = np.random.default_rng(1).integers(0, 8192, (2, 64))
reset_peak_memory(); before = peak_memory()
mtq.quantize(model, getattr(mtq, sys.argv[2]), lambda model: model(ids))
assert 0 < len(model.unseen_experts.get(0, ())) < 256 and model.expert_tokens[0].sum() == 8 * ids.size
print(peak_memory() - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """One layer of 256 experts, 144 MB of them."""
    from bench.make_moe import make

    folder = tmp_path_factory.mktemp("wide") / "moe"
    make(folder, "qwen3_moe", 0.14, layers=1, experts=256)
    return folder


@pytest.mark.parametrize("config", ["NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG"])
@pytest.mark.measures
def test_a_layer_of_256_experts_calibrates_in_the_memory_of_a_few(wide, config):
    done = subprocess.run([sys.executable, "-c", MEASURED, str(wide), config], capture_output=True, text=True, cwd=wide)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 20
