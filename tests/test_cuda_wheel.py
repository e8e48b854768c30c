"""Wheels: MODELQ_CUDA=1 puts the GPU's library beside the extension, which links nothing of CUDA with or without it."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cuda_library import ROOT, cuda_build

LIBRARY = "modelq/_cuda/libmodelq_cuda.so"


def test_architectures():
    assert cuda_build.architectures_of("") == cuda_build.SHIPPED
    assert cuda_build.architectures_of("80;90a") == cuda_build.architectures_of("sm_80, sm_90a") == ["sm_80", "sm_90a"]
    assert cuda_build.architectures_of("90+PTX compute_100") == ["sm_90", "compute_90", "compute_100"]
    for wrong in ("sm80", "9.0", "90b", "90+SASS"):
        with pytest.raises(ValueError, match="MODELQ_CUDA_ARCHITECTURES: .* is no architecture"):
            cuda_build.architectures_of(wrong)


def test_shipped_architectures_are_those_that_are_tested():
    import test_cuda_compiles

    assert set(test_cuda_compiles.ARCHITECTURES) <= set(cuda_build.SHIPPED)
    assert any(name.startswith("compute_") for name in cuda_build.SHIPPED)


def test_a_missing_compiler_is_said_before_anything_is_built(tmp_path):
    environment = {"MODELQ_CUDA": "1", "CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "MODELQ_CUDA=1: no nvcc in PATH, CUDA_HOME or NVCC: install the CUDA Toolkit 13" in done.stderr
    assert not list(tmp_path.rglob("*.o"))


def sources(folder: Path) -> Path:
    for name in ("csrc", "cuda", "modelq"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_cuda"))
    (folder / "scripts").mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "scripts/cuda_build.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def needed_libraries(library: Path) -> str:
    return subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(cuda_build.nvcc() is None, reason="needs nvcc, the compiler of the CUDA Toolkit, in PATH")
def test_the_wheel_has_the_library_and_the_extension_does_not_need_it(tmp_path):
    environment = {**os.environ, "MODELQ_CUDA": "1", "MODELQ_CUDA_ARCHITECTURES": "90a", "MODELQ_TESTING": "0",
                   "NVCC_APPEND_FLAGS": " ".join(cuda_build.QUICK)}       # what is optimized is in tests/test_cuda_compiles.py
    environment.pop("MODELQ_CUDA_LIBRARY", None)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(sources(tmp_path / "tree"))], check=True, env=environment)
    wheel, = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY in archive.namelist() and len([name for name in archive.namelist() if name.endswith(".so")]) == 2
        archive.extractall(tmp_path / "installed")
    extension, = (tmp_path / "installed/modelq").glob("_core*.so")
    for library in (extension, tmp_path / "installed" / LIBRARY):
        assert "cuda" not in needed_libraries(library) and "cublas" not in needed_libraries(library)
    code = "import modelq.cuda as c; print(c.library_path()); print(c.why_not())"
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert str(tmp_path / "installed" / LIBRARY) in said
    if not os.path.exists("/dev/nvidiactl"):
        assert "there is no NVIDIA driver (libcuda.so.1) on this machine" in said
