"""tests/gpu/run.sh, which does everything that takes a GPU: what it says without one, and that its comparisons and benches run, by the
emulated library."""
import os
import shutil
import subprocess
import sys

import pytest

from cuda_library import ROOT, SANITIZED, library_to_test

pytestmark = [pytest.mark.skipif(SANITIZED, reason="starts processes of its own"),
              pytest.mark.skipif("MODELQ_CUDA_LIBRARY" in os.environ, reason="it is running these tests")]


def run(*arguments, **environment):
    known = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODELQ_CUDA")}
    return subprocess.run([str(ROOT / "tests/gpu/run.sh"), *arguments], cwd=ROOT / "tests", capture_output=True, text=True,
                          env={**kept, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(known), **environment})


def test_without_a_gpu(tmp_path):
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(PATH=str(tmp_path))      # where there is no nvidia-smi
    assert done.returncode == 3 and "There is no GPU here" in done.stdout and "nothing measured" in done.stdout, done.stdout + done.stderr


def test_a_gpu_but_no_compiler(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0'\n")
    smi.chmod(0o755)
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(PATH=str(tmp_path), CUDA_HOME=str(tmp_path), NVCC="")
    assert done.returncode == 4 and "NVIDIA H200, but no nvcc" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_parity_by_emulation():
    done = run("--emulated", "--only", "parity", "--files", "experts", "attention", "--tests", "(dispatch or cache) and random",
               MODELQ_CUDA_EMULATED=str(library_to_test()))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("parity")]
    assert len(lines) == 2
    for name in ("experts", "attention"):
        assert any(f"test_cuda_{name}.py" in line and " passed" in line for line in lines), done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_differs_is_said(tmp_path):
    """A library that is none."""
    done = run("--emulated", "--only", "parity", "--files", "operations", "--tests", "swiglu and random", MODELQ_CUDA_EMULATED=str(tmp_path / "none.so"))
    assert done.returncode == 1 and "NOT GOOD" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_benches_by_emulation():
    done = run("--emulated", "--only", "bench", MODELQ_CUDA_EMULATED=str(library_to_test()))
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("copy", "amax per tensor", "quantize nvfp4", "fake-quantize FP8", "rmsnorm", "attention 1 x 40", "its gradients", "of a step"):
        assert f" {what}" in done.stdout
    assert "% of a copy" in done.stdout and "goal" not in done.stdout
