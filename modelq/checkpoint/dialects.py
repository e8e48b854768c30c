"""How a quantized linear is spelled on disk: names of its tensors and of its algorithm, per dialect. Read and write share it.

What the scheme itself says (its algorithm's name with and without quantized activations) comes from `_core.schemes()`.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np


WEIGHT_ONLY_KEY = "weight_only"    # in the config of a layer whose algorithm's name would mean quantized inputs too


class Name(NamedTuple):
    """Suffix behind the module's name; transform: "same", or "reciprocal" where the stored number is one divided by ours."""
    suffix: str
    transform: str = "same"


# dialect -> role -> name. Roles: the parts that _core.quantize returns, and what a checkpoint adds to them.
NAMES: dict[str, dict[str, Name]] = {
    "modelopt": {
        "weight": Name("weight"),
        "weight_scale": Name("weight_scale"),
        "weight_scale_2": Name("weight_scale_2"),
        "input_scale": Name("input_scale"),
    },
}


def spelled(array: np.ndarray, name: Name) -> np.ndarray:
    """A part as the dialect stores it; the same call turns what is stored back into the part."""
    return np.reciprocal(array) if name.transform == "reciprocal" else array


class Pair(NamedTuple):
    """A linear's two sides as scheme names; input is None where activations stay as they are."""
    weight: str
    input: str | None


@cache
def schemes() -> Mapping[str, Mapping[str, Any]]:
    """The rows of csrc/format/schemes.def by name."""
    from modelq import _core

    return _core.schemes()


@cache
def formats() -> Mapping[str, Mapping[str, Any]]:
    """The rows of csrc/format/formats.def by name."""
    from modelq import _core

    return _core.formats()


# what the other words of the column `activations` mean as a scheme name; "same" is the row itself
_ACTIVATIONS = {None: None, "fp8": "fp8", "fp8_token": "fp8_channel", "int8": "int8"}


def _modelopt_pairs() -> Iterator[tuple[Pair, str]]:
    for name, row in schemes().items():
        usual = _ACTIVATIONS.get(row["activations"], name)
        for column, side in (("modelopt", usual), ("modelopt_weight_only", None), ("modelopt_fp8_input", "fp8")):
            if row[column]:
                yield Pair(name, side), row[column]


@cache
def algorithms(dialect: str) -> dict[Pair, str]:
    """Every pair of schemes that the dialect can say, with the name of its algorithm. KeyError for an unknown dialect."""
    return dict({"modelopt": _modelopt_pairs}[dialect]())


@cache
def pairs(dialect: str) -> dict[str, Pair]:
    """The dialect's algorithm names and what they mean."""
    found: dict[str, Pair] = {}
    for pair, algorithm in algorithms(dialect).items():
        found.setdefault(algorithm, pair)    # one name for a scheme with and without its inputs means with
    return found


def may_lack_input_scale(pair: Pair) -> bool:
    """Whether a checkpoint may leave a static input scale out: beside weights that need no calibration, runs without any are usual."""
    return pair.input == "fp8" and schemes()[pair.weight]["scale"] == "e8m0"


def input_kind(quantizer: Any) -> str | None:
    """The scheme of an input quantizer: its own, or "int8" for one 8-bit integer scale per tensor (which no weight scheme has)."""
    if quantizer.scheme is None and quantizer.num_bits == 8:
        return "int8"
    return quantizer.scheme


def scale_divisor(scheme: str) -> float:
    """A per-tensor scale is amax / this: the largest element, times the largest block scale where there are two levels."""
    row = schemes()[scheme]
    return row["second_divisor"] or formats()[row["element"]]["max"]


def layout(scheme: str, shape: tuple[int, int], group_size: int | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """role -> (dtype, shape) of the parts that `_core.quantize` makes of a [out, in] weight."""
    row = schemes()[scheme]
    rows, cols = shape
    if row["packing"] == "row_pairs":
        rows //= 2
    elif row["packing"] == "row":
        cols = cols * formats()[row["element"]]["bits"] // 8
    parts = {"weight": (row["weight_dtype"], (rows, cols)), "weight_scale": (row["scale_dtype"], _scale_shape(row, shape, group_size))}
    if row["second_divisor"]:
        parts["weight_scale_2"] = ("float32", ())
    return parts


def _scale_shape(row: Mapping[str, Any], shape: tuple[int, int], group_size: int | None) -> tuple[int, ...]:
    rows, cols = shape
    block_rows, block_cols = row["block"]
    if block_cols and group_size:
        block_cols = group_size
    if not block_rows and not block_cols:
        return ()
    if not block_cols:
        return (rows,)
    grid = (-(-rows // block_rows), -(-cols // block_cols))
    if block_rows > 1:     # blocks both ways: the reference keeps the axes it reduced, except for a single block
        return () if grid == (1, 1) else (grid[0], 1, grid[1], 1)
    return grid


def is_dynamic_input(pair: Pair) -> bool:
    """Whether the input's scales are made from each call's data alone, so that a checkpoint stores none."""
    if pair.input is None:
        return False
    row = schemes()[pair.input]
    return row["scale"] == "e8m0" or (row["activations"] == "fp8_token" and pair.input == pair.weight)
