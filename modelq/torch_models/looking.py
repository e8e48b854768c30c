"""What looks on while a torch model computes: hooks on quantizers that hand what passes to statistics."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modelq import device_arrays
from modelq.arrays import take
from modelq.calibration.statistics import InputStatistics, Range
from modelq.nn.tensor_quantizer import TensorQuantizer
from modelq.rules import Setting, stages
from modelq.streaming import Part
from modelq.torch_models.quantizer_module import QuantizerModule


class GrainRange:
    """A range with more than one number, by an axis or static blocks; otherwise as modelq.calibration.statistics.Range."""
    bias = None

    def __init__(self, setting: Setting):
        self.name = setting.slot.name
        self.statistics = TensorQuantizer(stages(setting)[0], name=self.name)

    def amax(self) -> np.ndarray | None:
        return self.statistics.compute_amax()


def range_of(setting: Setting, histogram: Mapping[str, Any] | None) -> Any:
    attributes = stages(setting)[0]
    grained = attributes.axis is not None or (attributes.block_sizes or {}).get("type", "dynamic") != "dynamic"
    return GrainRange(setting) if grained else Range(setting, histogram)


def points_of(parts: Sequence[Part], statistics: Sequence[Mapping[str, InputStatistics]]) -> dict[str, dict[int | None, list[Any]]]:
    """Quantizers before which statistics look, to calibrators by expert (None: all that passes)."""
    points: dict[str, dict[int | None, list[Any]]] = {}
    for part, found in zip(parts, statistics):
        for seen in found.values():
            points.setdefault(seen.point, {})[part.expert] = list(seen.calibrators.values())
    return points


class Largest:
    """Largest magnitudes that stay on the device where they were found until all data have passed: no call waits for the device."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, torch.Tensor]] = {}

    def collect(self, found: Range, x: torch.Tensor) -> None:
        library = device_arrays.library_for(x) if x.numel() else None
        if library is not None:
            seen = device_arrays.largest(library, x).reshape(())
        else:
            seen = x.detach().abs().amax() if x.numel() else x.new_zeros(())
        before = self._found.get(id(found))
        self._found[id(found)] = (found, seen if before is None else torch.maximum(before[1], seen.to(before[1])))

    def hand_over(self) -> None:
        for found, seen in self._found.values():
            found.statistics.collect(take(seen.reshape(1), found.name))


def is_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def range_hook(found: Any, largest: Largest) -> Any:
    plain = isinstance(found, Range) and found.statistics.kind == "max"

    def collect(quantizer: QuantizerModule, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if plain and not is_on_cpu(output):
            largest.collect(found, output)
        elif isinstance(found, GrainRange) and device_arrays.library_for(output) is not None:
            found.statistics.collect(quantizer.as_rows(output.detach()))
        else:
            found.statistics.collect(quantizer.as_rows(take(output, found.name)))
    return collect


def statistics_hook(calibrators: Mapping[int | None, Sequence[Any]], prepared: bool, experts: Any) -> Any:
    """A hook that looks at what a quantizer gives, or (prepared) at what it would round."""
    def collect(quantizer: QuantizerModule, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        looking = calibrators.get(experts.running if experts is not None else None)
        if looking:
            array = take(quantizer.prepared(arguments[0]) if prepared else output, quantizer.name)
            for calibrator in looking:
                calibrator.collect(array)
    return collect
