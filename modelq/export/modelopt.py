"""The `modelopt` dialect: its algorithm names, hf_quant_config.json and config.json's quantization_config.

Both files are written because engines differ in which they read first (vLLM and SGLang the second, TensorRT-LLM the first).
`producer.name` says "modelopt", which names the dialect: readers of the nested file look for exactly that word. The version
carries ours behind a plus sign, so that a file tells who wrote it and still parses as a version.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from modelq._version import __version__
from modelq.checkpoint import dialects
from modelq.checkpoint.dialects import WEIGHT_ONLY_KEY
from modelq.checkpoint.kv_cache import ROTATE_KEY
from modelq.export.excluded import summarize_excluded
from modelq.export.side_files import ConfigFiles

if TYPE_CHECKING:
    from modelq.export.plan import Plan

DIALECT_VERSION = "0.47.0"
PRODUCER = {"name": "modelopt", "version": f"{DIALECT_VERSION}+modelq.{__version__}"}


class Side(NamedTuple):
    """What a config group says about weights or activations."""
    bits: int
    type: str
    grouped: bool = False
    strategy: str | None = None


class Algorithm(NamedTuple):
    """One quant_algo: keys beside it, its config group, and whether a model of this algorithm alone writes that group."""
    extras: tuple[str, ...] = ()
    activations: Side | None = None
    weights: Side | None = None
    alone: bool = False
    group_extras: tuple[tuple[str, Any], ...] = ()


GROUP = ("group_size",)
SMOOTHED = ("group_size", "has_zero_point", "pre_quant_scale")
FP8, FP8_GROUPED, FP4, INT4 = Side(8, "float"), Side(8, "float", True), Side(4, "float", True), Side(4, "int", True)
ALGORITHMS: dict[str, Algorithm] = {
    "FP8": Algorithm((), FP8, FP8, alone=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm((), FP8, Side(8, "float", strategy="channel")),
    "fp8_pb_wo": Algorithm(),
    "W8A8_SQ_PER_CHANNEL": Algorithm((), Side(8, "int"), Side(8, "int", strategy="channel")),
    "W8A16": Algorithm((), None, Side(8, "int")),
    "W4A16_AWQ": Algorithm(SMOOTHED, None, INT4),
    "W4A8_AWQ": Algorithm(SMOOTHED, FP8_GROUPED, FP4),
    "NVFP4": Algorithm(GROUP, FP4, FP4, alone=True),
    "W4A16_NVFP4": Algorithm(GROUP, None, FP4, alone=True),
    "NVFP4_AWQ": Algorithm(SMOOTHED, FP8_GROUPED, FP4),
    "NVFP4_SVD": Algorithm(SMOOTHED, FP4, FP4, alone=True, group_extras=(("has_zero_point", False), ("pre_quant_scale", True))),
    "W4A8_NVFP4_FP8": Algorithm(GROUP, FP8, FP4),
    "W4A8_MXFP4_FP8": Algorithm(GROUP, FP8, FP4),
    "MXFP8": Algorithm(GROUP, FP8_GROUPED, FP8_GROUPED),
    "mxfp4": Algorithm(),
}
EXTRA_VALUES = {"has_zero_point": False, "pre_quant_scale": True}
MIXED = "MIXED_PRECISION"


def config_files(plan: Plan) -> ConfigFiles:
    """Both places where a Model Optimizer export says what it is."""
    usual = dialects.pairs(plan.dialect)
    layers = {linear.module: layer_entry(linear.algorithm, linear.group_size, linear.pair != usual[linear.algorithm])
              for linear in plan.linears.values()}
    nested = hf_quant_config(layers, plan.unquantized, plan.cache.algorithm, plan.cache.rotate)
    return ConfigFiles(quantization_config(nested), {"hf_quant_config.json": nested})


def layer_entry(algorithm: str, group_size: int | None, weight_only: bool = False) -> dict[str, Any]:
    """What the config says about one layer: its quant_algo and the keys that go with it, in the dialect's order.

    weight_only: although the algorithm's name stands for quantized inputs too (only "mxfp4" has one name for both): modelq's own key.
    """
    entry: dict[str, Any] = {"quant_algo": algorithm}
    if weight_only:
        entry[WEIGHT_ONLY_KEY] = True
    for key in ALGORITHMS[algorithm].extras:
        entry[key] = group_size if key == "group_size" else EXTRA_VALUES[key]
    return entry


def hf_quant_config(layers: Mapping[str, dict[str, Any]], unquantized: list[str], kv_cache: str | None = None,
                    kv_rotate: bool = False) -> dict[str, Any]:
    """The contents of hf_quant_config.json.

    layers: module name to `layer_entry`, in the order of the model. unquantized: modules that could have been quantized and
    were not. kv_cache: the dialect's name of the KV cache's format, or None. kv_rotate: its keys are rotated.
    """
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    if kv_rotate:
        quantization[ROTATE_KEY] = True
    entries = list(layers.values())
    if not entries:
        quantization["quantized_layers"] = {}
    elif any(entry != entries[0] for entry in entries):
        quantization["quant_algo"] = MIXED
        quantization["quantized_layers"] = dict(layers)
    else:
        quantization.update(entries[0])
        quantization["exclude_modules"] = summarize_excluded(unquantized, layers)
    return {"producer": dict(PRODUCER), "quantization": quantization}


def quantization_config(nested: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's `quantization_config`, from the contents of hf_quant_config.json."""
    details = nested["quantization"]
    algorithm = details["quant_algo"]
    flat: dict[str, Any] = {}
    if algorithm == MIXED:
        flat["config_groups"] = _mixed_groups(details["quantized_layers"])
        flat["quantized_layers"] = details["quantized_layers"]
    elif algorithm is not None and ALGORITHMS[algorithm].alone:
        flat["config_groups"] = {"group_0": _group(algorithm, details.get("group_size")) | {"targets": ["Linear"]}}
    flat["ignore"] = details.get("exclude_modules", [])
    if algorithm:
        flat["quant_algo"] = algorithm
    if details["kv_cache_quant_algo"]:
        fp8 = details["kv_cache_quant_algo"] == "FP8"
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"} if fp8 else details["kv_cache_quant_algo"]
    for key in (ROTATE_KEY, WEIGHT_ONLY_KEY):
        if key in details:
            flat[key] = details[key]
    return flat | {"producer": nested["producer"], "quant_method": "modelopt"}


def _mixed_groups(layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    members: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, entry in layers.items():
        members.setdefault(tuple(entry.items()), []).append(name)
    groups = {}
    for i, (key, names) in enumerate(members.items()):
        entry = dict(key)
        groups[f"group_{i}"] = _group(entry["quant_algo"], entry.get("group_size")) | {"targets": sorted(names)}
    return groups


def _group(algorithm: str, group_size: int | None) -> dict[str, Any]:
    row = ALGORITHMS[algorithm]
    if row.activations is None and row.weights is None:
        return {"quant_algo": algorithm}
    group = {}
    for key, side in (("input_activations", row.activations), ("weights", row.weights)):
        if side is not None:
            group[key] = _side(side, group_size)
    return group | dict(row.group_extras)


def _side(side: Side, group_size: int | None) -> dict[str, Any]:
    said: dict[str, Any] = {"dynamic": False, "num_bits": side.bits, "type": side.type}
    if side.grouped:
        said["group_size"] = group_size
    if side.strategy:
        said["strategy"] = side.strategy
    return said
