"""Arrays of any framework: in by DLPack without a copy, and what is computed of them back out as the caller's kind.

No framework is imported here: whoever hands over a torch tensor or a JAX array has imported it.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelq import _core


def take(array: Any, name: str = "array") -> np.ndarray:
    """A view of an array on the CPU; a copy of one on another device, or of what only NumPy knows. TypeError names what cannot be: no
    values, an unknown dtype."""
    if isinstance(array, (list, tuple, float, int)):
        return np.asarray(array, np.float32)
    reading = _READING.get(framework_of(array))
    return _core.as_array(array if reading is None else reading(array, name), name)


def give_back(result: np.ndarray, like: Any) -> Any:
    """A new array as one of the framework of `like`, where `like` is; a NumPy array where that has none."""
    return origin_of(like).give(result)


@dataclass(frozen=True)
class Origin:
    """Where an array came from, so that what is made of it goes back there.

    framework: as framework_of says; place: of a JAX array that was put somewhere, its sharding; of what is not on the CPU, its device.
    """
    framework: str = "numpy"
    place: Any = None

    def give(self, result: np.ndarray) -> Any:
        """The result there; as it is where the framework has not been imported, which a pickled origin may see."""
        giving = _GIVING.get(self.framework) if self.framework in sys.modules else None
        return result if giving is None else giving(result, self.place)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (self.framework,)     # devices belong to a process


def origin_of(array: Any) -> Origin:
    framework, place = framework_of(array), None
    if framework == "jax" and getattr(array, "committed", False):
        place = array.sharding
    elif framework == "cupy" or framework == "torch" and array.device.type != "cpu":
        place = array.device
    return Origin(framework, place)


def framework_of(array: Any) -> str:
    """"torch", "jax", "numpy" or another package's name."""
    if _is_torch(array):
        return "torch"      # subclasses live in other packages
    root = type(array).__module__.partition(".")[0]
    return "jax" if root in ("jax", "jaxlib") else root


def _is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _from_torch(array: Any, name: str) -> Any:
    if array.device.type == "meta":
        raise TypeError(f"{name}: is on the meta device, it has no values")
    return array.detach().cpu()


def _from_jax(array: Any, name: str) -> Any:
    """JAX hands out memory of one CPU device; what is elsewhere, or in pieces, NumPy copies."""
    jax = sys.modules["jax"]
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"{name}: is being traced by JAX (jit, grad, vmap) and has no values to quantize yet: call this outside, on "
                        "arrays, or through jax.pure_callback")
    if not isinstance(array, jax.Array):
        return array
    devices = list(array.devices())
    return array if len(devices) == 1 and devices[0].platform == "cpu" else np.asarray(array)


def _as_torch(result: np.ndarray, place: Any) -> Any:
    """The same memory, on the CPU. Neither NumPy nor its DLPack knows ml_dtypes' formats: their bits are viewed as torch's of that name."""
    torch = sys.modules["torch"]
    plain, dtype = result, getattr(torch, result.dtype.name, None)
    if result.dtype.kind == "V" or result.dtype.name == "bfloat16" or result.dtype.name.startswith("float8"):
        plain = result.view(f"u{result.dtype.itemsize}" if result.dtype.itemsize == 1 else np.uint16)
        if dtype is None:
            raise TypeError(f"this torch has no dtype {result.dtype.name}")
        plain = plain if plain.dtype != np.uint16 else plain.view(np.int16)
        made = torch.from_numpy(plain).view(dtype)
    else:
        made = torch.from_numpy(plain)
    return made if place is None else made.to(place)


def _as_jax(result: np.ndarray, place: Any) -> Any:
    jax = sys.modules["jax"]
    return jax.numpy.asarray(result) if place is None else jax.device_put(result, place)


def _as_cupy(result: np.ndarray, place: Any) -> Any:
    with place:
        return sys.modules["cupy"].asarray(result)


def _from_cupy(array: Any, name: str) -> Any:
    return array.get()


_READING: dict[str, Callable[[Any, str], Any]] = {"torch": _from_torch, "jax": _from_jax, "cupy": _from_cupy}
_GIVING: dict[str, Callable[[np.ndarray, Any], Any]] = {"torch": _as_torch, "jax": _as_jax, "cupy": _as_cupy}
