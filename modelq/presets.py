"""The named configs of Model Optimizer 0.47 (`NVFP4_DEFAULT_CFG`, ...) and two more for GPTQ, as data made of shared pieces.

Every preset is built afresh: changing one in place changes no other. Names and contents equal the reference's, so that a script
written for it keeps its meaning; `choices` is the set of all names, `OWN` of those that are not the reference's. Dictionaries are
plain: an ordered list of rules `quant_cfg` and the name or settings of the calibration `algorithm` (the five `*_KV_*` presets hold
rules only, to be added to another).
"""
from __future__ import annotations

from typing import Any

Attributes = dict[str, Any]
Rule = dict[str, Any]

E2M1, E3M2, E4M3, E8M0 = (2, 1), (3, 2), (4, 3), (8, 0)


# Number formats ------------------------------------------------------------------------------------------------------------

def fp8() -> Attributes:
    return {"num_bits": E4M3, "axis": None}


def fp8_per_channel() -> Attributes:
    return {"num_bits": E4M3, "axis": 0}


def fp8_per_token() -> Attributes:
    """One scale per token, taken on the fly: a dynamic block that spans the whole last axis."""
    return {"num_bits": E4M3, "axis": None, "type": "dynamic", "block_sizes": {-1: None}}


def fp8_2d() -> Attributes:
    return {"num_bits": E4M3, "axis": None, "block_sizes": {-1: 128, -2: 128}}


def int8() -> Attributes:
    return {"num_bits": 8, "axis": None}


def int8_per_channel() -> Attributes:
    return {"num_bits": 8, "axis": 0}


def int4_blocks() -> Attributes:
    return {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}


def microscaling(num_bits: int | tuple[int, int]) -> Attributes:
    """OCP MX: blocks of 32 along the last axis that share a power-of-two scale (E8M0)."""
    return {"num_bits": num_bits, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E8M0}}


def nvfp4() -> Attributes:
    return {"num_bits": E2M1, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3}, "effective_bits": 4.5}


def nvfp4_blocks_of_32() -> Attributes:
    return {"num_bits": E2M1, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E4M3}}


def nvfp4_static() -> Attributes:
    return {"num_bits": E2M1, "block_sizes": {-1: 16, "type": "static", "scale_bits": E4M3}}


def nvfp4_four_over_six() -> Attributes:
    return {"num_bits": E2M1, "block_sizes": {-1: 16, "type": "static", "scale_bits": E4M3, "four_over_six": True}}


# Rules -----------------------------------------------------------------------------------------------------------------------

def on(pattern: str, attributes: Attributes | list[Attributes]) -> Rule:
    return {"quantizer_name": pattern, "cfg": attributes}


def off(pattern: str, parent_class: str | None = None) -> Rule:
    rule: Rule = {"quantizer_name": pattern, "enable": False}
    return rule if parent_class is None else {"parent_class": parent_class, **rule}


def weights(attributes: Attributes | list[Attributes]) -> Rule:
    return on("*weight_quantizer", attributes)


def inputs(attributes: Attributes | None) -> Rule:
    return off("*input_quantizer") if attributes is None else on("*input_quantizer", attributes)


DEFAULT_DISABLED_PATTERNS = (
    "*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*",
    "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.shared_expert_gate.*", "*output_layer*", "*proj_out.*", "*router*", "mtp.*",
    "output.*", "*embed_vision*", "*vision_tower*", "*visual*", "*vision_model*", "*multi_modal_projector*")
DEFAULT_DISABLED_CLASSES = ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d", "nn.LeakyReLU", "nn.Embedding")
MAMBA_DISABLED_PATTERNS = (
    "*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*", "*self_attention.linear_qkv*",
    "*self_attention.linear_proj*")
MAMBA_CONSERVATIVE_PATTERNS = ("*mixer.in_proj*", "*mixer.out_proj*")

# Spellings of one part in several families, or places only some have: that a model lacks them is no mistake.
FAMILY_PATTERNS = DEFAULT_DISABLED_PATTERNS + MAMBA_DISABLED_PATTERNS + MAMBA_CONSERVATIVE_PATTERNS + (
    "*softmax_quantizer", "transformer_blocks*bmm2_output_quantizer") + tuple(
    part + kind for part in ("*.mixer.up_proj.", "*.mixer.down_proj.", "*block_sparse_moe*", "*.experts.*")
    for kind in ("weight_quantizer", "input_quantizer"))


def everything_off() -> list[Rule]:
    return [off("*")]


def default_disabled() -> list[Rule]:
    """What stays in high precision unless a later rule says otherwise: heads, routers, norms, vision parts."""
    return [off(p) for p in DEFAULT_DISABLED_PATTERNS] + [off("*", parent_class=c) for c in DEFAULT_DISABLED_CLASSES]


def model_config(*rules: Rule, algorithm: Any = "max", extra_disabled: tuple[str, ...] = ()) -> dict[str, Any]:
    """All off, then the rules, then the default disabled list: the shape of every model preset but one."""
    quant_cfg = everything_off() + list(rules) + default_disabled() + [off(p) for p in extra_disabled]
    return {"quant_cfg": quant_cfg, "algorithm": algorithm}


def weights_and_inputs(attributes, algorithm: Any = "max", **more) -> dict[str, Any]:
    """`attributes` is a function of the first section, called once per use so that no two rules share a dictionary."""
    return model_config(weights(attributes()), inputs(attributes()), algorithm=algorithm, **more)


def parts(names: tuple[str, ...], attributes, with_inputs: bool = True, algorithm: Any = "max") -> dict[str, Any]:
    kinds = ("weight_quantizer", "input_quantizer") if with_inputs else ("weight_quantizer",)
    return model_config(*[on(name + kind, attributes()) for name in names for kind in kinds], algorithm=algorithm)


def key_value(attributes: Attributes) -> Rule:
    return on("*[kv]_bmm_quantizer", attributes)


def affine(attributes: Attributes) -> Attributes:
    """With a bias per head and channel: the mean over batch (-4) and sequence (-2)."""
    return {**attributes, "bias": {-2: None, -4: None, "type": "static"}}


# The presets -----------------------------------------------------------------------------------------------------------------

INT8_DEFAULT_CFG = model_config(weights(int8_per_channel()), inputs(int8()))
INT8_SMOOTHQUANT_CFG = model_config(weights(int8_per_channel()), inputs(int8()), algorithm="smoothquant")
INT8_WEIGHT_ONLY_CFG = model_config(weights(int8_per_channel()), inputs(None))

FP8_DEFAULT_CFG = weights_and_inputs(fp8)
FP8_PER_CHANNEL_PER_TOKEN_CFG = model_config(weights(fp8_per_channel()), inputs(fp8_per_token()))
FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG = model_config(weights(fp8_2d()), inputs(None))

INT4_BLOCKWISE_WEIGHT_ONLY_CFG = model_config(weights(int4_blocks()), inputs(None))
INT4_AWQ_CFG = model_config(weights(int4_blocks()), inputs(None), algorithm={"method": "awq_lite", "alpha_step": 0.1})
W4A8_AWQ_BETA_CFG = model_config(weights([int4_blocks(), fp8()]), inputs(fp8()), algorithm="awq_lite")

MXFP8_DEFAULT_CFG = weights_and_inputs(lambda: microscaling(E4M3), algorithm=None)
MXFP6_DEFAULT_CFG = weights_and_inputs(lambda: microscaling(E3M2), algorithm=None)
MXFP4_DEFAULT_CFG = weights_and_inputs(lambda: microscaling(E2M1), algorithm=None)
MXINT8_DEFAULT_CFG = weights_and_inputs(lambda: microscaling(8), algorithm=None)
W4A8_MXFP4_FP8_CFG = model_config(weights(microscaling(E2M1)), inputs(fp8()), algorithm=None)

NVFP4_DEFAULT_CFG = weights_and_inputs(nvfp4)
NVFP4_AWQ_LITE_CFG = weights_and_inputs(nvfp4, algorithm="awq_lite")
NVFP4_AWQ_CLIP_CFG = weights_and_inputs(nvfp4, algorithm={"method": "awq_clip"})
NVFP4_AWQ_FULL_CFG = weights_and_inputs(nvfp4, algorithm={"method": "awq_full", "alpha_step": 0.1})
NVFP4_SVDQUANT_DEFAULT_CFG = weights_and_inputs(nvfp4, algorithm={"method": "svdquant", "lowrank": 32})
NVFP4_FOUR_OVER_SIX_CFG = model_config(weights(nvfp4_four_over_six()), inputs(nvfp4()), algorithm={
    "method": "mse", "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5, "fp8_scale_sweep": False})
NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG = model_config(
    weights(nvfp4_static()), inputs(nvfp4()), algorithm={"method": "mse", "fp8_scale_sweep": True})
NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG = model_config(
    weights(nvfp4_static()), inputs(nvfp4()), algorithm={"method": "local_hessian", "fp8_scale_sweep": True})
W4A16_NVFP4_CFG = model_config(weights(nvfp4()))
W4A8_NVFP4_FP8_CFG = model_config(weights(nvfp4_blocks_of_32()), inputs(fp8()))

_MIXER_PARTS = ("*.mixer.up_proj.", "*.mixer.down_proj.")
NVFP4_MLP_WEIGHT_ONLY_CFG = parts(("*mlp*", "*block_sparse_moe*"), nvfp4_blocks_of_32, with_inputs=False)
MXFP4_MLP_WEIGHT_ONLY_CFG = parts(("*mlp*", "*block_sparse_moe*"), lambda: microscaling(E2M1), with_inputs=False, algorithm=None)
NVFP4_MLP_ONLY_CFG = parts(("*mlp*", *_MIXER_PARTS, "*block_sparse_moe*", "*.experts.*"), nvfp4)
NVFP4_EXPERTS_ONLY_CFG = parts(("*block_sparse_moe*", "*.experts.*"), nvfp4)
NVFP4_OMLP_ONLY_CFG = parts(("*o_proj*", "*mlp*", *_MIXER_PARTS, "*block_sparse_moe*"), nvfp4)

MAMBA_MOE_FP8_AGGRESSIVE_CFG = weights_and_inputs(fp8, extra_disabled=MAMBA_DISABLED_PATTERNS)
MAMBA_MOE_FP8_CONSERVATIVE_CFG = weights_and_inputs(fp8, extra_disabled=MAMBA_DISABLED_PATTERNS + MAMBA_CONSERVATIVE_PATTERNS)
MAMBA_MOE_NVFP4_AGGRESSIVE_CFG = weights_and_inputs(nvfp4, extra_disabled=MAMBA_DISABLED_PATTERNS)
MAMBA_MOE_NVFP4_CONSERVATIVE_CFG = weights_and_inputs(nvfp4, extra_disabled=MAMBA_DISABLED_PATTERNS + MAMBA_CONSERVATIVE_PATTERNS)

# The one preset without the default disabled list: it quantizes lm_head too.
NVFP4_FP8_MHA_CONFIG = {
    "quant_cfg": everything_off() + [
        weights(nvfp4()), inputs(nvfp4()), off("*output_quantizer"), on("*[qkv]_bmm_quantizer", fp8()), on("*softmax_quantizer", fp8()),
        on("*p_bmm_quantizer", fp8()), on("transformer_blocks*bmm2_output_quantizer", fp8())],
    "algorithm": "max"}

FP8_KV_CFG = {"quant_cfg": [key_value(fp8())]}
FP8_AFFINE_KV_CFG = {"quant_cfg": [key_value(fp8()), key_value(affine(fp8()))]}
NVFP4_KV_CFG = {"quant_cfg": [key_value(nvfp4())]}
NVFP4_AFFINE_KV_CFG = {"quant_cfg": [key_value(nvfp4()), key_value(affine(nvfp4()))]}
NVFP4_KV_ROTATE_CFG = {
    "quant_cfg": [
        {**on("*q_bmm_quantizer", {"rotate": True}), "enable": False}, on("*k_bmm_quantizer", {**nvfp4(), "rotate": True}),
        on("*v_bmm_quantizer", nvfp4())],
    "algorithm": "max"}


# Presets that the reference lacks ------------------------------------------------------------------------------------------------

def gptq(scale_sweep: bool) -> dict[str, Any]:
    """GPTQ as it does best on SmolLM2 (tests/bench/perplexity.py): layer by layer on quantized inputs, large columns first, from scales
    that weigh errors by the inputs. scale_sweep: over all FP8 scales of static blocks, rather than over multiples of the maximum."""
    return {"method": "gptq", "act_order": True, "layerwise": {"enable": True},
            "scale_algorithm": {"method": "local_hessian", "fp8_scale_sweep": scale_sweep}}


INT4_GPTQ_CFG = model_config(weights(int4_blocks()), inputs(None), algorithm=gptq(scale_sweep=False))
NVFP4_GPTQ_CFG = model_config(weights(nvfp4_static()), inputs(nvfp4()), algorithm=gptq(scale_sweep=True))

OWN = {"INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG"}
choices: set[str] = {name for name in globals() if name.endswith(("_CFG", "_CONFIG"))}

__all__ = sorted(choices) + ["OWN", "choices"]
