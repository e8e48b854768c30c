"""compressed-tensors' words for formats (its QuantizationArgs), both ways, and the reading of its quantization_config.

A group's arguments follow from the scheme's row: element bits and type, and which part of a matrix shares a scale ("strategy").
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelq.checkpoint.dialects import INTEGER_INPUTS, Pair, algorithms, compressed_inputs, formats, schemes
from modelq.checkpoint.said import AGAIN, Said

METHOD = "compressed-tensors"
MIXED_FORMAT = "mixed-precision"
KV_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_SCALE_DTYPES = {"fp8_e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
_KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype")


def weight_args(scheme: str, group_size: int | None) -> dict[str, Any]:
    """The arguments of weights of this scheme."""
    row = schemes()[scheme]
    block_rows, block_cols = row["block"]
    args: dict[str, Any] = {"strategy": "tensor"}
    if block_rows > 1:
        args = {"strategy": "block", "block_structure": [block_rows, block_cols]}
    elif block_cols:
        args = {"strategy": "tensor_group" if row["second_divisor"] else "group", "group_size": group_size or block_cols}
    elif block_rows:
        args = {"strategy": "channel"}
    return _args(row, args, False)


def input_args(kind: str) -> dict[str, Any]:
    """The arguments of activations of this kind."""
    row = schemes()["int8" if kind in INTEGER_INPUTS else kind]
    if kind in INTEGER_INPUTS:
        return _args(row, {"strategy": "tensor" if kind == "int8" else "token"}, kind != "int8")
    args = {**weight_args(kind, None)}
    if args["strategy"] == "channel":    # a scale per row: of activations, per token
        args["strategy"] = "token"
    return _args(row, args, "local" if row["second_divisor"] else args["strategy"] != "tensor")


def block_input_args(scheme: str) -> dict[str, Any]:
    """Engines multiply weights quantized by blocks both ways with activations quantized on the fly, in groups as wide as a block."""
    row = schemes()[scheme]
    return _args(row, {"strategy": "group", "group_size": row["block"][1]}, True)


def _args(row: Mapping[str, Any], args: dict[str, Any], dynamic: bool | str) -> dict[str, Any]:
    element = formats()[row["element"]]
    args = {**args, "num_bits": element["bits"], "type": element["compressed_type"], "symmetric": True, "dynamic": dynamic}
    if row["scale"] in _SCALE_DTYPES and args["strategy"] in ("group", "tensor_group"):
        args["scale_dtype"] = _SCALE_DTYPES[row["scale"]]
    return {key: args[key] for key in _KEYS if key in args}


# Reading -----------------------------------------------------------------------------------------------------------------------

def has_more_than_codes(config: Mapping[str, Any]) -> bool:
    """Whether weights are stored without their zeros, or rotated. "dense" weights are neither, whatever else is said of their zeros."""
    sparsity = config.get("sparsity_config")
    is_dense = not sparsity or (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense")
    return not is_dense or bool(config.get("transform_config"))


def read_config(config: Mapping[str, Any], file: Path) -> Said:
    """What a quantization_config says of each module. ValueError names the file and the group that is not understood."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ValueError(f"{file}: config_groups must map names to objects; {AGAIN}")
    if has_more_than_codes(config):
        raise ValueError(f"{file}: sparsity and transforms of compressed-tensors are not read; load the unquantized model instead")
    rules: list[tuple[int, str, tuple[Pair, int | None, str]]] = []
    for name, group in groups.items():
        meaning = _meaning(group, f"{file}: {name}")
        rules += [(_rank(target), target, meaning) for target in group.get("targets") or ["Linear"]]
    rules.sort(key=lambda rule: rule[:2])

    def find(module: str) -> tuple[Pair, int | None, str] | None:
        return next((meaning for _, target, meaning in rules if _fits(target, module)), None)
    return Said(METHOD, find)


def scheme_of(group: Mapping[str, Any]) -> str | None:
    """The scheme of a group's weights, if it says what an export of ours could say."""
    try:
        return _meaning(group, "")[0].weight
    except ValueError:
        return None


def group_finder(groups: Mapping[str, Mapping[str, Any]]) -> Callable[[str], Mapping[str, Any] | None]:
    """find(module) -> the group that it belongs to, or None."""
    rules = sorted(((_rank(target), target, name) for name, group in groups.items() for target in group.get("targets") or ["Linear"]))

    def find(module: str) -> Mapping[str, Any] | None:
        return next((groups[name] for _, target, name in rules if _fits(target, module)), None)
    return find


def _rank(target: str) -> int:
    """Exact names win over patterns, and patterns over classes."""
    return 1 if target.startswith("re:") else 0 if "." in target or target == "lm_head" else 2


def _fits(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return _rank(target) == 2 or target == module


def _meaning(group: Mapping[str, Any], where: str) -> tuple[Pair, int | None, str]:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs, (Mapping, type(None))):
        raise ValueError(f"{where}: no arguments of weights; {AGAIN}")
    if group.get("output_activations"):
        raise ValueError(f"{where}: quantized outputs are not read")
    scheme = next((name for name, row in schemes().items() if row["compressed_tensors"] and _same(weight_args(name, None), weights)), None)
    if scheme is None or weights.get("symmetric") is False or weights.get("actorder") in ("group", True):
        raise ValueError(f"{where}: weights of {_words(weights)} are not read; modelq reads {_known()}")
    by_blocks = schemes()[scheme]["block"][0] > 1
    kind = None
    if inputs is not None and not (by_blocks and _same(block_input_args(scheme), inputs)):
        kind = next((kind for kind in compressed_inputs() if _same(input_args(kind), inputs, inputs=True)), None)
        if kind is None or inputs.get("symmetric") is False:
            raise ValueError(f"{where}: activations of {_words(inputs)} are not read")
    pair = Pair(scheme, kind)
    size = weights.get("group_size")
    return pair, size if schemes()[scheme]["block"][1] and not by_blocks else None, algorithms(METHOD)[pair]


def _same(ours: Mapping[str, Any], given: Mapping[str, Any], inputs: bool = False) -> bool:
    """Whether arguments mean this scheme; a weight's group may have another size."""
    keys = ["num_bits", "type"] + (["dynamic"] if inputs else [])
    strategy = given.get("strategy") or default_strategy(given)
    mx = ours.get("scale_dtype") == "torch.uint8"
    return all(ours[key] == given.get(key, {"type": "int", "num_bits": 8, "dynamic": False}[key]) for key in keys) \
        and ours["strategy"] == strategy \
        and ours.get("block_structure") in (None, given.get("block_structure", ours.get("block_structure"))) \
        and (not (inputs or mx) or ours.get("group_size") == given.get("group_size"))


def default_strategy(given: Mapping[str, Any]) -> str:
    """Where arguments do not say it."""
    if given.get("group_size"):
        return "group" if given["group_size"] > 0 else "channel"
    return "token" if given.get("dynamic") else "tensor"


def _words(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {args[key]}" for key in (*_KEYS, "actorder") if args.get(key) is not None)


def _known() -> str:
    return ", ".join(sorted({word for word in algorithms(METHOD).values()}))
