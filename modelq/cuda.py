"""NVIDIA GPUs: whether modelq can use one here, which there are, and what is missing if not.

    import modelq.cuda
    modelq.cuda.is_available()      # True, or False
    modelq.cuda.why_not()           # None, or what is missing and how to get it
    modelq.cuda.devices()           # [Device(index=0, name="NVIDIA H100 80GB HBM3", ...)]

The GPU's code is a library of its own, which is looked for when it is first asked for: the file that MODELQ_CUDA_LIBRARY names, else
modelq/_cuda/libmodelq_cuda.so, which a build with MODELQ_CUDA=1 makes. cuBLASLt is found in NVIDIA's packages (pip install modelq[cuda]) or
where the system has it. Nothing here needs torch.
"""
from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from modelq import _core

LIBRARY = Path(__file__).parent / "_cuda" / "libmodelq_cuda.so"
CUBLAS = "libcublasLt.so.13"
_PACKAGE_FOLDERS = ("cu13/lib", "cublas/lib")       # below the nvidia packages' common folder: since CUDA 13, and before


class CudaUnavailable(OSError):
    """No GPU can be used; the text says what is missing and how to get it."""


@dataclass(frozen=True)
class Device:
    """One GPU. compute_capability: (9, 0) is sm_90; total_nbytes, free_nbytes: of its memory, free as of now."""
    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    total_nbytes: int
    free_nbytes: int

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"cuda:{self.index} {self.name}, sm_{major}{minor}, {self.free_nbytes / 1e9:.1f} of {self.total_nbytes / 1e9:.1f} GB free"


def library_path() -> Path:
    """Where the library is, or CudaUnavailable."""
    given = os.environ.get("MODELQ_CUDA_LIBRARY")
    path = Path(given) if given else LIBRARY
    if path.is_file():
        return path
    if given:
        raise CudaUnavailable(f"MODELQ_CUDA_LIBRARY names {given}, which is not there")
    raise CudaUnavailable("this modelq was installed without its CUDA library: with the CUDA Toolkit (nvcc) in PATH, install it from its "
                          "sources by `MODELQ_CUDA=1 pip install .`, and `pip install modelq[cuda]` for NVIDIA's libraries")


@lru_cache(maxsize=4)
def _opened(path: str) -> _core.CudaLibrary:
    return _core.CudaLibrary(path)


def library() -> _core.CudaLibrary:
    """The library, opened once per process and file, on a machine that has a GPU for it. CudaUnavailable says what is missing."""
    path = library_path()
    try:
        opened = _opened(str(path))
        opened.device_count()
    except RuntimeError as error:
        raise CudaUnavailable(f"no GPU for modelq: {error}. Everything runs on the CPU without it") from None
    return opened


def is_available() -> bool:
    """Whether there is a GPU that modelq can use, and all that it needs."""
    return why_not() is None


def why_not() -> str | None:
    """What is missing, or None if modelq can use a GPU."""
    try:
        library()
    except CudaUnavailable as error:
        return str(error)
    return None


def device_count() -> int:
    """How many GPUs modelq can use; 0 if none."""
    return library().device_count() if is_available() else 0


def devices() -> list[Device]:
    """All GPUs that modelq can use; CudaUnavailable says what is missing if there is none."""
    opened = library()
    return [Device(index, **opened.device(index)) for index in range(opened.device_count())]


def device_index(device: str) -> int | None:
    """None of "cpu", 0 of "cuda", n of "cuda:n". ValueError: neither."""
    kind, colon, number = device.partition(":")
    if kind == "cpu" and not colon:
        return None
    if kind != "cuda" or colon and not number.isdecimal():
        raise ValueError(f"device {device!r}: expected 'cpu', 'cuda' or 'cuda:0'")
    return int(number or 0)


def cublas_paths() -> list[Path]:
    """The files of cuBLASLt in NVIDIA's installed packages, in the order of sys.path."""
    found = importlib.util.find_spec("nvidia")
    roots = list(found.submodule_search_locations or []) if found is not None else []
    return [path for root in roots for folder in _PACKAGE_FOLDERS if (path := Path(root) / folder / CUBLAS).is_file()]


def cublas_path(opened: _core.CudaLibrary) -> str | None:
    """The cuBLASLt for a library: that of NVIDIA's package, else None, which is where the system has it. The emulated library has one
    within."""
    if opened.is_emulated:
        return str(library_path())
    return next(iter(map(str, cublas_paths())), None)


def describe() -> str:
    """One line for reports: the GPUs, or why there is none."""
    reason = why_not()
    return "; ".join(map(str, devices())) if reason is None else reason
