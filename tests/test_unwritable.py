"""What cannot be written is said before the work, with the place that cannot be written and why; nothing is left of it, and a second try
elsewhere works."""
import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from modelq.cli import main
from modelq.export import convert_checkpoint, export_hf_checkpoint
from test_quantize import loop_over

NOBODY = 65534


@pytest.fixture(scope="module")
def place(tiny_checkpoint):
    """A folder that everyone reads, with a checkpoint in it, and a folder `closed` that nobody may write to."""
    with tempfile.TemporaryDirectory(prefix="modelq-test-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        shutil.copytree(tiny_checkpoint, root / "checkpoint", copy_function=shutil.copyfile)
        (root / "open").mkdir()
        (root / "open").chmod(0o777)
        (root / "closed").mkdir()
        (root / "closed").chmod(0o555)
        yield root
        (root / "closed").chmod(0o755)


@contextmanager
def no_superuser():
    """root writes wherever it likes."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


CALIBRATION = ("--samples", 2, "--seq-len", 16)
COMMANDS = {
    "quantize": ("quantize", "{root}/checkpoint", "--format", "fp8", *CALIBRATION, "--out", "{out}/export"),
    "progress": ("quantize", "{root}/checkpoint", "--format", "fp8", *CALIBRATION, "--out", "{free}", "--checkpoint-dir", "{out}/progress"),
    "picture": ("autoquantize", "{root}/checkpoint", "--effective-bits", "8", *CALIBRATION, "--no-eval", "--plot-layers", "{out}/layers.png"),
    "search": ("autoquantize", "{root}/checkpoint", "--effective-bits", "8", *CALIBRATION, "--no-eval", "--checkpoint-dir", "{out}/search"),
    "convert": ("convert", "{root}/quantized", "--dialect", "compressed-tensors", "--out", "{out}/converted"),
}


@pytest.fixture(scope="module")
def quantized(place, golden):
    model = modelq.load(place / "checkpoint")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop_over(golden["llama"].calib))
    export_hf_checkpoint(model, place / "quantized")
    return model


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_so_before_the_work(capsys, monkeypatch, place, quantized, tmp_path, name):
    def arguments(out):
        return [argument.format(root=place, out=out, free=(place / "open" if out.parent == place else out.parent) / f"free-{name}") if isinstance(argument, str) else argument
                for argument in COMMANDS[name]]
    assert call(capsys, *arguments(tmp_path))[0] == 0       # the same command elsewhere; and all that is imported late is there now

    def work(*arguments, **options):
        raise AssertionError("it began")
    monkeypatch.setattr("modelq.streaming.run_layer", work)
    with no_superuser():
        code, out, err = call(capsys, *arguments(place / "closed"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(place / "closed") in err and ("cannot be written there" in err or "Permission denied" in err), err
    assert list((place / "closed").iterdir()) == [] and list((place / "open").iterdir()) == []
    (place / "file").write_text("")
    code, out, err = call(capsys, *arguments(place / "file"))
    assert (code, out, err.count("\n")) == (2, "", 1) and str(place / "file") in err, err


@pytest.mark.parametrize("write", [export_hf_checkpoint, modelq.save, lambda model, path: mtq.print_quant_summary(model, path),
                                   lambda model, path: modelq.save_arrays({"a": modelq.quantize_array(np.ones((16, 64), np.float32), "fp8")}, path),
                                   lambda model, path: convert_checkpoint(model.checkpoint.path.parent / "quantized", path, dialect="compressed-tensors")],
                         ids=["export", "save", "summary", "save_arrays", "convert"])
def test_the_api_names_the_place(place, quantized, tmp_path, write):
    write(quantized, tmp_path / "free")
    with no_superuser(), pytest.raises(PermissionError) as caught:
        write(quantized, place / "closed" / "out")
    assert str(place / "closed") in str(caught.value) and list((place / "closed").iterdir()) == []
    write(quantized, tmp_path / "again")


@pytest.fixture
def full_disk(monkeypatch):
    """A disk with room for so many bytes more."""
    def fill(room):
        pwrite = os.pwrite

        def limited(descriptor, data, offset):
            nonlocal room
            if room < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room -= len(data)
            return pwrite(descriptor, data, offset)
        monkeypatch.setattr(os, "pwrite", limited)
    return fill


@pytest.mark.parametrize("name", ["quantize", "progress", "search", "convert"])
def test_a_full_disk_on_the_command_line(capsys, place, quantized, tmp_path, full_disk, monkeypatch, name):
    where = tmp_path / "out"
    arguments = [argument.format(root=place, out=where, free=tmp_path / "free") if isinstance(argument, str) else argument
                 for argument in COMMANDS[name]]
    full_disk(2000)
    code, out, err = call(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and "No space left on device" in err and str(where) in err, err
    assert not (tmp_path / "free").exists() and not (where / "export").exists() and not (where / "converted").exists()
    assert not [path for path in tmp_path.rglob("*.partial")]
    monkeypatch.undo()
    assert call(capsys, *arguments)[0] == 0         # what is left of progress hinders nobody


def test_a_full_disk_leaves_the_model_usable(place, golden, tmp_path, full_disk, monkeypatch):
    """Progress that cannot be kept ends the calibration; the model is as it was, and can be calibrated without."""
    model, loop = modelq.load(place / "checkpoint"), loop_over(golden["llama"].calib)
    plain = model(golden["llama"].calib[:1]).logits
    full_disk(3000)
    with pytest.raises(OSError, match="No space left"):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop, checkpoint_dir=tmp_path / "progress")
    np.testing.assert_array_equal(model(golden["llama"].calib[:1]).logits, plain)
    with pytest.raises(OSError, match="No space left"):
        modelq.save(mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop), tmp_path / "saved")
    with pytest.raises(FileNotFoundError):          # rather than half of it
        modelq.restore(modelq.load(place / "checkpoint"), tmp_path / "saved")
    monkeypatch.undo()
    again = mtq.quantize(modelq.load(place / "checkpoint"), mtq.FP8_DEFAULT_CFG, loop)
    modelq.save(model, tmp_path / "saved")
    for one in (model, modelq.restore(modelq.load(place / "checkpoint"), tmp_path / "saved")):
        np.testing.assert_array_equal(one(golden["llama"].calib[:1]).logits, again(golden["llama"].calib[:1]).logits)
