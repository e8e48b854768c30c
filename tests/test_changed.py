"""Weights that were rounded, in front of a checkpoint."""
import copy
import tempfile

import numpy as np
import pytest

from modelq import _core
from modelq.changed import ChangedCheckpoint, Rounded
from modelq.checkpoint import open_checkpoint

NAME, OTHER = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
SCHEMES = [("int4", 32), ("nvfp4", None), ("fp8", None), ("int8", None)]


@pytest.fixture
def checkpoint(golden):
    with open_checkpoint(golden["llama"].source) as original:
        yield ChangedCheckpoint(original)


def rounded(checkpoint, scheme, size, name=NAME):
    weight = checkpoint.original.read(name)
    return Rounded(_core.quantize(weight, scheme, block_size=size), scheme, size, weight.dtype.name)


@pytest.mark.parametrize("scheme, size", SCHEMES)
def test_what_was_put_is_read(checkpoint, scheme, size):
    before, weight = np.array(checkpoint.original.read(NAME)), rounded(checkpoint, scheme, size)
    checkpoint.put(NAME, weight)
    expected = _core.dequantize(weight.parts, scheme, weight.dtype, size)
    np.testing.assert_array_equal(checkpoint.read(NAME), expected)
    assert checkpoint.read(NAME).dtype == before.dtype and not np.array_equal(expected, before)
    np.testing.assert_array_equal(checkpoint.original.read(NAME), before)
    np.testing.assert_array_equal(checkpoint.read(OTHER), checkpoint.original.read(OTHER))
    assert checkpoint.tensors is checkpoint.original.tensors and checkpoint.config is checkpoint.original.config


@pytest.mark.parametrize("scheme, size", SCHEMES)
def test_parts_are_kept_in_a_file_and_are_read_only(checkpoint, scheme, size):
    weight = rounded(checkpoint, scheme, size)
    parts = {role: np.array(part) for role, part in weight.parts.items()}
    checkpoint.put(NAME, weight)
    assert checkpoint.changed[NAME].parts.keys() == parts.keys()
    for role, part in checkpoint.changed[NAME].parts.items():
        assert (part.dtype, part.shape, part.tobytes()) == (parts[role].dtype, parts[role].shape, parts[role].tobytes())
        if part.nbytes >= 64:
            assert not part.flags.writeable and not part.flags.owndata
            with pytest.raises(ValueError, match="read-only"):
                part[...] = 0


def test_the_last_one_counts(checkpoint):
    for name, (scheme, size) in [(NAME, SCHEMES[0]), (OTHER, SCHEMES[1]), (NAME, SCHEMES[2])]:
        checkpoint.put(name, rounded(checkpoint, scheme, size, name))
    for name, scheme in ((NAME, "fp8"), (OTHER, "nvfp4")):
        weight = rounded(checkpoint, scheme, None, name)
        np.testing.assert_array_equal(checkpoint.read(name), _core.dequantize(weight.parts, scheme, weight.dtype, None))


def test_release_reaches_the_original_and_loses_nothing(checkpoint, monkeypatch):
    checkpoint.put(NAME, rounded(checkpoint, "int4", 32))
    before, released = checkpoint.read(NAME), []
    release = checkpoint.original.release
    monkeypatch.setattr(checkpoint.original, "release", lambda names=None: (released.append(names), release(names)))
    checkpoint.release([NAME, OTHER])
    checkpoint.release()
    assert released == [[NAME, OTHER], None]
    np.testing.assert_array_equal(checkpoint.read(NAME), before)


def test_a_copy_has_what_was_put(checkpoint):
    checkpoint.put(NAME, rounded(checkpoint, "int4", 32))
    np.testing.assert_array_equal(copy.copy(checkpoint).read(NAME), checkpoint.read(NAME))


def test_nothing_stays_in_the_folder(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_checkpoint(golden["llama"].source) as original:
        checkpoint = ChangedCheckpoint(original)
        checkpoint.put(NAME, rounded(checkpoint, "int4", 32))
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_weight_as_it_was(checkpoint, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return lambda *arguments: 0

        def write(self, data):
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        checkpoint.put(NAME, rounded(checkpoint, "int4", 32))
    np.testing.assert_array_equal(checkpoint.read(NAME), checkpoint.original.read(NAME))
