"""Scores of formats on native models by gradients: sum((g * d)^2) over the outputs of linears and of layers' experts, g from a backward
pass in C (modelq.gradients), d from each format's weights and inputs, which are in memory one part of the model at a time."""
from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core, streaming
from modelq.autoquantize.candidates import Candidate, Scores, Steps, give
from modelq.autoquantize.groups import Group
from modelq.experts import place_of
from modelq.gradients import backward
from modelq.inputs import Batch
from modelq.inputs import groups as rounds_of
from modelq.quantizers import make_quantizer
from modelq.rules import Setting, default_setting
from modelq.stated import stated_input_quantizers
from modelq.streaming import Part

if TYPE_CHECKING:
    from modelq.model import Model

SAME_LOSS = 0.01    # by how much of itself a user's loss may differ from the mean cross-entropy


def gradient_scores(model: Model, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps, batches: Sequence[Any],
                    first: int) -> Generator[tuple[int, Scores], None, None]:
    """As many batches at a time as go through the model together. ValueError: a loss that is not the mean cross-entropy of the labels, or
    not finite (names the batch)."""
    calls = [_recorded(model, steps, batch, first + index) for index, batch in enumerate(batches)]
    _check_loss(model, steps, batches[0], calls[0], first)
    formats = {recipe: _Format(model, candidate) for recipe, candidate in candidates.items()}
    for calls_together in rounds_of(calls, model.tokens_at_once):
        scorer = _Scorer(model, groups, formats)
        try:
            losses = backward(model, map(_arguments, calls_together), visitor=scorer).losses
        finally:
            scorer.leave_none()
        for index, loss in enumerate(losses):
            if not np.isfinite(loss):
                raise ValueError(f"batch {first + index} (counted from 0): the loss is {loss}: look for a batch without labels, or weights "
                                 "with NaN or infinity")
        first += len(calls_together)
        yield len(calls_together), scorer.scores


def _recorded(model: Model, steps: Steps, batch: Any, number: int) -> Batch:
    with model.recording() as calls:
        steps.forward_step(model, batch)
        found = list(calls)
    if len(found) != 1:
        raise ValueError(f"batch {number} (counted from 0): forward_step called the model {len(found)} times, and must once")
    return found[0]


def _arguments(call: Batch) -> dict[str, np.ndarray]:
    """To call the model with again."""
    given = {"input_ids": call.ids, "attention_mask": call.mask, "labels": call.labels}
    return {name: array for name, array in given.items() if array is not None}


def _check_loss(model: Model, steps: Steps, batch: Any, call: Batch, number: int) -> None:
    """The gradient is that of the model's own loss."""
    if steps.loss_func is None:
        raise ValueError("auto_quantize: forward_backward_step is for torch models: give a native model forward_step and loss_func")
    found, own = float(steps.loss_func(steps.forward_step(model, batch), batch)), model.loss([_arguments(call)])
    if not np.isfinite(found):
        raise ValueError(f"batch {number} (counted from 0): the loss is {found}: look for a batch without labels, or weights with NaN or "
                         "infinity")
    if abs(found - own) > SAME_LOSS * abs(own):
        raise ValueError(f"batch {number} (counted from 0): loss_func gives {found:.4g}, and the mean cross-entropy of the labels, which "
                         f"is the only loss that a native model has gradients of, is {own:.4g}: use output.loss, method='kl_div', or "
                         "a torch model")


class _Format:
    """The model as it would be in one format, as an export writes it, but that smoothing stays with the linears that it belongs to."""

    def __init__(self, model: Model, candidate: Candidate):
        made: Any = model.without_norms()
        made.settings = {name: candidate.settings.get(name, Setting(slot, default_setting(slot).attributes, False))
                         for name, slot in model.slots.items()}
        made.quantizers = {name: make_quantizer(setting) for name, setting in made.settings.items()}
        for name, values in candidate.values.items():
            give(made.quantizers[name], values)
        made.folds_all, made.simulate = True, True
        self._model = made
        self._inputs = made.quantizers if model.float32_weights else made.quantizers | stated_input_quantizers(made)

    def weight(self, row: dict[str, Any]) -> np.ndarray:
        return streaming.read(self._model, [row["weight"]], [row])[row["weight"]]

    def input_quantizer(self, name: str) -> Any:
        """The one of that name, None if it changes nothing."""
        quantizer = self._inputs[name]
        return quantizer if quantizer.enabled or quantizer.rotate or quantizer.pre_quant_scale is not None else None


class _Scorer:
    """A visitor of a backward pass: puts observers where groups are scored, and takes their sums."""

    def __init__(self, model: Model, groups: Sequence[Group], formats: Mapping[str, _Format]):
        self._model, self._formats = model, formats
        self._groups = {module: group for group in groups for module in group.modules}
        self._experts: Any = None
        self._there: dict[str, Any] = {}
        self.scores: Scores = {group.key: dict.fromkeys(self._recipes(group), 0.0) for group in groups}

    def _recipes(self, group: Group) -> list[str]:
        return [recipe for recipe in map(str, group.recipes) if recipe in self._formats]

    def enter(self, part: Part) -> None:
        if part.expert is not None:
            self._load_expert(part)
            return
        for row in part.modules:
            group = self._groups.get(row["name"])
            if group is None or row["kind"] not in ("linear", "experts"):
                continue
            formats = [self._formats[recipe] for recipe in self._recipes(group)]
            if row["kind"] == "experts":
                self._there[row["name"]] = _core.ExpertsScore(len(formats), self._model.runtime.compute)
                self._experts = (self._there[row["name"]], formats)
            else:
                bias = part.tensors[row["bias"]] if row["bias"] else None
                inputs = [one.input_quantizer(f"{row['name']}.input_quantizer") for one in formats]
                self._there[row["name"]] = _core.OutputScore([one.weight(row) for one in formats], inputs, bias)
        for name, observer in self._there.items():
            self._model.runtime.set_observer(name, observer)

    def leave_none(self) -> None:
        """No observer stays in the runtime."""
        for name in self._there:
            self._model.runtime.set_observer(name, None)
        self._there, self._experts = {}, None

    def _load_expert(self, part: Part) -> None:
        if self._experts is None:
            return
        observer, formats = self._experts
        gate, _, down = part.modules
        observer.load(part.expert, [(*(one.weight(row) for row in part.modules), *(
            one.input_quantizer(place_of(self._model, f"{row['name']}.input_quantizer").name) for row in (gate, down))) for one in formats])

    def leave(self, part: Part) -> None:
        if part.expert is not None:
            return
        for name, observer in self._there.items():
            group = self._groups[name]
            for recipe, score in zip(self._recipes(group), observer.scores.tolist()):
                self.scores[group.key][recipe] += score
        self.leave_none()
