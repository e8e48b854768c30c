"""Algorithms that follow each other, inputs of later layers, ranges from histograms, and weights that were rounded."""
import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from modelq.changed import ChangedCheckpoint
from modelq.export import export_hf_checkpoint

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


def found(model):
    enabled = {name: quantizer for name, quantizer in model.quantizers.items() if quantizer.enabled and quantizer.amax is not None}
    return {name: np.asarray(quantizer.amax) for name, quantizer in enabled.items()}


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
    alone = quantize(golden["llama"], config, {"method": algorithm, "layerwise": {"enable": True}}).quantizers
    for name, quantizer in plain.items():       # the order of work alone changes nothing, but for what local_hessian weighs weights by
        if algorithm == "local_hessian" and "weight" in name:
            continue
        np.testing.assert_array_equal(np.asarray(quantizer.amax, object), np.asarray(alone[name].amax, object), err_msg=name)


HEAD = [{"quantizer_name": f"lm_head.{side}_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True} for side in ("weight", "input")]


@QUIET
@pytest.mark.parametrize("algorithm", ["gptq", {"method": "local_hessian", "fp8_scale_sweep": False}])
@pytest.mark.parametrize("rules", [[], HEAD, [{"quantizer_name": "*layers.1.*", "enable": False}, *HEAD]])
def test_ranges_are_of_activations_that_are_not_quantized(golden, algorithm, rules):
    """As those of max, which comes first in the reference, though the search looks on while activations are quantized: behind a layer
    without quantizers and at lm_head, too."""
    config = {"quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], *rules]}
    plain, searched = (found(quantize(golden["llama"], config, step)) for step in ("max", algorithm))
    inputs = [name for name in plain if "input_quantizer" in name]
    assert len(inputs) == {0: 14, 2: 15, 3: 8}[len(rules)]
    for name in inputs:
        np.testing.assert_array_equal(searched[name], plain[name], err_msg=name)


@QUIET
def test_lm_head_is_rounded_by_inputs_that_are_quantized(golden):
    """What its Gram matrix is of: with and without the quantizer before it, rounding differs."""
    rules = [*mtq.INT8_DEFAULT_CFG["quant_cfg"], *HEAD]
    rounded = [quantize(golden["llama"], {"quant_cfg": [*rules, *more]}, "gptq").checkpoint.read("lm_head.weight")
               for more in ([], [{"quantizer_name": "lm_head.input_quantizer", "enable": False}])]
    assert not np.array_equal(*rounded)


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
    largest, entropy = (found(quantize(golden["llama"], mtq.INT8_DEFAULT_CFG, algorithm)) for algorithm in ("max", "entropy"))
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
    assert all(min(branch.down.shape[0], 128) == 128 for branch in whole.low_rank.values())
    assert error(whole, golden["llama"]) < 0.02      # nothing is left to quantize
