"""Where a native model is computed: on the CPU, or on a GPU, of which a share may be used."""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from modelq import cuda

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Placement:
    """A GPU by its number, and how many bytes of it may be used (0: nine tenths of what is free)."""
    index: int
    memory: int

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    def attach(self, runtime: Any) -> None:
        """Have a runtime compute there. CudaUnavailable, or the reason why it cannot: ValueError, MemoryError."""
        library = cuda.library()
        if self.index >= library.device_count():
            raise ValueError(f"device {self}: there are {library.device_count()}, from cuda:0 on")
        try:
            runtime.use_device(library, self.index, self.memory, cuda.cublas_path(library))
        except RuntimeError as error:
            raise cuda.CudaUnavailable(str(error)) from None


def placement_of(device: str | None, memory: int | str | None = None) -> Placement | None:
    """None for the CPU. memory: bytes, or text as "8GB" or "512MiB"; None: what MODELQ_CUDA_MEMORY says, else nine tenths of what is
    free. ValueError: no such device or number."""
    index = cuda.device_index(device or "cpu")
    if index is None:
        if memory is not None:
            raise ValueError("device_memory is for device='cuda'")
        return None
    return Placement(index, nbytes_of(os.environ.get("MODELQ_CUDA_MEMORY", "0") or "0" if memory is None else memory))


def nbytes_of(text: int | str) -> int:
    """Bytes of a number or of text as "8GB", "1.5G", "512MiB"."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?|)B?\s*", str(text).upper())
    if found is None:
        raise ValueError(f"device memory: expected a number of bytes, or text as '8GB' or '512MiB', got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])
