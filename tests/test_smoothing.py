"""AWQ's and SmoothQuant's layouts: with the reference's scales put in by hand, its exported bytes come out."""
import copy
import json
from functools import cache

import ml_dtypes
import numpy as np
import pytest

import golden_data
import modelq
import modelq.quantization as mtq
from golden_data import read_safetensors
from modelq.export import export_hf_checkpoint
from modelq.smoothing import as_loaded, own_weight, set_weight_amax, smooth
from recover_scales import recover

CONFIGS = ["INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "INT8_SMOOTHQUANT_CFG", "AUTO_6.0"]    # the last: a mixture by rules, module by module
CASES = golden_data.cases("bfloat16", CONFIGS, names=["llama", "qwen3"], needs=["model.safetensors", "amax.safetensors"])
SIBLINGS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
F32 = np.float32


def stored_scales(case):
    suffix = ".input_quantizer.pre_quant_scale"
    return {name.removesuffix(suffix): value for name, value in case.amax.items() if name.endswith(suffix)}


def config_of(case):
    """The preset with nothing searched; of AutoQuantize's result, the rules that make the same choice."""
    if not case.config.startswith("AUTO"):
        return {**copy.deepcopy(getattr(mtq, case.config)), "algorithm": "max"}
    said = json.loads((case.folder / "hf_quant_config.json").read_text())["quantization"]["quantized_layers"]
    rules = [{"quantizer_name": "*", "enable": False}]
    for module, entry in said.items():
        attributes = {"num_bits": (4, 3)} if entry["quant_algo"] == "FP8" else {"num_bits": 4, "block_sizes": {-1: entry["group_size"]}}
        rules.append({"quantizer_name": f"{module}.weight_quantizer", "cfg": attributes})
        if entry["quant_algo"] == "FP8":
            rules.append({"quantizer_name": f"{module}.input_quantizer", "cfg": attributes})
    return {"quant_cfg": rules, "algorithm": "max"}


def shared_scale(scales, module):
    """The mean of the siblings' stored scales, in the model's dtype."""
    parent, _, last = module.rpartition(".")
    members = [f"{parent}.{member}" for group in SIBLINGS if last in group for member in group] or [module]
    mean = sum(scales[member] for member in members) / F32(len(members))
    return mean.astype(ml_dtypes.bfloat16).astype(F32)


@cache
def smoothed_model(case):
    """The golden model with the golden scales; weights by the scales as they were before rounding."""
    model = modelq.load(case.model.source, compute="bfloat16")
    mtq.quantize(model, config_of(case), lambda model: [model(row[None]) for row in case.model.calib])
    stored, source = stored_scales(case), read_safetensors(case.model.source)
    for name, value in case.amax.items():
        if name.endswith("input_quantizer.amax"):
            model.quantizers[name.removesuffix(".amax")].amax = value
    smooth(model, stored)
    for module, scale in stored.items():
        parts = (case.exported[f"{module}.{part}"] for part in ("weight", "weight_scale"))
        weight = source[f"{module}.weight" if f"{module}.weight" in source else "model.embed_tokens.weight"]
        factors = recover(weight, scale, shared_scale(stored, module), *parts)
        assert np.abs(factors * scale - 1).max() <= 1.001 * 2**-8, module     # half a step of bfloat16: it rounds to what is stored
        model.quantizers[f"{module}.weight_quantizer"].pre_quant_scale = factors
    for row in model.modules:
        if row["name"] in stored:    # weights' amax anew; the inputs' stay the reference's
            set_weight_amax(model, row, own_weight(model, row, as_loaded(model, model.checkpoint.read(row["weight"]))))
    model.connect()
    return model


@pytest.mark.parametrize("case", CASES)
def test_weight_amax_of_smoothed_weights(case):
    """Before siblings take their mean scale: of INT4 blocks, of the FP8 stage behind them, of INT8 rows."""
    model = smoothed_model(case)
    expected = {name: value for name, value in case.amax.items() if "weight_quantizer" in name and name.endswith("amax")}
    assert len(expected) >= 14 and {name.partition(".weight_quantizer")[0] for name in expected} >= set(stored_scales(case))
    different = total = worst = 0
    for name, value in expected.items():
        whole, _, stage = name.removesuffix(".amax").partition(".weight_quantizer")
        quantizer = model.quantizers[f"{whole}.weight_quantizer"]
        found = getattr(quantizer, "stages", (quantizer,))[int(stage[1:] or 0)].amax
        errors = np.abs(found.reshape(-1) / value.reshape(-1) - 1)
        different, total, worst = different + (errors > 0).sum(), total + value.size, max(worst, errors.max())
    assert different <= 0.1 * total and worst <= 2**-6      # the bytes of siblings, smoothed twice, leave a last bit open


@pytest.mark.parametrize("case", CASES)
def test_exported_bytes_equal_the_reference(case, tmp_path):
    export_hf_checkpoint(smoothed_model(case), tmp_path / "out")
    found, expected = read_safetensors(tmp_path / "out"), case.exported
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if not case.config.startswith("AUTO"):
            assert found[name].tobytes() == tensor.tobytes(), name
        elif name == "model.embed_tokens.weight":   # the reference smooths the tied embedding along with its lm_head, which breaks the model
            assert found[name].tobytes() == read_safetensors(case.model.source)[name].tobytes()
        else:      # folded from a copy of the scales that golden does not hold
            assert (found[name].reshape(-1) == tensor.reshape(-1)).mean() > 0.95, name
    for file, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        ours, theirs = (json.loads((folder / file).read_text())[key] for folder in (tmp_path / "out", case.folder))
        for said in (ours, theirs):
            said.pop("producer", None)
        assert json.dumps(ours) == json.dumps(theirs), file


@pytest.mark.parametrize("case", CASES)
def test_a_reopened_export_computes_the_same_numbers(case, tmp_path):
    model = smoothed_model(case)
    export_hf_checkpoint(model, tmp_path / "out")
    before, after = (np.asarray(m(case.model.calib[:2]).logits) for m in (model, modelq.load(tmp_path / "out", compute="bfloat16")))
    assert np.array_equal(before, after)


# By hand ---------------------------------------------------------------------------------------------------------------------

def smoothed_by_hand(llama, preset, compute="bfloat16"):
    random = np.random.default_rng(7)
    config = {**copy.deepcopy(getattr(mtq, preset)), "algorithm": "max"}
    model = mtq.quantize(modelq.load(llama.source, compute=compute), config, lambda model: [model(row[None]) for row in llama.calib])
    scales = {row["name"]: np.exp2(random.uniform(-1, 1, row["shape"][1])).astype(F32) for row in model.modules
              if row["kind"] == "linear" and row["layer"] >= 0}
    smooth(model, scales)
    return model, scales


def test_nvfp4_awq(golden, tmp_path):
    """NVFP4's layout. down_proj's scale goes into up_proj's rows, and o_proj's, where two heads share a row of v_proj, is beside the weight."""
    model, scales = smoothed_by_hand(golden["llama"], "NVFP4_AWQ_LITE_CFG")
    export_hf_checkpoint(model, tmp_path / "out")
    tensors, said = read_safetensors(tmp_path / "out"), json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["pre_quant_scale"], said["has_zero_point"]) == ("NVFP4_AWQ", True, False)
    kept = {name.removesuffix(".pre_quant_scale") for name in tensors if name.endswith(".pre_quant_scale")}
    assert kept == {module for module in scales if module.endswith("o_proj")}
    for group in SIBLINGS:
        parent = "model.layers.0." + ("self_attn." if "q_proj" in group else "mlp.")
        assert len({tensors[f"{parent}{member}.weight_scale_2"].item() for member in group}) == 1
    before, after = (np.asarray(m(golden["llama"].calib[:2]).logits) for m in (model, modelq.load(tmp_path / "out", compute="bfloat16")))
    assert np.array_equal(before, after)


def test_smoothing_alone_changes_little(golden):
    """What multiplies the inputs divides the weights: in float32, with nothing rounded, the logits stay."""
    model, _ = smoothed_by_hand(golden["llama"], "INT8_DEFAULT_CFG", "float32")
    for name, quantizer in model.quantizers.items():
        if quantizer.enabled and name.endswith("input_quantizer"):
            quantizer.enabled = False
    for name in list(model.quantizers):
        if name.endswith("weight_quantizer"):
            model.quantizers[name] = Unrounded(model.quantizers[name])
    model.connect()
    assert np.asarray(model(golden["llama"].calib[:1]).logits) == pytest.approx(golden["llama"].logits, abs=2e-4)


class Unrounded:
    """A weight quantizer that only multiplies columns."""

    def __init__(self, quantizer):
        self.enabled, self.pre_quant_scale, self.bias, self.rotate = quantizer.enabled, quantizer.pre_quant_scale, None, 0

    def __call__(self, tensor):
        return tensor if self.pre_quant_scale is None else (tensor * self.pre_quant_scale).astype(tensor.dtype)


@pytest.mark.parametrize("scale, words", [(np.ones(3), "128 positive finite numbers, got shape"), (np.zeros(128), "positive"),
                                          (np.full(128, np.nan), "finite")])
def test_scales_that_cannot_be(golden, scale, words):
    model, _ = smoothed_by_hand(golden["llama"], "INT8_DEFAULT_CFG")
    with pytest.raises(ValueError, match=words):
        smooth(model, {"model.layers.0.mlp.up_proj": scale})
    with pytest.raises(ValueError, match="model.layers.7.mlp.up_proj: no linear of this model"):
        smooth(model, {"model.layers.7.mlp.up_proj": np.ones(128)})


def test_a_dialect_without_a_place_for_scales_refuses_them(golden, tmp_path):
    model, _ = smoothed_by_hand(golden["llama"], "INT8_DEFAULT_CFG")
    with pytest.raises(ValueError, match="gptq|compressed-tensors"):
        export_hf_checkpoint(model, tmp_path / "out", dialect="gptq")
