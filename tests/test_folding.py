"""Smoothing scales of o_proj and down_proj in exports that have no place for them: the rows of the linear before take them up."""
import copy
import json

import numpy as np
import pytest

import golden_data
import modelq
import modelq.quantization as mtq
import reference
from golden_data import read_safetensors, write_safetensors
from modelq.export import check_exportable, export_hf_checkpoint
from modelq.export.folding import folded
from modelq.smoothing import norm_scales, smooth, stated_weight

F32 = np.float32
KV_HEADS, WIDTH = 2, 32      # of the golden models; each key/value head serves two query heads
BACK, ALL = ("o_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BEFORE = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}
models = pytest.mark.parametrize("name", [param.values[0].name for param in golden_data.models(["llama", "qwen3"])])


def config_of(preset, *rules):
    found = copy.deepcopy(getattr(mtq, preset))
    return {"quant_cfg": [*found["quant_cfg"], *rules], "algorithm": "max"}


def random_scales(model, endings=BACK, equal_heads=False):
    """0.5 to 2. equal_heads: the same for the query heads that share a key/value head."""
    random, scales = np.random.default_rng(5), {}
    for row in model.modules:
        if row["kind"] == "linear" and row["name"].endswith(endings):
            scale = np.exp2(random.uniform(-1, 1, row["shape"][1])).astype(F32)
            if equal_heads and row["name"].endswith("o_proj"):
                heads = scale.reshape(KV_HEADS, -1, WIDTH)
                scale = np.broadcast_to(heads[:, :1], heads.shape).reshape(-1)
            scales[row["name"]] = scale
    return scales


def smoothed(golden, name, config, endings=BACK, equal_heads=False, source=None, compute="bfloat16"):
    calib = golden[name].calib
    model = mtq.quantize(modelq.load(source or golden[name].source, compute=compute), config, lambda m: [m(row[None]) for row in calib])
    smooth(model, random_scales(model, endings, equal_heads))
    return model


def logits_of(folder, golden, name, compute="float32"):
    return np.asarray(modelq.load(folder, compute=compute)(golden[name].calib[:2]).logits)


def unpacked(folder, dialect, module):
    """float32 weight of an export, by formulas that share no code with modelq."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    return reference.unpack(dialect, read_safetensors(folder), module, said)


def distance(found, expected):
    return np.abs(found - expected).mean() / np.abs(expected).mean()


# What is computed does not change --------------------------------------------------------------------------------------------

def float32_source(golden, name, folder):
    """The golden model in float32, with biases, which the fold has to scale too."""
    random, config = np.random.default_rng(1), json.loads((golden[name].source / "config.json").read_text())
    tensors = {key: tensor.astype(F32) for key, tensor in read_safetensors(golden[name].source).items()}
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        if name == "llama" or "self_attn" in key:
            tensors[key.replace("weight", "bias")] = random.normal(0, 0.1, tensors[key].shape[0]).astype(F32)
    return write_folder(folder, tensors, {**config, "dtype": "float32", "torch_dtype": "float32", "attention_bias": True, "mlp_bias": True})


def write_folder(folder, tensors, config):
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def folded_tensors(model):
    """Every tensor of the stand-in's checkpoint as an export would quantize it, unrounded."""
    found, tensors = folded(model), {}
    norms = norm_scales(found, [row for row in found.modules if found.quantizers.get(f"{row['name']}.weight_quantizer") is not None])
    weights = {row["weight"]: row for row in found.modules if row["kind"] == "linear"}
    for name in found.checkpoint.tensors:
        array = found.checkpoint.read(name)
        if name in weights:
            rows = found.scale_rows.get(weights[name]["name"])
            array = stated_weight(found, weights[name], array) * (1 if rows is None else rows[:, None])
        tensors[name] = array * norms.get(name, F32(1))
    return tensors


@models
@pytest.mark.parametrize("preset, endings", [("INT4_AWQ_CFG", BACK), ("INT8_DEFAULT_CFG", ALL), ("NVFP4_AWQ_LITE_CFG", ALL), ("plain", BACK)])
def test_folded_weights_compute_what_the_original_ones_do(name, preset, endings, golden, tmp_path):
    """In float32 with nothing quantized: under means over heads too, with biases, and where v_proj and up_proj stay in high precision."""
    source = float32_source(golden, name, tmp_path / "source")
    off = [{"quantizer_name": f"*{last}*", "enable": False} for last in ("v_proj", "up_proj")]
    config = config_of("INT8_DEFAULT_CFG", *off) if preset == "plain" else config_of(preset)
    model = smoothed(golden, name, config, endings, source=source, compute="float32")
    tensors, before = folded_tensors(model), read_safetensors(source)
    for last in ("v_proj.weight", "v_proj.bias", "up_proj.weight", "o_proj.weight", "down_proj.weight"):
        key = f"model.layers.1.{'self_attn' if last[0] in 'vo' else 'mlp'}.{last}"
        assert np.abs(tensors[key] / before[key] - 1).max() > 0.5, key
    write_folder(tmp_path / "folded", tensors, json.loads((source / "config.json").read_text()))
    found, expected = (logits_of(folder, golden, name) for folder in (tmp_path / "folded", source))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@models
@pytest.mark.parametrize("dialect, tolerance", [("compressed-tensors", 1e-6), ("autoawq", 1e-3), ("gptq", 1e-3)])
def test_int4_is_exact_where_heads_agree(name, dialect, tolerance, golden, tmp_path):
    """The codes stay what they are without a fold, each row times its factor. (autoawq and gptq round scales to float16.)"""
    model = smoothed(golden, name, config_of("INT4_AWQ_CFG"), equal_heads=True)
    export_hf_checkpoint(model, tmp_path / "beside")
    export_hf_checkpoint(model, tmp_path / "folded", dialect=dialect)
    assert not any("pre_quant_scale" in key for key in read_safetensors(tmp_path / "folded"))
    plain = mtq.quantize(modelq.load(golden[name].source), config_of("INT4_AWQ_CFG"))
    export_hf_checkpoint(plain, tmp_path / "plain", dialect=dialect)
    for layer in (0, 1):
        scale = {last: model.quantizers[f"model.layers.{layer}.{last}.input_quantizer"].pre_quant_scale for last in BEFORE}
        for last, module in BEFORE.items():
            rows = scale[last] if last == "mlp.down_proj" else scale[last].reshape(KV_HEADS, -1, WIDTH)[:, 0].reshape(-1)
            found, before = (unpacked(tmp_path / folder, dialect, f"model.layers.{layer}.{module}") for folder in ("folded", "plain"))
            assert found == pytest.approx(before * rows[:, None], rel=tolerance)
    expected = logits_of(tmp_path / "beside", golden, name)
    assert distance(logits_of(tmp_path / "folded", golden, name), expected) <= 0.01      # weights are rounded to bfloat16 as they are read
    before = np.asarray(model(golden[name].calib[:2]).logits)
    assert distance(logits_of(tmp_path / "folded", golden, name, "bfloat16"), before) <= 0.03      # two bfloat16 forwards


@models
@pytest.mark.parametrize("preset, dialect", [("INT4_AWQ_CFG", "compressed-tensors"), ("INT4_AWQ_CFG", "autoawq"), ("INT4_AWQ_CFG", "gptq"),
                                             ("INT8_DEFAULT_CFG", "compressed-tensors"), ("NVFP4_AWQ_LITE_CFG", "compressed-tensors")])
@pytest.mark.parametrize("endings", [BACK, ALL], ids=["back", "all"])
def test_means_over_heads_stay_as_close_to_the_model_as_the_format(name, preset, dialect, endings, golden, tmp_path):
    """A fold loses no more than what the rounding of the format itself costs: the distance to the unquantized logits hardly grows."""
    model = smoothed(golden, name, config_of(preset), endings)
    export_hf_checkpoint(model, tmp_path / "out", dialect=dialect)
    original = logits_of(golden[name].source, golden, name)
    simulated = np.asarray(model(golden[name].calib[:2]).logits)
    found = logits_of(tmp_path / "out", golden, name, "bfloat16")
    assert distance(found, original) <= 1.35 * distance(simulated, original)
    ideal = folded_tensors(model)
    for weight in [name for name in ideal if name.startswith("model.layers.") and name.endswith("proj.weight")]:
        ours = unpacked(tmp_path / "out", dialect, weight.removesuffix(".weight"))
        error = np.square(ours - ideal[weight].astype(F32)).mean() / np.square(ideal[weight].astype(F32)).mean()
        assert error <= {"INT8": 0.025, "INT4": 0.33, "NVFP": 0.15}[preset[:4]]**2, weight


# Bytes -----------------------------------------------------------------------------------------------------------------------

def test_what_is_written(golden, tmp_path):
    """INT8: equal codes, and scales times the factor. NVFP4: the weight times the factor, its siblings still on one second level."""
    model = smoothed(golden, "llama", config_of("INT8_DEFAULT_CFG"), equal_heads=True)
    scale = {last: model.quantizers[f"model.layers.0.{last}.input_quantizer"].pre_quant_scale for last in ("mlp.down_proj", "self_attn.o_proj")}
    export_hf_checkpoint(model, tmp_path / "beside")
    export_hf_checkpoint(model, tmp_path / "folded", dialect="compressed-tensors")
    before, after = read_safetensors(tmp_path / "beside"), read_safetensors(tmp_path / "folded")
    rows = {"mlp.up_proj": scale["mlp.down_proj"], "self_attn.v_proj": scale["self_attn.o_proj"].reshape(KV_HEADS, -1, WIDTH)[:, 0].reshape(-1)}
    for last in (f"{parent}.{which}_proj" for parent, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for which in names):
        key = f"model.layers.0.{last}"
        assert np.array_equal(before[f"{key}.weight"], after[f"{key}.weight"]), key
        expected = before[f"{key}.weight_scale"] * rows.get(last, F32(1))
        assert np.array_equal(after[f"{key}.weight_scale"].reshape(-1), expected), key
        assert after[f"{key}.input_scale"].item() == before[f"{key}.input_scale"].item()


def test_nvfp4_siblings_still_share(golden, tmp_path):
    model = smoothed(golden, "llama", config_of("NVFP4_AWQ_LITE_CFG"))
    export_hf_checkpoint(model, tmp_path / "out", dialect="compressed-tensors")
    tensors, source = read_safetensors(tmp_path / "out"), read_safetensors(golden["llama"].source)
    gate, up = (tensors[f"model.layers.0.mlp.{which}_proj.weight_global_scale"] for which in ("gate", "up"))
    scale = model.quantizers["model.layers.0.mlp.down_proj.input_quantizer"].pre_quant_scale
    product = (source["model.layers.0.mlp.up_proj.weight"].astype(F32) * scale[:, None]).astype(source["model.layers.0.mlp.up_proj.weight"].dtype)
    largest = max(np.abs(product.astype(F32)).max(), np.abs(source["model.layers.0.mlp.gate_proj.weight"].astype(F32)).max())
    assert gate == up and gate.item() == pytest.approx(6 * 448 / largest, rel=1e-6)


def test_the_model_stays_as_it_is(golden, tmp_path):
    """An export for one reader leaves nothing behind: another that has a place for the scales gets the bytes it would have got."""
    model = smoothed(golden, "llama", config_of("NVFP4_AWQ_LITE_CFG"), ALL)
    before = np.asarray(model(golden["llama"].calib[:1]).logits)
    export_hf_checkpoint(model, tmp_path / "first")
    export_hf_checkpoint(model, tmp_path / "folded", dialect="compressed-tensors")
    export_hf_checkpoint(model, tmp_path / "second")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (tmp_path / "second" / "model.safetensors").read_bytes()
    assert np.array_equal(before, np.asarray(model(golden["llama"].calib[:1]).logits))


def test_a_cache_of_values_takes_the_largest_factor(golden, tmp_path):
    config = mtq.update_quant_cfg_with_kv_cache_quant(config_of("INT8_DEFAULT_CFG"), mtq.FP8_KV_CFG["quant_cfg"])
    model = smoothed(golden, "llama", config, equal_heads=True)
    export_hf_checkpoint(model, tmp_path / "out", dialect="compressed-tensors")
    tensors = read_safetensors(tmp_path / "out")
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        amax = {which: float(model.quantizers[f"{layer}.{which}_bmm_quantizer"].amax) for which in "kv"}
        factor = float(model.quantizers[f"{layer}.o_proj.input_quantizer"].pre_quant_scale.max())
        assert tensors[f"{layer}.k_scale"][0] == pytest.approx(amax["k"] / 448, rel=1e-6)
        assert tensors[f"{layer}.v_scale"][0] == pytest.approx(factor * amax["v"] / 448, rel=1e-6)
    simulated = np.asarray(model(golden["llama"].calib[:2]).logits)
    original = logits_of(golden["llama"].source, golden, "llama")
    assert distance(logits_of(tmp_path / "out", golden, "llama", "bfloat16"), original) <= 1.35 * distance(simulated, original)


def test_a_cache_with_biases(golden):
    """No reader of folded scales takes one; the stand-in has them right all the same."""
    config = mtq.update_quant_cfg_with_kv_cache_quant(config_of("INT8_DEFAULT_CFG"), mtq.FP8_AFFINE_KV_CFG["quant_cfg"])
    model = smoothed(golden, "llama", config, equal_heads=True)
    found, layer = folded(model), "model.layers.1.self_attn"
    rows = model.quantizers[f"{layer}.o_proj.input_quantizer"].pre_quant_scale.reshape(KV_HEADS, -1, WIDTH)[:, 0].reshape(-1)
    bias = {which: tuple(m.quantizers[f"{layer}.{which}_bmm_quantizer"].bias for m in (model, found)) for which in "kv"}
    assert np.array_equal(bias["v"][1].reshape(-1), bias["v"][0].reshape(-1) * rows) and np.abs(bias["v"][0]).max() > 0
    assert np.array_equal(*bias["k"])


def test_experts(golden, tmp_path):
    """Attention is folded as elsewhere; the experts, which have no scales, stay what they are."""
    model = smoothed(golden, "qwen3moe", config_of("INT8_DEFAULT_CFG"), "o_proj", equal_heads=True)
    export_hf_checkpoint(model, tmp_path / "out", dialect="compressed-tensors")
    original = logits_of(golden["qwen3moe"].source, golden, "qwen3moe")
    simulated = np.asarray(model(golden["qwen3moe"].calib[:2]).logits)
    assert distance(logits_of(tmp_path / "out", golden, "qwen3moe", "bfloat16"), original) <= 1.35 * distance(simulated, original)


# Who gets it -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, engine, method, kept", [
    ("INT4_AWQ_CFG", "vllm", "compressed-tensors", False), ("INT4_AWQ_CFG", "sglang", "compressed-tensors", False),
    ("INT4_AWQ_CFG", "transformers", "compressed-tensors", False), ("INT4_AWQ_CFG", "tensorrt-llm", "modelopt", True),
    ("INT8_SMOOTHQUANT_CFG", "vllm", "compressed-tensors", False), ("NVFP4_AWQ_LITE_CFG", "vllm", "modelopt", False),
    ("NVFP4_AWQ_LITE_CFG", "sglang", "modelopt", True), ("NVFP4_AWQ_LITE_CFG", "transformers", "compressed-tensors", False)])
def test_each_engine_gets_what_it_takes(preset, engine, method, kept, golden, tmp_path):
    model = smoothed(golden, "llama", config_of(preset), ALL)
    export_hf_checkpoint(model, tmp_path / "out", engine=engine)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == method and said.get("quant_algo") != ("NVFP4" if kept else "NVFP4_AWQ")
    assert any("pre_quant_scale" in key for key in read_safetensors(tmp_path / "out")) == kept
    assert check_exportable(golden["llama"].source, getattr(mtq, preset), engine=engine) == method


def test_what_nothing_can_take_up_is_refused_by_name(golden, tmp_path):
    """q, k and v of which only some are quantized: the norm before them makes what the rest reads too."""
    off = {"quantizer_name": "*q_proj*", "enable": False}
    with pytest.warns(UserWarning, match="q_proj stays in high precision"):
        model = smoothed(golden, "llama", config_of("INT8_DEFAULT_CFG", off), ("k_proj", "v_proj"))
        export_hf_checkpoint(model, tmp_path / "beside")
    with pytest.raises(ValueError, match="k_proj: the compressed-tensors dialect has no place for pre_quant_scale"):
        export_hf_checkpoint(model, tmp_path / "out", dialect="compressed-tensors")
