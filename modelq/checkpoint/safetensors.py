"""Reader of one .safetensors file: everything is validated when the file is opened, then tensors are views of the mapping.

The format: 8 bytes of little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the tensors' bytes,
without holes or overlaps (https://github.com/huggingface/safetensors, "Format"). Files are hostile until proven otherwise: whatever
the safetensors library refuses is refused here too, with a ValueError that names the file and the tensor.
"""
from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint.base import TensorInfo, missing_tensor, unique_keys

MAX_HEADER_BYTES = 100_000_000
_MAX_INT_DIGITS = 20
FAULT_AROUND = 2 << 20      # what Linux may map for one page that is read: 64 KiB around it, or all of a large folio
_AGAIN = "download or export the file again"

# tag in the file -> (name in NumPy or ml_dtypes, bits). In the library's order, which its writer sorts by (descending).
DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a TensorInfo's dtype. Two float4 in a byte ("float4_e2m1fn_x2") are handed out as uint8."""
    if name == "float4_e2m1fn_x2":
        return np.dtype(np.uint8)
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


class SafetensorsFile:
    """One mapped file. ValueError if its header lies or the file is cut short, OSError if it cannot be opened."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(self.path, file, size)
            self.metadata, entries = _check_header(self.path, header, size - 8 - len(header))
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + len(header)
        self._offsets = {name: start + offset for name, (_, offset) in entries.items()}
        self.tensors: dict[str, TensorInfo] = {name: info for name, (info, _) in entries.items()}

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapping (misaligned if the file is)."""
        if name not in self.tensors:
            raise KeyError(missing_tensor(name, self.tensors, self.path))
        if self._map is None:
            raise ValueError(f"{self.path}: the file is closed; open the checkpoint again to read tensor {name!r}")
        info = self.tensors[name]
        if info.dtype.startswith("float6_"):
            raise ValueError(f"{self.path}: tensor {name!r} is {info.dtype}, which has no NumPy dtype; convert the checkpoint")
        dtype = numpy_dtype(info.dtype)
        count = info.nbytes // dtype.itemsize
        if count == 0:
            return np.empty(info.shape, dtype)
        return np.frombuffer(self._map, dtype, count, self._offsets[name]).reshape(info.shape)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Drop the pages of these tensors (all: None) from this process's memory."""
        if self._map is None:
            return
        if names is None:
            self._map.madvise(mmap.MADV_DONTNEED)
            return
        for name in names:
            drop_pages(self._map, self._offsets[name], self.tensors[name].nbytes)

    def close(self) -> None:
        mapping, self._map = self._map, None
        close_mapping(mapping)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, copied to memory. Errors as SafetensorsFile's."""
    file = SafetensorsFile(path)
    try:
        return {name: np.array(file.read(name)) for name in file.tensors}
    finally:
        file.close()


def drop_pages(mapping: mmap.mmap, offset: int, length: int) -> None:
    """madvise(DONTNEED) on every page that [offset, offset + length) touches, and on those that the kernel maps with a page that is
    read (of a checkpoint of many small tensors that may be nearly all): for a read-only file mapping always harmless."""
    start = offset - offset % FAULT_AROUND
    end = min(-(-(offset + length) // FAULT_AROUND) * FAULT_AROUND, len(mapping))
    if end > start:
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)


def close_mapping(mapping: mmap.mmap | None) -> None:
    """Unmap now if no array looks into the mapping, else when the last of them goes."""
    if mapping is not None:
        try:
            mapping.close()
        except BufferError:
            mapping.madvise(mmap.MADV_DONTNEED)


def _read_header(path: Path, file: Any, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{path}: {size} bytes is too short for a safetensors file; {_AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: a header of {length} bytes (over {MAX_HEADER_BYTES}): this is no safetensors file, or it is damaged; {_AGAIN}"
        )
    if length > size - 8:
        raise ValueError(f"{path}: the file ends within its header ({length} bytes announced, {size - 8} there); {_AGAIN}")
    header = file.read(length)
    if len(header) != length or not header.startswith(b"{"):
        raise ValueError(f"{path}: the header does not start with '{{': this is no safetensors file; {_AGAIN}")
    return header


def _check_header(path: Path, header: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, tuple[TensorInfo, int]]]:
    """(metadata, {name: (info, offset in the data)}) in the order of the data; every claim of the header checked."""
    entries = _parse_json(path, header)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings; {_AGAIN}")
    checked = {name: _check_entry(path, name, entry) for name, entry in entries.items()}
    ordered = sorted(checked.items(), key=lambda item: item[1][1:])
    position = 0
    for name, (_, begin, end) in ordered:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise ValueError(f"{path}: tensor {name!r} at bytes {begin}..{end} {kind}; {_AGAIN}")
        position = end
    if position != data_bytes:
        kind = "is cut short" if position > data_bytes else "has bytes that no tensor owns"
        raise ValueError(f"{path}: the file {kind}: its tensors need {position} bytes of data, it has {data_bytes}; {_AGAIN}")
    return metadata, {name: (info, begin) for name, (info, begin, _) in ordered}


def _parse_json(path: Path, header: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            header.decode("utf-8"), object_pairs_hook=unique_keys, parse_int=_bounded_int, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not valid JSON ({error}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the header must be a JSON object; {_AGAIN}")
    return value


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise ValueError(f"the number {digits[:_MAX_INT_DIGITS]}... is too large")
    return int(digits)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """(info, begin, end) of one header entry; ValueError if dtype, shape and offsets do not agree with each other."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: the tensor name {name!r} is not valid Unicode; {_AGAIN}") from None
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{where} needs dtype, shape and data_offsets; {_AGAIN}")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or tag not in DTYPES:
        raise ValueError(f"{where} has the unknown dtype {tag!r}; known are {', '.join(DTYPES)}")
    if not _is_sizes(shape):
        raise ValueError(f"{where} has the shape {shape!r}, not a list of integers >= 0; {_AGAIN}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has the data_offsets {offsets!r}, not two integers >= 0; {_AGAIN}")
    begin, end = offsets
    nbytes = _size_in_bytes(where, tag, shape)
    if end - begin != nbytes:
        raise ValueError(f"{where}: {tag} {shape} takes {nbytes} bytes, its data_offsets span {end - begin}; {_AGAIN}")
    dtype = DTYPES[tag][0]
    if tag == "F4":
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorInfo(name, dtype, tuple(shape), nbytes, path), begin, end


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _size_in_bytes(where: str, tag: str, shape: list[int]) -> int:
    if len(shape) > 32:
        raise ValueError(f"{where} has {len(shape)} dimensions; at most 32 are possible; {_AGAIN}")
    if tag == "F4" and (not shape or shape[-1] % 2):
        raise ValueError(f"{where}: F4 {shape} does not end at a whole byte in every row; {_AGAIN}")
    count = 1
    for size in sorted(shape):
        count *= size
        if count >= 2**60:
            raise ValueError(f"{where}: the shape {shape} overflows; {_AGAIN}")
    bits = count * DTYPES[tag][1]
    if bits % 8:
        raise ValueError(f"{where}: {tag} {shape} does not end at a whole byte; {_AGAIN}")
    return bits // 8
