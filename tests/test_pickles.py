"""The reader of torch's files: hostile and damaged ones are refused by name, and nothing of them is executed."""
import argparse
import collections
import io
import os
import pickle
import random
import re
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelq.checkpoint import open_checkpoint
from modelq.checkpoint.megatron.pickles import Opaque, Refused, read_pickle
from modelq.checkpoint.megatron.places import Folder
from modelq.checkpoint.megatron.torch_file import TORCH_NAMES, TorchFile

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
                     lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
                     | st.dictionaries(st.text(), inner), max_leaves=20)


@pytest.mark.parametrize("protocol", range(6))
@given(value=plain)
@settings(max_examples=60, deadline=None)
def test_plain_values_are_what_pickle_itself_reads(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), TORCH_NAMES) == value


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_the_list(protocol):
    twice = [1]
    value = {"twice": (twice, twice), "set": {1, 2}, "frozen": frozenset({3}), "ordered": collections.OrderedDict(a=1), "bytes": bytearray(b"x")}
    read = read_pickle(pickle.dumps(value, protocol), TORCH_NAMES)
    assert read == value and read["twice"][0] is read["twice"][1]
    names = read_pickle(pickle.dumps(argparse.Namespace(layers=3), max(protocol, 2)), TORCH_NAMES)
    assert isinstance(names, Opaque) and names.get("layers") == 3


class Calls:
    def __init__(self, function, *arguments):
        self.made = (function, arguments)

    def __reduce__(self):
        return self.made


HOSTILE = {
    "posix.system": Calls(os.system, "touch executed"),
    "builtins.eval": Calls(eval, "open('executed', 'w')"),
    "builtins.exec": Calls(exec, "open('executed', 'w')"),
    "builtins.getattr": Calls(getattr, {}, "system"),
    "builtins.__import__": Calls(__import__, "os"),
    "io.open": Calls(open, "executed", "w"),
    "subprocess.Popen": Calls(__import__("subprocess").Popen, ["touch", "executed"]),
    "random.Random": random.Random(0),
    "collections.ChainMap": collections.ChainMap({}),
    "importlib.import_module": Calls(__import__("importlib").import_module, "antigravity"),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_by_name(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, asked = pickle.dumps({"model": HOSTILE[name]}, protocol), []

    class Spy(pickle.Unpickler):
        """The first name outside of the list that pickle itself would look up."""

        def find_class(self, module, name):
            if f"{module}.{name}" not in TORCH_NAMES:
                asked.append(f"{module}.{name}")
                raise ValueError
            return super().find_class(module, name)

    with pytest.raises(ValueError):
        Spy(io.BytesIO(data)).load()
    with pytest.raises(Refused, match=f"asks for {re.escape(asked[0])}, which is not on the list"):
        read_pickle(data, TORCH_NAMES)
    assert not os.listdir(tmp_path)


HAND_WRITTEN = {
    "a name by INST": b"(S'touch executed'\nios\nsystem\n.",
    "a name by OBJ": b"(cos\nsystem\nS'touch executed'\no.",
    "an extension": b"\x80\x02\x82\x01.",
    "a call of what is no name": b"(lS'x'\n\x85R.",
    "a state for a list": b"(l}b.",
    "a state for a text": b"S'x'\n}b.",
    "an attribute of a name": b"ccollections\nOrderedDict.__class__\n.",
    "a name with arguments by keyword": b"\x80\x04cargparse\nNamespace\n)}S'a'\nK\x01s\x92.",
    "an object outside": b"\x80\x02S'x'\nQ.",
    "a name of a list": b"cargparse\nNamespace\n(S'a'\nlR.",
    "no end": b"\x80\x04}",
    "nothing on the stack": b"R.",
    "two values": b"K\x01K\x02.",
    "a key that is a list": b"}(lK\x01s.",
    "a memory that is empty": b"h\x05.",
    "a mark as a value": b"(\x85.",
    "a text that is too long": b"X\xff\xff\xff\x7fabc.",
    "no such opcode": b"\xfe.",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HAND_WRITTEN)
def test_hand_written_pickles_are_errors(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        read_pickle(HAND_WRITTEN[what], TORCH_NAMES)
    assert not os.listdir(tmp_path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_pickles_are_errors_or_data(data):
    """A byte changed anywhere: an error of the right kind, or a value of the kinds that can be built."""
    blob = bytearray(pickle.dumps({"a": [1, (2, "x")], "b": argparse.Namespace(c={1.5: b"y"}), "o": collections.OrderedDict(k=None)}, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_pickle(bytes(blob), TORCH_NAMES)
    except ValueError:
        pass


# Files of torch.save, written by hand --------------------------------------------------------------------------------------------

class Typed:
    """Pickles as a call of a name, whatever it is."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Pickler(pickle._Pickler):
    """Writes Typed objects as calls of names that this process does not have, and storages as persistent ids."""

    def persistent_id(self, value):
        return ("storage", Typed(f"torch.{value[1]}Storage"), value[2], "cpu", value[3]) if isinstance(value, tuple) and value[:1] == ("STORAGE",) else None

    def save(self, value, save_persistent_id=True):
        if not isinstance(value, Typed):
            return super().save(value, save_persistent_id)
        module, _, name = value.name.rpartition(".")
        self.write(b"c" + f"{module}\n{name}\n".encode())
        if value.arguments:
            super().save(value.arguments)
            self.write(b"R")
        return None


def tensor(key="0", kind="Float", count=6, offset=0, shape=(2, 3), strides=(3, 1)):
    return Typed("torch._utils._rebuild_tensor_v2", ("STORAGE", kind, key, count), offset, shape, strides, False, collections.OrderedDict())


def write(path, value, members=None, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for name, data in (members if members is not None else {"data/0": np.arange(6, dtype=np.float32).tobytes()}).items():
            archive.writestr(f"archive/{name}", data)
    return path


def opened(path):
    return TorchFile(Folder(path.parent).region(path.name))


def test_tensors_are_views_of_the_file(tmp_path):
    file = opened(write(tmp_path / "x.pt", {"whole": tensor(), "turned": tensor(shape=(3, 2), strides=(1, 3)), "part": tensor(offset=4, shape=(2,), strides=(1,)),
                                            "empty": tensor(shape=(0, 3))}))
    values = {name: file.read(value) for name, value in file.value.items()}
    np.testing.assert_array_equal(values["whole"], np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(values["turned"], np.arange(6, dtype=np.float32).reshape(2, 3).T)
    np.testing.assert_array_equal(values["part"], [4, 5])
    assert values["empty"].shape == (0, 3) and not values["whole"].flags.writeable and not values["whole"].flags.owndata


@pytest.mark.parametrize("bad, words", [
    (dict(offset=1), "beyond its storage"), (dict(shape=(2, 4), strides=(4, 1)), "beyond its storage"), (dict(shape=(1 << 40, 3)), "beyond"),
    (dict(strides=(1 << 60, 1)), "beyond"), (dict(key="1"), "no member"), (dict(key="../../etc/passwd"), "no member")])
def test_tensors_outside_of_their_storage_are_refused(bad, words, tmp_path):
    file = opened(write(tmp_path / "x.pt", tensor(**bad)))
    with pytest.raises(ValueError, match=words):
        file.read(file.value)


@pytest.mark.parametrize("bad", [dict(offset=-1), dict(shape=(-2, 3)), dict(strides=(-3, 1)), dict(strides=(1,)), dict(offset="x"), dict(kind="Quantized")])
def test_tensors_that_make_no_sense_are_refused(bad, tmp_path):
    with pytest.raises(ValueError):
        opened(write(tmp_path / "x.pt", tensor(**bad)))


def test_other_archives_are_refused(tmp_path):
    for name, made, words in [
            ("compressed", lambda path: write(path, 1, compression=zipfile.ZIP_DEFLATED), "is compressed"),
            ("no zip", lambda path: path.write_bytes(b"\x80\x02}q\x00."), "no zip archive"),
            ("cut short", lambda path: path.write_bytes(write(tmp_path / "whole", tensor()).read_bytes()[:-30]), "no zip archive"),
            ("big endian", lambda path: write(path, 1, {"byteorder": b"big"}), "byte order"),
            ("empty", lambda path: path.write_bytes(b""), "empty")]:
        path = tmp_path / name
        made(path)
        with pytest.raises(ValueError, match=words):
            opened(path)


def test_a_hostile_checkpoint_does_nothing(tmp_path, monkeypatch):
    """Whole: the folder of a training run, by modelq.load's way in."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    write(folder / "model_optim_rng.pt", {"model": {"x": tensor()}, "args": Typed("posix.system", "touch executed")})
    with pytest.raises(ValueError, match="asks for posix.system"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_checkpoint(tmp_path)


def test_a_hostile_nemo_archive_does_nothing(tmp_path):
    import tarfile

    for mode in ("w", "w:gz"):
        with tarfile.open(tmp_path / "x.nemo", mode) as archive:
            for name in ("model_config.yaml", "../outside.txt"):
                entry = tarfile.TarInfo(name)
                entry.size = 2
                archive.addfile(entry, io.BytesIO(b"{}"))
        with pytest.raises(ValueError, match="a place outside of it"):
            open_checkpoint(tmp_path / "x.nemo")
        assert os.listdir(tmp_path) == ["x.nemo"] and not (tmp_path.parent / "outside.txt").exists()
    (tmp_path / "y.nemo").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match="no readable tar archive"):
        open_checkpoint(tmp_path / "y.nemo")
