"""Weights as they were before a calibration rounded them, to be put back if it fails."""
from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch


class Originals:
    """Copies of tensors, in a file without a name: it goes with the object, or with the process. TMPDIR says where it lies."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, int]] = {}
        self._undoing: list[Callable[[], None]] = []
        self._file: Any = None

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor as it is, unless it was kept before. OSError: the disk is full."""
        if name in self._kept:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="modelq-")
        start = self._file.seek(0, 2)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._kept[name] = (tensor, start)

    def undo(self, step: Callable[[], None]) -> None:
        """To be called when all is put back."""
        self._undoing.append(step)

    def put_back(self) -> None:
        for step in reversed(self._undoing):
            step()
        for tensor, start in self._kept.values():
            self._file.seek(start)
            read = bytearray(self._file.read(tensor.numel() * tensor.element_size()))
            with torch.no_grad():
                tensor.copy_(torch.frombuffer(read, dtype=tensor.dtype).reshape(tensor.shape))
