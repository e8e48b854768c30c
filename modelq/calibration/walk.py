"""The order of work of a calibration: batches go through the layers one after the other, and a method looks on.

A layer after the last one whose activations are wanted is not computed, nor is lm_head. Calibrators live for one layer at a time.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import streaming
from modelq.calibration.statistics import Range, InputStatistics, activation_slots, input_statistics
from modelq.calibration.weights import find_weight_amax, freeze_scales, take_amax
from modelq.calibration.mxfp4 import keep_mxfp4
from modelq.experts import PARENT, quantizer_of
from modelq.inputs import Batch
from modelq.progress import progress
from modelq.rules import Slot
from modelq.streaming import Part
from modelq.tables import listed

if TYPE_CHECKING:
    from modelq.calibration.resume import Progress
    from modelq.model import Model


class Method:
    """One calibration algorithm. The base class is Model Optimizer's "max" (maximum calibration: Wu et al. 2020, "Integer quantization for
    deep learning inference", section 3.3): the largest magnitude of every weight, as it comes from the checkpoint, and of every
    activation, as the unquantized model makes it.

    What a search adds: statistics of the inputs of linears (`searched`, `kinds`), and what it makes of them (`search`).
    """

    needs_data = False                      # whether weights alone are not enough
    description = "calibrate"
    kinds: Mapping[str, int] = {}           # statistics of inputs, as InputStatistics takes them
    histogram: Mapping[str, Any] | None = None
    under_quantization = False              # a search looks on while activations are quantized, once their ranges are found
    sees_rounded = False                    # and sees inputs as their quantizers leave them
    changes_weights = False

    def __init__(self, model: Model, settings: Mapping[str, Any], compat: str | None = None):
        self.model, self.settings, self.compat = model, settings, compat
        self.losses: dict[str, Any] = {}        # what a search found each module or quantizer to lose

    def begin(self) -> None:
        """Before anything is run."""

    def searched(self, part: Part) -> list[dict[str, Any]]:
        """The linears of a part whose inputs a search needs to know."""
        return []

    def finds_range(self, slot: Slot) -> bool:
        """Whether the amax of an activation quantizer is found here, from what passes; else the search sees to it."""
        return True

    def enter(self, part: Part) -> None:
        """A part's weights are there; its tokens are to come."""
        freeze_scales(self.model, part, part.modules)
        find_weight_amax(self.model, part)

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        """A part's tokens have passed. inputs: by module, statistics of the inputs of what is `searched`."""

    def layer(self, walk: Walk, layer: int) -> None:
        """One layer of all batches; the next one's inputs are there afterwards: what this one makes of them, when quantized if the
        algorithm's layerwise setting says so."""
        layerwise = self.settings["layerwise"]
        quantized = layerwise["enable"] and layerwise["get_qdq_activations_from_prev_layer"]
        start = walk.run.state() if quantized or (layerwise["enable"] and (self.changes_weights or self.under_quantization)) else None
        walk.look(layer)
        if start is not None:
            walk.run.restore(start, layer)
            with self.model.simulating(weights=quantized, activations=quantized):
                walk.through(layer)

    def end(self) -> None:
        """After the last layer: what is to be said of all."""


class Walk:
    """Batches on their way through a model. run: None where no activation is wanted."""

    def __init__(self, model: Model, batches: Sequence[Batch], method: Method, done: Progress):
        self.model, self.method, self.done = model, method, done
        self._clean: np.ndarray | None = None       # hidden states where no activation is quantized, if these go another way
        self.slots = [slot for slot in activation_slots(model) if method.finds_range(slot)]
        searched = {row["layer"] for row in model.modules if row["kind"] == "linear" and method.needs_data and _is_on(model, row)}
        layers = searched | {slot.layer for slot in self.slots if slot.layer >= 0 or slot.parent == "nn.Linear"}
        self.wants_head = -1 in layers
        self.last = model.num_layers - 1 if self.wants_head else max(layers, default=-1)
        self.run = None
        if layers and not done.is_complete:
            self.run = streaming.start(model, batches, method.compat == "modelopt", onlooking_experts(model, method.settings))
        # those of an earlier step stay where this one does without the data
        model.expert_tokens = {} if layers or not batches else dict(model.expert_tokens)

    def go(self) -> None:
        model, method = self.model, self.method
        model.kept_blocks = keep_mxfp4(model) if type(method).search is Method.search else {}
        method.begin()
        for modules in (model.embedding_modules, () if self.wants_head else model.head_modules):
            self.weights_only([], Part(-1, None, modules, streaming.unread(model)))
        for layer in progress(range(model.num_layers), method.description):
            if (states := self.done.restore(layer, method.losses)) is not None:
                self.go_on(states, layer + 1)
                continue
            if self.run is not None and layer <= self.last:
                method.layer(self, layer)
            else:
                for names, part in streaming.parts(model, layer):
                    self.weights_only(names, part)
            self.done.save(layer, self.states() if layer < self.last or self.wants_head else {}, method.losses)
        if self.wants_head and self.done.restore(model.num_layers, method.losses) is None:
            self.look(model.num_layers)
            self.done.save(model.num_layers, {}, method.losses)
        model.search_losses = {**model.search_losses, **method.losses}
        method.end()

    def states(self) -> dict[str, np.ndarray]:
        """The hidden states behind a layer."""
        found = {} if self.run is None else {"hidden": self.run.state()}
        return found if self._clean is None else {**found, "clean": self._clean}

    def go_on(self, states: Mapping[str, np.ndarray], layer: int) -> None:
        """Begin with a layer from the states that were behind the one before."""
        if self.run is not None and "hidden" in states:
            self.run.restore(states["hidden"], layer)
            self._clean = states.get("clean")

    def slots_of(self, layer: int) -> list[Slot]:
        return [slot for slot in self.slots if slot.layer == (layer if layer < self.model.num_layers else -1)]

    def look(self, layer: int) -> None:
        """The method looks on while all batches go through one layer, or, behind the last, reach lm_head."""
        if self.method.under_quantization:
            self._look_twice(layer, apart=not self.method.settings["layerwise"]["enable"])
        else:
            self.through(layer, self.slots_of(layer), self.method)

    def _look_twice(self, layer: int, apart: bool) -> None:
        """Ranges are found first, where nothing is quantized; then the method looks on while activations are. apart: each time, what comes
        in is what came out of the layer before under the same conditions; else both start from where the run is. Before the first
        activation quantizer, once is enough."""
        slots = self.slots_of(layer)
        if slots or self._clean is not None:
            start = self.run.state()
            if self._clean is not None:
                self.run.restore(self._clean, layer)
            self.through(layer, slots)
            if layer < self.model.num_layers:
                self._clean = self.run.state() if apart else None
            self.run.restore(start, layer)
        with self.model.simulating(weights=False, activations=True):
            self.through(layer, (), self.method)

    def through(self, layer: int, slots: Sequence[Slot] = (), method: Method | None = None) -> None:
        """All batches through one layer, or from the last to lm_head; ranges are found at these slots; method, if any, looks on."""
        watch = _Watch(self.model, slots, method, self.method.histogram)
        with watch.attached():
            if layer < self.model.num_layers:
                tokens = streaming.run_layer(self.model, self.run, layer, watch if method is not None else None,
                                             layer + 1 if layer < min(self.last, self.model.num_layers - 1) else None)
                if method is not None:
                    _note_tokens(self.model, layer, tokens)
            else:
                self._finish(watch if method is not None else None)
        watch.take_ranges()

    def _finish(self, watch: _Watch | None) -> None:
        """What reaches lm_head, without logits."""
        tensors = streaming.head_tensors(self.model)
        part = Part(-1, None, self.model.head_modules, tensors)
        if watch is not None:
            watch.enter(part)
        self.run.finish(tensors)
        if watch is not None:
            watch.leave(part)

    def weights_only(self, names: Sequence[str], part: Part) -> None:
        self.method.enter(part)
        self.method.search(part, {})
        _park(self.model, part)
        self.model.checkpoint.release(names)


class _Watch:
    """Looks on while a layer runs: keeps calibrators where they belong, part by part."""

    def __init__(self, model: Model, slots: Sequence[Slot], method: Method | None, histogram: Mapping[str, Any] | None):
        self.model, self.method = model, method
        self.ranges = {slot.name: Range(model.settings[slot.name], histogram) for slot in slots}
        self.inputs: dict[str, InputStatistics] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        for name, found in self.ranges.items():
            self.model.runtime.set_calibrator(name, found.statistics)
        try:
            yield
        finally:
            for name in {*self.ranges, *(seen.point for seen in self.inputs.values())}:
                self.model.runtime.set_calibrator(name, None)

    def enter(self, part: Part) -> None:
        assert self.method is not None
        self.method.enter(part)
        self.inputs = input_statistics(self.model, self.method.searched(part), self.method.kinds)
        for point, seen in {seen.point: seen for seen in self.inputs.values()}.items():
            own = [self.ranges[point].statistics] if point in self.ranges else []
            self.model.runtime.set_calibrator(point, [*own, *seen.calibrators.values()], self.method.sees_rounded)

    def leave(self, part: Part) -> None:
        assert self.method is not None
        for point in {seen.point for seen in self.inputs.values()}:
            self.model.runtime.set_calibrator(point, self.ranges[point].statistics if point in self.ranges else None)
        inputs, self.inputs = self.inputs, {}
        self.method.search(part, inputs)
        _park(self.model, part)

    def take_ranges(self) -> None:
        for name, found in self.ranges.items():
            if (bias := found.bias) is not None:
                self.model.quantizers[name].bias = bias
            take_amax(self.model, name, [found.amax()])


def _park(model: Model, part: Part) -> None:
    if (parking := getattr(model, "parking", None)) is not None:
        parking.park(model, part.modules)


def _is_on(model: Model, row: dict[str, Any]) -> bool:
    quantizer = quantizer_of(model, f"{row['name']}.weight_quantizer")
    return quantizer is not None and quantizer.enabled


# Experts -------------------------------------------------------------------------------------------------------------------------

def onlooking_experts(model: Model, settings: Mapping[str, Any]) -> int:
    """How many experts see each token while calibrating, by moe_calib_experts_ratio: those besides a token's own add to statistics, not to
    the result."""
    ratio, experts = settings.get("moe_calib_experts_ratio"), model.runtime.config.get("num_experts", 0)
    return 0 if ratio is None or not experts else min(experts, round(experts * ratio))


def _note_tokens(model: Model, layer: int, tokens: np.ndarray | None) -> None:
    """Remember how many tokens reached each expert of a layer, if they are quantized."""
    if tokens is None or not any(slot.parent == PARENT and slot.layer == layer and model.settings[name].enable
                                 for name, slot in model.slots.items()):
        return
    model.expert_tokens[layer] = np.array(tokens[:, 1])


def warn_unseen(model: Model) -> None:
    unseen = model.unseen_experts
    if unseen:
        said = [f"layer {layer}: {len(experts)} of {model.runtime.experts(layer)}" for layer, experts in unseen.items()]
        warnings.warn(f"experts that saw no token ({listed(said, 8, '; ')}): their weights are calibrated from the weights alone, "
                      "their inputs have the scale of the layer's other experts; more or longer texts reach more of them, and so does an "
                      "algorithm {'method': 'max', 'moe_calib_experts_ratio': 0.25} (print_quant_summary names them)", stacklevel=4)
