"""Calibrations that search, against what Model Optimizer found (tests/data/make_search_golden.py), from the same weights and tokens.

In float32 choices agree, and numbers to the last digits. Where two candidates come out the same but for a last bit, either is right, and
the tests show that they do. What becomes of all this in an export: tests/test_search_exports.py.
"""
import ml_dtypes
import numpy as np
import pytest

from golden_data import read_safetensors, search_cases, search_losses, search_model
from modelq.experts import place_of
from modelq.quantizers import stage_quantizers

FLOAT32 = search_cases("float32", ["amax.safetensors"])
LITE = [case for case in FLOAT32 if any(word in case.id for word in ("AWQ_CFG", "AWQ_LITE", "AWQ_FULL", "AWQ_BETA", "SVDQUANT"))]
FIELDS = {"amax": "amax", "pre_quant_scale": "pre_quant_scale", "bias_value": "bias", "global_amax": "global_amax"}
NO_QUANTIZER_HAS = ("svdquant_lora_a", "svdquant_lora_b")
LAST_DIGITS = 5e-6
FP4_MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
FP8 = np.arange(1, 127).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
FP8_MIDDLES = (FP8[1:] + FP8[:-1]) / 2

# How many blocks of 16 may have another maximum: where a value or a scale is in the middle of two numbers, so that the last bit decides.
TIES = {"NVFP4_FOUR_OVER_SIX_CFG": 0.001, "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": 0.015, "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": 0.001}


def quantizer_of(model, name):
    """The quantizer, or stage of one, that the reference calls so."""
    if name in model.quantizers:
        return stage_quantizers(model.quantizers[name])[0]
    parent, _, stage = name.rpartition(".")
    return stage_quantizers(model.quantizers[parent])[int(stage)]


def off(ours, theirs):
    """By what part, element by element."""
    ours, theirs = (np.asarray(values, np.float64).ravel() for values in (ours, theirs))
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-30)


def another_is_as_good(model, case, module):
    """Whether the reference took another exponent (or may have, where its losses are not there: the second best) that loses no more."""
    ours, said = model.search_losses[module], search_losses(case).get(module)
    other = said[1] if said else np.argsort(ours)[1]
    return other != np.argmin(ours) and ours[other] / ours.min() - 1 <= 0.001


# What was found ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", FLOAT32)
def test_every_number(case):
    model, compared = search_model(case), 0
    for name, theirs in case.amax.items():
        quantizer, _, field = name.rpartition(".")
        if field in NO_QUANTIZER_HAS or "_shared_quant" in name or (case.config in TIES and "weight_quantizer" in name and field == "amax"):
            continue
        apart = off(getattr(quantizer_of(model, quantizer), FIELDS[field]), theirs).max(initial=0)
        module = quantizer.removesuffix(".0").removesuffix(".1").rpartition(".")[0]
        assert apart <= LAST_DIGITS or module in model.search_losses and another_is_as_good(model, case, module), (name, apart)
        compared += 1
    assert compared >= 14


@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.values[0].config in TIES])
def test_every_block(case):
    """Those with another maximum are ties."""
    model, weights, others, total = search_model(case), weights_by_quantizer(search_model(case)), 0, 0
    for name, theirs in case.amax.items():
        quantizer, _, field = name.rpartition(".")
        if "weight_quantizer" in name and field == "amax":
            ours, theirs = quantizer_of(model, quantizer).amax.ravel(), theirs.ravel()
            where = off(ours, theirs) > LAST_DIGITS
            blocks = weights[quantizer].astype(np.float64).reshape(-1, 16)[where]
            assert is_tie(case.config, blocks, ours[where], theirs[where], quantizer_of(model, quantizer)).all(), name
            others, total = others + where.sum(), total + where.size
    assert total >= 18432 and others <= TIES[case.config] * total


def weights_by_quantizer(model):
    """Experts that share a quantizer are one weight."""
    found = {}
    for row in model.modules:
        if row["kind"] == "linear":
            found.setdefault(place_of(model, f"{row['name']}.weight_quantizer").name, []).append(model.checkpoint.read(row["weight"]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def is_tie(config, blocks, ours, theirs, quantizer):
    """By block. What decides: in a plain sweep both lose the same; in four over six the candidate's scale is in the middle of two FP8
    numbers; weighed by a Hessian, in which direction a value in the middle of two FP4 numbers is off."""
    if "SWEEP" in config:
        ours, theirs = (np.square(blocks - nearest_fp4(blocks, amax)).sum(axis=1) for amax in (ours, theirs))
        return np.abs(ours / theirs - 1) <= 1e-6
    if "FOUR" in config:
        second = float(quantizer.global_amax) / quantizer.second_divisor
        return np.any([in_the_middle(amax / 6.0 / second, FP8_MIDDLES) for amax in (ours, theirs)], axis=0)
    return np.any([in_the_middle(blocks / (amax[:, None] / 6.0), FP4_MIDDLES).any(axis=1) for amax in (ours, theirs)], axis=0)


def in_the_middle(values, middles):
    return (np.abs(np.abs(values)[..., None] / middles - 1) <= 1e-6).any(axis=-1)


def nearest_fp4(blocks, amax):
    scale = amax[:, None] / 6.0
    return np.sign(blocks) * np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[np.searchsorted(FP4_MIDDLES, np.abs(blocks) / scale)] * scale


# AWQ --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", LITE)
def test_every_linear_is_searched(case):
    model = search_model(case)
    smoothed = {name.partition(".input_quantizer")[0] for name in case.amax if name.endswith("pre_quant_scale")}
    assert set(model.search_losses) == smoothed and len(smoothed) >= 8
    assert all(losses.shape == (11,) and losses.dtype == np.float64 for losses in model.search_losses.values())


@pytest.mark.parametrize("case", [case for case in LITE if search_losses(case.values[0])])
def test_losses_of_every_exponent(case):
    """The reference's are means over outputs and the 64 tokens of a call, ours sums. A value in the middle of two codes makes some differ.
    Experts before a linear are quantized during the reference's search, not during ours."""
    model, ratios = search_model(case), []
    rows = {row["name"]: row["shape"][0] for row in model.modules}
    for module, (theirs, best) in search_losses(case).items():
        ours, behind_experts = model.search_losses[module], "moe" in case.model.name and "layers.0." not in module
        ratio = ours / (theirs * rows[module] * case.model.calib.shape[1])
        np.testing.assert_allclose(ratio, 1, rtol=0.04 if behind_experts else 0.015, err_msg=module)
        ratios += [] if behind_experts else [ratio]
        assert np.argmin(ours) == best or another_is_as_good(model, case, module), module
    assert np.mean(np.abs(np.array(ratios) - 1) <= 1e-5) >= 0.85


# GPTQ, SVDQuant ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.values[0].has("weights.safetensors")])
def test_rounded_weights(case):
    """But for values in the middle of two numbers, and what they change behind them in their row."""
    model, different, total = search_model(case), 0, 0
    for name, expected in read_safetensors(case.folder / "weights.safetensors").items():
        ours, before = (store.read(name).astype(np.float32) for store in (model.checkpoint, model.checkpoint.original))
        different, total = different + (off(ours, expected) > 1e-6).sum(), total + expected.size
        assert np.mean(off(before, expected) > 1e-6) > 0.9, name
    assert total >= 16384 and different <= 0.003 * total


@pytest.mark.parametrize("case", [case for case in FLOAT32 if "SVDQUANT" in case.id and any(
    name.endswith("svdquant_lora_a") for name in case.values[0].amax)])
def test_branches_of_low_rank(case):
    """Halves are unique but for a rotation between them: their product."""
    model, compared = search_model(case), 0
    for name, down in case.amax.items():
        if name.endswith("svdquant_lora_a"):
            branch, expected = model.low_rank[name.partition(".weight_quantizer")[0]], case.amax[name.replace("lora_a", "lora_b")] @ down
            assert branch.down.shape == down.shape
            assert np.linalg.norm(branch.up @ branch.down - expected) <= 1e-5 * np.linalg.norm(expected), name
            compared += 1
    assert compared == len(model.low_rank) >= 8


# What comes out ---------------------------------------------------------------------------------------------------------------

# Of the logits, in their norm. Where no inputs are quantized, in all digits; an input in the middle of two codes, or a weight that GPTQ
# rounds to another, makes other inputs flip behind it. With four-bit inputs that goes on, to a part of what quantization does.
LOGITS = {"INT4_AWQ": 1e-5, "INT4_MSE": 1e-5, "INT4_SVDQUANT": 0.005, "INT8": 0.015, "W4A8": 0.03, "": 0.06}
OF_WHAT_IS_LOST = {"FOUR_OVER_SIX": 0.85, "NVFP4": 0.65}


@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.values[0].has("fake_logits.npy")])
def test_logits(case):
    ours, theirs = np.asarray(search_model(case)(case.model.calib[:1]).logits), case.fake_logits
    apart, lost = (np.linalg.norm(logits - theirs) / np.linalg.norm(theirs) for logits in (ours, case.model.logits))
    part = next((value for words, value in OF_WHAT_IS_LOST.items() if words in case.config), 1)
    most = part * lost if part < 1 else next(value for words, value in LOGITS.items() if words in case.config)
    assert apart <= most < lost, (apart, lost)
