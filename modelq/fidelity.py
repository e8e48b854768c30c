"""How much of a model is left in another: both go over the same text, layer by layer side by side, and what they say is compared.

Neither is ever whole in memory: held are both models' hidden states at one layer boundary, one layer of one of them, and at the end the
logits of some tokens of each.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import streaming
from modelq.inputs import Batch, check_vocabulary, groups, integer_matrix, make_batch
from modelq.progress import progress

if TYPE_CHECKING:
    from modelq.model import Model

PIECE, ROWS = 128, 64       # tokens whose logits are computed, and whose distributions are looked at, together
NOTHING = -1


@dataclass
class Fidelity:
    """perplexity: of the first model and of the second, each over all predicted tokens. divergence: Kullback and Leibler's, of the
    second's next-token distribution from the first's, in nats: mean and largest; agreement: how often both have the same likeliest token.
    hidden: by layer, and first the embedding, the relative error of the hidden states behind it, of the token in the middle when sorted
    by it."""
    perplexity_before: float
    perplexity_after: float
    divergence: float
    largest_divergence: float
    agreement: float
    positions: int
    window: int
    hidden: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Perplexity kept: 1 where nothing is lost, 0.5 where it has doubled."""
        return self.perplexity_before / self.perplexity_after

    def as_data(self) -> dict[str, Any]:
        return {"perplexity_before": self.perplexity_before, "perplexity_after": self.perplexity_after, "perplexity_kept": self.ratio,
                "kl_divergence": self.divergence, "largest_kl_divergence": self.largest_divergence, "top1_agreement": self.agreement,
                "positions": self.positions, "window": self.window}


def fidelity(first: Model, second: Model, token_ids: Any, window: int = 512, kept: list[np.ndarray] | None = None) -> Fidelity:
    """The second model against the first, over consecutive windows of one long row of tokens (as `Model.perplexity` takes them).

    kept: an empty list, where the first model's states behind its last layer are put; given again with another second model and the same
    tokens, it saves running the first. Hidden states of single layers are not compared then. ValueError: models of different shapes, too
    few tokens; the same model twice is a mistake, too.
    """
    for model in (first, second):
        model.must_compute()
    check_alike(first, second)
    ids = integer_matrix(token_ids, "token_ids")
    check_vocabulary(ids, first.vocab_size, "token_ids")
    if window < 2 or ids.size < 2:
        raise ValueError(f"fidelity: needs a window of at least 2 tokens and 2 tokens, got {window} and {ids.size}")
    window = min(window, ids.size)
    batches = [make_batch(first.vocab_size, row[None]) for row in ids.ravel()[:ids.size // window * window].reshape(-1, window)]
    found = _Sums(first.num_layers)
    states = iter(list(kept or ()))
    for group in groups(batches, first.tokens_at_once):
        if kept is None:
            _heads((first, second), _side_by_side(first, second, group, found), group, found)
            continue
        if (state := next(states, None)) is None:
            state = _state(first, group)
            kept.append(state)
        _heads((first, second), (state, _state(second, group)), group, found)
    return found.result(window)


def check_alike(first: Model, second: Model) -> None:
    """ValueError if their layers and distributions have no distance; a model twice is one runtime, which cannot run beside itself."""
    if first is second:
        raise ValueError("a model cannot be compared with itself: open it a second time")
    sizes = ((model.num_layers, model.vocab_size, int(model.runtime.config["hidden_size"])) for model in (first, second))
    for what, one, other in zip(("layers", "tokens in the vocabulary", "hidden channels"), *sizes):
        if one != other:
            raise ValueError(f"{first.checkpoint.path} has {one} {what}, {second.checkpoint.path} has {other}: they are not one model")


class _Sums:
    def __init__(self, layers: int):
        self.hidden: list[list[np.ndarray]] = [[] for _ in range(layers + 1)]
        self.divergences: list[np.ndarray] = []
        self.losses = np.zeros(2)
        self.agreeing = self.positions = 0

    def result(self, window: int) -> Fidelity:
        before, after = np.exp(self.losses / self.positions).tolist()
        divergences = np.concatenate(self.divergences)
        return Fidelity(before, after, float(divergences.mean()), float(divergences.max()), self.agreeing / self.positions, self.positions,
                        window, [float(np.median(np.concatenate(errors))) for errors in self.hidden if errors])


def _state(model: Model, batches: Sequence[Batch]) -> np.ndarray:
    """The hidden states behind the last layer: [rows, C]."""
    return streaming.forward(model, batches, "compare").state()


def _side_by_side(first: Model, second: Model, batches: Sequence[Batch], found: _Sums) -> tuple[np.ndarray, np.ndarray]:
    """The same of both, which are compared behind each layer."""
    runs = [streaming.start(model, batches) for model in (first, second)]
    for layer in progress(range(-1, first.num_layers), "compare"):
        for model, run in zip((first, second), runs) if layer >= 0 else ():
            streaming.run_layer(model, run, layer, following=layer + 1 if layer + 1 < first.num_layers else None)
        for index in range(len(batches)):
            left, right = (run.hidden(index)[0] for run in runs)
            found.hidden[layer + 1].append(np.linalg.norm(right - left, axis=-1) / np.maximum(np.linalg.norm(left, axis=-1), 1e-30))
    return runs[0].state(), runs[1].state()


def _heads(models: Sequence[Model], states: Sequence[np.ndarray], batches: Sequence[Batch], found: _Sums) -> None:
    """What both say, in pieces of windows: behind the layers each token is by itself, and logits of whole windows would be the largest
    thing in memory."""
    pieces = [batch.ids[:, start:start + PIECE] for batch in batches for start in range(0, batch.ids.shape[1], PIECE)]
    targets = np.concatenate([np.append(batch.ids[0, 1:], NOTHING) for batch in batches])
    runs, heads = [model.runtime.start(pieces) for model in models], [streaming.head_tensors(model) for model in models]
    for model, run, state in zip(models, runs, states):
        run.restore(state, model.num_layers)
    for index, piece in progress(list(enumerate(pieces)), "compare", unit="piece"):
        _distributions([run.logits(index, head)[0] for run, head in zip(runs, heads)], targets[:piece.size], found)
        targets = targets[piece.size:]


def _distributions(logits: list[np.ndarray], targets: np.ndarray, found: _Sums) -> None:
    """Of one piece: float32 [T, V] of each model, and the tokens that come next, int64 [T], NOTHING behind the last."""
    known = targets != NOTHING
    for start in range(0, int(known.sum()), ROWS):
        rows = slice(start, min(start + ROWS, int(known.sum())))
        left, right = (log_softmax(one[rows]) for one in logits)
        found.divergences.append((np.exp(left) * (left - right)).sum(axis=-1, dtype=np.float64))
        found.agreeing += int((left.argmax(axis=-1) == right.argmax(axis=-1)).sum())
        found.losses -= [side[np.arange(len(side)), targets[rows]].sum(dtype=np.float64) for side in (left, right)]
    found.positions += int(known.sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32, of float32: sums of a vocabulary's length lose nothing that would be seen in a mean."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64, keepdims=True)).astype(np.float32)


def input_points(model: Model) -> Iterator[tuple[dict[str, Any], str]]:
    """The linears inside layers whose inputs may be looked at, one of those that share an input, and the quantizer's name there."""
    from modelq.experts import place_of

    seen = set()
    for row in model.modules:
        if row["kind"] == "linear" and row["layer"] >= 0:
            point = place_of(model, f"{row['name']}.input_quantizer").name
            key = point if row["expert"] is not None else (row["layer"], row["site"])
            if key not in seen:
                seen.add(key)
                yield row, point
