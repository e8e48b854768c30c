"""Without any one of their barriers the CUDA kernels fail the tests of the emulated library."""
import shutil
import subprocess
import sys

import pytest

from cuda_library import ROOT, SANITIZED, library_to_test


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or SANITIZED, reason="needs g++, and objects without sanitizers")
def test_no_barrier_is_missed():
    objects = library_to_test().parent
    options = ["--objects", str(objects)] if (objects / "digest").exists() else []       # another library that is to be tested has none
    done = subprocess.run([sys.executable, str(ROOT / "scripts/cuda_mutants.py"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = sorted((ROOT / "cuda").glob("*.cu*"))
    assert done.stdout.count(" noticed\n") >= sum(path.read_text().count("__syncthreads();") for path in kernels) > 0
