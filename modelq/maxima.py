"""The maxima of a weight that lose least, by squared errors: multiples of those that it has, or all that FP8 scales can stand for."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from modelq import _core
from modelq.quantizers import has_static_levels

SWEPT_BLOCK = 16


def choose_maxima(quantizer: Any, weight: np.ndarray, settings: Mapping[str, Any], gram: np.ndarray | None = None) -> None:
    """Replace a quantizer's maxima. settings: of the algorithm mse; gram: blocks of X^T X of the weight's inputs, which weigh errors."""
    if settings["fp8_scale_sweep"]:
        if has_static_levels(quantizer) and quantizer.block_sizes[-1] == SWEPT_BLOCK:
            quantizer.amax = _core.sweep_block_scales(weight, float(quantizer.global_amax), quantizer.second_divisor, gram)
        return
    if not has_static_levels(quantizer) and not quantizer.needs_amax:
        return
    factors = multipliers(settings["start_multiplier"], settings["stop_multiplier"], settings["step_size"])
    loss = None if gram is None else _core.GramLoss(gram, "float32", weight.shape[1])
    exact = np.ndim(quantizer.amax) == 0 or quantizer.block_sizes is not None      # these are kept as float32 numbers there
    found = _core.best_amax(weight.astype(np.float32), quantizer, factors, loss, "float32" if exact else weight.dtype.name)
    found = found.reshape(np.shape(quantizer.amax))
    quantizer.amax = found if quantizer.block_sizes is not None else found.astype(weight.dtype).astype(np.float32)


def multipliers(start: float, stop: float, step: float) -> np.ndarray:
    """float32 [n]: from start to stop in equal steps of about `step`, counted from both ends as torch.linspace does."""
    count = math.ceil((stop - start) / step) + 1
    if count < 2:
        return np.array([start], np.float32)
    width, index = (np.float32(stop) - np.float32(start)) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    low, high = np.float32(start) + width * index, np.float32(stop) - width * (count - 1 - index)
    return np.where(index < count // 2, low, high).astype(np.float32)
