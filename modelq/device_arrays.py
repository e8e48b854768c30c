"""Arrays on NVIDIA GPUs, of whatever framework: quantizers run where the array lies, on the framework's current stream.

No framework is imported here, and none is made to wait: memory crosses by DLPack, whose producer orders its stream before ours, which is
the same one for torch and CuPy. Where there is no GPU library, arrays are copied through the CPU (modelq/arrays.py).
"""
from __future__ import annotations

import os
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from modelq import _core, cuda
from modelq.arrays import framework_of

KDL_CUDA = 2                # DLPack's number for memory of a CUDA device
DEFAULT_STREAM = 1          # its name for the default one


@lru_cache(maxsize=4)
def _library_here(named: str | None) -> _core.CudaLibrary | None:
    return cuda.library() if cuda.is_available() else None


def library_for(array: Any) -> _core.CudaLibrary | None:
    """The CUDA library if array lies on a GPU and there is one for it, else None. Arrays of JAX are constant: no result can be written into
    one, so that they go through the CPU."""
    if isinstance(array, (np.ndarray, list, tuple, float, int)):
        return None
    framework, device = framework_of(array), getattr(array, "device", None)
    if framework == "jax" or framework == "torch" and device is not None and device.type != "cuda":
        return None
    ask = getattr(array, "__dlpack_device__", None)
    if ask is None or int(ask()[0]) != KDL_CUDA:
        return None
    return _library_here(os.environ.get("MODELQ_CUDA_LIBRARY"))


def stream_of(array: Any) -> int:
    """The framework's current stream on the array's device, a cudaStream_t as a number; the default one of frameworks that do not say."""
    framework = framework_of(array)
    if framework == "torch":
        return sys.modules["torch"].cuda.current_stream(array.device).cuda_stream or DEFAULT_STREAM
    if framework == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream().ptr or DEFAULT_STREAM
    current = getattr(array, "current_stream", None)
    return int(current()) if callable(current) else DEFAULT_STREAM


def contiguous(array: Any) -> Any:
    """The array without gaps, and without a gradient."""
    framework = framework_of(array)
    if framework == "torch":
        return array.detach().contiguous()
    return sys.modules["cupy"].ascontiguousarray(array) if framework == "cupy" else array


def empty_like(array: Any, shape: Any = None, float32: bool = False) -> Any:
    """New memory of the array's framework on its device, of its dtype (or float32) and shape (or another)."""
    shape = tuple(array.shape if shape is None else shape)
    if framework_of(array) == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=torch.float32 if float32 else array.dtype, device=array.device)
    namespace = array.__array_namespace__()
    return namespace.empty(shape, dtype=namespace.float32 if float32 else array.dtype, device=array.device)


def to_host(array: Any) -> np.ndarray:
    """Its values as a NumPy array; this waits for the stream."""
    library = library_for(array)
    assert library is not None
    return _core.cuda_to_host(library, contiguous(array), stream_of(array))


def quantized(library: _core.CudaLibrary, quantizer: _core.Quantizer, x: Any, prepare: bool = False) -> Any:
    """quantizer(x) there; prepare: only what comes before rounding."""
    x = contiguous(x)
    out = empty_like(x)
    _core.cuda_quantize(library, quantizer, x, out, stream_of(x), prepare)
    return out


def gradient(library: _core.CudaLibrary, quantizer: _core.Quantizer, x: Any, gradient: Any) -> Any:
    """The gradient by x, straight through, there."""
    x, gradient = contiguous(x), contiguous(gradient)
    out = empty_like(x)
    _core.cuda_straight_through(library, quantizer, x, gradient, out, stream_of(x))
    return out


def largest(library: _core.CudaLibrary, x: Any, block: tuple[int, int] = (0, 0)) -> Any:
    """float32 [block rows, block columns] on its device: the largest magnitudes of x's blocks. (0, 0): [1, 1], of all of it."""
    x = contiguous(x)
    columns = int(x.shape[-1]) if len(x.shape) else 1
    rows = int(np.prod(x.shape[:-1], dtype=np.int64)) if len(x.shape) else 1
    shape = [-(-extent // size) if size else 1 for extent, size in zip((rows, columns), block)]
    out = empty_like(x, shape, float32=True)
    _core.cuda_amax(library, x, out, stream_of(x), *block)
    return out
