"""Calibrations that search, against what Model Optimizer found (tests/data/make_search_golden.py), from the same weights and tokens.

In float32 choices agree, and numbers to the last digits; where two candidates lose the same, either is right, and the losses say so. In
bfloat16 activations differ in their last bits already, so that maxima and means do, and with them what is made of them.
"""
import copy
import json
import warnings
from functools import cache

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from golden_data import SEARCH_ROOT, cases, read_safetensors
from modelq.calibration.smooth import alphas
from modelq.export import export_hf_checkpoint
from modelq.groups import siblings
from modelq.quantizers import stage_quantizers

INT4, LAYERWISE = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq", "layerwise": {"enable": True}}
OTHER_ALGORITHMS = {       # case: (preset, algorithm in the place of the preset's), as make_search_golden.py has them
    "INT4_AWQ_CLIP": ("INT4_AWQ_CFG", "awq_clip"), "INT4_AWQ_FULL": ("INT4_AWQ_CFG", "awq_full"),
    "INT8_SMOOTHQUANT_ALPHA_0.5": ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5}),
    "INT8_MSE": ("INT8_DEFAULT_CFG", "mse"), "INT4_MSE": (INT4, "mse"), "FP8_MSE": ("FP8_DEFAULT_CFG", "mse"), "INT4_GPTQ": (INT4, "gptq"),
    "INT8_GPTQ": ("INT8_WEIGHT_ONLY_CFG", "gptq"), "FP8_GPTQ": ("FP8_DEFAULT_CFG", "gptq"), "INT4_GPTQ_LAYERWISE": (INT4, LAYERWISE),
    "INT4_SVDQUANT": (INT4, {"method": "svdquant", "lowrank": 32})}
SEARCHING = ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_CLIP_CFG",
             "NVFP4_SVDQUANT_DEFAULT_CFG"]
FLOAT32 = [*cases("float32", SEARCHING, needs=["amax.safetensors"]), *cases("float32", needs=["amax.safetensors"], root=SEARCH_ROOT)]
EXPORTS = [case for case in cases("bfloat16", SEARCHING, needs=["model.safetensors"])
           + cases("bfloat16", needs=["model.safetensors"], root=SEARCH_ROOT) if "INT4_SVDQUANT" not in case.id]    # no engine reads that
FIELDS = {"amax": "amax", "pre_quant_scale": "pre_quant_scale", "bias_value": "bias", "global_amax": "global_amax"}

# How many of the maxima may be others, where each block chooses among many that are nearly as good.
TIES = {"NVFP4_FOUR_OVER_SIX_CFG": 1e-3, "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": 0.02, "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": 1e-3}


def config_of(name):
    preset, algorithm = OTHER_ALGORITHMS.get(name, (name, None))
    config = copy.deepcopy(getattr(mtq, preset))
    return config if algorithm is None else {**config, "algorithm": algorithm}


@cache
def calibrated(case):
    model = modelq.load(case.model.source, compute=case.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mtq.quantize(model, config_of(case.config), lambda model: [model(row[None]) for row in case.model.calib], compat="modelopt")


def found(model, name):
    """What we have under a name of the reference's; None for what belongs to no single quantizer."""
    quantizer, _, field = name.rpartition(".")
    if field not in FIELDS or "_shared_quant" in name:
        return None
    parent, _, stage = quantizer.rpartition(".")
    stages = stage_quantizers(model.quantizers[quantizer if quantizer in model.quantizers else parent])
    return np.asarray(getattr(stages[int(stage) if quantizer not in model.quantizers else 0], FIELDS[field]))


def best_is_another(losses, most=0.001):
    """Whether two exponents lose so nearly the same that either may be chosen."""
    least, second = np.sort(losses)[:2]
    return second / least - 1 <= most


def said_losses(case):
    """The reference's losses by linear and exponent, and its choice; SVDQuant's and awq_full's are those of awq_lite."""
    config = {"NVFP4_SVDQUANT_DEFAULT_CFG": "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_FULL_CFG": "NVFP4_AWQ_LITE_CFG",
              "INT4_AWQ_FULL": "INT4_AWQ_CFG"}.get(case.config, case.config)
    path = SEARCH_ROOT / case.model.name / case.dtype / config / "losses.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return {module: (np.array(list(words["losses"].values())), words["best_alpha"]) for module, words in said.items() if words["enabled"]}


# float32 ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", FLOAT32)
def test_what_was_found(case):
    model, compared, others, total = calibrated(case), 0, 0, 0
    for name, expected in case.amax.items():
        if (ours := found(model, name)) is None:
            continue
        difference = np.abs(ours.ravel() - expected.ravel()) / np.maximum(np.abs(expected.ravel()), 1e-30)
        compared += 1
        module = name.partition(".input_quantizer")[0].partition(".weight_quantizer")[0]
        if "weight_quantizer" in name and name.endswith(".amax") and case.config in TIES:
            others, total = others + (difference > 3e-6).sum(), total + difference.size
        elif difference.max() > 3e-6:
            assert best_is_another(model.search_losses[module]), (name, difference.max())
    assert compared >= 14
    assert others <= TIES.get(case.config, 0) * total


@pytest.mark.parametrize("case", [case for case in FLOAT32 if "AWQ" in case.id and "CLIP" not in case.id])
def test_every_linear_was_searched(case):
    """And takes the first of the best exponents."""
    model = calibrated(case)
    smoothed = {name.partition(".input_quantizer")[0] for name in case.amax if name.endswith("pre_quant_scale")}
    assert set(model.search_losses) == smoothed and smoothed
    assert all(losses.shape == (11,) and losses.dtype == np.float64 for losses in model.search_losses.values())


@pytest.mark.parametrize("case", [case for case in FLOAT32 if said_losses(case.values[0])])
def test_losses_of_every_exponent(case):
    """The reference's are means over outputs and tokens, added up over calls: ours but for one factor in each linear, and but for values
    in the middle of two codes."""
    model = calibrated(case)
    for module, (theirs, best) in said_losses(case).items():
        ours = model.search_losses[module]
        np.testing.assert_allclose(ours / ours.min(), theirs / theirs.min(), rtol=0.03 if "NVFP4" in case.config or "moe" in case.model.name else 5e-3)
        assert np.isclose(alphas(0.1)[np.argmin(ours)], best) or best_is_another(ours)


@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.values[0].has("weights.safetensors")])
def test_rounded_weights(case):
    """GPTQ: but for values in the middle of two numbers, and what they change behind them in their row."""
    model, different, total = calibrated(case), 0, 0
    for name, expected in read_safetensors(case.folder / "weights.safetensors").items():
        ours = model.checkpoint.read(name if name.endswith(".weight") else f"{name}.weight").astype(np.float32)
        different += (np.abs(ours - expected) > 1e-6 * np.abs(expected).max()).sum()
        total += expected.size
        assert np.mean(np.abs(model.checkpoint.original.read(name).astype(np.float32) - expected) > 1e-6) > 0.9
    assert total and different <= 0.003 * total


@pytest.mark.parametrize("case", [case for case in FLOAT32 if "SVDQUANT" in case.id and any(
    name.endswith("svdquant_lora_a") for name in case.values[0].amax)])
def test_branches_of_low_rank(case):
    model, compared = calibrated(case), 0
    for name, down in case.amax.items():
        if name.endswith("svdquant_lora_a"):
            branch = model.low_rank[name.partition(".weight_quantizer")[0]]
            expected = case.amax[name.replace("lora_a", "lora_b")] @ down
            np.testing.assert_allclose(branch.up @ branch.down, expected, atol=1e-4 * np.linalg.norm(expected))
            compared += 1
    assert compared


@pytest.mark.parametrize("case", [case for case in FLOAT32 if case.values[0].has("fake_logits.npy")])
def test_logits(case):
    """Four-bit activations that flip make others flip: then no nearer than what quantization does, but nearer."""
    ours, theirs = calibrated(case)(case.model.calib[:1]).logits, case.fake_logits
    plain = modelq.load(case.model.source, compute="float32")(case.model.calib[:1]).logits
    off, lost = (np.linalg.norm(logits - theirs) / np.linalg.norm(theirs) for logits in (ours, plain))
    assert off <= (0.8 * lost if "NVFP4" in case.config else 0.05), (off, lost)


# bfloat16 ---------------------------------------------------------------------------------------------------------------------

def quantization_of(folder):
    said = [json.loads((folder / "hf_quant_config.json").read_text())["quantization"],
            json.loads((folder / "config.json").read_text())["quantization_config"]]
    return [{key: value for key, value in words.items() if key != "producer"} for words in said]


# How much of each weight's codes are the reference's at least, and how far its scales are off at most (95% of them).
CODES = {"GPTQ": 0.5, "AWQ_FULL": 0.45, "AWQ": 0.85, "SMOOTHQUANT": 0.85, "SVDQUANT": 0.85, "HESSIAN": 0.85, "": 0.95}
SCALES = {"AWQ_FULL": 0.35, "AWQ_CLIP_CFG": 0.3, "SVDQUANT": 0.35, "": 0.06}


def of_kind(table, config):
    return next(value for words, value in table.items() if words in config)


@pytest.mark.parametrize("case", EXPORTS)
def test_exports(case, tmp_path):
    """Names, shapes, dtypes and words are the reference's; scales are near, and nearly all codes the same, where the same exponent wins."""
    model = calibrated(case)
    export_hf_checkpoint(model, tmp_path)
    assert quantization_of(tmp_path) == quantization_of(case.folder)
    ours, expected, codes = read_safetensors(tmp_path), case.exported, 0
    whole = len({name.split(".")[2] for name in expected if "layers" in name}) == model.num_layers      # the subset has parts of some
    assert ours.keys() == expected.keys() if whole else ours.keys() > expected.keys()
    others = other_exponents(case, model)
    for name, theirs in expected.items():
        assert ours[name].shape == theirs.shape and ours[name].dtype == theirs.dtype, name
        if name.rpartition(".")[0] in others or "svdquant_lora" in name or (others and "norm" in name):
            continue        # branches are unique but for a rotation between their halves
        if theirs.dtype.itemsize > 1:
            a, b = ours[name].astype(np.float32), theirs.astype(np.float32)
            assert np.quantile(np.abs(a - b) / (np.abs(b) + 1e-30), 0.95) <= of_kind(SCALES, case.config), name
        elif name.endswith(".weight"):
            assert np.mean(ours[name].view(np.uint8) == theirs.view(np.uint8)) >= of_kind(CODES, case.config), name
            codes += 1
    assert codes


def other_exponents(case, model):
    """Linears with whose siblings another exponent won than in the reference, as their mean scale shows: then the losses of two exponents
    of one of them are within 0.5% of each other there, as bfloat16 activations make them."""
    apart, suffix = set(), ".input_quantizer.pre_quant_scale"
    for rows in siblings(row for row in model.modules if row["kind"] == "linear"):
        names = [row["name"] for row in rows if row["name"] + suffix in case.amax and row["name"] in model.search_losses]
        if not names:
            continue        # not searched
        theirs = np.mean([case.amax[name + suffix] for name in names], axis=0)
        ours = np.mean([model.quantizers[f"{name}.input_quantizer"].pre_quant_scale for name in names], axis=0)
        if np.median(np.abs(ours / theirs - 1)) > 0.01:
            assert any(best_is_another(said_losses(case)[name][0], most=0.005) for name in names), names
            apart.update(names)
    return apart


@pytest.mark.parametrize("case", EXPORTS)
def test_siblings_share_their_scale(case, tmp_path):
    """q, k, v and gate, up are stored with one pre_quant_scale or none, which is then in the norm before; experts have none."""
    model = calibrated(case)
    export_hf_checkpoint(model, tmp_path)
    tensors = read_safetensors(tmp_path)
    for rows in siblings(row for row in model.modules if row["kind"] == "linear"):
        scales = [tensors.get(f"{row['name']}.pre_quant_scale") for row in rows]
        assert all(scale is None for scale in scales) or all(np.array_equal(scale, scales[0]) for scale in scales)
        if rows[0]["expert"] is not None:
            assert scales[0] is None
