"""tests/gpu/run.sh, which does everything that takes a GPU: what it says without one, and that its comparisons and benches run, by the
emulated library."""
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from cuda_library import ROOT, SANITIZED, library_to_test

spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests/gpu/run.py")
gpu_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_run)

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
    """Every script of tests/gpu to its last line, tiny: each row that a GPU will get."""
    done = run("--emulated", "--only", "bench", MODELQ_CUDA_EMULATED=str(library_to_test()))
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("copy", "amax per tensor", "quantize nvfp4", "fake-quantize FP8", "rmsnorm", "attention 1 x 40", "its gradients", "of a step",
                 "tiny, 3 x 8 tokens, calibration forward", "tiny, weights alone", "tiny, layers alone", "tiny, weights hidden behind layers",
                 "tiny, torch"):
        assert f" {what}" in done.stdout, what
    assert "% of a copy" in done.stdout and "% of what can be" in done.stdout and "goal" not in done.stdout
    assert "not measured" in done.stdout or "% of torch" in done.stdout
    for kind in ("bf16", "fp8 tensor", "fp8 channel, token", "fp8 block", "int8 channel, token", "mxfp8", "nvfp4"):       # of bench_gemm.py
        assert f"| {kind} | 128 x 256 | 4 |" in done.stdout, kind


@pytest.mark.parametrize("row, is_bad, said", [
    (dict(share=0.84, has_goal=True), True, "84.0% of a copy (goal 85%)   <-- NOT GOOD"), (dict(share=0.86, has_goal=True), False, "(goal 85%)"),
    (dict(share=0.86, has_goal=True, of="torch", goal=0.9), True, "86.0% of torch (goal 90%)   <-- NOT GOOD"),
    (dict(share=0.1, has_goal=False), False, "10.0% of a copy"), (dict(), False, "5.0 GB/s")])
def test_goals(capsys, row, is_bad, said):
    """What a GPU's figures would be told."""
    table = gpu_run.Table()
    gpu_run.add_row(table, dict(what="x", milliseconds=1.0, rate=5.0, unit="GB/s", **row), False)
    assert table.is_bad == is_bad and said in capsys.readouterr().out
    gpu_run.add_row(table, dict(what="y", note="not measured: no torch"), False)
    assert table.is_bad == is_bad and "not measured: no torch" in capsys.readouterr().out


def test_a_compute_sanitizer_is_asked_for_all_its_tools(tmp_path, capsys, monkeypatch):
    """What run.py would have one do; this one only says what it was asked for."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@" >> "$0.asked"\n[ "$2" = racecheck ] && exit 9\necho "3 passed"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    table = gpu_run.Table()
    gpu_run.sanitizer(table, dict(os.environ))
    asked = (tmp_path / "compute-sanitizer.asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == ["memcheck", "racecheck", "synccheck", "initcheck"] and table.is_bad
    assert all("-m pytest" in line and "test_cuda_operations.py" in line for line in asked)
    told = capsys.readouterr().out
    assert told.count("NOT GOOD") == 1 and "racecheck" in told.split("NOT GOOD")[0].splitlines()[-1]


def test_the_files_of_the_comparisons_are_there():
    for name in gpu_run.PARITY:
        assert (ROOT / f"tests/test_cuda_{name}.py").exists() or (ROOT / f"tests/test_{name}.py").exists(), name


def test_every_script_is_run():
    """A script that nobody starts here would fall on a GPU."""
    text = (ROOT / "tests/gpu/run.py").read_text() + "".join(path.read_text() for path in (ROOT / "tests/gpu").glob("bench*.py"))
    for path in (ROOT / "tests/gpu").glob("*.py"):
        assert path.name == "run.py" or path.name in text or f"from {path.stem} import" in text, path.name
