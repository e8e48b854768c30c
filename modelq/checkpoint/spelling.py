"""Transforms between the parts that `_core.quantize` makes and the arrays that a dialect stores.

Each is a row of TRANSFORMS: the stored dtype and shape, the way there and the way back. Bytes are rearranged, never requantized; the only
numbers that change are scales rounded to float16 where a layout holds no others.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from modelq.checkpoint.dialects import Form, formats, scale_divisor, schemes

Layout = tuple[str, tuple[int, ...]]
FLOATS = ("float32", "bfloat16", "float16")
POWERS = "float8_e8m0fnu"        # of scales that are powers of two, as DeepSeek's newer models have them


class Transform(NamedTuple):
    """layout(form, dtype, shape of the part) -> what is stored; store(form, part); load(form, stored) -> the part.

    constant: the tensor follows from the form alone; load then only checks it. floats: a reader takes any float dtype.
    """
    layout: Callable[[Form, str, tuple[int, ...]], Layout]
    store: Callable[[Form, Any], np.ndarray]
    load: Callable[[Form, np.ndarray], Any]
    constant: bool = False
    floats: bool = False


# Scales ----------------------------------------------------------------------------------------------------------------------

def _grid_layout(form: Form, dtype: str, shape: tuple[int, ...]) -> Layout:
    """Always with axes: one number is [1], one per row [out, 1], blocks [block rows, block columns]."""
    if schemes()[form.pair.weight]["block"][0] > 1:
        return dtype, (shape[0], shape[2]) if shape else (1, 1)
    return dtype, {0: (1,), 1: (*shape, 1)}.get(len(shape), shape)


def _part_shape(form: Form) -> tuple[int, ...]:
    from modelq.checkpoint.dialects import layout

    return layout(form.pair.weight, form.shape, form.group_size)["weight_scale"][1]


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in (*FLOATS, POWERS) else array


def _half_layout(form: Form, dtype: str, shape: tuple[int, ...]) -> Layout:
    return "float16", (shape[1], shape[0])


def _to_half(form: Form, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(scale.T.astype(np.float16))
    if np.isinf(half).any():
        raise ValueError(f"a scale of {scale.max()} does not fit the float16 scales of this layout; use the compressed-tensors dialect")
    return half


def _second_divisor(kind: str) -> np.float32:
    return np.float32(scale_divisor(kind))


def amax_of(scale: np.float32, divisor: np.float32) -> np.float32:
    """The amax that a scale was made of. Weights and activations are bfloat16 as a rule: if such a number gives the scale, it was that."""
    import ml_dtypes

    product = scale * divisor
    rounded = product.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded if rounded / divisor == scale else product


def _reciprocal(divisor: np.float32, scale: np.ndarray) -> np.ndarray:
    """divisor / amax, rounded once."""
    return np.asarray(divisor / amax_of(np.float32(scale.reshape(())), divisor), np.float32).reshape(1)


def _from_reciprocal(divisor: np.float32, stored: np.ndarray) -> np.ndarray:
    import ml_dtypes

    found = np.float32(stored.reshape(()))
    with np.errstate(divide="ignore", invalid="ignore"):
        amax = divisor / found
        rounded = amax.astype(ml_dtypes.bfloat16).astype(np.float32)
        amax = rounded if divisor / rounded == found else amax
    return np.asarray(amax / divisor, np.float32)


def _reciprocal_of(side: Callable[[Form], str]) -> Transform:
    return Transform(lambda form, dtype, shape: ("float32", (1,)),
                     lambda form, scale: _reciprocal(_second_divisor(side(form)), scale),
                     lambda form, array: _from_reciprocal(_second_divisor(side(form)), array))


# Integer codes -----------------------------------------------------------------------------------------------------------------

def _bits(form: Form) -> int:
    return formats()[schemes()[form.pair.weight]["element"]]["bits"]


def _int32_row_layout(form: Form, dtype: str, shape: tuple[int, ...]) -> Layout:
    rows, cols = form.shape
    return "int32", (rows, _whole(cols, 32 // _bits(form), "columns"))


def _int32_row(form: Form, codes: np.ndarray) -> np.ndarray:
    from modelq import _core

    if _bits(form) == 8:   # four bytes of code + 128
        return (codes.view(np.uint8) ^ np.uint8(128)).view("<i4")
    return _core.repack_int4(codes, "row_pairs", "int32_row")


def _from_int32_row(form: Form, words: np.ndarray) -> np.ndarray:
    from modelq import _core

    if _bits(form) == 8:
        return (np.ascontiguousarray(words).view(np.uint8) ^ np.uint8(128)).view(np.int8)
    return _core.repack_int4(words, "int32_row", "row_pairs")


def _whole(size: int, per_word: int, what: str) -> int:
    if size % per_word:
        raise ValueError(f"{size} {what} do not fill 32-bit words of {per_word} codes; leave this layer in high precision")
    return size // per_word


def _awq_layout(form: Form, dtype: str, shape: tuple[int, ...]) -> Layout:
    return "int32", (form.shape[1], _whole(form.shape[0], 8, "rows"))


def _gptq_layout(form: Form, dtype: str, shape: tuple[int, ...]) -> Layout:
    return "int32", (_whole(form.shape[1], 8, "columns"), form.shape[0])


def _repacked(layout: Callable[[Form, str, tuple[int, ...]], Layout], name: str) -> Transform:
    def store(form: Form, codes: np.ndarray) -> np.ndarray:
        from modelq import _core
        return _core.repack_int4(codes, "row_pairs", name)

    def load(form: Form, words: np.ndarray) -> np.ndarray:
        from modelq import _core
        return _core.repack_int4(words, name, "row_pairs")
    return Transform(layout, store, load)


# Tensors that follow from the shape --------------------------------------------------------------------------------------------

def _groups_of(form: Form) -> int:
    return _part_shape(form)[1]


def _constant(make: Callable[[Form], np.ndarray], layout: Callable[[Form], Layout], wrong: str) -> Transform:
    def check(form: Form, array: np.ndarray) -> None:
        if not np.array_equal(array, make(form)):
            raise ValueError(wrong)
    return Transform(lambda form, dtype, shape: layout(form), lambda form, part: make(form), check, constant=True)


def _zeros(nibble: int) -> Transform:
    """Symmetric codes are stored plus 8, so every zero point is 8; GPTQ's format stores zero points minus 1."""
    word = np.uint32(0x11111111 * nibble).view(np.int32)

    def layout(form: Form) -> Layout:
        return "int32", (_groups_of(form), _whole(form.shape[0], 8, "rows"))
    return _constant(lambda form: np.full(layout(form)[1], word, np.int32), layout,
                     "holds zero points other than that of symmetric codes; only symmetric quantization is read")


def _group_index(form: Form) -> np.ndarray:
    return (np.arange(form.shape[1]) // (form.shape[1] // _groups_of(form))).astype(np.int32)


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda form, dtype, shape: (dtype, shape), lambda form, part: part, lambda form, array: array),
    "vector": Transform(lambda form, dtype, shape: (dtype, (1,)), lambda form, part: np.asarray(part).reshape(1),
                        lambda form, array: _as_float32(array.reshape(())), floats=True),
    "grid": Transform(_grid_layout, lambda form, part: part.reshape(_grid_layout(form, "", part.shape)[1]),
                      lambda form, array: _as_float32(array.reshape(_part_shape(form))), floats=True),
    "reciprocal_weight": _reciprocal_of(lambda form: form.pair.weight),
    "reciprocal_input": _reciprocal_of(lambda form: form.pair.input or ""),
    "half_transposed": Transform(_half_layout, _to_half, lambda form, array: np.ascontiguousarray(array.T.astype(np.float32)), floats=True),
    "int32_row": Transform(_int32_row_layout, _int32_row, _from_int32_row),
    "awq": _repacked(_awq_layout, "awq"),
    "gptq": _repacked(_gptq_layout, "gptq"),
    "shape": _constant(lambda form: np.array(form.shape, np.int64), lambda form: ("int64", (2,)), "does not say the shape of the weight"),
    "zeros_8": _zeros(8),
    "zeros_7": _zeros(7),
    "groups": _constant(_group_index, lambda form: ("int32", (form.shape[1],)),
                        "orders columns by activation (desc_act); only groups of neighbouring columns are read"),
}


def matrix_shape(transform: str, scheme: str, stored: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of the weight whose packed form has this shape."""
    row = schemes()[scheme]
    bits = formats()[row["element"]]["bits"]
    if transform == "int32_row":
        return stored[0], stored[1] * 32 // bits
    if transform == "awq":
        return stored[1] * 8, stored[0]
    if transform == "gptq":
        return stored[1], stored[0] * 8
    rows = stored[0] * 2 if row["packing"] == "row_pairs" else stored[0]
    return rows, stored[1] * 8 // bits if row["packing"] == "row" else stored[1]
