"""What changes weights before they are quantized, on every family: rotations, smoothing, branches of low rank. Where a family's algebra
does not allow it, it is refused by name."""
import copy

import numpy as np
import pytest

import micro_models
import modelq
import modelq._core as core
import modelq.quantization as mtq
from micro_models import MODELS, build, inputs, save
from modelq.export import export_hf_checkpoint
from modelq.rotation import RotatedCheckpoint

NAMES = [name for name in MODELS if name.split()[0] not in ("llama",)]
NORMS_BEHIND = ("olmo2", "gemma2", "gemma3")
OWN_KINDS = {"phi3": "qkv_proj", "deepseek": "kv_b_proj"}       # where the rows of values are, if not in v_proj


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return request.param, save(build(request.param), tmp_path_factory.mktemp("model") / "source")


def rotated(folder, **options):
    model = modelq.load(folder, compute="float32")
    model.take(RotatedCheckpoint(model, **options), "float32")
    return model


def alone(model):
    """Names of linears that are no experts'."""
    return [row["name"] for row in model.modules if row["kind"] == "linear" and row["expert"] is None]


@pytest.mark.parametrize("options", [{}, {"values": False}, {"residual": False}], ids=["both", "residual", "values"])
def test_a_rotated_model_computes_what_it_did(case, options):
    """Through fused linears, latent vectors, biases, experts shared or in stacks, sinks, multipliers; with padding."""
    name, folder = case
    ids, left, _ = inputs()
    plain = modelq.load(folder, compute="float32")
    if name.startswith(NORMS_BEHIND) and options.get("residual", True):
        with pytest.raises(ValueError, match=f"rotate: a model of the family {name.split()[0]} has norms of what is added to its residual"):
            rotated(folder, **options)
        return
    model, seen = rotated(folder, **options), left.astype(bool)
    expected = plain(ids, attention_mask=left).logits[seen]
    np.testing.assert_allclose(model(ids, attention_mask=left).logits[seen], expected, rtol=0, atol=2e-5 * np.abs(expected).max() + 1e-5)
    changed = [row["name"] for row in plain.modules if row["kind"] in ("linear", "router", "embedding")
               and not np.array_equal(model.checkpoint.read(row["weight"]), plain.checkpoint.read(row["weight"]))]
    values = next((kind for family, kind in OWN_KINDS.items() if name.startswith(family)), "v_proj")
    if not options.get("residual", True):
        assert {module.rpartition(".")[2] for module in changed} == {values, "o_proj"}
    else:
        untouched = {row["name"].rpartition(".")[2] for row in plain.modules if row["kind"] in ("linear", "router")} - \
            {module.rpartition(".")[2] for module in changed}
        assert untouched <= {"q_b_proj", "kv_b_proj"}       # behind norms of their own


def test_a_rotated_model_is_written(case, tmp_path):
    name, folder = case
    if name.startswith(NORMS_BEHIND):
        pytest.skip("refused")
    model, (ids, _, _) = modelq.load(folder, compute="bfloat16"), inputs()
    plain = model(ids).logits
    mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": ["rotate", "max"]}, lambda model: model(ids))
    simulated = model(ids).logits
    assert 0 < np.linalg.norm(simulated - plain) < 0.3 * np.linalg.norm(plain)
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    again = modelq.load(tmp_path / "export", compute="bfloat16")(ids).logits
    assert np.linalg.norm(again - simulated) < 0.03 * np.linalg.norm(simulated)


@pytest.mark.parametrize("name", ["phi3", "granitemoe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_model_in_torch_is_rotated(name):
    """Fused and latent linears, stacks of experts, a vector that corrects a router: in the user's process. One linear is INT8."""
    import torch
    theirs, ids = build(name), torch.from_numpy(inputs()[0])
    with torch.no_grad():
        plain = theirs(ids).logits
    first = {"quantizer_name": "*layers.0.self_attn.o_proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
    before = theirs.model.layers[1].self_attn.o_proj.weight.clone()
    mtq.quantize(theirs, {"quant_cfg": [{"quantizer_name": "*", "enable": False}, first], "algorithm": ["rotate", "max"]},
                 lambda model: model(ids))
    with torch.no_grad():
        assert (theirs(ids).logits - plain).norm() < 0.05 * plain.norm()
    assert (theirs.model.layers[1].self_attn.o_proj.weight - before).norm() > 0.5 * before.norm()


def test_smoothing_reaches_every_linear_outside_experts(case):
    """The product is the same while nothing is quantized; with INT8 it is near. Also behind the norms of latent vectors."""
    _, folder = case
    model, (ids, _, right) = modelq.load(folder, compute="float32"), inputs()
    plain = model(ids).logits
    mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, lambda model: model(ids, attention_mask=right))
    smoothed = [name for name in alone(model) if model.quantizers[f"{name}.input_quantizer"].pre_quant_scale is not None]
    assert smoothed == [name for name in alone(model) if name != "lm_head"]
    assert 0 < np.linalg.norm(model(ids).logits - plain) < 0.25 * np.linalg.norm(plain)
    with model.simulating(weights=False, activations=False):
        assert np.linalg.norm(model(ids).logits - plain) < 1e-4 * np.linalg.norm(plain)


def with_sizes_of_16(name):
    kind, arguments = MODELS[name]
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 32, "v_head_dim": 16}
    return kind, arguments | {key: size for key, size in sizes.items() if arguments.get(key)}


@pytest.mark.parametrize("name", dict.fromkeys(name.split()[0] for name in NAMES))
def test_branches_of_low_rank_and_searched_scales(name, tmp_path, monkeypatch):
    """SVDQuant's branch makes up for some of NVFP4's error in every linear outside experts, and AWQ's scales are found."""
    monkeypatch.setitem(micro_models.MODELS, name, with_sizes_of_16(name))
    folder, (ids, _, _) = save(build(name), tmp_path / "source"), inputs()
    plain, errors = modelq.load(folder, compute="bfloat16")(ids).logits, {}
    for preset in ("NVFP4_DEFAULT_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG"):
        config, model = copy.deepcopy(getattr(mtq, preset)), modelq.load(folder, compute="bfloat16")
        if "SVD" in preset:
            config["algorithm"] = {"method": "svdquant", "lowrank": 8}
        mtq.quantize(model, config, lambda model: model(ids))
        errors[preset] = np.linalg.norm(model(ids).logits - plain) / np.linalg.norm(plain)
        quantized = [module for module in alone(model) if model.quantizers[f"{module}.weight_quantizer"].enabled]
        if "SVD" in preset:
            assert set(model.low_rank) == set(quantized)
        if "AWQ" in preset:
            assert [module for module in quantized if model.quantizers[f"{module}.input_quantizer"].pre_quant_scale is not None]
    assert errors["NVFP4_SVDQUANT_DEFAULT_CFG"] < errors["NVFP4_DEFAULT_CFG"]
    assert errors["NVFP4_AWQ_LITE_CFG"] < 1.5 * errors["NVFP4_DEFAULT_CFG"]


def test_parts_of_another_model_are_not_left_behind(tmp_path):
    """A vision tower writes into the stream as it was: rotating that is refused, values are rotated."""
    import torch
    import transformers as tf
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    torch.manual_seed(0)
    config = tf.Llama4Config(text_config=dict(MODELS["llama4"][1]), vision_config=vision)
    theirs = tf.Llama4ForConditionalGeneration(config).eval().float()
    folder, (ids, _, _) = save(theirs, tmp_path / "source"), inputs()
    with pytest.raises(ValueError, match="rotate: multi_modal_projector.* is no tensor of the family llama4"):
        rotated(folder)
    expected = modelq.load(folder, compute="float32")(ids).logits
    np.testing.assert_allclose(rotated(folder, residual=False)(ids).logits, expected, rtol=0, atol=1e-4)


def test_every_family_is_here():
    """Llama's relatives have golden files; Llama-Nemotron is in tests/test_nemotron.py."""
    assert {row["family"] for row in core.archs()} - {name.split()[0] for name in NAMES} == \
        {"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "nemotron_nas"}
