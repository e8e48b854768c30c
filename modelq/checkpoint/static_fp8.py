"""FP8 with one scale for a weight and one for its input, under quant_method "fp8" (activation_scheme "static"): read as a quantized model.

vLLM's AutoFP8 wrote weight_scale and input_scale; transformers (and Mistral's own checkpoints) weight_scale_inv and activation_scale. Both
are what Model Optimizer and compressed-tensors call FP8, so such a folder computes with quantized inputs, and converts with its scales.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.dialects import STATIC_FP8, Pair
from modelq.checkpoint.said import Said

WORD = "fp8"
_PAIR = Pair("fp8", "fp8")


def dialect_of(checkpoint: Checkpoint, config: Any) -> str | None:
    """Which of STATIC_FP8 all FP8 weights of a folder are spelled in; None: some of them, or the config, say something else."""
    if not isinstance(config, Mapping) or config.get("quant_method") != "fp8" or config.get("activation_scheme") != "static":
        return None
    weights = [info for name, info in checkpoint.tensors.items() if name.endswith(".weight") and info.dtype.startswith("float8")]
    for dialect, roles in STATIC_FP8.items():
        if weights and all(info.dtype == "float8_e4m3fn" and len(info.shape) == 2 and _is_scaled(checkpoint, info.name, roles.values())
                           for info in weights):
            return dialect
    return None


def find_static(checkpoint: Checkpoint) -> tuple[Said, dict[str, Any]] | None:
    """As `find_quantization`, of such a folder; None for others."""
    config = checkpoint.config.get("quantization_config")
    dialect = dialect_of(checkpoint, config)
    return None if dialect is None else (Said(dialect, lambda module: (_PAIR, None, WORD), (), WORD), dict(config))


def _is_scaled(checkpoint: Checkpoint, name: str, suffixes: Any) -> bool:
    scales = [checkpoint.tensors.get(f"{name.removesuffix('weight')}{suffix}") for suffix in suffixes]
    return all(scale is not None and set(scale.shape) <= {1} for scale in scales)
