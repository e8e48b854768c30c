"""Checkpoints whose weights are codes, less zero points, times scales, in layouts that no export of ours has: as sources.

GPTQ and AutoAWQ with zero points, GPTQ with columns in another order or other bits, compressed-tensors with either, FP8 with a scale for
the tensor, for rows (fbgemm_fp8) or for blocks of any size. (What an export of ours can say too opens as one: see quantized.py.) `read`
gives (code - zero) x scale in float32, rounded once to the model's dtype, some rows at a time.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo, WrappedCheckpoint
from modelq.checkpoint.codes import LAYOUTS, TURNED
from modelq.checkpoint.config import stated_dtype
from modelq.checkpoint.said import AGAIN

PIECE = 1 << 20       # numbers that are dequantized at a time


@dataclass(frozen=True)
class ScaledLinear:
    """A linear's weight: shape [out, in]; layout: a key of LAYOUTS; block: rows and columns that share a scale, and a zero point; tensors:
    names by role (weight, scale; zero and groups, which says each column's block, where they are there)."""
    shape: tuple[int, int]
    layout: str
    bits: int
    block: tuple[int, int]
    tensors: Mapping[str, str]

    @property
    def word(self) -> str:
        """What `modelq inspect` calls it."""
        return f"{self.layout}, {self.bits} bits"

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks there are in either direction."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])


class ScaledCheckpoint(WrappedCheckpoint):
    """A folder that reads as the model it stands for. linears: module to ScaledLinear. hidden: tensors that belong to quantization and
    are not shown. config: what is left of config.json."""

    is_source = True

    def __init__(self, inner: Checkpoint, linears: Mapping[str, ScaledLinear], hidden: Iterable[str], config: dict[str, Any]):
        self.inner, self.linears = inner, dict(linears)
        self.dtype = stated_dtype(inner.config) or "bfloat16"
        stored = {linear.tensors["weight"]: module for module, linear in self.linears.items()}
        hidden = {name for linear in self.linears.values() for name in linear.tensors.values()} | set(hidden)
        tensors = {}
        for name, info in inner.tensors.items():
            if name in stored:
                made, shape = f"{stored[name]}.weight", self.linears[stored[name]].shape
                tensors[made] = TensorInfo(made, self.dtype, shape, shape[0] * shape[1] * (4 if self.dtype == "float32" else 2), info.file)
            elif name not in hidden:
                tensors[name] = info
        super().__init__(inner, config, tensors)
        for module, linear in self.linears.items():
            self._check(module, linear)

    def read(self, name: str) -> np.ndarray:
        linear = self._linear(name)
        return self.inner.read(self._info(name).name) if linear is None else self.read_rows(name, 0, linear.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Of a quantized weight: these rows alone."""
        from modelq.checkpoint.safetensors import numpy_dtype

        linear = self._linear(name)
        if linear is None:
            return super().read_rows(name, start, stop)
        start, stop, _ = slice(start, stop).indices(linear.shape[0])
        parts = {role: self.inner.read(tensor) for role, tensor in linear.tensors.items()}
        found = np.empty((max(0, stop - start), linear.shape[1]), numpy_dtype(self.dtype))
        step = max(8, PIECE // linear.shape[1] // 8 * 8)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            try:
                found[first - start:last - start] = values_of(linear, parts, first, last)
            except ValueError as error:
                tensor = self.inner.tensors[linear.tensors.get("zero", linear.tensors["weight"])]
                raise ValueError(f"{tensor.file}: tensor {tensor.name!r} {error}") from None
        return found

    def is_made_by_rows(self, name: str) -> bool:
        return self._linear(name) is not None

    def release(self, names: Iterable[str] | None = None) -> None:
        if names is None:
            return self.inner.release()
        for name in names:
            linear = self._linear(name)
            self.inner.release([name] if linear is None else linear.tensors.values())

    def _linear(self, name: str) -> ScaledLinear | None:
        return self.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _check(self, module: str, linear: ScaledLinear) -> None:
        """ValueError names a tensor that does not fit its weight."""
        info = self.inner.tensors[linear.tensors["scale"]]
        rows, columns = linear.grid
        wanted = (columns, rows) if linear.layout in TURNED else (rows, columns)
        if info.shape != wanted and (len(info.shape) > 1 or int(np.prod(info.shape)) != rows * columns):
            raise ValueError(f"{info.file}: tensor {info.name!r} has the shape {list(info.shape)}; a weight {list(linear.shape)} in blocks "
                             f"of {list(linear.block)} has {list(wanted)} scales; {AGAIN}")
        if "groups" in linear.tensors:
            index = self.inner.read(linear.tensors["groups"])
            if index.shape != linear.shape[1:] or index.dtype.kind != "i" or index.min(initial=0) < 0 or index.max(initial=0) >= columns:
                raise ValueError(f"{info.file}: tensor {linear.tensors['groups']!r} must say for each of {linear.shape[1]} columns one of "
                                 f"{columns} groups; {AGAIN}")


def values_of(linear: ScaledLinear, parts: Mapping[str, np.ndarray], start: int, stop: int) -> np.ndarray:
    """float32 [stop - start, in]: (code - zero) x scale of these rows. parts: the arrays by role."""
    layout = LAYOUTS[linear.layout]
    found = layout.codes(parts["weight"], linear.bits, start, stop, linear.shape[1]).astype(np.float32)
    rows = np.arange(start, stop) // linear.block[0]
    scale = _grid(layout.scales(parts["scale"]), linear)[rows].astype(np.float32)
    zero = None
    if "zero" in parts:
        zero = layout.zeros(parts["zero"], linear.bits, linear.grid)[rows].astype(np.float32)
    elif linear.layout == "pack-quantized":
        zero = np.full((1, linear.grid[1]), 2 ** (linear.bits - 1), np.float32)
    if "groups" in parts or linear.shape[1] % linear.block[1]:
        index = parts["groups"] if "groups" in parts else np.arange(linear.shape[1]) // linear.block[1]
        if zero is not None:
            found -= zero[:, index]
        found *= scale[:, index]
        return found
    blocks = found.reshape(len(found), linear.grid[1], linear.block[1])
    if zero is not None:
        blocks -= zero[:, :, None]
    blocks *= scale[:, :, None]
    return found


def _grid(scales: np.ndarray, linear: ScaledLinear) -> np.ndarray:
    return scales.reshape(linear.grid)
