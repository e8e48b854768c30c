"""Single arrays, and trees of them, in a format: packed as a checkpoint would hold them, or rounded to its numbers.

    packed = modelq.quantize_array(x, "nvfp4")              # or a preset, by its name or as a dictionary: its rule for weights
    y = packed.dequantize()                                 # an array of x's framework, dtype and shape
    y = modelq.fake_quantize_array(x, "fp8")                # the same at once

The last axis is what blocks go along; axes before it count as rows. Trees are dictionaries, lists and tuples.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelq import _core
from modelq.arrays import give_back, take
from modelq.attributes import QuantizerAttributeConfig
from modelq.quantizers import block_extents, core_quantizer

__all__ = ["QuantizedArray", "dequantize_array", "fake_quantize_array", "quantize_array"]


@dataclass(frozen=True)
class QuantizedArray:
    """An array by its parts: "weight" (codes), "weight_scale" and, with a second level of scales, "weight_scale_2".

    scheme: a row of `modelq formats`; shape and dtype: of the original; block_size: columns of a block, None for the scheme's own.
    """
    parts: Mapping[str, np.ndarray]
    scheme: str
    shape: tuple[int, ...]
    dtype: str
    block_size: int | None = None
    like: Any = None        # an array of the caller's framework

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: str | None = None) -> Any:
        """float array of the original's shape and framework; dtype "float32", "bfloat16" or "float16", else the original's."""
        made = _core.dequantize(self.parts, self.scheme, dtype or self.dtype, self.block_size)
        return give_back(made.reshape(self.shape), self.like)

    def __repr__(self) -> str:
        return f"<QuantizedArray {self.scheme} {list(self.shape)} of {self.dtype}: {self.nbytes} bytes>"


def quantize_array(x: Any, format: Any, amax: Any = None, block_size: int | None = None) -> Any:
    """Pack a float array [..., n], or every array of a tree.

    format: a scheme ("nvfp4", "fp8", "int4", "int8", "mxfp4", ...) or a preset. amax: the largest magnitude to be representable, in
    the grain of the scheme's scales; None: of the array itself. ValueError: n is not whole blocks, NaN, an unknown format.
    """
    if _is_tree(x):
        return _map(lambda leaf: quantize_array(leaf, format, amax, block_size), x)
    scheme, size = _scheme_of(format)
    size, array = block_size or size, take(x)
    parts = _core.quantize(_as_matrix(array), scheme, amax=amax, block_size=size)
    return QuantizedArray(parts, scheme, array.shape, array.dtype.name, size, x[:0] if array.ndim and not isinstance(x, list) else None)


def dequantize_array(packed: Any, dtype: str | None = None) -> Any:
    """The arrays that a QuantizedArray, or every one of a tree, stands for."""
    if isinstance(packed, QuantizedArray):
        return packed.dequantize(dtype)
    if not _is_tree(packed):
        raise TypeError(f"dequantize_array: expected a QuantizedArray or a tree of them, got {type(packed).__name__}")
    return _map(lambda leaf: dequantize_array(leaf, dtype), packed)


def fake_quantize_array(x: Any, format: Any, amax: Any = None, block_size: int | None = None) -> Any:
    """x [..., n] (or a tree) with every number rounded to what its code would stand for; framework, dtype and shape stay."""
    if _is_tree(x):
        return _map(lambda leaf: fake_quantize_array(leaf, format, amax, block_size), x)
    scheme, size = _scheme_of(format)
    array = take(x)
    made = _core.fake_quantize(_as_matrix(array), scheme, amax=amax, block_size=block_size or size)
    return give_back(made.reshape(array.shape), x)


# Parts ---------------------------------------------------------------------------------------------------------------------------

def _as_matrix(array: np.ndarray) -> np.ndarray:
    if array.ndim == 0:
        raise ValueError("expected an array of at least one axis, got a single number")
    return array.reshape(-1, array.shape[-1]) if array.size else array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def _scheme_of(format: Any) -> tuple[str, int | None]:
    """(scheme, columns of a block where they are not the scheme's own)."""
    if isinstance(format, str) and format in _core.schemes():
        return format, None
    attributes = _weight_attributes(format)
    scheme = core_quantizer(attributes).scheme
    if scheme is None:
        raise ValueError(f"num_bits {attributes.num_bits} with block_sizes {attributes.block_sizes} is no scheme that can be packed: known "
                         f"are {', '.join(_core.schemes())}")
    return scheme, block_extents(attributes).get(-1)


def _weight_attributes(format: Any) -> QuantizerAttributeConfig:
    """What a preset's rules make of a weight: the last that speaks of every weight."""
    from modelq import presets
    from modelq.config import QuantizeConfig

    if isinstance(format, str):
        if format not in presets.choices:
            raise ValueError(f"unknown format {format!r}: known are {', '.join(_core.schemes())} and presets such as NVFP4_DEFAULT_CFG")
        format = getattr(presets, format)
    rules = [rule for rule in QuantizeConfig.parse(format).quant_cfg if rule.quantizer_name == "*weight_quantizer" and rule.cfg is not None]
    if not rules:
        raise ValueError("this config has no rule for '*weight_quantizer'")
    return rules[-1].cfg[0] if isinstance(rules[-1].cfg, tuple) else rules[-1].cfg


def _is_tree(x: Any) -> bool:
    """Lists of numbers are arrays; lists of anything else, and dictionaries, are trees."""
    return isinstance(x, Mapping) or (isinstance(x, (list, tuple)) and not _is_numbers(x))


def _is_numbers(x: Any) -> bool:
    return all(_is_numbers(item) if isinstance(item, (list, tuple)) else isinstance(item, (int, float)) for item in x)


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: function(value) for key, value in tree.items()}
    made = [function(value) for value in tree]
    return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
