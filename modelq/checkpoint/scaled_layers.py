"""Which folders are opened as `ScaledCheckpoint`: by config.json's quantization_config, by names and shapes."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelq.checkpoint import compressed
from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.quantization_config import NESTED_FILE
from modelq.checkpoint.scaled import ScaledCheckpoint, ScaledLinear
from modelq.checkpoint.scaled_compressed import find_compressed
from modelq.checkpoint.scaled_fp8 import find_fbgemm, find_fp8, find_unsaid
from modelq.checkpoint.scaled_integers import find_awq, find_gptq

_FINDERS = {"fp8": find_fp8, "fbgemm_fp8": find_fbgemm, "awq": find_awq, "gptq": find_gptq}
# Beside a weight: of its input and output, or repeating what shapes say.
_BESIDE = ("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale",
           "output_zero_point", "weight_shape", "weight_g_idx", "g_idx", "bias_scale")
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".k_zero_point", ".v_zero_point")


def open_scaled(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it is none of these, else what dequantizes it around it. ValueError names what is not read."""
    config, left = checkpoint.config.get("quantization_config"), None
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    linears: Mapping[str, ScaledLinear] | None = None
    if config is None and not (checkpoint.path / NESTED_FILE).exists():
        linears = find_unsaid(checkpoint)
    elif config is not None and method == compressed.METHOD:
        found = find_compressed(checkpoint, config)
        linears, left = found if found is not None else (None, None)
    elif config is not None and method in _FINDERS:
        linears = _FINDERS[method](checkpoint, config)
    return checkpoint if linears is None else _around(checkpoint, linears, left)


def _around(checkpoint: Checkpoint, linears: Mapping[str, ScaledLinear], left: Mapping[str, Any] | None) -> ScaledCheckpoint:
    """left: the quantization_config of what is stored in another way."""
    hidden = [name for name in checkpoint.tensors if _is_beside(name, linears) or name.endswith(_CACHE)]
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return ScaledCheckpoint(checkpoint, linears, hidden, config if left is None else {**config, "quantization_config": left})


def _is_beside(name: str, linears: Mapping[str, ScaledLinear]) -> bool:
    module, _, last = name.rpartition(".")
    return module in linears and last in _BESIDE
