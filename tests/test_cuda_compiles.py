"""nvcc takes every kernel for the architectures we ship, without a warning. Nothing is run: that takes a GPU. Optimized fully, as in wheels, for
one of them alone: most of the time goes there, and the others are to show that their branches and instructions are taken."""
import ctypes
import os
import shutil

import pytest

from cuda_library import INTERFACE, ROOT, AmaxJob, Error, Matrix, cuda_build, once

# The oldest, without FP8 or FP4 instructions; Hopper, with FP8; Blackwell, with both. Each takes its own branch of cuda/convert.cuh.
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
OPTIMIZED = "sm_90a"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the compiler of the CUDA Toolkit, in PATH")


def compiled(architecture):
    def make(folder):
        cuda_build.compile_all(folder, [architecture], flags=[] if architecture == OPTIMIZED else cuda_build.QUICK)
        cuda_build.library(folder)
    return once(ROOT / "build/cuda" / architecture, make)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture):
    folder = compiled(architecture)
    assert all((folder / f"{path.name}.o").exists() for path in cuda_build.kernels())


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU, and this is what is said without one")
def test_without_a_gpu_the_error_says_what_was_asked_for():
    """The library of nvcc, its CUDA runtime within: it loads on any machine, and a call says in full what failed."""
    c, err = ctypes.CDLL(str(compiled(OPTIMIZED) / "libmodelq_cuda.so")), Error()
    assert c.mq_cuda_is_emulated() == 0 and c.mq_cuda_interface() == INTERFACE
    job = AmaxJob(Matrix(None, 1, 3, 0, 0), 1, 0, 4096)
    assert c.mq_cuda_amax(ctypes.byref(job), None, ctypes.byref(err)) == err.code < 0
    assert err.text.decode().startswith("CUDA kernel amax_zero, grid (1, 1, 1), block (256, 1, 1), 3 maxima at 0x1000: ")
    assert "(cudaError" in err.text.decode()
