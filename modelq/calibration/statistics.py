"""Statistics of activations: what a quantizer's range is made of, and what searches know of a linear's input."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.algorithms import HISTOGRAM
from modelq.experts import place_of
from modelq.groups import siblings
from modelq.quantizers import calibrator_of, needs_amax, takes_histogram
from modelq.rules import Setting, Slot, stages
from modelq.smoothing import own_scale

if TYPE_CHECKING:
    from modelq.model import Model

RANGES = {"range_method": "entropy", **HISTOGRAM}


def activation_slots(model: Model) -> list[Slot]:
    """The places of activations whose amax calibration must find."""
    return [model.slots[name] for name, setting in model.settings.items()
            if setting.slot.role != "weight" and setting.enable and needs_amax(setting)]


# Ranges of single quantizers -----------------------------------------------------------------------------------------------------

class Range:
    """The amax (and bias) of one activation quantizer. histogram: settings as in RANGES where the algorithm finds ranges so; a quantizer
    may also ask for it itself (calibrator "histogram")."""

    def __init__(self, setting: Setting, histogram: Mapping[str, Any] | None):
        attributes = stages(setting)[0]
        self.histogram = histogram if histogram is not None else RANGES if attributes.calibrator == "histogram" else None
        if not takes_histogram(setting):
            self.histogram = None
        self.bits = attributes.num_bits if isinstance(attributes.num_bits, int) else 0
        self.name, self.unsigned = setting.slot.name, attributes.unsigned
        if self.histogram and self.histogram["range_method"] == "entropy" and not self.bits:
            raise ValueError(f"{self.name}: entropy compares a histogram with the equal steps of integers, and num_bits is "
                             f"{attributes.num_bits}: use percentile or {{'method': 'histogram', 'range_method': 'mse'}}")
        kind, bins = ("histogram", self.histogram["num_bins"]) if self.histogram else (calibrator_of(setting), 0)
        self.statistics = _core.Calibrator(kind, None, bins)

    def amax(self) -> np.ndarray | None:
        """None if nothing was seen. ValueError names the quantizer if NaN or infinity was."""
        try:
            if self.histogram is None:
                found = self.statistics.compute_amax()
            else:
                how = self.histogram
                found = self.statistics.compute_range(how["range_method"], self.bits, self.unsigned, how["stride"], how["start_bin"],
                                                      how["percentile"], how["skip_zeros"])
        except ValueError as error:
            raise not_finite(self.name, error) from error
        return None if found is None else np.asarray(found, dtype=np.float32)

    @property
    def bias(self) -> np.ndarray | None:
        return self.statistics.compute_bias() if self.statistics.kind.startswith("affine") else None


def not_finite(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name}: NaN or infinity in the activations that reach it: in bfloat16 or float16 a value overflowed, or a weight "
                      f"before it is damaged ({error})")


# Inputs of linears ---------------------------------------------------------------------------------------------------------------

class InputStatistics:
    """What is known of one tensor that linears read. kinds: "amax" (largest magnitude by channel), "mean" (of magnitudes by channel),
    "gram" (X^T X), and options for them: {"gram": 16} keeps blocks of 16 on the diagonal, {"mean": 1} weighs calls as Model Optimizer."""

    KINDS = {"amax": "max", "mean": "mean_abs", "gram": "gram"}

    def __init__(self, point: str, kinds: Mapping[str, int]):
        self.point = point      # the quantizer before which it passes
        self.calibrators = {kind: _core.Calibrator(self.KINDS[kind], -1, option) for kind, option in kinds.items()}

    @cached_property
    def count(self) -> int:
        """Tokens seen, asked for when all have passed."""
        return max(calibrator.count for calibrator in self.calibrators.values())

    @cached_property
    def amax(self) -> np.ndarray:
        return self._found("amax", "compute_amax")

    @cached_property
    def mean(self) -> np.ndarray:
        return self._found("mean", "compute_amax")

    @cached_property
    def gram(self) -> np.ndarray:
        """float32 [C, C], or its blocks [blocks, size, size]. The calibrator's own sums are dropped."""
        found = self._found("gram", "compute_gram")
        self.count      # noqa: B018 (cached before it is gone)
        self.calibrators["gram"].reset()
        return found

    def _found(self, kind: str, method: str) -> np.ndarray:
        try:
            return np.asarray(getattr(self.calibrators[kind], method)())
        except ValueError as error:
            raise not_finite(self.point, error) from error


def input_statistics(model: Model, rows: Sequence[dict[str, Any]], kinds: Mapping[str, int]) -> dict[str, InputStatistics]:
    """Module to statistics of its input, of these kinds; linears that read one tensor, smoothed alike, have one between them."""
    found: dict[str, InputStatistics] = {}
    for members in siblings(row for row in rows if row["kind"] == "linear") if kinds else ():
        for row in members:
            alike = [other for other in members if other["name"] in found and same_scale(model, row, other)]
            found[row["name"]] = found[alike[0]["name"]] if alike else InputStatistics(
                place_of(model, f"{row['name']}.input_quantizer").name, kinds)
    return found


def same_scale(model: Model, row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two linears' inputs are smoothed alike. Siblings are, but in a model loaded as float32."""
    return not (model.float32_weights or model.own_scales) or np.array_equal(own_scale(model, row["name"]), own_scale(model, other["name"]))
