"""What `model(input_ids)` answers: logits and loss that are computed when touched."""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import streaming
from modelq.inputs import IGNORED_LABEL, Batch

if TYPE_CHECKING:
    from modelq.model import Model


class Pass:
    """Batches that went through all layers together; the head is applied when someone asks."""

    def __init__(self, model: Model, batches: Sequence[Batch], description: str = "forward"):
        self.model, self.batches = model, batches
        self.run = streaming.forward(model, batches, description)
        self.rows = np.cumsum([0] + [len(batch.ids) for batch in batches])

    def logits(self, index: int) -> np.ndarray:
        """float32 [B, T, V] of one batch."""
        return self.run.logits(index, streaming.head_for_products(self.model))

    @cached_property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihoods in nats summed over each sequence of all batches, and how many tokens were predicted.

        Labels say which, where a batch has them; elsewhere every token but padding.
        """
        labels = None
        if any(batch.labels is not None for batch in self.batches):
            labels = [targets_of(batch) for batch in self.batches]
        return self.run.loss(streaming.head_for_products(self.model), labels)

    def loss(self, index: int) -> float:
        """The mean over one batch; NaN if nothing is predicted."""
        sums, counts = (part[self.rows[index]:self.rows[index + 1]].sum() for part in self.losses)
        return float(sums / counts) if counts else float("nan")


def targets_of(batch: Batch) -> np.ndarray:
    """Labels of a batch: its own, or its ids where neither the token nor the one before is padding."""
    if batch.labels is not None:
        return batch.labels
    if batch.mask is None:
        return batch.ids
    seen = batch.mask.astype(bool)
    seen[:, 1:] &= batch.mask[:, :-1].astype(bool)
    return np.where(seen, batch.ids, IGNORED_LABEL)


class Output:
    """logits: float32 [B, T, V]; loss: the mean cross-entropy of each next label (-100 does not count), None if none were given.

    Touching either runs all calls still waiting through the layers together, each layer once. An output that nobody keeps is
    never computed. `np.asarray(output)` and `output["logits"]` are the logits too.
    """

    def __init__(self, model: Model, batch: Batch):
        self.batch = batch
        self._model: Model = model
        self._pass: Pass | None = None
        self._index = 0
        self._logits: np.ndarray | None = None
        self._loss: float | None = None

    @property
    def logits(self) -> np.ndarray:
        if self._logits is None:
            self._logits = self._computed().logits(self._index)
        return self._logits

    @property
    def loss(self) -> float | None:
        if self.batch.labels is not None and self._loss is None:
            self._loss = self._computed().loss(self._index)
        return self._loss

    def finish(self) -> None:
        """Compute everything now, and hold on to nothing else."""
        self.logits, self.loss  # noqa: B018
        self._pass = None

    def keep(self, done: Pass, index: int) -> None:
        """Called by the model: the pass that holds this call's hidden states, and which of its batches it is."""
        self._pass, self._index = done, index

    @property
    def waiting(self) -> bool:
        return self._pass is None and self._logits is None

    @property
    def finished(self) -> bool:
        return self._logits is not None and (self._loss is not None or self.batch.labels is None)

    def _computed(self) -> Pass:
        if self._pass is None:
            self._model.compute_pending(self)
        assert self._pass is not None
        return self._pass

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        logits = self.logits
        return np.array(logits, dtype=dtype) if copy or dtype not in (None, logits.dtype) else logits

    def __getitem__(self, key: str | int) -> Any:
        if key in ("logits", "loss"):
            return getattr(self, key)
        if isinstance(key, int):
            return [value for value in (self.loss, self.logits) if value is not None][key]
        raise KeyError(key)

    def __repr__(self) -> str:
        state = "not computed yet" if self._logits is None else "computed"
        return f"<Output of a batch of shape {self.batch.ids.shape}: logits {state}>"
