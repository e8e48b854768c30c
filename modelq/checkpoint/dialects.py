"""How a quantized linear is spelled on disk: names of its tensors and of its algorithm, per dialect. Read and write share it.

What the scheme itself says (its algorithm's name with and without quantized activations) comes from `_core.schemes()`; how an array is
laid out where a dialect departs from ours is a transform of `modelq.checkpoint.spelling`.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np


WEIGHT_ONLY_KEY = "weight_only"    # in the config of a layer whose algorithm's name would mean quantized inputs too


class Name(NamedTuple):
    """Suffix behind the module's name, and how the stored array is made of the part (see `modelq.checkpoint.spelling`)."""
    suffix: str
    transform: str = "same"


class Pair(NamedTuple):
    """A linear's two sides as scheme names; input is None where activations stay as they are."""
    weight: str
    input: str | None


@dataclass(frozen=True)
class Form:
    """What a quantized linear is, whatever the dialect. shape: [out, in]. smoothed: whether a pre_quant_scale multiplies its input.
    fp8_stage: whether its weight is rounded to FP8 (by weight_scale_2) after its scheme. input_scaled: False where a static input scale
    is left out (see `may_lack_input_scale`). rank: of the branch of low rank beside it, 0 if there is none."""
    pair: Pair
    shape: tuple[int, int]
    group_size: int | None = None
    smoothed: bool = False
    fp8_stage: bool = False
    input_scaled: bool = True
    rank: int = 0


_PLAIN = {"weight": Name("weight"), "weight_scale": Name("weight_scale", "grid")}
_PACKED = {"weight": Name("weight_packed"), "weight_scale": Name("weight_scale", "grid")}
# dialect -> word for the format ("": all others) -> role -> name. Roles: the parts that _core.quantize returns, what a checkpoint adds to
# them (input_scale, pre_quant_scale), and tensors that follow from the shape alone.
NAMES: dict[str, dict[str, dict[str, Name]]] = {
    "modelopt": {"": {
        "weight": Name("weight"), "weight_scale": Name("weight_scale"), "weight_scale_2": Name("weight_scale_2"),
        "input_scale": Name("input_scale"), "pre_quant_scale": Name("pre_quant_scale"),
        "low_rank_down": Name("weight_quantizer._svdquant_lora_a"), "low_rank_up": Name("weight_quantizer._svdquant_lora_b"),
    }},
    "compressed-tensors": {
        "": {**_PLAIN, "input_scale": Name("input_scale", "vector")},
        "pack-quantized": {"weight": Name("weight_packed", "int32_row"), "weight_scale": Name("weight_scale", "grid"),
                           "input_scale": Name("input_scale", "vector"), "shape": Name("weight_shape", "shape")},
        "nvfp4-pack-quantized": {**_PACKED, "weight_scale_2": Name("weight_global_scale", "reciprocal_weight"),
                                 "input_scale": Name("input_scale", "vector")},
        "mxfp4-pack-quantized": {**_PACKED, "input_scale": Name("input_scale", "vector")},
        "mxfp6-pack-quantized": _PACKED,
    },
    "autoawq": {"": {"weight": Name("qweight", "awq"), "weight_scale": Name("scales", "half_transposed"),
                     "zeros": Name("qzeros", "zeros_8")}},
    "gptq": {"": {"weight": Name("qweight", "gptq"), "weight_scale": Name("scales", "half_transposed"), "zeros": Name("qzeros", "zeros_7"),
                  "groups": Name("g_idx", "groups")}},
    "fp8": {"": {"weight": Name("weight"), "weight_scale": Name("weight_scale_inv", "grid")}},
}
WRITTEN = tuple(NAMES)
# Spellings of FP8 with static scales that are read only: dialect -> role -> suffix.
STATIC_FP8 = {"fp8-static": {"weight_scale": "weight_scale", "input_scale": "input_scale"},
              "fp8-static-inverse": {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}}
NAMES |= {dialect: {"": {"weight": Name("weight"), **{role: Name(suffix, "vector") for role, suffix in roles.items()}}}
          for dialect, roles in STATIC_FP8.items()}
# of inputs whose scheme has two levels
_INPUT_TWO_LEVELS = {"compressed-tensors": Name("input_global_scale", "reciprocal_input")}


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


# Words for pairs of formats ---------------------------------------------------------------------------------------------------

# what the other words of the column `activations` mean as an input kind; "same" is the row itself
_ACTIVATIONS = {None: None, "fp8": "fp8", "fp8_token": "fp8_channel", "int8": "int8"}
# Input kinds are names of schemes, and these: one 8-bit integer scale per tensor, or per token on the fly.
INTEGER_INPUTS = ("int8", "int8_token")


def _modelopt_pairs() -> Iterator[tuple[Pair, str]]:
    for name, row in schemes().items():
        usual = _ACTIVATIONS.get(row["activations"], name)
        for column, side in (("modelopt", usual), ("modelopt_weight_only", None), ("modelopt_fp8_input", "fp8")):
            if row[column]:
                yield Pair(name, side), row[column]


def _compressed_pairs() -> Iterator[tuple[Pair, str]]:
    for name, row in schemes().items():
        if row["compressed_tensors"]:
            yield Pair(name, None), row["compressed_tensors_weight_only"]
            for side in compressed_inputs() if row["block"][0] < 2 else ():
                yield Pair(name, side), row["compressed_tensors"]


@cache
def compressed_inputs() -> tuple[str, ...]:
    """The input kinds that compressed-tensors has words for."""
    plain = [name for name, row in schemes().items() if row["compressed_tensors"] and row["block"][0] < 2]
    return tuple(name for name in plain if formats()[schemes()[name]["element"]]["kind"] != "int") + INTEGER_INPUTS


def _native_pairs(dialect: str) -> Iterator[tuple[Pair, str]]:
    for name, row in schemes().items():
        if row[dialect]:
            usual = _ACTIVATIONS.get(row["activations"], name)
            yield Pair(name, usual), row[dialect]


@cache
def algorithms(dialect: str) -> dict[Pair, str]:
    """Every pair of schemes that the dialect can say, with the name of its algorithm. KeyError for an unknown dialect."""
    if dialect in STATIC_FP8:
        return {Pair("fp8", "fp8"): "fp8"}
    known = {"modelopt": _modelopt_pairs, "compressed-tensors": _compressed_pairs}
    return dict(known[dialect]() if dialect in known else _native_pairs({"autoawq": "autoawq", "gptq": "gptq", "fp8": "fp8"}[dialect]))


@cache
def pairs(dialect: str) -> dict[str, Pair]:
    """The dialect's algorithm names and what they mean (of dialects with a name for each pair)."""
    found: dict[str, Pair] = {}
    for pair, algorithm in [*algorithms(dialect).items(), *SMOOTHED.get(dialect, {}).items(), *LOW_RANK.get(dialect, {}).items()]:
        found.setdefault(algorithm, pair)    # one name for a scheme with and without its inputs means with
    return found


# dialect -> what a smoothed linear is called, where that matters; other pairs cannot be smoothed.
SMOOTHED: dict[str, dict[Pair, str]] = {
    "modelopt": {Pair("int4", None): "W4A16_AWQ", Pair("int4", "fp8"): "W4A8_AWQ", Pair("nvfp4", "nvfp4"): "NVFP4_AWQ",
                 Pair("int8", "int8"): "W8A8_SQ_PER_CHANNEL"},
}


# dialect -> what a linear with a branch of low rank is called.
LOW_RANK: dict[str, dict[Pair, str]] = {"modelopt": {Pair("nvfp4", "nvfp4"): "NVFP4_SVD"}}


def algorithm(dialect: str, form: Form) -> str:
    """The dialect's word for a linear. ValueError says what the dialect can say."""
    words = SMOOTHED[dialect] if form.smoothed and dialect in SMOOTHED else algorithms(dialect)
    if form.rank:
        words = LOW_RANK.get(dialect, {})
    if form.pair in words:
        return words[form.pair]
    said = sorted({f"{pair.weight} weights with {pair.input or 'unquantized'} inputs" for pair in words})
    raise ValueError(f"the {dialect} dialect cannot say {form.pair.weight} weights with {form.pair.input or 'unquantized'} inputs"
                     f"{' beside a branch of low rank' if form.rank else ' that are smoothed' if form.smoothed else ''}; it can say "
                     f"{'; '.join(said) or 'no such branches'}")


def may_lack_input_scale(pair: Pair) -> bool:
    """Whether a checkpoint may leave a static input scale out: beside weights that need no calibration, runs without any are usual."""
    return pair.input == "fp8" and schemes()[pair.weight]["scale"] == "e8m0"


def input_kind(quantizer: Any) -> str | None:
    """The kind of an input quantizer: its scheme, or a word for 8-bit integers, whose scheme is one of weights; "other" for the rest."""
    scheme, dynamic = quantizer.scheme, getattr(quantizer, "is_dynamic", False)
    if scheme is None:
        plain = quantizer.num_bits == 8 and not quantizer.block_sizes and getattr(quantizer, "axis", None) is None
        return "int8" if plain and not dynamic else "other"
    block = tuple(schemes()[scheme]["block"])
    if block[0] < 2 and not block[1] and schemes()[scheme]["scale"] == "fp32":    # per tensor from calibration, per row on the fly
        if dynamic != (block == (1, 0)):
            return "other"
    return "int8_token" if scheme == "int8" else scheme


def scale_divisor(kind: str) -> float:
    """A per-tensor scale is amax / this: the largest element, times the largest block scale where there are two levels."""
    row = schemes()["int8" if kind in INTEGER_INPUTS else kind]
    return row["second_divisor"] or formats()[row["element"]]["max"]


def is_dynamic_input(pair: Pair) -> bool:
    """Whether the input's scales are made from each call's data alone, so that a checkpoint stores none."""
    if pair.input is None or pair.input in INTEGER_INPUTS:
        return pair.input == "int8_token"
    row = schemes()[pair.input]
    return row["scale"] == "e8m0" or tuple(row["block"]) == (1, 0)


# Parts and what is stored of them ------------------------------------------------------------------------------------------------

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


def form_layout(form: Form, dtype: str = "bfloat16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """role -> (dtype, shape) of all parts of a linear, its input's scale and pre_quant_scale (in the model's dtype) among them."""
    parts = layout(form.pair.weight, form.shape, form.group_size)
    if form.fp8_stage:
        parts["weight_scale_2"] = ("float32", ())
    if form.pair.input is not None and form.input_scaled and not is_dynamic_input(form.pair):
        parts["input_scale"] = ("float32", ())
    if form.smoothed:
        parts["pre_quant_scale"] = (dtype, (form.shape[1],))
    if form.rank:
        parts |= {"low_rank_down": (dtype, (form.rank, form.shape[1])), "low_rank_up": (dtype, (form.shape[0], form.rank))}
    return parts


def names(dialect: str, pair: Pair) -> dict[str, Name]:
    """role -> name for linears of this pair. KeyError if the dialect has no word for the pair."""
    word = algorithms(dialect)[pair]
    table = NAMES[dialect]
    found = dict(table.get(word, table[""]))
    if pair.input is not None and pair.input in schemes() and schemes()[pair.input]["second_divisor"] and dialect in _INPUT_TWO_LEVELS:
        found["input_scale"] = _INPUT_TWO_LEVELS[dialect]
    return found


def stored_layout(dialect: str, form: Form, dtype: str = "bfloat16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """role -> (dtype, shape) as the dialect stores the linear, tensors that only it has included. ValueError: a shape does not fit."""
    from modelq.checkpoint.spelling import TRANSFORMS

    parts, found = form_layout(form, dtype), names(dialect, form.pair)
    unsaid = sorted(set(parts) - set(found))
    if unsaid:
        raise ValueError(f"the {dialect} dialect has no place for {', '.join(unsaid)}; use the modelopt dialect")
    constants = [role for role, name in found.items() if TRANSFORMS[name.transform].constant]
    return {role: TRANSFORMS[found[role].transform].layout(form, *parts.get(role, ("", ()))) for role in [*parts, *constants]}


def stored(dialect: str, form: Form, role: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array of this role as the dialect stores it."""
    from modelq.checkpoint.spelling import TRANSFORMS

    return TRANSFORMS[names(dialect, form.pair)[role].transform].store(form, parts.get(role))


def loaded(dialect: str, form: Form, role: str, array: np.ndarray) -> np.ndarray:
    """The part, from what the dialect stores. ValueError if it holds what the part cannot."""
    from modelq.checkpoint.spelling import TRANSFORMS

    return TRANSFORMS[names(dialect, form.pair)[role].transform].load(form, array)
