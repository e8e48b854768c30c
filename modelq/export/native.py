"""The dialects that are Hugging Face's own: `autoawq`, `gptq` (INT4 weights) and `fp8` (DeepSeek's blocks, and mxfp8).

Each says one format for the whole model. What a method's config says besides is a row of METHODS.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modelq.checkpoint import dialects
from modelq.export.side_files import ConfigFiles

if TYPE_CHECKING:
    from modelq.export.plan import Linear, Plan


def _block(linear: Linear) -> list[int]:
    return list(dialects.schemes()[linear.pair.weight]["block"])


def _group(linear: Linear) -> int:
    return linear.group_size or _block(linear)[1]


# quant_method -> (what its config says, the key that lists what stays in high precision)
METHODS: dict[str, tuple[Callable[[Linear], dict[str, Any]], str]] = {
    "awq": (lambda linear: {"bits": 4, "group_size": _group(linear), "zero_point": True, "version": "gemm", "backend": "autoawq"},
            "modules_to_not_convert"),
    "gptq": (lambda linear: {"bits": 4, "group_size": _group(linear), "sym": True, "desc_act": False, "damp_percent": 0.01,
                             "true_sequential": True, "checkpoint_format": "gptq"}, "modules_to_not_convert"),
    "fp8": (lambda linear: {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": _block(linear)}, "modules_to_not_convert"),
    "mxfp8": (lambda linear: {"activation_scheme": "dynamic", "weight_block_size": _block(linear)}, "modules_to_not_convert"),
}


def config_files(plan: Plan) -> ConfigFiles:
    """config.json's section. ValueError if the layers do not share one format."""
    linears = list(plan.linears.values())
    if not linears:
        raise ValueError(f"no layer of this model is quantized: the {plan.dialect} dialect has nothing to say")
    first = linears[0]
    for other in linears:
        if (other.pair, other.group_size) != (first.pair, first.group_size):
            raise ValueError(f"{other.module} and {first.module} are quantized differently: the {plan.dialect} dialect says one format for "
                             "the whole model; use the compressed-tensors dialect")
    method = dialects.algorithms(plan.dialect)[first.pair]
    details, excluded = METHODS[method]
    return ConfigFiles({"quant_method": method, **details(first), excluded: plan.unquantized_linears})
