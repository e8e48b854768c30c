"""compressed-tensors' folders with zero points, columns in another order, or other bits: what their linears are."""
from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from modelq.checkpoint import compressed
from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.codes import LAYOUTS, words_for
from modelq.checkpoint.dialects import schemes
from modelq.checkpoint.matrices import FLOATS
from modelq.checkpoint.said import AGAIN
from modelq.checkpoint.scaled import ScaledLinear
from modelq.checkpoint.scaled_fp8 import DTYPES

Found = tuple[dict[str, ScaledLinear], "dict[str, Any] | None"]


def find_compressed(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Found | None:
    """(the linears of groups that no export of ours could have, the quantization_config of the others or None). None: there are no such."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()) \
            or compressed.has_more_than_codes(config):
        return None
    taken = {name: group for name, group in groups.items() if _is_scaled(group.get("weights"))
             and ((scheme := compressed.scheme_of(group)) is None or _has_more(checkpoint, group, scheme))}
    if not taken:
        return None
    linears = {module: _linear(checkpoint, module, groups[name]["weights"])
               for module, name in _members(checkpoint, groups) if name in taken}
    if any(group.get("input_activations") for group in taken.values()):
        warnings.warn(f"{checkpoint.path}: how the inputs of {len(linears)} linears are quantized is not simulated: their weights are "
                      "read, and inputs stay as they are", stacklevel=2)
    left = {name: group for name, group in groups.items() if name not in taken}
    return linears, {**config, "config_groups": left} if left else None


def _is_scaled(weights: Any) -> bool:
    return isinstance(weights, Mapping) and (weights.get("type", "int"), weights.get("num_bits", 8)) in (
        ("float", 8), *(("int", bits) for bits in range(1, 9))) and weights.get("strategy") not in ("tensor_group", "attn_head")


def _members(checkpoint: Checkpoint, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Modules that are stored quantized, each with its group's name."""
    find, name_of = compressed.group_finder(groups), {id(group): name for name, group in groups.items()}
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight_packed" or last == "weight" and info.dtype in ("int8", *DTYPES):
            group = find(module)
            if group is None:
                raise ValueError(f"{checkpoint.path}: {module} is stored quantized, but the config leaves it out; {AGAIN}")
            yield module, name_of[id(group)]


def _has_more(checkpoint: Checkpoint, group: Mapping[str, Any], scheme: str) -> bool:
    """Zero points or an order of columns beside a weight of this group, whatever its arguments say, or scales that its scheme has not."""
    find, powers = compressed.group_finder({"": group}), schemes()[scheme]["scale"] == "e8m0"
    for name, info in checkpoint.tensors.items():
        module, _, last = name.rpartition(".")
        more = last in ("weight_zero_point", "weight_g_idx") or powers and last == "weight_scale" and info.dtype in FLOATS
        if more and find(module) is not None:
            return True
    return False


def _linear(checkpoint: Checkpoint, module: str, weights: Mapping[str, Any]) -> ScaledLinear:
    packed, bits = f"{module}.weight_packed" in checkpoint.tensors, weights.get("num_bits", 8)
    tensors = {"weight": f"{module}.weight_packed" if packed else f"{module}.weight", "scale": f"{module}.weight_scale"}
    if weights.get("symmetric") is False or f"{module}.weight_zero_point" in checkpoint.tensors:
        tensors["zero"] = f"{module}.weight_zero_point"
    if f"{module}.weight_g_idx" in checkpoint.tensors and (checkpoint.read(f"{module}.weight_g_idx") >= 0).all():   # -1: not used
        tensors["groups"] = f"{module}.weight_g_idx"
    for name in tensors.values():
        if name not in checkpoint.tensors:
            raise ValueError(f"{checkpoint.path}: tensor {name!r} is missing, {compressed.METHOD} needs it; {AGAIN}")
    info = checkpoint.tensors[tensors["weight"]]
    if len(info.shape) != 2:
        raise ValueError(f"{info.file}: tensor {info.name!r} has the shape {list(info.shape)}, a linear's weight has two axes")
    rows, columns = LAYOUTS["pack-quantized" if packed else "plain"].shape(info.shape, bits)
    if f"{module}.weight_shape" in checkpoint.tensors and packed:
        stated = checkpoint.read(f"{module}.weight_shape").tolist()
        if len(stated) != 2 or stated[0] != rows or words_for(stated[1], bits) != info.shape[1]:
            raise ValueError(f"{info.file}: tensor {info.name!r} has the shape {list(info.shape)}, weight_shape says {stated} in codes of "
                             f"{bits} bits; {AGAIN}")
        columns = stated[1]
    block = _block(checkpoint, module, weights, (rows, columns))
    return ScaledLinear((rows, columns), "pack-quantized" if packed else "plain", bits, block, tensors)


def _block(checkpoint: Checkpoint, module: str, weights: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    strategy, size = weights.get("strategy") or compressed.default_strategy(weights), weights.get("group_size")
    structure = weights.get("block_structure")
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        return structure[0], structure[1]
    if strategy == "group":
        return 1, size if type(size) is int and size > 0 else shape[1]
    if strategy not in ("tensor", "channel"):
        raise ValueError(f"{checkpoint.path}: {module} has scales by {strategy!r}, which modelq does not read")
    return shape if strategy == "tensor" else (1, shape[1])
