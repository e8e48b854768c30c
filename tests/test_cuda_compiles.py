"""nvcc takes every kernel for the architectures we ship, without a warning. Nothing is run: that takes a GPU."""
import shutil

import pytest

from cuda_library import ROOT, cuda_build, once

# The oldest, without FP8 or FP4 instructions; Hopper, with FP8; Blackwell, with both. Each takes its own branch of cuda/convert.cuh.
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the compiler of the CUDA Toolkit, in PATH")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture):
    def make(folder):
        cuda_build.run(cuda_build.nvcc_commands(folder, [architecture]))
    folder = once(ROOT / "build" / f"cuda-{architecture}", make)
    assert len(list(folder.glob("*.o"))) == len(cuda_build.kernels())
