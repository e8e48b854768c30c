"""modelq.cuda: how the CUDA library is found and opened, and what is said where something is missing. No GPU: the emulated library, which
says of itself what the environment tells it, and libraries made wrong."""
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_library import INTERFACE, library_to_test

import modelq._core as core
from modelq import cuda
from modelq.cli import main


@pytest.fixture(scope="module")
def emulated():
    return library_to_test()


@pytest.fixture
def use(monkeypatch, emulated):
    def choose(path=emulated, **machine):
        monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(path))
        for name, value in machine.items():
            monkeypatch.setenv(f"MODELQ_SHIM_{name.upper()}", str(value))
    return choose


def compiled(folder: Path, text: str) -> Path:
    source, made = folder / "fake.c", folder / "libfake.so"
    source.write_text(text)
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    return made


def test_a_device_is_described(use):
    use(devices=2, memory=3 << 30)
    assert cuda.is_available() and cuda.why_not() is None and cuda.device_count() == 2
    first, second = cuda.devices()
    assert (first.index, first.name, second.name) == (0, "emulated device 0", "emulated device 1")
    assert first.total_nbytes == 3 << 30 and 0 < first.free_nbytes <= first.total_nbytes
    assert str(first).startswith("cuda:0 emulated device 0, sm_80, 3.2 of 3.2 GB free")
    assert cuda.library().is_emulated and cuda.library() is cuda.library()


def test_a_missing_driver_an_old_one_and_no_gpu_are_told_apart(use, capsys):
    use(driver=0)
    assert "there is no NVIDIA driver (libcuda.so.1) on this machine: install version 580" in cuda.why_not()
    use(driver=12040)
    assert "the NVIDIA driver is too old: it runs CUDA 12.4, this library was made for CUDA 13.0" in cuda.why_not()
    use(driver=13000, devices=0)
    assert "finds no GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)" in cuda.why_not()
    assert not cuda.is_available() and cuda.device_count() == 0
    with pytest.raises(cuda.CudaUnavailable, match="Everything runs on the CPU without it"):
        cuda.devices()
    assert main(["formats"]) == 0
    assert "GPU: no GPU for modelq: the NVIDIA driver finds no GPU" in capsys.readouterr().out


def test_a_missing_library_says_how_to_get_it(use, monkeypatch, tmp_path):
    use(tmp_path / "nowhere.so")
    assert cuda.why_not() == f"MODELQ_CUDA_LIBRARY names {tmp_path / 'nowhere.so'}, which is not there"
    monkeypatch.delenv("MODELQ_CUDA_LIBRARY")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "none.so")
    assert "MODELQ_CUDA=1 pip install ." in cuda.why_not() and "pip install modelq[cuda]" in cuda.why_not()


def test_a_file_that_is_no_library(use, tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    use(tmp_path / "text.so")
    assert "the CUDA library does not open: " in cuda.why_not() and "text.so" in cuda.why_not()


def test_another_interface_is_refused(use, tmp_path):
    use(compiled(tmp_path, "int mq_cuda_interface(void) { return 999; }"))
    reason = cuda.why_not()
    assert f"has version 999 of the interface, this modelq needs {INTERFACE}" in reason and "MODELQ_CUDA=1 pip install ." in reason


def test_a_missing_call_is_named(use, tmp_path):
    use(compiled(tmp_path, "int x;"))
    assert "lacks mq_cuda_interface" in cuda.why_not()
    other = tmp_path / "other"
    other.mkdir()
    use(compiled(other, f"int mq_cuda_interface(void) {{ return {INTERFACE}; }}"))
    assert "lacks mq_cuda_is_emulated: build it from modelq's sources of this version" in cuda.why_not()


def test_devices_that_do_not_exist(use, emulated):
    use(devices=1)
    library = core.CudaLibrary(str(emulated))
    for index in (-1, 1, 2**40):
        with pytest.raises(ValueError, match="there are 1, from cuda:0 on"):
            library.device(index)
    with pytest.raises(TypeError):
        library.device("0")


@pytest.mark.parametrize("text, index", [("cpu", None), ("cuda", 0), ("cuda:3", 3)])
def test_names_of_devices(text, index):
    assert cuda.device_index(text) == index


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "cuda:-1"])
def test_wrong_names_of_devices(text):
    with pytest.raises(ValueError, match="expected 'cpu', 'cuda' or 'cuda:0'"):
        cuda.device_index(text)


def test_cublas_is_found_in_nvidias_packages(monkeypatch, tmp_path):
    """Laid out as in nvidia-cublas 13 (nvidia/cu13/lib), a folder that several distributions share."""
    folder = tmp_path / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    compiled(folder, "int mq_here;").rename(folder / cuda.CUBLAS)
    monkeypatch.syspath_prepend(tmp_path)
    assert cuda.cublas_paths()[0] == folder / cuda.CUBLAS
    assert cuda.cublas_path(SimpleNamespace(is_emulated=False)) == str(folder / cuda.CUBLAS)
