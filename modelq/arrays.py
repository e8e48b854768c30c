"""Arrays of any framework: in by DLPack without a copy, and what is computed of them back out as the caller's kind.

No framework is imported here: whoever hands over a torch tensor has imported torch.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from modelq import _core


def take(array: Any, name: str = "array") -> np.ndarray:
    """A view of an array on the CPU (or what NumPy makes of it). TypeError names what cannot be: another device, an unknown dtype."""
    if isinstance(array, (list, tuple, float, int)):
        return np.asarray(array, np.float32)
    if framework_of(array) == "torch" and array.requires_grad:
        array = array.detach()
    return _core.as_array(array, name)


def give_back(result: np.ndarray, like: Any) -> Any:
    """A new array as one of the framework of `like`; a NumPy array where that has none."""
    return _GIVING.get(framework_of(like), _as_numpy)(result, like)


def framework_of(array: Any) -> str:
    """"torch", "jax", "numpy" or another package's name."""
    if _is_torch(array):
        return "torch"      # subclasses live in other packages
    root = type(array).__module__.partition(".")[0]
    return "jax" if root in ("jax", "jaxlib") else root


def _is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _as_numpy(result: np.ndarray, like: Any) -> np.ndarray:
    return result


def _as_torch(result: np.ndarray, like: Any) -> Any:
    """The same memory. Neither NumPy nor its DLPack knows ml_dtypes' formats: their bits are viewed as torch's of the same name."""
    torch = sys.modules["torch"]
    plain, dtype = result, getattr(torch, result.dtype.name, None)
    if result.dtype.kind == "V" or result.dtype.name == "bfloat16" or result.dtype.name.startswith("float8"):
        plain = result.view(f"u{result.dtype.itemsize}" if result.dtype.itemsize == 1 else np.uint16)
        if dtype is None:
            raise TypeError(f"this torch has no dtype {result.dtype.name}")
        plain = plain if plain.dtype != np.uint16 else plain.view(np.int16)
        return torch.from_numpy(plain).view(dtype)
    return torch.from_numpy(plain)


def _as_jax(result: np.ndarray, like: Any) -> Any:
    return sys.modules["jax"].numpy.asarray(result)


_GIVING: dict[str, Callable[[np.ndarray, Any], Any]] = {"torch": _as_torch, "jax": _as_jax}
