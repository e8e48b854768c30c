"""Writer of .safetensors files that streams: sizes are planned first, tensors then written at their place, in any order.

File names, shards and index are those of transformers' save_pretrained; the bytes of a file are those of the safetensors library's
save_file for the same tensors (sorted by dtype, widest first, then name; header padded with blanks to 8 bytes).
"""
from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint.atomic import atomic_directory
from modelq.checkpoint.base import TensorInfo
from modelq.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from modelq.checkpoint.safetensors import DTYPES, numpy_dtype

__all__ = ["ShardedWriter", "atomic_directory", "parse_size"]

_RANK = {name: (rank, tag) for rank, (tag, (name, bits)) in enumerate(DTYPES.items()) if bits != 6}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class ShardedWriter:
    """Write the planned tensors into directory, one at a time.

        with ShardedWriter(directory, plan) as writer:
            for info in plan:
                writer.write(info.name, array)

    plan: a TensorInfo per tensor, whose order decides the shards (file and nbytes are not looked at). max_shard_size: bytes, or
    "10GB". Leaving the block checks that every tensor was written, syncs the files and writes the index; leaving it by an
    exception, or a failure of that check, removes what was written. No more than the array being written is in memory.
    """

    def __init__(
        self,
        directory: Path | str,
        plan: Iterable[TensorInfo],
        max_shard_size: int | str = 10_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ):
        self.directory = Path(directory)
        self._plan = _by_name(plan)
        self._shards = _split(self._plan, parse_size(max_shard_size))
        metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._headers = {shard: _header(infos, metadata) for shard, infos in self._shards.items()}
        self._place = {name: (shard, at) for shard, (_, offsets, _) in self._headers.items() for name, at in offsets.items()}
        self._left = {shard: {info.name for info in infos} for shard, infos in self._shards.items()}
        self._open: dict[str, int] = {}
        self._made: list[Path] = []
        self._check_space()

    @property
    def total_size(self) -> int:
        """Bytes of tensor data, headers not counted: the index's total_size."""
        return sum(size_of(info) for info in self._plan.values())

    @property
    def files(self) -> list[Path]:
        """The weight files that are written."""
        return [self.directory / shard for shard in self._shards]

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor. ValueError if it is not in the plan, was written before, or has another dtype or shape."""
        array = np.asarray(array)
        if name in self._plan and array.shape != tuple(self._plan[name].shape):
            raise self._misfit(name, array.dtype, array.shape)
        self.write_pieces(name, [array])

    def write_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Write one tensor that comes as consecutive runs of its rows, so that it need not be in memory as a whole."""
        if name not in self._place:
            raise ValueError(f"tensor {name!r} is not in the plan of {self.directory}")
        shard, offset = self._place[name]
        info = self._plan[name]
        if name not in self._left[shard]:
            raise ValueError(f"tensor {name!r} was written twice into {self.directory}")
        end, rows = offset + size_of(info), 0
        for piece in pieces:
            rows += piece.shape[0] if piece.ndim else 0
            if piece.dtype != numpy_dtype(info.dtype) or piece.shape[1:] != tuple(info.shape[1:]) or offset + piece.nbytes > end:
                raise self._misfit(name, piece.dtype, (rows, *piece.shape[1:]))
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            with _Naming(self.directory / shard, f"tensor {name!r}"):
                _write_all(self._file(shard), data, offset)
            offset += piece.nbytes
        if offset != end:
            raise self._misfit(name, numpy_dtype(info.dtype), (rows, *info.shape[1:]))
        self._left[shard].discard(name)
        if not self._left[shard]:
            self._finish_shard(shard)

    def _misfit(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> ValueError:
        info = self._plan[name]
        return ValueError(f"tensor {name!r} was planned as {info.dtype} {tuple(info.shape)}, got {dtype} {shape}")

    def finish(self) -> list[Path]:
        """Check that every tensor was written, sync, write the index; return the files. Called by leaving the block."""
        missing = [name for names in self._left.values() for name in sorted(names)]
        if missing:
            raise ValueError(f"{len(missing)} planned tensors were not written into {self.directory}, such as {missing[0]!r}")
        if len(self._shards) > 1:
            self._write_index()
        return list(self._made)

    def abort(self) -> None:
        """Close and remove the files."""
        while self._open:
            os.close(self._open.popitem()[1])
        while self._made:
            self._made.pop().unlink(missing_ok=True)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            if kind is None:
                self.finish()
        except BaseException:
            self.abort()
            raise
        if kind is not None:
            self.abort()

    def _check_space(self) -> None:
        free, need = shutil.disk_usage(self.directory).free, self.total_size
        if need > free:
            raise OSError(errno.ENOSPC, f"no space for the export: it needs {need:,} bytes, {free:,} are free", str(self.directory))

    def _file(self, shard: str) -> int:
        """The shard's file, made with its header and its whole length at the first call."""
        if shard not in self._open:
            path = self.directory / shard
            header, _, size = self._headers[shard]
            self._open[shard] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._made.append(path)
            _write_all(self._open[shard], np.frombuffer(header, np.uint8), 0)
            os.ftruncate(self._open[shard], size)
        return self._open[shard]

    def _finish_shard(self, shard: str) -> None:
        with _Naming(self.directory / shard, "the file"):
            os.fsync(self._file(shard))
            os.close(self._open.pop(shard))

    def _write_index(self) -> None:
        weight_map = {name: shard for name, (shard, _) in self._place.items()}
        index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
        path = self.directory / INDEX_FILE
        self._made.append(path)
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """One file of tensors that appears whole: written beside its place, synced, renamed."""
    infos = [TensorInfo(name, array.dtype.name, array.shape, array.nbytes) for name, array in arrays.items()]
    header, offsets, size = _header(infos, dict(metadata or {}))
    partial = path.with_name(path.name + ".partial")
    try:
        with _Naming(path, "the file"), open(partial, "wb", buffering=0) as file:
            _write_all(file.fileno(), np.frombuffer(header, np.uint8), 0)
            for name, array in arrays.items():
                _write_all(file.fileno(), np.ascontiguousarray(array).reshape(-1).view(np.uint8), offsets[name])
            os.ftruncate(file.fileno(), size)
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def size_of(info: TensorInfo) -> int:
    """Bytes of a planned tensor."""
    count = 1
    for size in info.shape:
        count *= int(size)
    return count * numpy_dtype(info.dtype).itemsize


def parse_size(size: int | str) -> int:
    """Bytes of "10GB" (decimal), "512MiB" (binary) or a plain number; ValueError for anything else or less than one byte."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ValueError(f"a size must be a positive number of bytes, or text such as '10GB' or '500MB'; got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]


def _by_name(plan: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    result: dict[str, TensorInfo] = {}
    for info in plan:
        if info.name in result or info.name == "__metadata__":
            raise ValueError(f"tensor {info.name!r} cannot be planned: the name is {'there twice' if info.name in result else 'reserved'}")
        if info.dtype not in _RANK or any(size < 0 for size in info.shape) or (info.dtype.endswith("_x2") and not info.shape):
            raise ValueError(f"tensor {info.name!r} cannot be planned: {info.dtype} {tuple(info.shape)} does not fit a .safetensors file")
        result[info.name] = info
    if not result:
        raise ValueError("the plan has no tensors")
    return result


def _split(plan: dict[str, TensorInfo], max_shard_size: int) -> dict[str, list[TensorInfo]]:
    """File name -> tensors: in the plan's order, a new shard where the next tensor would not fit; one that is larger than a shard
    gets its own at once (huggingface_hub, split_state_dict_into_shards_factory)."""
    shards: list[list[TensorInfo]] = []
    current: list[TensorInfo] = []
    filled = 0
    for info in plan.values():
        size = size_of(info)
        if size > max_shard_size:
            shards.append([info])
            continue
        if filled + size > max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(info)
        filled += size
    if current:
        shards.append(current)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def _header(infos: list[TensorInfo], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(the file's first bytes, {name: offset in the file}, the file's size)."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for info in sorted(infos, key=lambda info: (-_RANK[info.dtype][0], info.name.encode())):
        tag, shape, size = _RANK[info.dtype][1], [int(n) for n in info.shape], size_of(info)
        if tag == "F4":  # two in a byte: the file counts elements
            shape = [*shape[:-1], shape[-1] * 2]
        entries[info.name] = {"dtype": tag, "shape": shape, "data_offsets": [position, position + size]}
        offsets[info.name] = position
        position += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in offsets.items()}, start + position


def _write_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    """Bytes at an offset; a write may take fewer than it is given."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


class _Naming:
    """Adds to an OSError (a full disk has no file name) which file and what could not be written."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, f"{error.strerror} (writing {self.what})", str(self.path)) from error
