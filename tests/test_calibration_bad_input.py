"""Calibration of what is not good: too few tokens, silent channels, experts without tokens, NaN, no data, formats that do not fit."""
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

import modelq.quantization as mtq
from golden_data import read_safetensors
from modelq.export import export_hf_checkpoint
from modelq.summary import summary_lines
from test_calibration import AWQ, QUIET, UP, load, quantize, untouched

INT8_BEFORE = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, {
    "quantizer_name": "*layers.0.mlp.up_proj.*", "cfg": {"num_bits": 8}, "enable": True}, {
    "quantizer_name": "*output_quantizer", "enable": False}]}


def changed_source(golden_model, folder, change):
    """A copy of the checkpoint with other tensors."""
    shutil.copytree(golden_model.source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: np.array(tensor) for name, tensor in read_safetensors(golden_model.source).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return load(folder)


def test_too_few_tokens_are_damped_and_said(golden):
    with pytest.warns(UserWarning, match=r"gptq: the Gram matrix of \d+ inputs is singular.*layers.0.self_attn.q_proj.*5 tokens, 128 chan"):
        model = quantize(golden["llama"], mtq.INT4_GPTQ_CFG, tokens=golden["llama"].calib[:1, :5])
    assert np.isfinite(model(golden["llama"].calib[:1]).logits).all()
    for algorithm in ("awq_lite", "awq_full"):
        model = quantize(golden["llama"], AWQ, algorithm, tokens=golden["llama"].calib[:1, :1])
        assert np.isfinite(model(golden["llama"].calib[:1]).logits).all()


def silence(tensors):
    """A channel of each norm that is always zero, in layer 0."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"][7] = 0


@QUIET
@pytest.mark.parametrize("preset, algorithm", [
    ("INT8_SMOOTHQUANT_CFG", None), ("INT4_AWQ_CFG", None), ("INT4_AWQ_CFG", "awq_full"), ("NVFP4_AWQ_LITE_CFG", None),
    ("INT4_GPTQ_CFG", None), ("NVFP4_GPTQ_CFG", None), ("NVFP4_SVDQUANT_DEFAULT_CFG", None), ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", None)])
def test_a_channel_that_is_always_zero(golden, preset, algorithm, tmp_path):
    model = changed_source(golden["llama"], tmp_path / "silent", silence)
    plain = model(golden["llama"].calib[:1]).logits
    quantize(golden["llama"], getattr(mtq, preset), algorithm, model=model)
    for name, quantizer in model.quantizers.items():
        scale = quantizer.pre_quant_scale
        assert scale is None or (np.isfinite(scale).all() and (scale > 0).all()), name
    assert np.linalg.norm(model(golden["llama"].calib[:1]).logits - plain) < 0.6 * np.linalg.norm(plain)
    export_hf_checkpoint(model, tmp_path / "export")
    np.testing.assert_array_equal(load(tmp_path / "export")(golden["llama"].calib[:1]).logits, model(golden["llama"].calib[:1]).logits)


@QUIET
@pytest.mark.parametrize("preset, algorithm", [("INT4_AWQ_CFG", "awq_clip"), ("INT4_GPTQ_CFG", None), ("FP8_DEFAULT_CFG", None),
                                               ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", None)])
def test_an_expert_that_saw_no_token(golden, preset, algorithm, tmp_path):
    """It is calibrated from its weights alone: the same as without a search; a warning and the summary say so."""
    def avoid(tensors):
        tensors["model.layers.0.mlp.gate.weight"][2] = 0
        tensors["model.layers.0.mlp.gate.weight"][[0, 1, 3]] *= 50
    moe, ids = golden["qwen3moe"], golden["qwen3moe"].calib[:1, :1]
    model = changed_source(moe, tmp_path / "avoided", avoid)
    with pytest.warns(UserWarning, match=r"experts that saw no token \(layer 0: \d of 4"):
        quantize(moe, getattr(mtq, preset), algorithm, tokens=ids, model=model)
    unseen = model.unseen_experts[0][0]
    assert any("Experts that saw no token, calibrated from their weights alone" in line for line in summary_lines(model))
    weight = f"model.layers.0.mlp.experts.{unseen}.up_proj.weight"
    np.testing.assert_array_equal(model.checkpoint.read(weight), read_safetensors(tmp_path / "avoided")[weight])
    name = f"model.layers.0.mlp.experts.down_proj_weight_quantizers.{unseen}"
    plain = changed_source(moe, tmp_path / "again", avoid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize(moe, getattr(mtq, preset), "max" if preset != "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG" else {
            "method": "mse", "fp8_scale_sweep": True}, tokens=moe.calib, model=plain)
    np.testing.assert_array_equal(model.quantizers[name].amax, plain.quantizers[name].amax)


@pytest.mark.parametrize("preset", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "INT4_GPTQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG"])
def test_nan_is_named(golden, preset, tmp_path):
    def break_weight(tensors):
        tensors[f"{UP}.weight"][3, 4] = np.nan

    def overflow(tensors):
        tensors["model.layers.0.post_attention_layernorm.weight"][:] = 3e38
    model = changed_source(golden["llama"], tmp_path / "weight", break_weight)
    with pytest.raises(ValueError, match=f"{UP}.weight.*NaN"):
        quantize(golden["llama"], getattr(mtq, preset), model=model)
    untouched(model)
    model = changed_source(golden["llama"], tmp_path / "input", overflow)
    with pytest.raises(ValueError, match=r"layers\.[01]\..*NaN or infinity in the activations"):
        quantize(golden["llama"], getattr(mtq, preset), model=model)
    untouched(model)


@pytest.mark.parametrize("preset", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "INT4_GPTQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG"])
def test_data_are_asked_for(golden, preset):
    model, method = load(golden["llama"].source), {"INT8": "smoothquant", "INT4": "awq_lite|gptq", "NVFP": "svdquant"}[preset[:4]]
    with pytest.raises(ValueError, match=f"({method}) looks at activations"):
        mtq.quantize(model, getattr(mtq, preset))
    untouched(model)


def test_what_an_algorithm_is_not_for(golden):
    with pytest.raises(ValueError, match="smoothquant: no linear has 8-bit integer weights"):
        quantize(golden["llama"], AWQ, "smoothquant")
    with pytest.raises(ValueError, match="q_proj.weight_quantizer: gptq rounds INT4, INT8, FP8 and NVFP4"):
        quantize(golden["llama"], mtq.MXFP4_DEFAULT_CFG, "gptq")
    with pytest.raises(ValueError, match="compat must be None or 'modelopt'"):
        quantize(golden["llama"], AWQ, compat="tensorrt")

@pytest.mark.parametrize("algorithm", ["max", "entropy", "smoothquant", "gptq", "local_hessian"])
def test_a_value_that_overflows_is_named_by_its_quantizer(golden, algorithm, tmp_path):
    """Infinity in one channel of one layer's inputs; a model that was quantized before is as it was then."""
    def overflow(tensors):
        tensors["model.layers.1.post_attention_layernorm.weight"][5] = 3e38
    model, ids = changed_source(golden["llama"], tmp_path / "input", overflow), golden["llama"].calib
    mtq.quantize(model, INT8_BEFORE, lambda model: model(ids[:1]))
    before = model(ids[:1, :4]).logits
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.\w+_proj.input_quantizer: NaN or infinity in the activations that reach it"):
        quantize(golden["llama"], mtq.INT8_DEFAULT_CFG, algorithm, model=model)
    assert sum(quantizer.enabled for quantizer in model.quantizers.values()) == 2
    np.testing.assert_array_equal(model(ids[:1, :4]).logits, before)
