"""Weights that calibration rounded by itself (GPTQ): kept packed, in a temporary file, in front of the checkpoint."""
from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from modelq import _core

ALIGNMENT = 64


class Rounded(NamedTuple):
    """A weight whose values are numbers of a scheme, by its parts as `_core.quantize` makes them."""
    parts: Mapping[str, np.ndarray]
    scheme: str
    block_size: int | None
    dtype: str

    def read(self) -> np.ndarray:
        return _core.dequantize(self.parts, self.scheme, self.dtype, self.block_size)


class ChangedCheckpoint:
    """A checkpoint, some of whose weights were replaced; otherwise what it wraps. The file has no name: it goes with the object, or with
    the process, whatever happens to that. TMPDIR says where it lies."""

    def __init__(self, checkpoint: Any):
        self.original = checkpoint
        self.changed: dict[str, Rounded] = {}
        self._file = tempfile.TemporaryFile(prefix="modelq-")

    def __getattr__(self, name: str) -> Any:
        if name == "original":      # asked for before there is one: while a copy is being made
            raise AttributeError(name)
        return getattr(self.original, name)

    def put(self, name: str, weight: Rounded) -> None:
        """Replace a weight. OSError: the disk is full."""
        self.changed[name] = weight._replace(parts={role: self._stored(part) for role, part in weight.parts.items()})

    def _stored(self, part: np.ndarray) -> np.ndarray:
        """The same array as a view of the file."""
        if part.size == 0 or part.nbytes < ALIGNMENT:
            kept = part.copy()
            kept.flags.writeable = False
            return kept
        start = -(-self._file.seek(0, 2) // ALIGNMENT) * ALIGNMENT
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(part).view(np.uint8).data)
        self._file.flush()
        view = np.memmap(self._file, np.uint8, "r", start, (part.nbytes,))
        return np.asarray(view).view(part.dtype).reshape(part.shape)

    def read(self, name: str) -> np.ndarray:
        return self.changed[name].read() if name in self.changed else self.original.read(name)

    def release(self, names: Iterable[str] | None = None) -> None:
        self.original.release(names)
