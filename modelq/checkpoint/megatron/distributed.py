"""Folders of torch.distributed.checkpoint (Megatron-LM's torch_dist): `.metadata`, a pickle that says where every piece of every tensor
lies, and .distcp files, which are files of torch.save one behind the other.

Megatron-LM stacks what all layers have along a leading axis; a part of a tensor is read without the rest.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint.megatron.pickles import Name, Opaque, read_pickle
from modelq.checkpoint.megatron.places import AGAIN, Place, Region
from modelq.checkpoint.megatron.torch_file import TORCH_NAMES, FileTensor, TorchFile
from modelq.checkpoint.safetensors import numpy_dtype

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor: from where to where in it, and the bytes of its file."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor in pieces."""
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class DistributedFolder:
    """The folder `prefix` (ends with "/", or is empty) of a place. tensors: name to where it is stored.

    ValueError if the metadata are damaged or leave parts of a tensor out."""

    def __init__(self, place: Place, prefix: str = ""):
        self._place, self._prefix = place, prefix
        self._open: dict[tuple[str, int], TorchFile] = {}
        region = place.region(prefix + METADATA)
        self.tensors = _tensors(region.path, region.bytes())

    def read(self, name: str, leading: tuple[int, ...] = ()) -> np.ndarray:
        """tensor[leading], a view of a file where it lies there in one piece, else a copy."""
        stored = self.tensors[name]
        shape, whole = stored.shape[len(leading):], None
        for chunk in _chunks_at(stored, leading):
            piece = self._chunk(name, stored, chunk)
            piece = piece[tuple(index - offset for index, offset in zip(leading, chunk.offsets))]
            if piece.shape == shape:
                return piece
            if whole is None:
                whole = np.empty(shape, numpy_dtype(stored.dtype))
            offsets = chunk.offsets[len(leading):]
            whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets, piece.shape))] = piece
        assert whole is not None or 0 in shape
        return np.empty(shape, numpy_dtype(stored.dtype)) if whole is None else whole

    def release(self, name: str, leading: tuple[int, ...] = ()) -> None:
        for chunk in _chunks_at(self.tensors[name], leading):
            self._region(chunk).release()

    def _region(self, chunk: Chunk) -> Region:
        return self._place.region(self._prefix + chunk.file).part(chunk.start, chunk.length, "a piece of a tensor")

    def _chunk(self, name: str, stored: Stored, chunk: Chunk) -> np.ndarray:
        key = (chunk.file, chunk.start)
        if key not in self._open:
            self._open[key] = TorchFile(self._region(chunk))
        file = self._open[key]
        tensor = file.value
        if not isinstance(tensor, FileTensor) or tensor.dtype != stored.dtype or tensor.shape != chunk.sizes:
            raise ValueError(f"{file.region.path}: a piece of tensor {name!r} is not {stored.dtype} {list(chunk.sizes)}, as "
                             f"{METADATA} says; {AGAIN}")
        return file.read(tensor)


def _chunks_at(stored: Stored, leading: tuple[int, ...]) -> Iterable[Chunk]:
    return (chunk for chunk in stored.chunks
            if all(start <= index < start + size for index, start, size in zip(leading, chunk.offsets, chunk.sizes)))


def _tensors(path: Path, data: bytes) -> dict[str, Stored]:
    try:
        metadata = read_pickle(data, TORCH_NAMES)
        places = _places(metadata)
        return {name: _stored(name, entry, places) for name, entry in metadata.state["state_dict_metadata"].items()
                if isinstance(entry, Opaque) and entry.name.endswith(".TensorStorageMetadata")}
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not the metadata of torch.distributed.checkpoint ({error}); {AGAIN}") from None


def _places(metadata: Any) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """(tensor, offsets) -> (file, start, length)."""
    places = {}
    for index, info in metadata.state["storage_data"].items():
        file, start, length = info.state["relative_path"], info.state["offset"], info.state["length"]
        if not isinstance(file, str) or Path(file).name != file or type(start) is not int or type(length) is not int:
            raise ValueError(f"a piece is said to be at {file!r}, {start!r}, {length!r}; do not trust this file")
        if info.get("transform_descriptors"):
            raise ValueError(f"{index.state['fqn']!r} is stored compressed; save it without extensions")
        places[index.state["fqn"], _sizes(index.get("offset") or ())] = (file, start, length)
    return places


def _stored(name: str, entry: Opaque, places: dict[Any, tuple[str, int, int]]) -> Stored:
    dtype = entry.state["properties"].state[0] if isinstance(entry.state["properties"].state, tuple) \
        else entry.state["properties"].state["dtype"]
    if not isinstance(dtype, Name):
        raise ValueError(f"tensor {name!r} has the dtype {dtype!r}")
    shape = _sizes(entry.state["size"])
    chunks = []
    for chunk in entry.state["chunks"]:
        offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
        if (name, offsets) not in places:
            raise ValueError(f"tensor {name!r}: no place for its piece at {list(offsets)}; {AGAIN}")
        if not len(offsets) == len(sizes) == len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape)):
            raise ValueError(f"tensor {name!r} {list(shape)} has a piece {list(sizes)} at {list(offsets)}; {AGAIN}")
        chunks.append(Chunk(offsets, sizes, *places[name, offsets]))
    distinct = {(chunk.offsets, chunk.sizes): chunk for chunk in chunks}
    if sum(int(np.prod(sizes, dtype=object)) for _, sizes in distinct) != int(np.prod(shape, dtype=object)):
        raise ValueError(f"tensor {name!r} {list(shape)}: its pieces are not the whole of it; is a file missing?")
    return Stored(dtype.name.removeprefix("torch."), shape, tuple(distinct.values()))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"sizes {value!r}; {AGAIN}")
    return tuple(value)
