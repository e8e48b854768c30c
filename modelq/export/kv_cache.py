"""The key and value cache of an export: its format's name, scales and biases. Everything that cannot be said is refused."""
from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelq.checkpoint.kv_cache import SAYABLE, SCALE_DIVISOR, TENSORS

FORMATS = "use FP8_KV_CFG, FP8_AFFINE_KV_CFG, NVFP4_KV_CFG or NVFP4_AFFINE_KV_CFG"


@dataclass(frozen=True)
class Cache:
    """algorithm: the dialect's name, None for a cache in high precision; tensors: what is written, by name."""
    algorithm: str | None = None
    rotate: bool = False
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def plan_cache(model: Any, dtype: str, dialect: str = "modelopt") -> Cache:
    """The cache of a quantized model; dtype is that of biases. ValueError names the layer, or what the dialect cannot say."""
    from modelq.checkpoint.safetensors import numpy_dtype

    attentions = [row for row in model.modules if row["kind"] == "attention"]
    active = {row["name"]: _quantizers(model, row["name"]) for row in attentions}
    if not any(active.values()):
        return Cache()
    algorithms = {module: _algorithm(module, found) for module, found in active.items()}
    first = next(iter(algorithms.values()))
    for module, algorithm in algorithms.items():
        if algorithm != first:
            raise ValueError(f"{module}: its cache is {algorithm or 'in high precision'}, {next(iter(algorithms))}'s is "
                             f"{first or 'in high precision'}: engines keep one format for all layers; change the rules to give one")
    check_sayable(first, any(found["k"].rotate for found in active.values()), dialect)
    tensors: dict[str, np.ndarray] = {}
    for row in attentions:
        for which, quantizer in active[row["name"]].items():
            scale, bias = (f"{row['name']}.{suffix}" for suffix in TENSORS[dialect][which])
            if not _is_constant(model, f"{row['name']}.{which}_bmm_quantizer"):
                tensors[scale] = stored_scale(_scale(quantizer, f"{row['name']}.{which}_bmm_quantizer"), dialect)
            if quantizer.bias is not None:
                heads, width = row["shape"]
                tensors[bias] = quantizer.bias.reshape(1, heads, 1, width).astype(numpy_dtype(dtype))
    _warn_unsaid(model, active)
    return Cache(first, any(found["k"].rotate for found in active.values()), tensors)


def check_sayable(algorithm: str | None, rotate: bool, dialect: str) -> None:
    """ValueError if the dialect has no words for such a cache."""
    if algorithm not in SAYABLE.get(dialect, ()) or (rotate and dialect != "modelopt"):
        words = ", ".join(SAYABLE.get(dialect, ())) or "none"
        raise ValueError(f"the KV cache is {algorithm}{' of rotated keys' if rotate else ''}: the {dialect} dialect can say {words}; leave "
                         "the cache in high precision, or use the modelopt dialect")


def stored_scale(scale: np.ndarray, dialect: str) -> np.ndarray:
    """In Model Optimizer's words a number, elsewhere a vector of one."""
    return scale if dialect == "modelopt" else scale.reshape(1)


def _quantizers(model: Any, module: str) -> dict[str, Any]:
    found = {which: model.quantizers.get(f"{module}.{which}_bmm_quantizer") for which in ("k", "v")}
    return {which: quantizer for which, quantizer in found.items() if quantizer is not None and quantizer.enabled}


def _algorithm(module: str, found: dict[str, Any]) -> str | None:
    if not found:
        return None
    if len(found) < 2:
        raise ValueError(f"{module}: only {next(iter(found))} of its cache is quantized: a cache holds k and v in one format; {FORMATS}")
    kinds = {which: (quantizer.scheme, quantizer.bias is not None) for which, quantizer in found.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{module}: k is {_words(kinds['k'])}, v {_words(kinds['v'])}: a cache holds both in one format; {FORMATS}")
    scheme, affine = kinds["k"]
    if scheme == "fp8":
        return "FP8"
    if scheme == "nvfp4" and found["k"].block_sizes.get(-1) == 16:
        return "NVFP4_AFFINE" if affine else "NVFP4"
    said = f"num_bits {found['k'].num_bits} with axis {found['k'].axis} and block_sizes {found['k'].block_sizes}"
    raise ValueError(f"{module}: no checkpoint can say a cache of {said}; {FORMATS}")


def _words(kind: tuple[str | None, bool]) -> str:
    return f"{kind[0] or 'no known scheme'}{' with a bias' if kind[1] else ''}"


def _is_constant(model: Any, name: str) -> bool:
    """Scales of 1 by decree (the "cast" presets) are not stored."""
    setting = getattr(model, "settings", {}).get(name)
    return setting is not None and setting.attributes.use_constant_amax


def _scale(quantizer: Any, name: str) -> np.ndarray:
    if quantizer.amax is None:
        raise ValueError(f"{name} was never calibrated: no batch of the forward loop reached it; call modelq.quantization.quantize with a "
                         "forward_loop that runs the model on data")
    amax = np.float32(np.asarray(quantizer.amax).reshape(-1)[0]) or np.float32(SCALE_DIVISOR)     # zero on all data: no scale may be 0
    return np.asarray(amax / np.float32(SCALE_DIVISOR), dtype=np.float32)


def _warn_unsaid(model: Any, active: dict[str, dict[str, Any]]) -> None:
    queries = [name for module in active if (q := model.quantizers.get(name := f"{module}.q_bmm_quantizer")) is not None and q.enabled]
    if queries:
        warnings.warn(f"{queries[0]} and the like: a checkpoint has no place for the quantization of queries: engines decide that",
                      stacklevel=5)
    if any(found["k"].rotate for found in active.values()):
        warnings.warn("the cache's scales are of rotated keys: an engine has to rotate queries and keys too, and none reads that from a "
                      "checkpoint", stacklevel=5)
