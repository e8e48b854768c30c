"""The hidden states between layers, kept for the way back: in memory up to a limit, behind it in a temporary file without a name."""
from __future__ import annotations

import math
import mmap
import os
import tempfile
from typing import Any

import numpy as np


class Boundaries:
    """What a run's hidden states, [rows, width], were before each of its layers. keep_bytes: so much of them is in memory; the rest lies
    in a file (TMPDIR says where) that goes with the object, or with the process, whatever happens to that."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, keep_bytes: int):
        self._shape, self._dtype, self._room = shape, dtype, keep_bytes
        self._nbytes = math.prod(shape) * dtype.itemsize
        self._states: list[np.ndarray] = []
        self._file: Any = None

    def keep(self, run: Any) -> None:
        """The run's hidden states where it is now. OSError: the disk is full."""
        if self._nbytes <= self._room:
            self._room -= self._nbytes
            self._states.append(run.state())
            return
        mapped = self._map()
        self._states.append(run.state(np.frombuffer(mapped, self._dtype).reshape(self._shape)))
        if hasattr(mapped, "madvise"):      # what is in the file need not stay in the process's memory
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self) -> mmap.mmap:
        """Room in the file for one more. It is taken now: a full disk found when a page is written would kill the process."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="modelq-")
        start = -(-self._file.seek(0, os.SEEK_END) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self._file.fileno(), start, self._nbytes)
        return mmap.mmap(self._file.fileno(), self._nbytes, offset=start)

    def take(self) -> np.ndarray:
        """The last of those that are kept, which then belongs to the caller."""
        return self._states.pop()
