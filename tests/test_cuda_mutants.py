"""Without any one of their barriers the CUDA kernels fail the tests of the emulated library."""
import shutil
import subprocess
import sys

import pytest

from cuda_library import ROOT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_barrier_is_missed():
    done = subprocess.run([sys.executable, str(ROOT / "scripts/cuda_mutants.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = sorted((ROOT / "cuda").glob("*.cu*"))
    assert done.stdout.count(" noticed\n") >= sum(path.read_text().count("__syncthreads();") for path in kernels) > 0
