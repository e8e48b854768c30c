"""From GGUF metadata and tensor names to a Hugging Face config and Hugging Face names.

The metadata keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `<arch>` stands for general.architecture.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Hugging Face name -> (key behind "<arch>.", required)
_KEYS = {
    "hidden_size": ("embedding_length", True),
    "intermediate_size": ("feed_forward_length", True),
    "num_hidden_layers": ("block_count", True),
    "num_attention_heads": ("attention.head_count", True),
    "num_key_value_heads": ("attention.head_count_kv", False),
    "max_position_embeddings": ("context_length", True),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", True),
    "rope_theta": ("rope.freq_base", False),
}
_TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(path: Path, name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. ValueError for a tensor no supported family has."""
    stem, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", stem)
    if suffix in ("weight", "bias"):
        if block and block[2] in _BLOCK_NAMES:
            return f"model.layers.{int(block[1])}.{_BLOCK_NAMES[block[2]]}.{suffix}"
        if stem in _TOP_NAMES:
            return f"{_TOP_NAMES[stem]}.{suffix}"
    raise ValueError(f"{path}: tensor {name!r} belongs to no supported model family; supported are {', '.join(ARCHITECTURES)}")


def config_from_metadata(
    path: Path, metadata: dict[str, Any], tensors: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """A dict in the shape of config.json. tensors: the shapes of those in the file; rope_factors: its rope_freqs.weight, if any.

    ValueError for an unsupported architecture, a missing key, or a setting that modelq would compute wrongly.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"{path}: GGUF architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu", "dtype": "bfloat16"}
    for key, (gguf_key, required) in _KEYS.items():
        value = metadata.get(f"{arch}.{gguf_key}")
        if value is None and required:
            raise ValueError(f"{path}: the metadata key {arch}.{gguf_key} is missing; download the file again")
        if value is not None:
            config[key] = _number(path, f"{arch}.{gguf_key}", value, float if key in ("rms_norm_eps", "rope_theta") else int)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    config["head_dim"] = _head_dim(path, arch, metadata, config)
    if len(tensors.get("token_embd.weight", ())) != 2:
        raise ValueError(f"{path}: no tensor token_embd.weight [vocabulary, {config['hidden_size']}]; download the file again")
    config["vocab_size"] = tensors["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    config["rope_scaling"] = _rope_scaling(path, arch, metadata, config, rope_factors)
    for key, gguf_key in _TOKEN_IDS.items():
        config[key] = metadata.get(f"tokenizer.ggml.{gguf_key}")
    if metadata.get(f"{arch}.expert_count"):
        raise ValueError(f"{path}: a mixture of experts in GGUF is not supported; take the checkpoint in safetensors")
    return config


def _number(path: Path, key: str, value: Any, kind: type) -> int | float:
    """Floats are stored in 32 bits: 9.99999974e-06 means 1e-05, its shortest spelling."""
    if type(value) is not kind or not 0 < value < float("inf"):
        raise ValueError(f"{path}: the metadata key {key} is {value!r}, expected one positive {kind.__name__} for all layers")
    return float(str(np.float32(value))) if kind is float else value


def _head_dim(path: Path, arch: str, metadata: dict[str, Any], config: dict[str, Any]) -> int:
    head_dim = metadata.get(f"{arch}.attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    for key in ("attention.value_length", "rope.dimension_count"):
        value = metadata.get(f"{arch}.{key}", head_dim)
        if value != head_dim:
            raise ValueError(f"{path}: {arch}.{key} is {value}, only the head size {head_dim} is supported there")
    return head_dim


def _rope_scaling(
    path: Path, arch: str, metadata: dict[str, Any], config: dict[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling, None for none. Llama 3's is stored as the factors themselves: check that they are Llama 3's."""
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        factor = metadata.get(f"{arch}.rope.scaling.factor", 1.0)
        return {"rope_type": kind, "factor": factor}
    if factors is None:
        return None
    factors = np.asarray(factors, dtype=np.float64).reshape(-1)
    scaling = {
        "rope_type": "llama3", "factor": float(factors.max(initial=0)), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    expected = _llama3_factors(config["rope_theta"], config["head_dim"], scaling)
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4, atol=0):
        raise ValueError(f"{path}: rope_freqs.weight does not hold Llama 3's rotary scaling; take the checkpoint in safetensors")
    return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """By how much each frequency is divided [head_dim / 2]: 1 for short waves, factor for long ones, a ramp between (transformers,
    modeling_rope_utils, llama3)."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / max(scaling["factor"], 1e-9) + smooth)
