"""The `compressed-tensors` dialect's quantization_config: one config group per format, as its library writes it.

vLLM, SGLang and transformers read it. A model of one format targets every "Linear" and lists what stays as it is; one of several
formats names the modules of each group.
"""
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from modelq._version import __version__
from modelq.checkpoint import dialects
from modelq.checkpoint.compressed import KV_FP8, METHOD, MIXED_FORMAT, block_input_args, input_args, weight_args
from modelq.checkpoint.dialects import Pair
from modelq.export.side_files import ConfigFiles

if TYPE_CHECKING:
    from modelq.export.plan import Plan


def config_files(plan: Plan) -> ConfigFiles:
    """Everything goes into config.json."""
    members: dict[tuple[Pair, int | None], list[str]] = {}
    for linear in plan.linears.values():
        members.setdefault((linear.pair, linear.group_size), []).append(linear.module)
    groups = {}
    for i, ((pair, size), modules) in enumerate(members.items()):
        groups[f"group_{i}"] = group(pair, size, ["Linear"] if len(members) == 1 else modules)
    formats = {said["format"] for said in groups.values()}
    dense = "dense" if not groups else MIXED_FORMAT
    return ConfigFiles({
        "config_groups": groups, "format": formats.pop() if len(formats) == 1 else dense, "global_compression_ratio": None,
        "ignore": [as_target(name) for name in plan.unquantized_linears],
        "kv_cache_scheme": KV_FP8 if plan.cache.algorithm else None, "quant_method": METHOD,
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": f"modelq.{__version__}"})


def as_target(name: str) -> str:
    """A name, or a name's beginning with * behind it, in the library's words: anything but a whole name is a regular expression."""
    return f"re:{re.escape(name[:-1])}.*" if name.endswith("*") else name


def group(pair: Pair, group_size: int | None, targets: list[str]) -> dict[str, Any]:
    """One config group."""
    inputs = None if pair.input is None else input_args(pair.input)
    if dialects.schemes()[pair.weight]["block"][0] > 1:
        inputs = block_input_args(pair.weight)
    return {"format": dialects.algorithms(METHOD)[pair], "input_activations": inputs, "output_activations": None, "targets": targets,
            "weights": weight_args(pair.weight, group_size)}
