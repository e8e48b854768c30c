"""Gradients of a model's loss, layer by layer from the last to the first, for whoever looks on.

What is held: the hidden states before each layer (`Boundaries`), their gradients at one layer, and that layer's weights. A layer is
computed again on its way back. Gradients by outputs of linears go to observers (`_core.OutputScore`, ...) within the layer and are
not kept.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelq import streaming
from modelq.ahead import ahead_of, forget_ahead
from modelq.boundaries import Boundaries
from modelq.inputs import Batch, groups, make_batch
from modelq.output import targets_of
from modelq.progress import progress
from modelq.streaming import Part, Visitor

if TYPE_CHECKING:
    from modelq.model import Model

KEEP_BYTES = 1 << 30

Look = Callable[[int, Any], None]


class Gradients(NamedTuple):
    """losses: float64, of each batch the mean cross-entropy over its labels (NaN: it has none); counts: int64, how many labels.
    weights: by tensor name, float32, of the sum of the losses."""
    losses: np.ndarray
    counts: np.ndarray
    weights: dict[str, np.ndarray]


def backward(model: Model, batches: Iterable[Any], wanted: Iterable[str] = (), observers: Mapping[str, Any] | None = None,
             visitor: Visitor | None = None, look: Look | None = None, keep_bytes: int = KEEP_BYTES) -> Gradients:
    """The gradients of the batches' losses, each the mean over the labels of its batch (all tokens but padding if it has none).

    batches: anything that the model can be called with. wanted: names of tensors whose gradients are to be computed. observers: by
    name of a linear, a layer's experts or lm_head, of the gradients by its output (see `_core.Runtime.set_observer`).
    visitor: is shown each part of the model, with its tensors, before gradients pass it and afterwards; that is the time to put
    observers there and to take them away. look(layer, backward): called with `backward.gradient(batch)` being by the hidden states
    before `layer` (as many as there are layers: behind the last), once the layer is done. keep_bytes: of hidden states between
    layers kept in memory, more go to a file.

    Batches whose hidden states are too many at once (`modelq.model.HIDDEN_BYTES`) go in further rounds through the whole model, each
    with calls of visitor and look of its own. Activations must not be quantized meanwhile: ValueError.
    """
    _check(model)
    given = [make_batch(model.vocab_size, batch) for batch in batches]
    if not given:
        raise ValueError("backward: there are no batches")
    weights = {name: np.zeros(_shape_of(model, name), np.float32) for name in wanted}
    losses, counts = [], []
    with _observing(model, observers or {}):
        for group in groups(given, model.tokens_at_once):
            found = _round(model, group, weights, visitor, look, keep_bytes)
            losses.append(found[0])
            counts.append(found[1])
    return Gradients(np.concatenate(losses), np.concatenate(counts), weights)


def _check(model: Model) -> None:
    if model.low_rank:
        raise ValueError("backward: branches of low rank (SVDQuant) have no gradient here")
    if model.connected:
        raise ValueError(f"backward: {min(model.connected)} changes activations, which has no gradient: use "
                         "model.simulating(weights=..., activations=False), and no smoothing")


def _shape_of(model: Model, name: str) -> tuple[int, ...]:
    for module in model.modules:
        if name == module["weight"]:
            return tuple(module["shape"])
        if name == module["bias"]:
            return tuple(module["shape"][:1])
    raise KeyError(f"{name}: no tensor of this model's weights")


@contextmanager
def _observing(model: Model, observers: Mapping[str, Any]) -> Iterator[None]:
    put: list[str] = []
    try:
        for name, observer in observers.items():
            model.runtime.set_observer(name, observer)
            put.append(name)
        yield
    finally:
        for name in put:
            model.runtime.set_observer(name, None)


def _round(model: Model, batches: Sequence[Batch], weights: dict[str, np.ndarray], visitor: Visitor | None, look: Look | None,
           keep_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    run = streaming.start(model, batches)
    boundaries = Boundaries((sum(batch.ids.size for batch in batches), model.runtime.config["hidden_size"]), _dtype(model), keep_bytes)
    for layer in progress(range(model.num_layers), "forward"):
        boundaries.keep(run)
        streaming.run_layer(model, run, layer, following=layer + 1 if layer + 1 < model.num_layers else None)
    back = run.backward(weights)
    losses = _head(model, back, [targets_of(batch) for batch in batches], visitor)
    if look is not None:
        look(model.num_layers, back)
    for layer in progress(range(model.num_layers - 1, -1, -1), "backward"):
        _layer(model, back, layer, boundaries.take(), visitor)
        if look is not None:
            look(layer, back)
    back.embed()
    return losses


def _dtype(model: Model) -> np.dtype:
    import ml_dtypes
    return np.dtype(ml_dtypes.bfloat16 if model.runtime.compute == "bfloat16" else np.float32)


def _head(model: Model, back: Any, labels: list[np.ndarray], visitor: Visitor | None) -> tuple[np.ndarray, np.ndarray]:
    part = Part(-1, None, model.head_modules, streaming.head_tensors(model))
    if visitor is not None:
        visitor.enter(part)
    losses: tuple[np.ndarray, np.ndarray] = back.head(part.tensors, labels)
    if visitor is not None:
        visitor.leave(part)
    return losses


def _layer(model: Model, back: Any, layer: int, state: np.ndarray, visitor: Visitor | None) -> None:
    names, modules = model.runtime.layer_tensors(layer), model.modules_of(layer)
    try:
        part = Part(layer, None, modules, streaming.read_part(model, names, layer, None, False))
        if visitor is not None:
            visitor.enter(part)
        before = layer - 1 if layer > 0 else None
        ahead = ahead_of(model, layer, 0, False) if model.runtime.experts(layer) else ahead_of(model, before, None, False)
        tokens: np.ndarray | None = back.layer(layer, state, part.tensors, ahead)
        counts = {} if tokens is None else {expert: counted for expert, (count, counted) in enumerate(tokens.tolist()) if count}
        for (expert, counted), then in zip(counts.items(), [*list(counts)[1:], None]):
            ahead = ahead_of(model, before, None, False) if then is None else ahead_of(model, layer, then, False)
            _expert(model, back, layer, expert, counted, visitor, ahead)
        if visitor is not None:
            visitor.leave(part)
    except BaseException:
        forget_ahead(model)
        raise
    finally:
        model.runtime.drop_layer(layer)
        model.checkpoint.release(names)


def _expert(model: Model, back: Any, layer: int, expert: int, counted: int, visitor: Visitor | None,
            ahead: Callable[[], None] | None) -> None:
    names, modules = model.runtime.expert_tensors(layer, expert), model.modules_of(layer, expert)
    try:
        part = Part(layer, expert, modules, streaming.read_part(model, names, layer, expert, False), counted)
        if visitor is not None:
            visitor.enter(part)
        back.expert(layer, expert, part.tensors, ahead)
        if visitor is not None:
            visitor.leave(part)
    finally:
        model.checkpoint.release(names)
