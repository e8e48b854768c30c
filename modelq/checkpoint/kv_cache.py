"""How a quantized key and value cache is spelled, per dialect. Read and write share it.

A scale is amax / 448 whatever the format (NVFP4 too: engines multiply it back); a bias is [1, heads, 1, head_dim]. A checkpoint that
names a format and holds no scales means scales of 1.
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.dialects import STATIC_FP8

SCALE_DIVISOR = 448.0
# dialect -> k or v -> names of scale and bias, below the attention module. Dialects that are not here have no words for a cache.
TENSORS = {"modelopt": {"k": ("k_proj.k_scale", "k_proj.k_bias"), "v": ("v_proj.v_scale", "v_proj.v_bias")},
           "compressed-tensors": {"k": ("k_scale", ""), "v": ("v_scale", "")},
           **dict.fromkeys(STATIC_FP8, {"k": ("k_scale", ""), "v": ("v_scale", ""), "both": ("kv_scale", "")})}
SAYABLE = {"modelopt": ("FP8", "NVFP4", "NVFP4_AFFINE"), "compressed-tensors": ("FP8",)}
ALGORITHMS = {"FP8": "fp8", "NVFP4": "nvfp4", "NVFP4_AFFINE": "nvfp4"}  # to the scheme of both quantizers
ROTATE_KEY = "kv_cache_rotate"     # modelq's own word: the scales are of keys rotated by a Hadamard matrix


@dataclass(frozen=True)
class StoredCache:
    """What a checkpoint says of its cache. scales and biases: by attention module and "k" or "v"."""
    scheme: str
    rotate: bool
    scales: dict[tuple[str, str], np.float32]
    biases: dict[tuple[str, str], np.ndarray]


def names_of(inner: Checkpoint, dialect: str) -> set[str]:
    """The tensors that belong to the cache."""
    suffixes = tuple("." + suffix for pair in TENSORS.get(dialect, {}).values() for suffix in pair if suffix)
    return {name for name in inner.tensors if name.endswith(suffixes)}


def read_cache(inner: Checkpoint, quantization: dict[str, Any], dialect: str) -> StoredCache | None:
    """ValueError names the tensor or the key that cannot be. Scales without a format are said and ignored."""
    algorithm, names = _algorithm(quantization), names_of(inner, dialect)
    if algorithm is None:
        if names:
            warnings.warn(f"{inner.path}: the KV cache's {len(names)} scales are not simulated: k and v stay in high precision, as the "
                          "config names no format for them", stacklevel=2)
        return None
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{inner.path}: the KV cache is quantized as {algorithm!r}, which modelq does not read; it reads "
                         f"{', '.join(ALGORITHMS)}")
    scales: dict[tuple[str, str], np.float32] = {}
    biases: dict[tuple[str, str], np.ndarray] = {}
    for which, (scale, bias) in TENSORS.get(dialect, {}).items():
        for name in sorted(names):
            module = name[:-len(scale) - 1]
            if name.endswith("." + scale):
                scales[module, which] = _scale(inner, name)
            elif bias and name.endswith("." + bias):
                biases[name[:-len(bias) - 1], which] = np.asarray(inner.read(name), dtype=np.float32).reshape(-1)
    return StoredCache(ALGORITHMS[algorithm], bool(quantization.get(ROTATE_KEY)), scales, biases)


def _algorithm(quantization: dict[str, Any]) -> str | None:
    """The dialect's word: hf_quant_config.json's, or config.json's scheme."""
    said = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    if not isinstance(said, dict):
        return said
    return "FP8" if (said.get("num_bits"), said.get("type", "float")) == (8, "float") else repr(said)


def _scale(inner: Checkpoint, name: str) -> np.float32:
    value = np.asarray(inner.read(name), dtype=np.float32)
    if value.size != 1 or not np.isfinite(value).all() or value.item() <= 0:
        raise ValueError(f"{inner.tensors[name].file}: tensor {name!r} is {value.tolist()}, not a positive number; export the model again, "
                         "or download the file again")
    return np.float32(value.item())
