"""One .safetensors file: round trips with the safetensors library, and files that lie."""
from __future__ import annotations

import json
import mmap
import random
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from safetensors import TensorSpec, serialize_file

from modelq.checkpoint.safetensors import DTYPES, SafetensorsFile, numpy_dtype

PLAIN = [name for name, bits in DTYPES.values() if bits >= 8]


def build(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: object = "U8", shape: object = (1,), offsets: object = (0, 1)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def library_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
        return True
    except safetensors.SafetensorError:
        return False


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write_file


def library_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    """Write by the safetensors library; unlike its NumPy front end this takes every dtype."""
    specs = {
        name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in tensors.items()
    }
    serialize_file(specs, path, metadata=metadata)
    return path


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    target = numpy_dtype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * target.itemsize), target).reshape(shape)


# ---- reading what the library writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PLAIN)
def test_every_dtype_reads_as_the_library_wrote_it(dtype, tmp_path):
    rng = np.random.default_rng(3)
    arrays = {f"t{i}": random_array(rng, dtype, shape) for i, shape in enumerate([(), (7,), (3, 5), (2, 1, 4), (0,), (4, 0, 2)])}
    file = SafetensorsFile(library_file(tmp_path / "a.safetensors", arrays, {"format": "pt"}))
    assert file.metadata == {"format": "pt"} and set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        got = file.read(name)
        info = file.tensors[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert (info.dtype, info.shape, info.nbytes, info.file) == (dtype, array.shape, array.nbytes, file.path)
        assert got.size == 0 or not got.flags.writeable


def test_mixed_dtypes_and_odd_names(tmp_path):
    rng = np.random.default_rng(4)
    names = ["a", "Z", "a10", "a9", "ü.weight", 'quo"te\\n', "", "\x01\n\t", "\u2028", "x" * 500]
    arrays = {name: random_array(rng, PLAIN[i % len(PLAIN)], (i + 1, 3)) for i, name in enumerate(names)}
    file = SafetensorsFile(library_file(tmp_path / "a.safetensors", arrays))
    for name, array in arrays.items():
        assert file.read(name).tobytes() == array.tobytes() and file.read(name).dtype == array.dtype


def test_packed_float4_is_bytes(tmp_path):
    packed = np.arange(24, dtype=np.uint8).reshape(3, 8)
    spec = TensorSpec(dtype="float4_e2m1fn_x2", shape=packed.shape, data_ptr=packed.ctypes.data, data_len=packed.nbytes)
    serialize_file({"w": spec}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensors["w"].shape == (3, 8) and file.tensors["w"].dtype == "float4_e2m1fn_x2"
    assert np.array_equal(file.read("w"), packed)


def test_float6_is_listed_but_not_read(write):
    file = SafetensorsFile(write(build({"a": entry("F6_E2M3", [4], [0, 3])}, b"123")))
    assert file.tensors["a"].nbytes == 3
    with pytest.raises(ValueError, match="'a' is float6"):
        file.read("a")


def test_misaligned_data(write):
    values = np.arange(5, dtype=np.float32)
    for pad in range(8):
        header = json.dumps({"a": entry("F32", [5], [0, 20])}).encode() + b" " * pad
        content = build(header, values.tobytes())
        assert np.array_equal(SafetensorsFile(write(content)).read("a"), values)


def test_views_outlive_the_file_and_are_not_copies(tmp_path):
    array = np.arange(1 << 16, dtype=np.float32)
    file = SafetensorsFile(library_file(tmp_path / "a.safetensors", {"a": array}))
    first, second = file.read("a"), file.read("a")
    assert first.ctypes.data == second.ctypes.data
    file.release(["a"])
    file.release()
    file.close()
    file.close()
    file.release()
    assert np.array_equal(first, array)
    with pytest.raises(ValueError, match="closed"):
        file.read("a")


def test_missing_tensor_names_its_neighbours(tmp_path):
    file = SafetensorsFile(library_file(tmp_path / "a.safetensors", {"model.embed.weight": np.zeros(1)}))
    with pytest.raises(KeyError, match="did you mean model.embed.weight"):
        file.read("model.embeds.weight")


# ---- files that lie ---------------------------------------------------------------------------------------------------------------

GOOD = entry()
HOSTILE = {
    "empty header": b"",
    "array": [],
    "string": b'"abc"',
    "leading blank": b'  {"a":1}',
    "trailing bytes": b"{}\0\0",
    "two objects": b"{}{}",
    "not UTF-8": b'{"\xff":1}',
    "lone surrogate": b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "unclosed": b'{"a":',
    "nesting bomb of lists": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nesting bomb of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
    "Infinity": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}',
    "duplicate tensor": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
    "duplicate key within": b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": GOOD},
    "metadata a list": {"__metadata__": ["a"], "a": GOOD},
    "entry a number": {"a": 3},
    "entry null": {"a": None},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 1]}},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 1]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [1]}},
    "unknown dtype": {"a": entry("U9")},
    "dtype a list": {"a": entry(["U8"])},
    "lying dtype": {"a": entry("F32")},
    "shape a number": {"a": entry(shape=1)},
    "shape negative": {"a": entry(shape=[-1])},
    "shapes negative, product right": {"a": entry(shape=[-1, -1])},
    "shape a float": {"a": entry(shape=[1.0])},
    "shape a bool": {"a": entry(shape=[True])},
    "shape a string": {"a": entry(shape="1")},
    "shape overflows 64 bits to the right size": {"a": entry(shape=[2**32, 2**32, 1])},
    "shape huge times zero": {"a": entry(shape=[2**64, 0], offsets=[0, 0])},
    "number of many digits": b'{"a":{"dtype":"U8","shape":[1' + b"0" * 100_000 + b'],"data_offsets":[0,1]}}',
    "hundred dimensions": {"a": entry(shape=[1] * 100)},
    "one offset": {"a": entry(offsets=[0])},
    "three offsets": {"a": entry(offsets=[0, 1, 1])},
    "offsets reversed": {"a": entry(offsets=[1, 0])},
    "offset negative": {"a": entry(offsets=[-1, 0])},
    "offsets floats": {"a": entry(offsets=[0, 1.0])},
    "offset past the end": {"a": entry(offsets=[1, 2])},
    "offset huge": {"a": entry(offsets=[2**64 - 1, 2**64])},
    "size too small": {"a": entry(shape=[2])},
    "overlap": {"a": entry(), "b": entry()},
    "partial overlap": {"a": entry(shape=[2], offsets=[0, 2]), "b": entry(shape=[2], offsets=[1, 3])},
    "hole": {"a": entry(), "b": entry(offsets=[2, 3])},
    "hole at the start": {"a": entry(offsets=[1, 2])},
    "empty tensor in the middle of another": {"a": entry(shape=[2], offsets=[0, 2]), "b": entry(shape=[0], offsets=[1, 1])},
    "empty tensor beyond the end": {"a": entry(), "b": entry(shape=[0], offsets=[9, 9])},
    "half a byte": {"a": entry("F4", [3], [0, 2])},
    "F6 not at a byte": {"a": entry("F6_E3M2", [1], [0, 1])},
}
STRICTER = {"leading blank", "duplicate tensor", "duplicate key within", "hundred dimensions", "shape huge times zero"}
"""What the library takes and we do not, on purpose."""


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, write):
    assert case in STRICTER or not library_accepts(build(HOSTILE[case], b"x"))
    for data in (b"x", b"", b"xxx"):
        content = build(HOSTILE[case], data)
        if case not in STRICTER and library_accepts(content):
            continue  # with that much data the file tells the truth
        with pytest.raises(ValueError, match="model.safetensors: ") as caught:
            SafetensorsFile(write(content))
        assert len(str(caught.value)) < 1200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a.weight": entry("F32")}, b"x", "a.weight"),
        ({"a.weight": entry(), "b.bias": entry(offsets=[2, 3])}, b"xxx", "b.bias.*hole"),
        ({"a.weight": entry(), "b.bias": entry(offsets=[0, 1])}, b"x", "b.bias.*overlaps"),
        ({"a.weight": entry("Q4")}, b"x", "a.weight.*unknown dtype 'Q4'.*BF16"),
        ({"a": entry()}, b"", "cut short.*download"),
        ({"a": entry()}, b"xx", "no tensor owns"),
    ],
)
def test_errors_name_tensor_and_remedy(header, data, word, write):
    with pytest.raises(ValueError, match=word):
        SafetensorsFile(write(build(header, data)))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100_000_001, 100_000_000, 200])
def test_header_length_lies(length, write):
    with pytest.raises(ValueError, match="model.safetensors: "):
        SafetensorsFile(write(build({"a": entry()}, b"x", length=length)))


def test_truncated_at_every_length(tmp_path, write):
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.arange(4, dtype=np.uint8), "c": np.zeros((2, 2), ml_dtypes.bfloat16)}
    content = library_file(tmp_path / "whole", arrays).read_bytes()
    assert SafetensorsFile(write(content)).tensors
    for length in range(len(content)):
        with pytest.raises(ValueError, match="model.safetensors: "):
            SafetensorsFile(write(content[:length]))
    with pytest.raises(ValueError, match="no tensor owns"):
        SafetensorsFile(write(content + b"\0"))


def test_not_there_or_not_readable(tmp_path):
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(OSError, match="directory"):
        SafetensorsFile(tmp_path)


def mutate(rng: random.Random, content: bytearray, header_end: int) -> bytes:
    """One to four small damages, most of them within the header."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(header_end if rng.random() < 0.9 and len(content) >= header_end else max(len(content), 1)) if content else 0
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at : at + rng.randint(1, 12)]
        elif kind == 2:
            content[at:at] = bytes(rng.choice(b'0123456789{}[]",:-eE. \\u') for _ in range(rng.randint(1, 4)))
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            source = rng.randrange(len(content) or 1)
            content[at : at + 8] = content[source : source + 8]
        else:
            digits = [i for i in range(8, min(header_end, len(content))) if 48 <= content[i] <= 57]
            if digits:
                content[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(content)


def test_mutations_are_refused_or_read_as_the_library_reads_them(tmp_path):
    rng = random.Random(20)
    arrays = {f"layer.{i}.weight": np.full((i + 1, 4), i, dt) for i, dt in enumerate([np.float32, np.uint8, np.float16, ml_dtypes.bfloat16])}
    original = library_file(tmp_path / "whole", arrays, {"format": "pt"}).read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    path = tmp_path / "model.safetensors"
    accepted = 0
    for _ in range(4000):
        content = mutate(rng, bytearray(original), header_end)
        path.write_bytes(content)
        try:
            file = SafetensorsFile(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
            continue
        accepted += 1
        expected = dict(safetensors.deserialize(content))  # raises if the library refuses what we took
        assert set(file.tensors) == set(expected)
        for name, want in expected.items():
            assert list(file.tensors[name].shape) == want["shape"] or want["dtype"] == "F4"
            assert file.read(name).tobytes() == bytes(want["data"])
        file.close()
    assert accepted > 20  # the mutator must not be so rough that nothing survives


# ---- memory -----------------------------------------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_reading_one_tensor_of_a_large_file_stays_small(tmp_path):
    """Two GiB, sparse on disk: opening costs nothing, reading a tensor its pages, releasing gives them back."""
    count, size = 64, 32 << 20
    header = json.dumps({f"t{i}": entry("BF16", [size // 2], [i * size, (i + 1) * size]) for i in range(count)}).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(build(header))
        file.truncate(8 + len(header) + count * size)
    start = resident()
    opened = SafetensorsFile(path)
    assert resident() - start < 8 << 20
    for i in range(0, count, 8):
        tensor = opened.read(f"t{i}")
        assert not tensor.view(np.uint16).any()
        del tensor
        opened.release([f"t{i}"])
    assert resident() - start < 16 << 20
    kept = opened.read("t1").view(np.uint8)
    assert kept[:: mmap.PAGESIZE].sum() == 0 and resident() - start > 24 << 20  # the measure does see pages
    opened.release()
    assert resident() - start < 16 << 20


RELEASED = """
import sys
from modelq.checkpoint.safetensors import SafetensorsFile
def mapped():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile"))
file = SafetensorsFile(sys.argv[1])
file.read("experts.0000")[::512].sum()       # what reading itself needs of the libraries
file.release()
before = mapped()
for name in file.tensors:
    assert file.read(name)[::512].sum() > 0
    file.release([name])
print(mapped() - before)
"""


def test_released_tensors_leave_no_pages_behind(tmp_path):
    """Neither their own nor those that the kernel maps around them: 64 MB in tensors of 96 KB."""
    safetensors.numpy.save_file({f"experts.{i:04}": np.ones(96 * 1024, np.uint8) for i in range(680)}, tmp_path / "many.safetensors")
    done = subprocess.run([sys.executable, "-c", RELEASED, str(tmp_path / "many.safetensors")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024      # kB
