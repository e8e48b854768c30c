"""Where the maxima of static blocks lie once they are found, if they are many: in a file, so that no more than a few are in memory.

A searched NVFP4 weight has a maximum for every 16 numbers, and as much again of what kernels take: half a byte for each weight of the
model, which for DeepSeek-R1 is 336 GB. They are float32 as they were found, bit for bit; TMPDIR says where the file lies. It has no
name: it goes with the model, or with the process, whatever happens to that.
"""
from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from typing import Any

from modelq.experts import place_of
from modelq.quantizers import has_static_levels, stage_quantizers

KEPT = 256 << 20         # bytes that stay in memory before any go to the file
CHUNK = 64 << 20         # bytes that are mapped at a time
ALIGNMENT = 64


class Parking:
    """The file, and what is mapped of it. Room that is not used any more is not used again."""

    def __init__(self) -> None:
        self._file: Any = None
        self._chunks: list[mmap.mmap] = []
        self._left = self._size = self._kept = self._seen = 0

    def park(self, model: Any, rows: Iterable[dict[str, Any]]) -> None:
        """Move the maxima of these modules' weight quantizers, once more than `KEPT` bytes of such are in memory. OSError: the disk is
        full."""
        for name in {place_of(model, f"{row['name']}.weight_quantizer").name: None for row in rows}:
            quantizer = model.quantizers.get(name)
            for stage in stage_quantizers(quantizer) if quantizer is not None else ():
                if has_static_levels(stage) and not stage.is_lent and (amax := stage.amax) is not None and amax.ndim:
                    self._take(stage, 2 * amax.nbytes)

    def saw(self, nbytes: int) -> None:
        """So many bytes were looked at: their pages are given back when they are a chunk."""
        self._seen += nbytes if self._chunks else 0
        if self._seen >= CHUNK:
            self.rest()

    def rest(self) -> None:
        """Give pages back; what they hold is in the file."""
        self._seen = 0
        for chunk in self._chunks:
            chunk.madvise(mmap.MADV_DONTNEED)

    def _take(self, quantizer: Any, nbytes: int) -> None:
        if self._kept + nbytes <= KEPT:
            self._kept += nbytes
            return
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._left:
            self._map(max(size, CHUNK))
        chunk = self._chunks[-1]
        start = len(chunk) - self._left
        quantizer.lend(memoryview(chunk)[start:start + nbytes])
        self._left -= size
        self.saw(nbytes)

    def _map(self, size: int) -> None:
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.rest()
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="modelq-")
        os.posix_fallocate(self._file.fileno(), self._size, size)      # a full disk is an OSError here, and SIGBUS later
        self._chunks.append(mmap.mmap(self._file.fileno(), size, offset=self._size))
        self._size, self._left = self._size + size, size
