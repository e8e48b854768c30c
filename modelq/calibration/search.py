"""Searches for ranges: of weights by squared errors, plain or as blocks of inputs weigh them (mse, local_hessian), and of activations by
histograms."""
from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from modelq import _core
from modelq.calibration.statistics import InputStatistics
from modelq.calibration.walk import Method
from modelq.calibration.weights import quantized_weights, tensor_of
from modelq.quantizers import has_static_levels, needs_amax, stage_quantizers
from modelq.rules import stages
from modelq.streaming import Part
from modelq.tables import listed

SWEPT_BLOCK = 16


class Mse(Method):
    """For every maximum the multiple with the least squared error, or (fp8_scale_sweep) for every static NVFP4 block the best of all FP8
    scales; other weights then keep their maxima, as in Model Optimizer."""

    description = "mse"

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        for name, setting, members in quantized_weights(self.model, part):
            quantizers = stage_quantizers(self.model.quantizers[name])
            if len(quantizers) == 1 and needs_amax(setting) and quantizers[0].amax is not None and stages(setting)[0].type != "dynamic":
                tensors = [tensor_of(self.model, row, part) for row in members]
                weight = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
                gram = inputs[members[0]["name"]].gram if members[0]["name"] in inputs else None
                self.choose(name, quantizers[0], weight, gram)

    def choose(self, name: str, quantizer: Any, weight: np.ndarray, gram: np.ndarray | None) -> None:
        """Replace the quantizer's maxima. gram: blocks of X^T X of the weight's inputs, or None."""
        if self.settings["fp8_scale_sweep"]:
            if has_static_levels(quantizer) and quantizer.block_sizes[-1] == SWEPT_BLOCK:
                quantizer.amax = _core.sweep_block_scales(weight, float(quantizer.global_amax), quantizer.second_divisor, gram)
            return
        if not has_static_levels(quantizer) and not quantizer.needs_amax:
            return
        loss = None if gram is None else _core.GramLoss(gram, "float32", weight.shape[1])
        exact = np.ndim(quantizer.amax) == 0 or quantizer.block_sizes is not None      # these are kept as float32 numbers there
        found = _core.best_amax(weight.astype(np.float32), quantizer, self.factors, loss, "float32" if exact else weight.dtype.name)
        found = found.reshape(np.shape(quantizer.amax))
        quantizer.amax = found if quantizer.block_sizes is not None else found.astype(weight.dtype).astype(np.float32)

    @property
    def factors(self) -> np.ndarray:
        return multipliers(self.settings["start_multiplier"], self.settings["stop_multiplier"], self.settings["step_size"])


def multipliers(start: float, stop: float, step: float) -> np.ndarray:
    """float32 [n]: from start to stop in equal steps of about `step`, counted from both ends as torch.linspace does."""
    count = math.ceil((stop - start) / step) + 1
    if count < 2:
        return np.array([start], np.float32)
    width, index = (np.float32(stop) - np.float32(start)) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    low, high = np.float32(start) + width * index, np.float32(stop) - width * (count - 1 - index)
    return np.where(index < count // 2, low, high).astype(np.float32)


class LocalHessian(Mse):
    """The same with the error weighed by the Gram matrix of each block's inputs, which are those that quantized activations lead to; plain
    squares where no token came by, or where blocks of that size do not divide the weight's columns."""

    needs_data = True
    description = "local_hessian"
    under_quantization = True

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        self.kinds = {"gram": settings["block_size"]}
        self.plain: list[str] = []

    def searched(self, part: Part) -> list[dict[str, Any]]:
        if part.tokens == 0:
            return []
        return [row for _, _, members in quantized_weights(self.model, part) for row in members if self._divides(row)]

    def _divides(self, row: dict[str, Any]) -> bool:
        if row["kind"] != "linear":
            return False
        if row["shape"][1] % self.settings["block_size"]:
            self.plain.append(row["name"])
            return False
        return True

    def end(self) -> None:
        if self.plain:
            warnings.warn(f"local_hessian: blocks of {self.settings['block_size']} do not divide the columns of "
                          f"{listed(self.plain, 1)}: plain squared errors there", stacklevel=5)


class Histogram(Method):
    """Ranges of activations with one static scale (integers, FP8) from histograms; maxima elsewhere."""

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        method = settings["method"] if settings["method"] != "histogram" else settings["range_method"]
        self.histogram = {**{key: settings[key] for key in ("percentile", "num_bins", "start_bin", "stride", "skip_zeros")},
                          "range_method": method}
        self.description = method
