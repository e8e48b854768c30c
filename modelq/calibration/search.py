"""Searches for ranges: of weights by squared errors, plain or as blocks of inputs weigh them (mse, local_hessian), and of activations by
histograms."""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from modelq.calibration.statistics import InputStatistics
from modelq.calibration.walk import Method
from modelq.calibration.weights import quantized_weights, tensor_of
from modelq.maxima import choose_maxima
from modelq.quantizers import needs_amax, stage_quantizers
from modelq.rules import stages
from modelq.streaming import Part
from modelq.tables import listed

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
                choose_maxima(quantizers[0], weight, self.settings, gram)


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
