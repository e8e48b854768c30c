"""Calibration algorithms on transformers models: torch computes, hooks hand what passes to the statistics, and the same methods search as
for native models (modelq.calibration), on a native twin of the model.

A forward_loop is run once per group of layers, as many as have room for their Gram matrices at once (twice for methods that look on while
activations are quantized).
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from modelq.arrays import give_back, take
from modelq.calibration import METHODS
from modelq.calibration.statistics import InputStatistics, Range, activation_slots, input_statistics
from modelq.calibration.walk import Method
from modelq.calibration.weights import take_amax
from modelq.changed import ChangedCheckpoint
from modelq.quantizers import found_values, set_found_values
from modelq.rules import stages
from modelq.streaming import Part, unread
from modelq.torch_models.modules import QuantizerModule
from modelq.torch_models.quantize import SETTINGS, quantizers_of, rounding
from modelq.torch_models.twin import twin_of

ROOM = 2 << 30      # bytes of Gram matrices at once
Loop = Callable[..., Any]


def run_step(model: Any, step: Mapping[str, Any], forward_loop: Loop | None, compat: str | None) -> None:
    """One step of an algorithm. ValueError as for native models; NotImplementedError for what torch models cannot do yet."""
    if step["method"] == "svdquant" or step["layerwise"]["enable"]:
        what = "svdquant" if step["method"] == "svdquant" else "layerwise calibration"
        raise NotImplementedError(f"{what} is not available for torch models yet: save the model with save_pretrained, and quantize that "
                                  "folder with modelq.load")
    twin = twin_of(model, for_search=True)
    method = METHODS[step["method"]](twin, step, compat)
    slots = [slot for slot in activation_slots(twin) if method.finds_range(slot)]
    if forward_loop is None and (method.needs_data or slots):
        raise ValueError(f"{step['method']} looks at activations: calibration data are needed: give a forward_loop")
    method.begin()
    ranges = {slot.name: Range(twin.settings[slot.name], method.histogram) for slot in slots}
    waiting = dict(ranges)
    for parts in _groups(twin, method):
        for part in parts:
            method.enter(part)
        statistics = [input_statistics(twin, method.searched(part), method.kinds) for part in parts]
        apart = method.under_quantization and bool(ranges)
        if apart and waiting:
            _look(model, forward_loop, waiting, [], False, False)
            _take_ranges(twin, waiting)
            _hand_over(twin, model)
            waiting = {}
        if waiting or any(statistics):
            _look(model, forward_loop, waiting, statistics, method.under_quantization, method.sees_rounded)
            _take_ranges(twin, waiting)
            waiting = {}
        for part, found in zip(parts, statistics):
            method.search(part, found)
    method.end()
    _hand_over(twin, model)


def _groups(twin: Any, method: Method) -> Iterator[list[Part]]:
    """Parts of the model whose statistics have room together, all others with the first."""
    outside = [Part(-1, None, modules, unread(twin)) for modules in (twin.embedding_modules, twin.head_modules)]
    group, room = list(outside), ROOM
    for layer in range(twin.num_layers):
        part = Part(layer, None, twin.modules_of(layer), unread(twin))
        sites = {row["site"]: row["shape"][1] for row in part.modules if row["kind"] == "linear"}
        needed = sum(4 * width * width for width in sites.values()) if "gram" in method.kinds else 0
        if group and needed > room:
            yield group
            group, room = [], ROOM
        group.append(part)
        room -= needed
    yield group


def _look(model: Any, forward_loop: Any, ranges: Mapping[str, Range], statistics: Sequence[Mapping[str, InputStatistics]], quantized: bool,
          sees_rounded: bool) -> None:
    """Run the data through the model while ranges and statistics take note. quantized: activations are."""
    quantizers = quantizers_of(model)
    seen = {f"{module}.input_quantizer": found for layer in statistics for module, found in layer.items()}
    by_object = {id(found): name for name, found in reversed(seen.items())}       # siblings share theirs: the first collects
    with ExitStack() as hooks, torch.no_grad():
        for name, found in ranges.items():
            hooks.callback(quantizers[name].register_forward_hook(_collector([found.statistics], False)).remove)
        for name in by_object.values():
            collector = _collector(list(seen[name].calibrators.values()), quantized and not sees_rounded)
            hooks.callback(quantizers[name].register_forward_hook(collector).remove)
        hooks.enter_context(rounding(quantizers, quantized))
        forward_loop(model)


def _collector(calibrators: Sequence[Any], prepared: bool) -> Any:
    """A hook that looks at what a quantizer gives, or (prepared) at what it would round."""
    def collect(quantizer: QuantizerModule, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        array = take(quantizer.prepared(arguments[0]) if prepared else output, quantizer.name)
        for calibrator in calibrators:
            calibrator.collect(array)
    return collect


def _take_ranges(twin: Any, ranges: Mapping[str, Range]) -> None:
    unseen = []
    for name, found in ranges.items():
        if (amax := found.amax()) is None:
            unseen.append(name)
        else:
            take_amax(twin, name, [amax])
    if unseen and len(unseen) == len(ranges):
        raise ValueError("forward_loop ran nothing through the model: no quantizer saw an array")
    if unseen:
        warnings.warn(f"no data reached {', '.join(unseen[:4])}{', ...' if len(unseen) > 4 else ''}", UserWarning, stacklevel=6)


def _hand_over(twin: Any, model: Any) -> None:
    """What was found, to the model: ranges and scales, settings that a method changed, weights that it rounded."""
    settings = dict(getattr(model, SETTINGS))
    for name, quantizer in quantizers_of(model).items():
        if name not in twin.quantizers:
            continue
        if twin.settings[name].attributes != settings[name].attributes:
            settings[name] = twin.settings[name]
            quantizer.set_from_attribute_config(stages(settings[name])[0])
        set_found_values(quantizer.native, found_values(twin.quantizers[name]))
    setattr(model, SETTINGS, settings)
    if isinstance(twin.checkpoint, ChangedCheckpoint):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, rounded in twin.checkpoint.changed.items():
            with torch.no_grad():
                parameters[name].copy_(give_back(rounded.read(), parameters[name]))
