"""Writing: the bytes of the safetensors library, shards of transformers, folders that appear whole or not at all."""
from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import TensorSpec, serialize_file

from modelq.checkpoint import TensorInfo, open_checkpoint
from modelq.checkpoint import atomic
from modelq.checkpoint.safetensors import DTYPES, SafetensorsFile, numpy_dtype
from modelq.checkpoint.writer import ShardedWriter, atomic_directory, parse_size

ROOT = Path(__file__).parent.parent


def info_of(name: str, array: np.ndarray, dtype: str | None = None) -> TensorInfo:
    return TensorInfo(name, dtype or array.dtype.name, array.shape, array.nbytes)


def random_arrays(rng: np.random.Generator, count: int = 40) -> dict[str, tuple[np.ndarray, str]]:
    """Every dtype, odd shapes and names."""
    dtypes = [name for name, bits in DTYPES.values() if bits != 6]
    shapes = [(3, 5), (), (0, 4), (7,), (1, 2, 3)]
    result = {}
    for i in range(count):
        dtype, shape = dtypes[i % len(dtypes)], shapes[i % len(shapes)]
        if dtype.endswith("_x2"):
            shape = (2, 3)
        target = numpy_dtype(dtype)
        raw = rng.bytes(int(np.prod(shape)) * target.itemsize)
        array = np.frombuffer(raw, target).reshape(shape) if dtype != "bool" else rng.integers(0, 2, shape).astype(bool)
        result[f"model.layers.{i * 7 % count}.wé\"{i % 3}.weight"] = (array, dtype)
    return result


def library_bytes(path: Path, arrays: dict[str, tuple[np.ndarray, str]], metadata: dict | None) -> bytes:
    specs = {n: TensorSpec(dtype=d, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes) for n, (a, d) in arrays.items()}
    serialize_file(specs, path, metadata=metadata)
    return path.read_bytes()


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}, {"ключ": 'a"\n'}])
def test_bytes_are_the_librarys(tmp_path, metadata):
    arrays = random_arrays(np.random.default_rng(0))
    want = library_bytes(tmp_path / "library", arrays, metadata or None)
    for order in (list(arrays), sorted(arrays), list(reversed(arrays))):
        folder = tmp_path / str(order.index(next(iter(arrays))))
        folder.mkdir(exist_ok=True)
        plan = [info_of(name, *arrays[name]) for name in arrays]
        with ShardedWriter(folder, plan, metadata=metadata) as writer:
            for name in order:
                writer.write(name, arrays[name][0])
        assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
        assert (folder / "model.safetensors").read_bytes() == want
        (folder / "model.safetensors").unlink()


def test_plain_numpy_front_end_agrees_and_reads_back(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {f"t{i}": rng.standard_normal((i, 3)).astype(t) for i, t in enumerate([np.float32, np.float16, ml_dtypes.bfloat16, np.int8])}
    safetensors.numpy.save_file(arrays, tmp_path / "library", metadata={"format": "pt"})
    with ShardedWriter(tmp_path, [info_of(n, a) for n, a in arrays.items()]) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()
    back = SafetensorsFile(tmp_path / "model.safetensors")
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, array in arrays.items():
        assert back.read(name).tobytes() == array.tobytes() == theirs[name].tobytes()


def test_views_of_every_kind_are_written_as_values(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    frozen = base.copy()
    frozen.flags.writeable = False
    misaligned = np.frombuffer(b"x" + base.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 6)
    arrays = {"t": base.T, "s": base[::2, ::3], "r": base[::-1], "f": np.asfortranarray(base), "frozen": frozen, "m": misaligned}
    with ShardedWriter(tmp_path, [info_of(n, a) for n, a in arrays.items()]) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    back = SafetensorsFile(tmp_path / "model.safetensors")
    assert all(np.array_equal(back.read(name), array) for name, array in arrays.items())


def hub_split(arrays: dict[str, np.ndarray], size: int) -> dict[str, list[str]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        arrays, get_storage_size=lambda a: a.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=size
    )
    return split.filename_to_tensors, split.tensor_to_filename, split.metadata


@pytest.mark.parametrize("size", [1, 40, 64, 100, 399, 400, 10**6])
def test_shards_are_transformers(tmp_path, size):
    pytest.importorskip("huggingface_hub")
    rng = np.random.default_rng(size)
    arrays = {f"w{i}": rng.standard_normal(int(rng.integers(1, 13))).astype(np.float32) for i in range(20)}
    files, places, metadata = hub_split(arrays, size)
    with ShardedWriter(tmp_path, [info_of(n, a) for n, a in arrays.items()], max_shard_size=size) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])
    assert writer.total_size == metadata["total_size"] and {file.name for file in writer.files} == set(files)
    for file, names in files.items():
        assert set(SafetensorsFile(tmp_path / file).tensors) == set(names)
    if len(files) > 1:
        text = (tmp_path / "model.safetensors.index.json").read_text()
        want = {"metadata": metadata, "weight_map": places}
        assert text == json.dumps(want, indent=2, sort_keys=True) + "\n"
    assert len(list(tmp_path.iterdir())) == len(files) + (len(files) > 1)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(np.array_equal(checkpoint.read(name), array) for name, array in arrays.items())


@pytest.mark.parametrize(("text", "value"), [(5, 5), ("5", 5), ("10GB", 10**10), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("2KB", 2000)])
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "0", 0, -1, "ten", "1 XB", "1e9", None, "0.5"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="a size must be"):
        parse_size(text)


A = np.arange(6, dtype=np.float32)
PLAN = [info_of("a", A), info_of("b", A)]


def wrong_name(writer):
    writer.write("c", A)


def wrong_dtype(writer):
    writer.write("a", A.astype(np.float64))


def wrong_byte_order(writer):
    writer.write("a", A.astype(">f4"))


def wrong_shape(writer):
    writer.write("a", A.reshape(2, 3))


def twice(writer):
    writer.write("a", A)
    writer.write("a", A)


def twice_after_the_end(writer):
    writer.write("a", A)
    writer.write("b", A)
    writer.write("a", A)


def one_missing(writer):
    writer.write("a", A)


@pytest.mark.parametrize(
    ("action", "message"),
    [(wrong_name, "'c' is not in the plan"), (wrong_dtype, "planned as float32 .* got float64"), (wrong_byte_order, "got >f4"),
     (wrong_shape, r"planned as float32 \(6,\), got float32 \(2, 3\)"), (twice, "'a' was written twice"),
     (twice_after_the_end, "'a' was written twice"), (one_missing, "1 planned tensors were not written .* 'b'")],
)  # fmt: skip
@pytest.mark.parametrize("size", [24, 1000])
def test_a_broken_promise_leaves_nothing(action, message, size, tmp_path):
    with pytest.raises(ValueError, match=message):
        with ShardedWriter(tmp_path, PLAN, max_shard_size=size) as writer:
            action(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "message"),
    [([], "no tensors"), ([*PLAN, PLAN[0]], "'a' .*twice"), ([TensorInfo("__metadata__", "float32", (1,), 4)], "reserved"),
     ([TensorInfo("a", "float6_e2m3fn", (4,), 3)], "does not fit"), ([TensorInfo("a", "str", (4,), 3)], "does not fit"),
     ([TensorInfo("a", "float32", (-1,), 4)], "does not fit"), ([TensorInfo("a", "float4_e2m1fn_x2", (), 1)], "does not fit")],
)  # fmt: skip
def test_bad_plans(plan, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ShardedWriter(tmp_path, plan)


def test_existing_files_are_not_touched(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError), ShardedWriter(tmp_path, PLAN) as writer:
        writer.write("a", A)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_no_space_is_seen_before_work_begins(tmp_path):
    with pytest.raises(OSError, match="it needs .* are free") as caught:
        ShardedWriter(tmp_path, [TensorInfo("a", "uint8", (1 << 60,), 1 << 60)])
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_disk_full_while_writing(tmp_path, run_python):
    """RLIMIT_FSIZE stands for a full disk: the kernel refuses the write in the middle of the second tensor."""
    code = f"""
import os, resource, signal
import numpy as np
from modelq.checkpoint.writer import ShardedWriter, atomic_directory
from modelq.checkpoint import TensorInfo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
plan = [TensorInfo(n, "uint8", (2 << 20,), 2 << 20) for n in "ab"]
try:
    with atomic_directory({str(tmp_path / "out")!r}) as folder:
        with ShardedWriter(folder, plan, max_shard_size=2 << 20) as writer:
            writer.write("a", np.zeros(2 << 20, np.uint8))
        raise SystemExit("no error")
except ValueError as error:
    print(error)
try:
    with atomic_directory({str(tmp_path / "out")!r}) as folder:
        with ShardedWriter(folder, plan) as writer:
            for name in "ab":
                writer.write(name, np.zeros(2 << 20, np.uint8))
except OSError as error:
    print(error.errno, error)
"""
    out = run_python(code)
    assert "not written" in out and f"{errno.EFBIG} " in out and "out" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.measures
def test_memory_stays_at_one_tensor(tmp_path, run_python):
    code = f"""
import resource
import numpy as np
from modelq.checkpoint.writer import ShardedWriter
from modelq.checkpoint import TensorInfo
plan = [TensorInfo(f"t{{i}}", "uint8", (8 << 20,), 8 << 20) for i in range(32)]
array = np.ones(8 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ShardedWriter({str(tmp_path)!r}, plan) as writer:
    for info in plan:
        writer.write(info.name, array)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(run_python(code)) < 4 << 10  # KiB


# ---- folders ----------------------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


OLD = {"config.json": "old", "sub/x": "old"}
NEW = {"config.json": "new", "sub/y": "new"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    fill(tmp_path / "out", OLD)
    return tmp_path / "out"


def test_appears_whole(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with atomic_directory(target) as folder:
        assert folder.is_dir() and not any(folder.iterdir()) and folder.parent == target.parent and not target.exists()
        fill(folder, NEW)
    assert tree(tmp_path) == {f"a/b/out/{name}": text for name, text in NEW.items()}
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_empty_folder_is_filled_and_a_relative_path_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with atomic_directory("out") as folder:
        fill(folder, NEW)
    assert tree(tmp_path / "out") == NEW and os.listdir(tmp_path) == ["out"]


def test_existing_folder_is_refused(old):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        with atomic_directory(old):
            raise AssertionError("not reached")
    assert tree(old) == OLD and os.listdir(old.parent) == ["out"]


def test_a_file_or_a_folder_of_other_things_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    fill(tmp_path / "photos", {"holiday.jpg": "x"})
    fill(tmp_path / "cwd", {"config.json": "{}", "sub/x": ""})
    monkeypatch.chdir(tmp_path / "cwd" / "sub")
    for name in ("file", "photos", "cwd"):
        with pytest.raises(FileExistsError, match="a file is there|does not look like a checkpoint"):
            with atomic_directory(tmp_path / name, overwrite=True):
                raise AssertionError("not reached")
    assert (tmp_path / "photos" / "holiday.jpg").exists() and (tmp_path / "cwd" / "config.json").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_swaps_at_the_end(old, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    with atomic_directory(old, overwrite=True) as folder:
        fill(folder, NEW)
        assert tree(old) == OLD
    assert tree(old) == NEW and os.listdir(old.parent) == ["out"]


def test_overwrite_through_a_link_keeps_the_link(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("out")
    with atomic_directory(link, overwrite=True) as folder:
        fill(folder, NEW)
    assert link.is_symlink() and tree(old) == NEW and tree(link) == NEW


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_exception_leaves_what_was_there(error, overwrite, old):
    target = old if overwrite else old.parent / "x" / "y"
    before = tree(old.parent)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        with atomic_directory(target, overwrite=overwrite) as folder:
            fill(folder, NEW)
            raise error
    assert tree(old.parent) == before and os.listdir(old.parent) == ["out"]


@pytest.mark.parametrize("step", ["_sync", "_exchange", "sync_tree"])
def test_a_failure_at_the_very_end_leaves_what_was_there(step, old, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(atomic, step, fail)
    with pytest.raises(OSError, match="broken disk"):
        with atomic_directory(old, overwrite=True) as folder:
            fill(folder, NEW)
    assert tree(old) == OLD and os.listdir(old.parent) == ["out"]


def test_second_rename_fails_where_there_is_no_exchange(old, monkeypatch):
    rename = Path.rename

    def fail_once(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="broken disk"):
        with atomic_directory(old, overwrite=True) as folder:
            fill(folder, NEW)
    assert tree(old) == OLD and os.listdir(old.parent) == ["out"]


def test_someone_else_was_faster(tmp_path):
    with pytest.raises(FileExistsError):
        with atomic_directory(tmp_path / "out") as folder:
            fill(folder, NEW)
            fill(tmp_path / "out", OLD)
    assert tree(tmp_path / "out") == OLD and os.listdir(tmp_path) == ["out"]


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


HOLD = """
import sys, time
from pathlib import Path
from modelq.checkpoint.writer import atomic_directory
with atomic_directory({target!r}, overwrite=True) as folder:
    (folder / "config.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_killed_run_leaves_the_old_and_the_next_run_tidies_up(old):
    process = start(HOLD.format(target=str(old)))
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    leftovers = [path for path in old.parent.iterdir() if path != old]
    assert tree(old) == OLD and len(leftovers) == 1 and leftovers[0].name.startswith(".out.")
    (old.parent / ".out.notours").mkdir()
    (old.parent / ".out2.12.partial").mkdir()
    with atomic_directory(old, overwrite=True) as folder:
        fill(folder, NEW)
    assert tree(old) == NEW and sorted(os.listdir(old.parent)) == [".out.notours", ".out2.12.partial", "out"]


def test_a_running_neighbour_is_left_alone_and_interrupt_tidies_up(old):
    process = start(HOLD.format(target=str(old)))
    assert process.stdout.readline() == "ready\n"
    with atomic_directory(old, overwrite=True) as folder:
        fill(folder, NEW)
        assert len(os.listdir(old.parent)) == 3
    assert len(os.listdir(old.parent)) == 2
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert tree(old) == NEW and os.listdir(old.parent) == ["out"]


def test_killed_between_the_two_renames_the_old_comes_back(old):
    """Only where the file system cannot exchange: the old folder waits under its set-aside name."""
    old.rename(old.parent / ".out.abcd.replaced")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        with atomic_directory(old):
            raise AssertionError("not reached")
    assert tree(old) == OLD and os.listdir(old.parent) == ["out"]


def test_killed_at_any_moment(tmp_path):
    """kill -9 after a random while: the target is always wholly old or wholly new."""
    code = """
from modelq.checkpoint.writer import atomic_directory
print("ready", flush=True)
for i in range(100000):
    with atomic_directory({target!r}, overwrite=True) as folder:
        for name in ("config.json", "a", "b"):
            (folder / name).write_text(str(i))
"""
    target = tmp_path / "out"
    for delay in (0.0, 0.013, 0.03, 0.051, 0.08):
        process = start(code.format(target=str(target)))
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1 + delay)
        process.kill()
        process.wait()
        texts = set(tree(target).values())
        assert len(texts) == 1 and len(tree(target)) == 3
    with atomic_directory(target, overwrite=True) as folder:
        fill(folder, NEW)
    assert tree(target) == NEW and os.listdir(tmp_path) == ["out"]


def test_pieces_make_the_same_file_as_whole_tensors(tmp_path):
    values = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    plan = [TensorInfo("a", "float32", (7, 3), 0)]
    for folder, pieces in ((tmp_path / "whole", [values]), (tmp_path / "pieces", [values[:2], values[2:3], values[3:]])):
        folder.mkdir()
        with ShardedWriter(folder, plan) as writer:
            writer.write_pieces("a", pieces)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "pieces" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("pieces", [[(2, 3)], [(4, 3), (4, 3)], [(3, 3), (4, 2)], []], ids=str)
def test_pieces_that_do_not_make_the_tensor(tmp_path, pieces):
    with pytest.raises(ValueError, match=r"'a' was planned as float32 \(7, 3\)"):
        with ShardedWriter(tmp_path, [TensorInfo("a", "float32", (7, 3), 0)]) as writer:
            writer.write_pieces("a", [np.zeros(shape, np.float32) for shape in pieces])
    assert not list(tmp_path.iterdir())
