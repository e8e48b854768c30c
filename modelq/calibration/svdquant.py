"""SVDQuant (Li et al. 2024): AWQ's smoothing, then a branch of low rank beside each weight, and the rest of the weight is quantized.

Linears that read one input share the smoothing scale and the branch's first half, as an export writes them; in a model loaded as float32,
and a torch model under compat "modelopt", each linear has its own, as in Model Optimizer before its export.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from modelq.calibration.smooth import AwqLite
from modelq.calibration.statistics import InputStatistics
from modelq.calibration.weights import freeze_scales, share_global_amax, take_amax, tensor_of
from modelq.groups import siblings
from modelq.low_rank import LowRank, largest_part
from modelq.quantizers import needs_amax
from modelq.smoothing import dtype_of, own_scale, rounded, set_weight_amax
from modelq.streaming import Part


class SvdQuant(AwqLite):
    description = "svdquant"

    def takes(self, row: dict[str, Any]) -> bool:
        skipped = any(fnmatchcase(row["name"], pattern) for pattern in self.settings.get("skip_layers") or ())
        return super().takes(row) and not skipped and row["layer"] >= 0

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        super().search(part, inputs)
        rows = self.searched(part)
        freeze_scales(self.model, part, rows)
        for members in siblings(rows):
            apart = self.model.float32_weights or self.model.own_scales
            together = [[row] for row in members] if apart else [members]
            for group in together:
                self.split(group, part)
            for row in members:
                if self.model.settings[f"{row['name']}.input_quantizer"].enable:
                    self.set_input_amax(row, inputs[row["name"]].amax, own_scale(self.model, row["name"]))
        share_global_amax(self.model, part.modules, [f"{row['name']}.weight_quantizer" for row in rows])

    def split(self, rows: Sequence[dict[str, Any]], part: Part) -> None:
        """Give these linears a branch with one first half."""
        weights = [tensor_of(self.model, row, part) for row in rows]
        dtype = dtype_of(self.model, rows[0])
        down, up = largest_part(np.concatenate([weight.astype(np.float32) for weight in weights]), self.settings["lowrank"])
        start = 0
        for row, weight in zip(rows, weights):
            self.model.low_rank[row["name"]] = LowRank(down.astype(dtype), up[start:start + len(weight)].astype(dtype))
            start += len(weight)
            set_weight_amax(self.model, row, tensor_of(self.model, row, part))

    def set_input_amax(self, row: dict[str, Any], amax: np.ndarray, scale: np.ndarray) -> None:
        """Of inputs as they are multiplied by the stored scale."""
        name, dtype = f"{row['name']}.input_quantizer", dtype_of(self.model, row)
        if self.model.settings[name].enable and needs_amax(self.model.settings[name]):
            stored = rounded(scale, dtype)
            take_amax(self.model, name, [np.float32(rounded(rounded(amax, dtype) * stored, dtype).max(initial=0))])
