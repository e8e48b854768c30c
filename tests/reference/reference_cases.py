"""What is compared with nvidia-modelopt: micro models of the families, and the formats that it can make on a CPU.

The sizes are such that every matrix, and each half of an expert's gate and up, is made of whole blocks. Weights follow from the tensors'
names, so that a test without torch makes the same.
"""
from __future__ import annotations

import copy
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from micro_models import BASE, HEAD, MODELS, inputs      # noqa: E402

WIDE = BASE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
          "moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
# what micro_models' families have otherwise here
OTHERWISE = {
    "granite": {}, "olmo2": {}, "phi3": {}, "gemma2": {}, "gemma3": {}, "gpt_oss": {"intermediate_size": 64},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64, "num_experts": 4},
    "llama4": {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_hidden_layers": 4},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 128, "residual_multiplier": 0.6},    # with 0.4 a token is between experts
    "deepseek_v2": LATENT, "deepseek_v3": LATENT,
}
# family -> (config class, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", WIDE | HEAD | {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", WIDE | HEAD | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", WIDE),
    "qwen3": ("Qwen3Config", WIDE | HEAD | {"tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", WIDE | HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "qwen3_moe": ("Qwen3MoeConfig", WIDE | HEAD | EXPERTS | {"num_experts": 4, "norm_topk_prob": True}),
    **{name: (MODELS[name][0], {**MODELS[name][1], **{key: WIDE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
                                **other}) for name, other in OTHERWISE.items()},
}
STACKED = ("gpt_oss", "llama4")     # experts in one tensor
WITH_EXPERTS = (*STACKED, "mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "deepseek_v2", "deepseek_v3")

# "A+B": with B's rules, for the KV cache, behind A's. EXACT: weights and their scales equal the reference's to the byte.
EXACT = ("FP8_DEFAULT_CFG", "FP8_DEFAULT_CFG+FP8_KV_CFG", "NVFP4_DEFAULT_CFG", "NVFP4_DEFAULT_CFG+NVFP4_KV_CFG", "W4A16_NVFP4_CFG",
         "INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
         "MXFP8_DEFAULT_CFG")
SEARCHED = ("INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG")
FORMATS = (*EXACT, *SEARCHED)
BLOCKS = {"INT4_AWQ_CFG": 16, "W4A8_AWQ_BETA_CFG": 16, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": 16}      # instead of 128
# One family for each format: what the usual suite compares, by what tests/data/reference holds.
STORED = {"FP8_DEFAULT_CFG": "phi3", "FP8_DEFAULT_CFG+FP8_KV_CFG": "llama4", "NVFP4_DEFAULT_CFG": "deepseek_v3",
          "NVFP4_DEFAULT_CFG+NVFP4_KV_CFG": "gpt_oss", "W4A16_NVFP4_CFG": "olmo2", "INT8_DEFAULT_CFG": "granite",
          "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "gemma2", "FP8_PER_CHANNEL_PER_TOKEN_CFG": "qwen2_moe",
          "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "qwen3_moe", "MXFP8_DEFAULT_CFG": "gemma3", "INT8_SMOOTHQUANT_CFG": "qwen2",
          "INT4_AWQ_CFG": "phi3", "W4A8_AWQ_BETA_CFG": "mistral"}


def dtype_of(format: str) -> str:
    """What a model computes in: searches see every last bit of activations, and choose otherwise for another."""
    return "float32" if format in SEARCHED else "bfloat16"


def configuration(mtq: Any, name: str) -> dict[str, Any]:
    """The preset of either library, in blocks that fit."""
    first, *rest = (copy.deepcopy(getattr(mtq, part)) for part in name.split("+"))
    rules = [*first["quant_cfg"], *(rule for other in rest for rule in other["quant_cfg"])]
    for rule in rules if name in BLOCKS else ():
        stages = rule.get("cfg") or []
        for stage in stages if isinstance(stages, list) else [stages]:
            if -1 in (stage.get("block_sizes") or {}):
                stage["block_sizes"][-1] = BLOCKS[name]
    return {**first, "quant_cfg": rules}


def folder_of(format: str) -> str:
    return format.replace("+", "__")


def token_ids() -> np.ndarray:
    """int64 [3, 24]."""
    return inputs()[0]


def values_of(name: str, shape: tuple[int, ...], base: float) -> np.ndarray:
    """float32: what a tensor of this name holds; base: what norms and biases start as. Near a normal distribution, of raw bits alone."""
    count = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count).astype("<u8").view("<u2").reshape(count, 4)
    noise = (bits.sum(1, dtype=np.int64) - 131070) / 37837.0
    if name.endswith("e_score_correction_bias"):
        noise = np.abs(noise)
    return np.asarray(noise * 0.15 if len(shape) > 1 else base + noise * 0.2, np.float32).reshape(shape)
