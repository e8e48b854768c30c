"""Gradient scores of native models: candidates of every linear are shown to the gradients that pass its output (modelq.gradients)."""
from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from modelq import _core, streaming
from modelq.autoquantize.candidates import Candidate, Scores, Steps, give
from modelq.autoquantize.groups import Group
from modelq.experts import quantizer_of
from modelq.gradients import backward
from modelq.model import groups as rounds
from modelq.quantizers import make_quantizer
from modelq.rules import Setting, default_setting
from modelq.smoothing import stated_scale
from modelq.stated import stated_input_quantizers
from modelq.streaming import Part


def gradient_scores(model: Any, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps, batches: Sequence[Any],
                    first: int) -> Generator[tuple[int, Scores], None, None]:
    """As many batches at a time as go through the model together. The loss is each batch's mean cross-entropy, `output.loss`."""
    with model.recording() as calls:
        for number, batch in enumerate(batches, first):
            steps.forward_step(model, batch)
            if len(calls) != number - first + 1:
                raise ValueError(f"batch {number}: forward_step must call the model once, it did so {len(calls) - number + first} times")
        recorded = list(calls)
    for group in rounds(recorded, model.tokens_at_once):
        scores = _Scores(model, groups, candidates)
        given = [{"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels} for batch in group]
        try:
            losses = backward(model, given, visitor=scores).losses
        finally:
            scores.give_up()
        if not np.isfinite(losses).all():
            number = first + int(np.flatnonzero(~np.isfinite(losses))[0])
            raise ValueError(f"batch {number} (of {first + len(batches)}, counted from 0): the loss is {losses[number - first]}: look for "
                             "a batch without labels, or weights with NaN or infinity")
        yield len(group), scores.found
        first += len(group)
        batches = batches[len(group):]


class _Loss:
    """An output of which only the loss may be taken."""

    loss = object()

    def __getitem__(self, key: Any) -> Any:
        if key in ("loss", 0):
            return self.loss
        raise KeyError(key)


def check_loss(steps: Steps) -> None:
    """ValueError: the loss is another than the one whose gradients are known."""
    wanted = "a native model knows the gradients of the mean cross-entropy of a batch: let loss_func return output.loss"
    if steps.forward_backward_step is not None:
        raise ValueError(f"forward_backward_step is for torch modules; {wanted}, or use method='kl_div'")
    assert steps.loss_func is not None
    try:
        taken = steps.loss_func(_Loss(), None)
    except Exception as error:
        raise ValueError(f"{wanted}, or use method='kl_div' (loss_func: {type(error).__name__}: {error})") from None
    if taken is not _Loss.loss:
        raise ValueError(f"{wanted} as it is, or use method='kl_div'")


class _Scores:
    """A visitor of gradients that puts the candidates of a part where they pass."""

    def __init__(self, model: Any, groups: Sequence[Group], candidates: Mapping[str, Candidate]):
        self.model, self.found = model, {group.key: {} for group in groups}     # type: dict[str, dict[str, float]]
        self._group = {module: group for group in groups for module in group.modules}
        self._models = {recipe: _quantized(model, candidate) for recipe, candidate in candidates.items()}
        self._quantizers = [_input_quantizers(other) for other in self._models.values()]
        self._put: dict[str, Any] = {}

    def enter(self, part: Part) -> None:
        if part.expert is not None:
            self._load_expert(part)
            return
        for row in part.modules:
            if row["name"] not in self._group:
                continue
            if row["kind"] == "experts":
                observer: Any = _core.ExpertsScore(len(self._models), self.model.runtime.compute)
            else:
                bias = None if not row["bias"] else part.tensors[row["bias"]]
                observer = _core.OutputScore(self._weights(row), self._inputs(row["name"] + "."), bias)
            self.model.runtime.set_observer(row["name"], observer)
            self._put[row["name"]] = observer

    def leave(self, part: Part) -> None:
        if part.expert is not None:
            return
        for row in part.modules:
            if (observer := self._put.pop(row["name"], None)) is None:
                continue
            self.model.runtime.set_observer(row["name"], None)
            scores = self.found[self._group[row["name"]].key]
            for recipe, score in zip(self._models, observer.scores.tolist()):
                scores[recipe] = scores.get(recipe, 0.0) + score

    def give_up(self) -> None:
        """Leave no observer in the runtime."""
        for name in self._put:
            self.model.runtime.set_observer(name, None)

    def _load_expert(self, part: Part) -> None:
        container = next((name for name in self._put if part.modules[0]["name"].startswith(f"{name}.")), None)
        if container is not None:
            both = [self._inputs(f"{container}.{matrix}_") for matrix in ("gate_up_proj", "down_proj")]
            self._put[container].load(part.expert, list(zip(*map(self._weights, part.modules), *both)))

    def _weights(self, row: dict[str, Any]) -> list[np.ndarray]:
        return [_weight(model, row) for model in self._models.values()]

    def _inputs(self, prefix: str) -> list[Any]:
        return [quantizers[f"{prefix}input_quantizer"] for quantizers in self._quantizers]


def _weight(model: Any, row: dict[str, Any]) -> np.ndarray:
    """A weight as the model computes with it, whatever a norm before takes up."""
    if quantizer_of(model, f"{row['name']}.weight_quantizer").enabled:
        return streaming.simulated(model, row)
    return streaming.smoothed(model, row)


def _quantized(model: Any, candidate: Candidate) -> Any:
    """The same model with a format everywhere, for its weights: nothing runs through it."""
    other = copy.copy(model)
    other.settings = {name: candidate.settings.get(name, Setting(slot, default_setting(slot).attributes, False))
                      for name, slot in model.slots.items()}
    other.quantizers = {name: make_quantizer(setting) for name, setting in other.settings.items()}
    for name, values in candidate.values.items():
        give(other.quantizers[name], values)
    return other


def _input_quantizers(model: Any) -> dict[str, Any]:
    """By name, those that belong to the weights of `_weight`: with the scale that siblings share in an export, even where a norm takes it
    up."""
    if model.float32_weights:
        return dict(model.quantizers)
    stated = stated_input_quantizers(model)
    for row in model.modules:
        if (quantizer := stated.get(f"{row['name']}.input_quantizer")) is not None:
            quantizer.pre_quant_scale = stated_scale(model, row)
    return {**model.quantizers, **stated}
