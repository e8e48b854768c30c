"""Single arrays, and trees of them, in a format: packed as a checkpoint would hold them, or rounded to its numbers.

    packed = modelq.quantize_array(x, "nvfp4")              # or a preset, by its name or as a dictionary: its rule for weights
    y = packed.dequantize()                                 # an array of x's framework, dtype and shape
    y = modelq.fake_quantize_array(x, "fp8")                # the same at once

    packed = modelq.quantize_array(params, "nvfp4", axis=-2, where=lambda path, x: path.endswith("kernel"))      # a tree: Flax's parameters
    params = modelq.dequantize_array(packed)

Of a tree (modelq/trees.py says what is one), the float arrays with two axes or more are meant; the others (biases, the scales of norms,
integers) stay as they are. where(path, leaf) chooses others, by a leaf's keys, indices and fields, joined by dots. A leaf that was chosen
and cannot be quantized is an error that names it, and so is a tree of which nothing was chosen.

Of a preset's algorithm, searches by the weight alone are done (mse; local_hessian with no inputs is that, too); those that need inputs
(AWQ, SmoothQuant, GPTQ, SVDQuant) are left out: they are for models.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from modelq import _core
from modelq.arrays import Origin, origin_of, take
from modelq.attributes import QuantizerAttributeConfig
from modelq.maxima import choose_maxima
from modelq.quantizers import block_extents, core_quantizer, has_static_levels, stage_amax
from modelq.trees import is_tree, map_leaves

__all__ = ["QuantizedArray", "dequantize_array", "fake_quantize_array", "quantize_array"]

Where = Callable[[str, Any], bool]


@dataclass(frozen=True)
class QuantizedArray:
    """An array by its parts: "weight" (codes), "weight_scale" and, with a second level of scales, "weight_scale_2".

    scheme: a row of `modelq formats`; shape and dtype: of the original; block_size: elements of a block, None for the scheme's own; axis:
    that blocks go along, which is the last of the parts.
    """
    parts: Mapping[str, np.ndarray]
    scheme: str
    shape: tuple[int, ...]
    dtype: str
    block_size: int | None = None
    axis: int = -1
    origin: Origin = field(default=Origin(), repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: str | None = None) -> Any:
        """float array of the original's shape, framework and device; dtype "float32", "bfloat16" or "float16", else the original's."""
        made = _core.dequantize(self.parts, self.scheme, dtype or self.dtype, self.block_size)
        return self.origin.give(_from_matrix(made, self.shape, self.axis))

    def __repr__(self) -> str:
        return f"<QuantizedArray {self.scheme} {list(self.shape)} of {self.dtype}: {self.nbytes} bytes>"


def quantize_array(x: Any, format: Any, amax: Any = None, block_size: int | None = None, axis: int = -1, where: Where | None = None) -> Any:
    """Pack a float array, or arrays of a tree.

    format: a scheme ("nvfp4", "fp8", "int4", "int8", "mxfp4", ...) or a preset. amax: the largest magnitude to be representable, in
    the grain of the scheme's scales; None: of the array itself. axis: what is summed over when x is multiplied by activations: the last of
    a weight [out, in], -2 of a JAX kernel [in, out]; blocks go along it, other axes count as rows. block_size: elements of a block, for
    schemes that leave it open (INT4). where: of a tree, says which leaves. Returns a QuantizedArray, or the tree with those.
    ValueError: the axis is not whole blocks, NaN, an unknown format.

    >>> import numpy as np
    >>> packed = quantize_array(np.array([[0.5, -1.0, 3.0, 6.0] * 4], np.float32), "nvfp4")
    >>> packed
    <QuantizedArray nvfp4 [1, 16] of float32: 13 bytes>
    >>> packed.dequantize()[0, :4].tolist()
    [0.5, -1.0, 3.0, 6.0]
    """
    way = _way_of(format, block_size)

    def pack(name: str, leaf: Any) -> QuantizedArray:
        array = take(leaf, name)
        matrix = _as_matrix(array, axis, name)
        parts = _core.quantize(matrix, way.scheme, block_size=way.block_size, name=name, **_maxima(way, matrix, amax))
        return QuantizedArray(parts, way.scheme, array.shape, array.dtype.name, way.block_size, axis, origin_of(leaf))
    return _chosen(pack, x, where)


def dequantize_array(packed: Any, dtype: str | None = None) -> Any:
    """The array that a QuantizedArray `packed` stands for, or a tree with those of all that are in it. dtype: "float32", "bfloat16" or
    "float16"; None: of the original. TypeError: neither a QuantizedArray nor a tree."""
    if not isinstance(packed, QuantizedArray) and not is_tree(packed):
        raise TypeError(f"dequantize_array: expected a QuantizedArray or a tree of them, got {type(packed).__name__}")
    return map_leaves(lambda path, leaf: leaf.dequantize(dtype) if isinstance(leaf, QuantizedArray) else leaf, packed)


def fake_quantize_array(x: Any, format: Any, amax: Any = None, block_size: int | None = None, axis: int = -1,
                        where: Where | None = None) -> Any:
    """x with every number rounded to what its code would stand for; framework, device, dtype and shape stay.

    format, amax, block_size, axis, where, and what is raised: as for quantize_array.

    >>> import numpy as np
    >>> fake_quantize_array(np.array([[1.0, 1.1, 200.0, 448.0]], np.float32), "fp8").tolist()
    [[1.0, 1.125, 192.0, 448.0]]
    """
    way = _way_of(format, block_size)

    def fake(name: str, leaf: Any) -> Any:
        array = take(leaf, name)
        matrix = _as_matrix(array, axis, name)
        made = _core.fake_quantize(matrix, way.scheme, block_size=way.block_size, name=name, **_maxima(way, matrix, amax))
        return origin_of(leaf).give(_from_matrix(made, array.shape, axis))
    return _chosen(fake, x, where)


# Leaves --------------------------------------------------------------------------------------------------------------------------

def _chosen(function: Callable[[str, Any], Any], x: Any, where: Where | None) -> Any:
    if not is_tree(x):
        if where is not None:
            raise ValueError("where: chooses leaves of a tree, and this is a single array")
        return function("array", x)
    taken = []

    def visit(path: str, leaf: Any) -> Any:
        if not (where or _is_float_matrix)(path, leaf):
            return leaf
        taken.append(path)
        return function(path, leaf)
    made = map_leaves(visit, x)
    if not taken:
        raise ValueError("nothing in this tree was chosen: " + ("where said no to every leaf" if where is not None else
                                                                "no leaf is a float array with two axes or more"))
    return made


def _is_float_matrix(path: str, leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) >= 2 and str(leaf.dtype).rpartition(".")[2].startswith(("float", "bfloat"))


def _as_matrix(array: np.ndarray, axis: int, name: str) -> np.ndarray:
    if array.ndim == 0:
        raise ValueError(f"{name}: expected an array of at least one axis, got a single number")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{name}: axis {axis} is out of bounds for an array of {array.ndim} axes")
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(int(np.prod(moved.shape[:-1])), moved.shape[-1])


def _from_matrix(matrix: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    moved = list(shape)
    moved.append(moved.pop(axis))
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(moved), -1, axis))


# Formats -------------------------------------------------------------------------------------------------------------------------

class _Way(NamedTuple):
    """To quantize a weight. attributes: of a preset; search: the settings of its search for maxima."""
    scheme: str
    block_size: int | None
    attributes: QuantizerAttributeConfig | None = None
    search: Mapping[str, Any] | None = None


def _way_of(format: Any, block_size: int | None) -> _Way:
    if isinstance(format, str) and format in _core.schemes():
        return _Way(format, block_size)
    attributes, search = _preset(format)
    scheme, size = core_quantizer(attributes).scheme, block_extents(attributes).get(-1)
    if scheme is None:
        raise ValueError(f"num_bits {attributes.num_bits} with block_sizes {attributes.block_sizes} is no scheme that can be packed: known "
                         f"are {', '.join(_core.schemes())}")
    if size is not None and block_size not in (None, size):
        attributes = replace(attributes, block_sizes={**(attributes.block_sizes or {}), -1: block_size})
    return _Way(scheme, block_size or size, attributes, search)


def _preset(format: Any) -> tuple[QuantizerAttributeConfig, Mapping[str, Any] | None]:
    """What a preset's rules make of a weight (the last that speaks of every weight), and how it looks for maxima without inputs."""
    from modelq import presets
    from modelq.config import QuantizeConfig

    if isinstance(format, str):
        if format not in presets.choices:
            raise ValueError(f"unknown format {format!r}: known are {', '.join(_core.schemes())} and presets such as NVFP4_DEFAULT_CFG")
        format = getattr(presets, format)
    config = QuantizeConfig.parse(format)
    rules = [rule.cfg for rule in config.quant_cfg if rule.quantizer_name == "*weight_quantizer" and rule.cfg is not None]
    if not rules:
        raise ValueError("this config has no rule for '*weight_quantizer'")
    attributes = rules[-1][0] if isinstance(rules[-1], tuple) else rules[-1]
    return attributes, next((step for step in config.steps if step["method"] in ("mse", "local_hessian")), None)


def _maxima(way: _Way, matrix: np.ndarray, amax: Any) -> dict[str, Any]:
    """As arguments of _core.quantize, which finds them itself where nothing is to be chosen, and says what is wrong with a matrix."""
    quantizer = core_quantizer(way.attributes) if way.attributes is not None else None
    if quantizer is None or quantizer.is_dynamic or not quantizer.needs_amax:
        return {"amax": amax}
    levels = has_static_levels(quantizer)
    if not levels and (amax is not None or way.search is None):
        return {"amax": amax}
    assert way.attributes is not None
    maxima = stage_amax(way.attributes, matrix)
    if matrix.size == 0 or not np.isfinite(maxima).all() or (levels and matrix.shape[1] % quantizer.block_sizes[-1]):
        return {"amax": amax}
    quantizer.amax = maxima
    if levels:
        quantizer.global_amax = maxima.max() if amax is None else take(amax, "amax")
    if way.search is not None:
        choose_maxima(quantizer, matrix, way.search)
    if not levels:
        return {"amax": quantizer.amax}
    return {"amax": quantizer.global_amax, "block_amax": quantizer.amax, "second_divisor": quantizer.second_divisor}
