"""gpt-oss as it is published: stacked experts in MXFP4 (quant_method mxfp4), read as the model they stand for.

A stack `<name>` of experts is stored as `<name>_blocks`, uint8 [experts, rows, blocks, 16] (two E2M1 codes a byte, the first in the low
bits), and `<name>_scales`, uint8 [experts, rows, blocks] (2 ** (scale - 127) for the 32 codes of a block). The unquantized model holds
bfloat16 [experts, columns, rows]: each expert's matrix is turned over (transformers 5.17, integrations/mxfp4.py).
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo, WrappedCheckpoint
from modelq.checkpoint.config import stated_dtype
from modelq.checkpoint.said import AGAIN

METHOD = "mxfp4"
BLOCKS, SCALES, BLOCK = "_blocks", "_scales", 32


@dataclass(frozen=True)
class Stack:
    """Experts' matrices in MXFP4: shape [experts, rows, columns], and the names of the two tensors."""
    shape: tuple[int, int, int]
    blocks: str
    scales: str


class Mxfp4Checkpoint(WrappedCheckpoint):
    """A folder whose stacked experts dequantize as they are read, one expert at a time. stacks: name to Stack."""

    is_source = True

    def __init__(self, inner: Checkpoint):
        self.inner = inner
        self.stacks = _find_stacks(inner)
        self.dtype = stated_dtype(inner.config) or "bfloat16"
        hidden = {name for stack in self.stacks.values() for name in (stack.blocks, stack.scales)}
        tensors = {}
        for name, info in inner.tensors.items():
            stack = self.stacks.get(name.removesuffix(BLOCKS))
            if stack is not None and name == stack.blocks:
                experts, rows, columns = stack.shape
                nbytes = experts * rows * columns * (4 if self.dtype == "float32" else 2)
                whole = name.removesuffix(BLOCKS)
                tensors[whole] = TensorInfo(whole, self.dtype, (experts, columns, rows), nbytes, info.file)
            elif name not in hidden:
                tensors[name] = info
        super().__init__(inner, {k: v for k, v in inner.config.items() if k != "quantization_config"}, tensors)

    def read(self, name: str) -> np.ndarray:
        stack = self.stacks.get(name)
        return self.inner.read(self._info(name).name) if stack is None else self.read_rows(name, 0, stack.shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Of a stack: the experts from start to stop, [experts, columns, rows]."""
        from modelq.checkpoint.safetensors import numpy_dtype

        stack = self.stacks.get(name)
        if stack is None:
            return super().read_rows(name, start, stop)
        found = np.empty((len(range(*slice(start, stop).indices(stack.shape[0]))), stack.shape[2], stack.shape[1]), numpy_dtype(self.dtype))
        for index in range(len(found)):
            found[index] = self.expert(name, start + index).T
        return found

    def is_made_by_rows(self, name: str) -> bool:
        return name in self.stacks

    def expert(self, name: str, index: int) -> np.ndarray:
        """One expert's matrix of a stack as a linear's weight, [rows, columns], in the model's dtype."""
        from modelq import _core

        return _core.dequantize(self.expert_parts(name, index), "mxfp4", self.dtype)

    def expert_parts(self, name: str, index: int) -> dict[str, np.ndarray]:
        """The same as it is stored: weight, uint8 [rows, columns / 2], and weight_scale, uint8 [rows, columns / 32]."""
        stack = self.stacks[name]
        _, rows, columns = stack.shape
        blocks, scales = self.inner.read(stack.blocks)[index], self.inner.read(stack.scales)[index]
        return {"weight": np.ascontiguousarray(blocks).reshape(rows, columns // 2), "weight_scale": np.ascontiguousarray(scales)}

    def release(self, names: Iterable[str] | None = None) -> None:
        if names is None:
            return self.inner.release()
        for name in names:
            stack = self.stacks.get(name)
            self.inner.release([name] if stack is None else [stack.blocks, stack.scales])


def is_mxfp4(config: dict[str, Any]) -> bool:
    """Whether config.json says that experts are stored so."""
    said = config.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == METHOD


def _find_stacks(inner: Checkpoint) -> dict[str, Stack]:
    found = {}
    for name, info in inner.tensors.items():
        if not name.endswith(BLOCKS):
            continue
        stack = name.removesuffix(BLOCKS)
        scales = inner.tensors.get(stack + SCALES)
        if scales is None:
            raise ValueError(f"{inner.path}: tensor {stack + SCALES!r} is missing, mxfp4 needs it beside {name!r}; {AGAIN}")
        if info.dtype != "uint8" or scales.dtype != "uint8" or len(info.shape) != 4 or info.shape[3] != BLOCK // 2 \
                or scales.shape != info.shape[:3]:
            raise ValueError(f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)} with scales {scales.dtype} "
                             f"{list(scales.shape)}; mxfp4 has uint8 [experts, rows, blocks, 16] with uint8 [experts, rows, blocks]; "
                             f"{AGAIN}")
        experts, rows, blocks, _ = info.shape
        found[stack] = Stack((experts, rows, blocks * BLOCK), name, stack + SCALES)
    if not found:
        raise ValueError(f"{inner.path}: the config says mxfp4, but no tensor ends in {BLOCKS}; {AGAIN}")
    return found
