"""Where the maxima of static blocks lie once they are found, if they are many: in a file, so that no more than a few are in memory.

A searched NVFP4 weight has a maximum for every 16 numbers, and as much again of what kernels take: half a byte for each weight of the
model, which for DeepSeek-R1 is 336 GB. They are float32 as they were found, bit for bit; TMPDIR says where the file lies. It has no
name: it goes with the model, or with the process, whatever happens to that.
"""
from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from modelq.experts import place_of
from modelq.quantizers import Found, has_static_levels, set_found_values, stage_quantizers

KEPT = 256 << 20         # bytes that stay in memory before any go to the file
CHUNK = 64 << 20         # bytes that are mapped at a time
ALIGNMENT = 64


class Kept(NamedTuple):
    """What was found for a stage of a quantizer. home: the memory that its amax lies in, of which amax is then a view."""
    found: Found
    home: Any


def kept_values(quantizer: Any) -> list[Kept]:
    """As `found_values`, but maxima that lie in the file stay there, and are not copied: nobody writes over them."""
    return [Kept(Found(_lying_amax(stage), stage.bias, stage.pre_quant_scale, stage.global_amax), stage.home)
            for stage in stage_quantizers(quantizer)]


def put_back(quantizer: Any, values: list[Kept]) -> None:
    """What `kept_values` gave; what lay in the file does so again, in the same place."""
    for stage, (found, home) in zip(stage_quantizers(quantizer), values):
        if home is None or stage.home is not home or stage.global_amax != found.global_amax:
            set_found_values(stage, [found])
            if home is not None:
                stage.lend(home)
        stage.bias, stage.pre_quant_scale = found.bias, found.pre_quant_scale


def _lying_amax(stage: Any) -> Any:
    return stage.amax if stage.home is None else np.asarray(stage.home)[0]


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
                    self._take(stage, amax.shape)

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

    def _take(self, quantizer: Any, shape: tuple[int, ...]) -> None:
        nbytes = 8 * math.prod(shape)
        if self._kept + nbytes <= KEPT:
            self._kept += nbytes
            return
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._left:
            self._map(max(size, CHUNK))
        chunk = self._chunks[-1]
        start = len(chunk) - self._left
        quantizer.lend(memoryview(chunk)[start:start + nbytes].cast("f", (2, *shape)))
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
