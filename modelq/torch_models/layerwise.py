"""Layer by layer: each decoder layer is computed by itself from the inputs that reached it, so that what it is given can be what the
quantized layers before it make, and the user's loop is run once.

What is held: the hidden states of every call at one layer boundary, and what else each layer was called with (masks, positions).
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from modelq.arrays import give_back, take
from modelq.calibration.resume import Progress, Saved
from modelq.progress import progress
from modelq.torch_models.calibration import Step
from modelq.torch_models.modules import is_inserted
from modelq.torch_models.processes import run_together
from modelq.torch_models.quantize import quantizers_of, rounding

Loop = Callable[..., Any]


def layer_by_layer(work: Step, forward_loop: Loop, keep: Callable[[str], Progress]) -> None:
    """Search every layer, from the first to the last, and then what is outside of them. keep: makes what keeps the progress, from a digest
    of the data."""
    model, layerwise, inside = work.model, work.method.settings["layerwise"], set()
    layers = decoder_layers(model)
    with rounding(quantizers_of(model), weights=False, activations=False):
        captured: list[Calls] = []
        run_together(lambda: captured.append(Calls(layers, lambda: forward_loop(model))))
    calls, = captured
    quantized, done = layerwise["get_qdq_activations_from_prev_layer"], keep(calls.digest())
    for index, (name, _) in enumerate(progress(layers, work.method.description)):
        rows = [row for row in work.stand_in.modules if row["name"].startswith(f"{name}.")]
        inside.update(row["name"] for row in rows)
        ranges = {place: work.ranges.pop(place) for place in list(work.ranges) if place.startswith(f"{name}.")}
        if (states := done.restore(index, work.method.losses)) is not None:
            work.take_restored(ranges)
            calls.go_on(index, states)
            continue
        work.observe(lambda index=index: calls.through(index), work.parts(rows), ranges)        # type: ignore[misc]
        work.hand_over()
        with rounding(quantizers_of(model), weights=quantized, activations=quantized):
            calls.advance(index)
        done.save(index, calls.states(), work.method.losses)
    rest = [row for row in work.stand_in.modules if row["name"] not in inside]
    with rounding(quantizers_of(model), weights=quantized, activations=quantized):
        work.observe(lambda: forward_loop(model), work.parts(rest), work.ranges)
    if isinstance(done, Saved):
        done.finish()


def decoder_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The first list of modules that all have something to quantize. ValueError: there is none."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and all(any(map(is_inserted, layer.modules())) for layer in module):
            return [(f"{name}.{index}".lstrip("."), layer) for index, layer in enumerate(module)]
    raise ValueError("layerwise: this model has no list of layers (torch.nn.ModuleList): leave layerwise out")


class Calls:
    """The calls that a run makes of each of a row of layers. hidden: by call, what the next layer is given."""

    def __init__(self, layers: list[tuple[str, torch.nn.Module]], run: Callable[[], Any]):
        self.layers = layers
        self.hidden: list[torch.Tensor] = []
        self._others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in layers]
        hooks = [layer.register_forward_pre_hook(self._recorder(index), with_kwargs=True) for index, (_, layer) in enumerate(layers)]
        try:
            with torch.no_grad():
                run()
        finally:
            for hook in hooks:
                hook.remove()
        if not self.hidden:
            raise ValueError("forward_loop ran nothing through the model: no layer was called")
        if any(len(others) != len(self.hidden) for others in self._others):
            raise ValueError("layerwise: the layers are not called one after the other, each once per forward: leave layerwise out")

    def _recorder(self, index: int) -> Any:
        def record(layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden, *rest = arguments or (named["hidden_states"],)
            if index == 0:
                self.hidden.append(hidden.detach())
            cache = named.get("past_key_values")
            if cache is not None and index == 0 and cache.get_seq_length():
                raise ValueError("layerwise: forward_loop generates with a cache: call model(input_ids) on whole texts instead")
            kept = {key: value for key, value in named.items() if key not in ("hidden_states", "past_key_values", "use_cache")}
            self._others[index].append((tuple(rest), kept))
        return record

    def through(self, index: int) -> list[torch.Tensor]:
        """What a layer makes of every call's hidden states."""
        made = []
        with torch.no_grad():
            for hidden, (rest, named) in zip(self.hidden, self._others[index]):
                output = self.layers[index][1](hidden, *rest, **named)
                made.append(output[0] if isinstance(output, tuple) else output)
        return made

    def advance(self, index: int) -> None:
        """On to the next layer."""
        self.hidden = self.through(index)
        self._others[index] = []

    def states(self) -> dict[str, np.ndarray]:
        """What the next layer is given, by name."""
        return {f"hidden.{call}": take(hidden) for call, hidden in enumerate(self.hidden)}

    def go_on(self, index: int, states: Mapping[str, np.ndarray]) -> None:
        """Past a layer that was done before, from these states behind it, if the next one was not."""
        if states:
            self.hidden = [give_back(np.array(states[f"hidden.{call}"]), hidden)
                           for call, hidden in enumerate(self.hidden)]
        self._others[index] = []

    def digest(self) -> str:
        """Of what the first layer is given."""
        found = hashlib.sha256()
        for name, array in self.states().items():
            found.update(f"{name}{array.shape}{array.dtype}".encode() + array.tobytes())
        return found.hexdigest()
