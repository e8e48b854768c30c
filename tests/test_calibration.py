"""Algorithms that follow each other, ranges from histograms, weights that were rounded, and input that is not good."""
import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

import modelq
import modelq.quantization as mtq
from golden_data import read_safetensors
from modelq.changed import ChangedCheckpoint
from modelq.export import export_hf_checkpoint
from modelq.summary import summary_lines

INT4 = mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG
AWQ = mtq.INT4_AWQ_CFG
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")     # few tokens: singular Gram matrices
UP = "model.layers.1.mlp.up_proj"


def load(source):
    return modelq.load(source, compute="bfloat16")


def quantize(golden_model, config, algorithm=None, tokens=None, model=None, **options):
    model = model or load(golden_model.source)
    tokens = golden_model.calib if tokens is None else tokens
    config = config if algorithm is None else {**config, "algorithm": algorithm}
    return mtq.quantize(model, config, lambda model: [model(row[None]) for row in tokens], **options)


def error(model, golden_model):
    plain = load(golden_model.source)(golden_model.calib[:2]).logits
    return np.linalg.norm(model(golden_model.calib[:2]).logits - plain) / np.linalg.norm(plain)


def changed_source(golden_model, folder, change):
    """A copy of the checkpoint with other tensors."""
    shutil.copytree(golden_model.source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: np.array(tensor) for name, tensor in read_safetensors(golden_model.source).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return load(folder)


def found(model):
    return {name: np.asarray(quantizer.amax) for name, quantizer in model.quantizers.items() if quantizer.enabled and quantizer.amax is not None}


def untouched(model):
    assert not model.quantized and not model.quantizers and not isinstance(model.checkpoint, ChangedCheckpoint)


# One after the other --------------------------------------------------------------------------------------------------------

def test_clipping_after_smoothing_is_awq_full(golden):
    """But for the dtype that clipped maxima are rounded to: bfloat16 in awq_clip, float32 in awq_full, as in the reference."""
    both, full = quantize(golden["llama"], AWQ, ["awq_lite", "awq_clip"]), quantize(golden["llama"], AWQ, "awq_full")
    for name in full.quantizers:
        a, b = both.quantizers[name], full.quantizers[name]
        if a.pre_quant_scale is not None:
            np.testing.assert_array_equal(a.pre_quant_scale, b.pre_quant_scale)
        if a.enabled:
            assert np.mean(np.isclose(a.amax, b.amax, rtol=2 ** -8)) > 0.75, name       # the same ratio,
            assert np.mean(np.isclose(a.amax, b.amax, rtol=0.12)) > 0.9, name              # or the next one
    assert both.search_losses.keys() == full.search_losses.keys()


@QUIET
@pytest.mark.parametrize("preset", ["INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG"])
def test_rounding_after_smoothing(golden, preset):
    config = getattr(mtq, preset)
    nearest = error(quantize(golden["llama"], config, "max"), golden["llama"])
    smoothed = quantize(golden["llama"], config, ["awq_lite", config["algorithm"]])
    assert error(smoothed, golden["llama"]) < nearest
    assert len(smoothed.checkpoint.changed) == 14


@QUIET
def test_what_was_rounded_is_not_smoothed(golden):
    model = load(golden["llama"].source)
    with pytest.raises(ValueError, match=r"self_attn.q_proj: awq_lite: gptq has rounded its weight already"):
        quantize(golden["llama"], mtq.INT4_GPTQ_CFG, ["gptq", "awq_lite"], model=model)
    untouched(model)


@QUIET
@pytest.mark.parametrize("algorithm", ["max", "mse", "awq_lite", "smoothquant", "local_hessian"])
def test_layer_by_layer(golden, algorithm):
    """Inputs are what quantized layers make; so later layers find other ranges, and the first the same."""
    config = {"smoothquant": mtq.INT8_SMOOTHQUANT_CFG, "awq_lite": mtq.W4A8_AWQ_BETA_CFG}.get(algorithm, mtq.INT8_DEFAULT_CFG)
    layerwise = {"enable": True, "get_qdq_activations_from_prev_layer": True}
    plain = quantize(golden["llama"], config, algorithm).quantizers
    staged = quantize(golden["llama"], config, {"method": algorithm, "layerwise": layerwise}).quantizers
    field = "pre_quant_scale" if algorithm == "smoothquant" else "amax"
    first, second = ([getattr(model[f"model.layers.{layer}.self_attn.q_proj.input_quantizer"], field) for model in (plain, staged)]
                     for layer in (0, 1))
    np.testing.assert_array_equal(*first)
    assert not np.array_equal(*second)
    np.testing.assert_allclose(*second, rtol=0.5)


# Ranges from histograms ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
@pytest.mark.parametrize("method", ["entropy", "percentile", "mse"])
def test_histograms(golden, preset, method):
    config = getattr(mtq, preset)
    if (preset, method) == ("FP8_DEFAULT_CFG", "entropy"):
        with pytest.raises(ValueError, match="q_proj.input_quantizer: entropy compares a histogram with the equal steps of integers"):
            quantize(golden["llama"], config, method)
        return
    largest = found(quantize(golden["llama"], config))
    ranges = found(quantize(golden["llama"], config, {"method": "histogram", "range_method": method, "percentile": 99.0}))
    inputs = [name for name in ranges if "input_quantizer" in name]
    assert len(inputs) == 14 and all(0 < ranges[name] <= largest[name] * 1.001 for name in inputs)
    assert sum(ranges[name] < 0.99 * largest[name] for name in inputs) >= (0 if (preset, method) == ("FP8_DEFAULT_CFG", "mse") else 10)
    for name in set(ranges) - set(inputs):
        np.testing.assert_array_equal(ranges[name], largest[name])      # weights keep their maxima


def test_a_quantizer_may_ask_for_a_histogram_itself(golden):
    """As in Model Optimizer: calibrator "histogram"; the others keep their maxima."""
    rules = [*mtq.INT8_DEFAULT_CFG["quant_cfg"], {"quantizer_name": "*mlp.up_proj.input_quantizer", "cfg": {
        "num_bits": 8, "axis": None, "calibrator": "histogram"}}]
    mixed = found(quantize(golden["llama"], {"quant_cfg": rules, "algorithm": "max"}))
    largest, entropy = found(quantize(golden["llama"], mtq.INT8_DEFAULT_CFG)), found(quantize(golden["llama"], mtq.INT8_DEFAULT_CFG, "entropy"))
    for name in mixed:
        np.testing.assert_array_equal(mixed[name], (entropy if "up_proj.input" in name else largest)[name])


# Weights that were rounded ----------------------------------------------------------------------------------------------------

@QUIET
@pytest.mark.parametrize("preset", ["INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG"])
def test_an_export_holds_the_rounded_weights(golden, preset, tmp_path):
    model = quantize(golden["llama"], getattr(mtq, preset))
    export_hf_checkpoint(model, tmp_path)
    opened = load(tmp_path)
    np.testing.assert_array_equal(opened(golden["llama"].calib[:1]).logits, model(golden["llama"].calib[:1]).logits)
    np.testing.assert_array_equal(opened.checkpoint.read(f"{UP}.weight"), model.checkpoint.read(f"{UP}.weight"))
    assert not np.array_equal(opened.checkpoint.read(f"{UP}.weight"), quantize(golden["llama"], INT4).checkpoint.read(f"{UP}.weight"))


@QUIET
def test_quantizing_again_starts_from_the_original(golden):
    model, ids = load(golden["llama"].source), golden["llama"].calib[:1]
    first = quantize(golden["llama"], mtq.INT4_GPTQ_CFG, model=model)(ids).logits
    original = model.checkpoint.original.read(f"{UP}.weight")
    assert not np.array_equal(model.checkpoint.read(f"{UP}.weight"), original)
    again = quantize(golden["llama"], mtq.INT4_GPTQ_CFG, model=model)(ids).logits
    np.testing.assert_array_equal(first, again)
    plain = quantize(golden["llama"], INT4, model=model)
    np.testing.assert_array_equal(plain.checkpoint.read(f"{UP}.weight"), original)
    np.testing.assert_array_equal(plain(ids).logits, quantize(golden["llama"], INT4)(ids).logits)


@QUIET
def test_a_second_algorithm_that_fails_leaves_the_first(golden):
    """calibrate() on a quantized model: everything is as before if it raises."""
    model, ids = quantize(golden["llama"], mtq.INT4_GPTQ_CFG), golden["llama"].calib[:1]
    before = model(ids).logits

    def breaks(model):
        raise RuntimeError("no more data")
    for algorithm in ("awq_clip", "gptq"):
        with pytest.raises(RuntimeError, match="no more data"):
            mtq.calibrate(model, algorithm, breaks)
        np.testing.assert_array_equal(model(ids).logits, before)


def test_svdquant_goes_all_the_way(golden, tmp_path):
    model, ids = quantize(golden["llama"], mtq.NVFP4_SVDQUANT_DEFAULT_CFG), golden["llama"].calib[:1]
    assert error(model, golden["llama"]) < error(quantize(golden["llama"], mtq.NVFP4_AWQ_LITE_CFG), golden["llama"])
    export_hf_checkpoint(model, tmp_path)
    np.testing.assert_array_equal(load(tmp_path)(ids).logits, model(ids).logits)
    kept = quantize(golden["llama"], mtq.NVFP4_SVDQUANT_DEFAULT_CFG, {"method": "svdquant", "lowrank": 4, "skip_layers": ["*layers.0.*"]})
    assert all(name.startswith("model.layers.1.") and branch.down.shape[0] == 4 for name, branch in kept.low_rank.items())
    whole = quantize(golden["llama"], mtq.NVFP4_SVDQUANT_DEFAULT_CFG, {"method": "svdquant", "lowrank": 4096})
    assert np.isfinite(whole(ids).logits).all()


# Input that is not good -------------------------------------------------------------------------------------------------------

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
    ("INT8_SMOOTHQUANT_CFG", None), ("INT4_AWQ_CFG", None), ("INT4_AWQ_CFG", "awq_full"), ("NVFP4_AWQ_LITE_CFG", None), ("INT4_GPTQ_CFG", None),
    ("NVFP4_GPTQ_CFG", None), ("NVFP4_SVDQUANT_DEFAULT_CFG", None), ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", None)])
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
        tensors["model.layers.0.mlp.gate.weight"][2] = -100 * np.sign(tensors["model.layers.0.mlp.gate.weight"][0].astype(np.float32))
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


# From the command line ----------------------------------------------------------------------------------------------------------

def test_command_line(tiny_checkpoint, tmp_path, capsys):
    """Formats by short names, a block size, a folder for progress."""
    from modelq.cli import main

    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 40)
    arguments = ["quantize", str(tiny_checkpoint), "--samples", "4", "--seq-len", "64", "--out", str(tmp_path / "out"), "--format", "int4_awq", "--block-size", "32",
                 "--calib", str(text), "--checkpoint-dir", str(tmp_path / "progress")]
    assert main(arguments) == 0, capsys.readouterr()
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "W4A16_AWQ" and said["group_size"] == 32
    assert (tmp_path / "progress" / "manifest.json").exists()
