"""Exports after calibrations that search, against what Model Optimizer exported (tests/data/make_search_golden.py), in bfloat16.

Activations differ in their last bits already, so that maxima, means and Gram matrices do, and with them what is made of them: scales are
near, and most codes the same. Names, shapes, dtypes and words are the reference's.
"""
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from golden_data import read_safetensors, search_cases, search_losses, search_model
from modelq.export import export_hf_checkpoint
from modelq.groups import siblings

EXPORTS = [case for case in search_cases("bfloat16", ["model.safetensors"]) if "INT4_SVDQUANT" not in case.id]    # no engine reads that
SCALE, PRE = ".weight_scale", ".pre_quant_scale"

SMOOTHING = ("SMOOTHQUANT", "AWQ_CFG", "AWQ_LITE", "AWQ_FULL", "AWQ_BETA", "SVDQUANT")

# By words of a config's name: how many blocks have the reference's scale within NEAR, in all and in the worst of weights; of the codes in
# these blocks, how many are the reference's, and how many at most a step off. GPTQ adds up what differs along a row; awq_full clips
# siblings by the scale that they share in an export, the reference by each one's own: other blocks' scales are theirs (in "INT4_AWQ_FULL").
NEAR = 0.035
BLOCKS = {"INT4_AWQ_FULL": (0.95, 0.9), "NVFP4_AWQ_FULL": (0.65, 0.2), "NVFP4_AWQ_CLIP": (0.97, 0.55), "NVFP4_AWQ_LITE": (0.95, 0.88),
          "SVDQUANT": (0.9, 0.85), "HESSIAN": (0.93, 0.85), "INT4_AWQ_CLIP": (0.985, 0.96), "4": (0.999, 0.99), "": (1, 1)}
CODES = {"FP8_GPTQ": (0.8, 0.65), "LAYERWISE": (0.88, 0.65), "GPTQ": (0.97, 0.88), "SMOOTHQUANT": (0.92, 0.84), "NVFP4_AWQ": (0.965, 0.94),
         "SVDQUANT": (0.96, 0.94), "AWQ": (0.995, 0.98), "": (1, 1)}
A_STEP_OFF = {"FP8_GPTQ": (0.95, 0.88), "LAYERWISE": (0.99, 0.95), "GPTQ": (0.998, 0.99), "SMOOTHQUANT": (0.998, 0.99), "": (1, 1)}
INPUTS = {"SVDQUANT": 0.3, "": 0.02}       # SVDQuant: ours are of inputs by the scale that is stated, there by each linear's own


def of_config(table, config):
    return next(value for words, value in table.items() if words in config)


@cache
def exported(case):
    """(tensors, hf_quant_config's quantization, config's quantization_config) of our export."""
    with TemporaryDirectory() as folder:
        export_hf_checkpoint(search_model(case), folder)
        return read_safetensors(folder), *words_of(folder)


def words_of(folder):
    said = [json.loads((Path(folder) / "hf_quant_config.json").read_text())["quantization"],
            json.loads((Path(folder) / "config.json").read_text())["quantization_config"]]
    return [{key: value for key, value in words.items() if key != "producer"} for words in said]


def linears(model):
    return [row for row in model.modules if row["kind"] == "linear"]


def with_another_exponent(case):
    """{linear: by what part it loses more with the exponent that the reference took than with ours}, by our losses or the reference's,
    whichever see less of a difference; where they are the same exponent the linear is left out."""
    model, found = search_model(case), {}
    for name, (theirs, best) in search_losses(case).items():
        ours = model.search_losses.get(name)
        if ours is not None and (taken := int(np.argmin(ours))) != best:
            found[name] = min(ours[best] / ours[taken], theirs[taken] / theirs[best]) - 1
    return found


def changed_with(case, names):
    """The linears whose weights follow these exponents: siblings share a scale, and what has none beside it has it in the rows of the
    linear before."""
    changed = {row["name"] for rows in siblings(linears(search_model(case))) if {row["name"] for row in rows} & set(names) for row in rows}
    for name in list(changed):
        parent, _, last = name.rpartition(".")
        before = {"down_proj": ("gate_proj", "up_proj"), "o_proj": ("v_proj",)}.get(last, ())
        changed.update(f"{parent}.{other}" for other in before if name + PRE not in exported(case)[0])
    return changed


def levels(codes, scheme):
    """[out, in]: codes as whole numbers in the order of their values."""
    if codes.dtype.name == "float8_e4m3fn" or scheme == "NVFP4":
        byte = codes.view(np.uint8)
        if scheme == "NVFP4":
            byte = np.stack([byte & 15, byte >> 4], axis=-1).reshape(len(codes), -1)
        sign = 8 if scheme == "NVFP4" else 128
        return np.where(byte & sign, -1, 1) * (byte & (sign - 1)).astype(int)
    if codes.dtype == np.int8:
        return codes.astype(int)
    pairs = np.stack([codes & 15, codes >> 4], axis=1).reshape(2 * len(codes), -1).astype(int)      # of two rows
    return np.where(pairs > 7, pairs - 16, pairs)


def weight_of(tensors, module, config):
    """(levels [out, in], scales that broadcast to it)."""
    found = levels(tensors[f"{module}.weight"], config.partition("_")[0])
    scale = tensors[module + SCALE].astype(np.float64)
    if config.startswith("NVFP4"):
        scale = scale * tensors[module + ".weight_scale_2"]
    scale = scale.reshape(len(found), -1) if scale.size > 1 else scale.reshape(1, 1)
    return found, np.repeat(scale, found.shape[1] // scale.shape[1], axis=1)


@pytest.mark.parametrize("case", EXPORTS)
def test_names_and_words(case):
    ours, *words = exported(case)
    assert words == words_of(case.folder)
    whole = len({name.split(".")[2] for name in case.exported if "layers" in name}) == search_model(case).num_layers
    assert ours.keys() == case.exported.keys() if whole else ours.keys() > case.exported.keys()      # the subset has parts of some
    assert {name: (ours[name].shape, ours[name].dtype) for name in case.exported} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in case.exported.items()}


@pytest.mark.parametrize("case", [case for case in EXPORTS if search_losses(case.values[0])])
def test_exponents(case):
    """Of the few linears for which another exponent wins, that costs next to nothing."""
    others = with_another_exponent(case)
    assert len(others) <= 1 and all(cost <= 0.005 for cost in others.values()), others
    assert set(search_losses(case)) == set(search_model(case).search_losses)


@pytest.mark.parametrize("case", EXPORTS)
def test_codes(case):
    ours, changed, found = exported(case)[0], changed_with(case, with_another_exponent(case)), []
    for module in {name.removesuffix(SCALE) for name in case.exported if name.endswith(SCALE)} - changed:
        (codes, scales), (expected, theirs) = (weight_of(tensors, module, case.config) for tensors in (ours, case.exported))
        near, steps = np.broadcast_to(np.abs(scales - theirs) <= NEAR * theirs, codes.shape), np.abs(codes - expected)
        clipped_apart = case.config == "INT4_AWQ_FULL" and not module.endswith(("o_proj", "down_proj"))
        found.append([1 if clipped_apart else near.mean(), (steps[near] == 0).mean(), (steps[near] <= 1).mean()])
    assert len(found) >= 3
    for shares, table in zip(np.array(found).T, (BLOCKS, CODES, A_STEP_OFF)):
        in_all, worst = of_config(table, case.config)
        assert shares.mean() >= in_all and shares.min() >= worst, (shares.mean(), shares.min())


@pytest.mark.parametrize("case", EXPORTS)
def test_scales(case):
    """Of inputs, norms that hold smoothing scales, and what is not quantized."""
    ours, compared = exported(case)[0], 0
    changed = {name.rpartition(".")[0] for name in changed_with(case, with_another_exponent(case))}
    norms = {name.replace(".self_attn", ".input_layernorm").replace(".mlp", ".post_attention_layernorm") for name in changed}
    for name, expected in case.exported.items():
        module, _, part = name.rpartition(".")
        if module.rpartition(".")[0] in changed or module in norms or "lora" in part or part.startswith("weight_scale"):
            continue
        if part == "weight" and module + SCALE in case.exported:
            continue        # test_codes
        most = of_config(INPUTS, case.config) if part == "input_scale" else NEAR
        smoothed = part in ("pre_quant_scale", "input_scale") or "AWQ" in case.config
        np.testing.assert_allclose(ours[name].astype(np.float32), expected.astype(np.float32), rtol=most if smoothed else 0, err_msg=name)
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("case", [case for case in EXPORTS if "SVDQUANT" in case.id])
def test_branches_of_low_rank(case):
    """Halves are unique but for a rotation between them: their product."""
    ours, compared = exported(case)[0], 0
    changed = changed_with(case, with_another_exponent(case))
    for name in case.exported:
        if name.endswith("lora_a") and name.partition(".weight_quantizer")[0] not in changed:
            product, expected = (tensors[name.replace("lora_a", "lora_b")].astype(np.float32) @ tensors[name].astype(np.float32)
                                 for tensors in (ours, case.exported))
            assert np.linalg.norm(product - expected) <= 0.03 * np.linalg.norm(expected), name
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("case", [case for case in EXPORTS if any(word in case.id for word in SMOOTHING)])
def test_siblings_share_their_scale(case):
    """q, k, v and gate, up are stored with one pre_quant_scale, or with none, as the norm before has it; experts have none."""
    ours, smoothed = exported(case)[0], 0
    for rows in siblings(linears(search_model(case))):
        scales = [ours.get(row["name"] + PRE) for row in rows]
        assert all(scale is None for scale in scales) or all(np.array_equal(scale, scales[0]) for scale in scales)
        assert rows[0]["expert"] is None or scales[0] is None
        smoothed += scales[0] is not None
    assert smoothed
