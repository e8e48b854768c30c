"""Calibration of torch modules: torch computes, hooks hand what passes to the statistics, and the same methods search as for native models
(modelq.calibration), on a stand-in for the model.

A forward_loop is run once per group of layers, as many as have room for their Gram matrices at once (twice for methods that look on while
activations are quantized); layer by layer (modelq.torch_models.layerwise) it is run once.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from modelq.arrays import give_back
from modelq.calibration import METHODS, progress_folder
from modelq.calibration.resume import Progress, Saved
from modelq.calibration.statistics import InputStatistics, Range, activation_slots, input_statistics
from modelq.calibration.walk import Method
from modelq.calibration.weights import find_weight_amax, take_amax
from modelq.changed import ChangedCheckpoint
from modelq.rules import stages
from modelq.streaming import Part, unread
from modelq.tables import listed
from modelq.torch_models.experts import QuantizedExperts
from modelq.torch_models.looking import Largest, points_of, range_hook, range_of, statistics_hook
from modelq.torch_models.originals import Originals
from modelq.torch_models.processes import merge, run_together
from modelq.torch_models.routing import onlooking
from modelq.torch_models.quantize import SETTINGS, find_other_weight_amax, quantizers_of, rounding
from modelq.torch_models.stand_in import StandIn, key_of

ROOM = 2 << 30      # bytes of Gram matrices at once
Loop = Callable[[], Any]


def run_step(model: torch.nn.Module, step: Mapping[str, Any], forward_loop: Callable[..., Any] | None, compat: str | None,
             originals: Originals, index: int = 0, checkpoint_dir: Any = None) -> None:
    """One step of an algorithm, the index-th. ValueError as for native models, and for a checkpoint_dir where layerwise is off."""
    layerwise, folder = step["layerwise"]["enable"], progress_folder(checkpoint_dir, [step])
    if folder is not None and not layerwise:
        raise ValueError("checkpoint_dir: progress of a torch model is kept layer by layer: use {'layerwise': {'enable': True}} in the "
                         "algorithm")
    find_other_weight_amax(model)
    work = Step(model, step, compat, originals)
    if forward_loop is None and (work.method.needs_data or work.ranges):
        what = f"{step['method']} looks at activations" if work.method.needs_data else "this config quantizes activations"
        raise ValueError(f"{what}: calibration data are needed: give a forward_loop")
    work.method.begin()
    if layerwise and (work.method.needs_data or work.ranges):
        from modelq.torch_models.layerwise import layer_by_layer

        before = "" if folder is None else work.stand_in.digest([step], compat)
        layer_by_layer(work, forward_loop, lambda data: Progress() if folder is None else Saved(
            work.stand_in, folder, index, before + data, step["layerwise"]["save_every"]))       # type: ignore[arg-type]
    else:
        for parts in work.groups():
            work.observe((lambda: forward_loop(model)) if forward_loop is not None else None, parts, work.ranges)
    work.method.end()
    work.hand_over()
    work.say_what_was_not_seen()


class Step:
    """One step of an algorithm on a model. ranges: of the activation quantizers that are still to be found."""

    def __init__(self, model: torch.nn.Module, step: Mapping[str, Any], compat: str | None, originals: Originals):
        self.model, self.originals = model, originals
        self.stand_in = StandIn(model, own_scales=step["method"] != "svdquant" or compat == "modelopt")
        self.method: Method = METHODS[step["method"]](self.stand_in, step, compat)     # type: ignore[arg-type]
        self.ranges = {slot.name: range_of(self.stand_in.settings[slot.name], self.method.histogram)
                       for slot in activation_slots(self.stand_in) if self.method.finds_range(slot)}        # type: ignore[arg-type]
        self.experts = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
        self.unseen: list[str] = []         # quantizers that no data reached; seen: how many it did
        self.seen = 0
        self.idle_experts: dict[str, np.ndarray] = {}       # by container, those that no token reached

    def parts(self, rows: Sequence[dict[str, Any]]) -> list[Part]:
        """These modules by layer and expert."""
        by = sorted(rows, key=lambda row: (row["layer"], -1 if row["expert"] is None else row["expert"]))
        return [Part(layer, expert, list(group), unread(self.stand_in))     # type: ignore[arg-type]
                for (layer, expert), group in groupby(by, key=lambda row: (row["layer"], row["expert"]))]

    def groups(self) -> Iterator[list[Part]]:
        """Parts of the model whose statistics have room together."""
        group: list[Part] = []
        room = ROOM
        for part in self.parts(self.stand_in.modules):
            sites = {row["site"]: row["shape"][1] for row in part.modules if row["kind"] == "linear"}
            needed = sum(4 * width * width for width in sites.values()) if "gram" in self.method.kinds else 0
            if group and needed > room:
                yield group
                group, room = [], ROOM
            group.append(part)
            room -= needed
        yield group

    def observe(self, run: Loop | None, parts: Sequence[Part], ranges: dict[str, Any]) -> None:
        """Find these ranges, and let the method search these parts, by what passes while `run` computes (None: weights alone do)."""
        method = self.method
        for part in parts:
            method.enter(part)
        statistics = [input_statistics(self.stand_in, method.searched(part), method.kinds) for part in parts]     # type: ignore[arg-type]
        if run is not None:
            if method.under_quantization and ranges:
                self.look(run, ranges, (), ())
                self.hand_over()
            if ranges or any(statistics):
                parts = self.look(run, ranges, parts, statistics)
        for part, found in zip(parts, statistics):
            method.search(*self.without_unseen(part, found if run is not None and part.tokens != 0 else {}))

    def without_unseen(self, part: Part, found: Mapping[str, InputStatistics]) -> tuple[Part, Mapping[str, InputStatistics]]:
        """A part and what was seen of it, without the modules that no data reached: these keep their weights' maxima."""
        unseen = [row for row in part.modules if row["name"] in found and not found[row["name"]].count]
        self.seen += len(found) - len(unseen)
        if not unseen:
            return part, found
        find_weight_amax(self.stand_in, part._replace(modules=unseen))      # type: ignore[arg-type]
        self.unseen += [f"{row['name']}.input_quantizer" for row in unseen]
        rest = [row for row in part.modules if row not in unseen]
        return part._replace(modules=rest), {row["name"]: found[row["name"]] for row in rest if row["name"] in found}

    def look(self, run: Loop, ranges: dict[str, Any], parts: Sequence[Part], statistics: Sequence[Mapping[str, InputStatistics]]
             ) -> list[Part]:
        """Compute while these take note, and take the ranges; returns the parts with the number of tokens that reached each expert."""
        quantized = self.method.under_quantization and bool(parts)
        quantizers, points = self.quantizers(), points_of(parts, statistics)
        with ExitStack() as hooks, torch.no_grad():
            largest = Largest()
            for name, found in ranges.items():
                hooks.callback(quantizers[name].register_forward_hook(range_hook(found, largest)).remove)
            for point, calibrators in points.items():
                hook = statistics_hook(calibrators, quantized and not self.method.sees_rounded,
                                        self.experts.get(point.rpartition(".")[0]))
                hooks.callback(quantizers[point].register_forward_hook(hook).remove)
            tokens = hooks.enter_context(self.counting())
            hooks.enter_context(onlooking(self.model, self.method.settings.get("moe_calib_experts_ratio")))
            hooks.enter_context(rounding(quantizers, weights=False, activations=quantized))
            run_together(run)
            largest.hand_over()
        counters = {f"{point}:{expert}:{index}": calibrator for point, by_expert in points.items()
                    for expert, calibrators in by_expert.items() for index, calibrator in enumerate(calibrators)}
        counters |= {name: found.statistics for name, found in ranges.items() if isinstance(found, Range)}
        merge(counters, {name: found.statistics for name, found in ranges.items() if not isinstance(found, Range)}, tokens)
        self.idle_experts = {name: np.flatnonzero(count == 0) for name, count in tokens.items() if count.any() and not count.all()}
        self.take_ranges(ranges)
        counted = [part if part.expert is None else part._replace(tokens=int(tokens[part.modules[0]["container"]][part.expert]))
                   for part in parts]
        return counted

    @contextmanager
    def counting(self) -> Iterator[dict[str, np.ndarray]]:
        """Within it, how many tokens reach each expert is counted, by container."""
        tokens = {name: np.zeros(module.num_experts, np.int64) for name, module in self.experts.items()}       # type: ignore[attr-defined]
        for name, module in self.experts.items():
            object.__setattr__(module, "tokens", tokens[name])
        try:
            yield tokens
        finally:
            for module in self.experts.values():
                object.__setattr__(module, "tokens", None)

    def take_restored(self, ranges: dict[str, Any]) -> None:
        """These ranges were found before."""
        self.seen += len(ranges)
        self.hand_over()

    def take_ranges(self, ranges: dict[str, Any]) -> None:
        """Those that saw something are found; none is left to be."""
        for name, found in ranges.items():
            if (bias := found.bias) is not None:
                self.stand_in.quantizers[name].bias = bias
            if (amax := found.amax()) is None:
                self.unseen.append(name)
            else:
                self.seen += 1
                take_amax(self.stand_in, name, [amax])      # type: ignore[arg-type]
        ranges.clear()

    def say_what_was_not_seen(self) -> None:
        """ValueError if no quantizer of activations saw anything; those that did not are off."""
        if self.unseen and not self.seen:
            raise ValueError("forward_loop ran nothing through the model: no quantizer saw an array")
        if self.unseen:
            warnings.warn(f"no data reached {listed(self.unseen, 4)}: they are off", UserWarning, stacklevel=6)
            quantizers = self.quantizers()
            for name in self.unseen:
                if name in quantizers:
                    quantizers[name].disable()
        if self.idle_experts:
            said = [f"{name}: {len(idle)} of {self.experts[name].num_experts}"          # type: ignore[attr-defined]
                    for name, idle in self.idle_experts.items()]
            warnings.warn(f"experts that saw no token ({listed(said, 8, '; ')}): they are calibrated from their weights alone; more or "
                          "longer calibration texts reach more of them", UserWarning, stacklevel=6)

    def quantizers(self) -> dict[str, Any]:
        """The model's, by the stand-in's names."""
        return {key_of(name): quantizer for name, quantizer in quantizers_of(self.model).items()}

    def hand_over(self) -> None:
        """What was found, to the model: ranges and scales, settings that a method changed, branches, weights that it rounded."""
        settings, stand_in = dict(getattr(self.model, SETTINGS)), self.stand_in
        for name, quantizer in quantizers_of(self.model).items():
            found = stand_in.settings[key_of(name)]
            if found.attributes != settings[name].attributes:
                settings[name] = replace(found, slot=settings[name].slot)
                quantizer.set_from_attribute_config(stages(found)[0])
            if name.endswith(".weight_quantizer"):
                branch = stand_in.low_rank.get(name.removesuffix(".weight_quantizer"))
                if branch is not None or quantizer.low_rank is not None:
                    quantizer.low_rank = branch
        stand_in.give_values(self.model)
        setattr(self.model, SETTINGS, settings)
        checkpoint = stand_in.checkpoint
        if isinstance(checkpoint, ChangedCheckpoint):
            for name in list(checkpoint.changed):
                weight = checkpoint.original.live(name)
                self.originals.keep(name, weight)
                with torch.no_grad():
                    weight.copy_(give_back(checkpoint.read(name), weight))
