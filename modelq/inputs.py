"""Token ids and masks as users bring them, checked, as arrays that the runtime takes."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from modelq import _core

# Arguments of a transformers model that change nothing here: accepted so that loops written for one run as they are.
IGNORED_ARGUMENTS = frozenset({"use_cache", "return_dict", "output_attentions", "output_hidden_states", "position_ids", "logits_to_keep",
                               "token_type_ids"})
IGNORED_LABEL = -100


class Batch(NamedTuple):
    """ids int64 [B, T]; mask uint8 [B, T], 0 where a token is padding, or None; labels int64 [B, T], -100 where nothing is to be
    predicted, or None."""

    ids: np.ndarray
    mask: np.ndarray | None = None
    labels: np.ndarray | None = None


def make_batch(vocab_size: int, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Batch:
    """Check and copy one batch (the caller may reuse its buffers). ValueError or TypeError says what is wrong with which part."""
    if isinstance(input_ids, Mapping):
        extra = {k: v for k, v in (("attention_mask", attention_mask), ("labels", labels)) if v is not None}
        return make_batch(vocab_size, **{**{k: v for k, v in input_ids.items() if k not in IGNORED_ARGUMENTS}, **extra})
    ids = integer_matrix(input_ids, "input_ids")
    if ids.size == 0:
        raise ValueError(f"input_ids: no tokens (shape {ids.shape})")
    check_vocabulary(ids, vocab_size)
    mask = _same_shape(attention_mask, ids, "attention_mask", flags=True)
    targets = _same_shape(labels, ids, "labels")
    if targets is not None:
        check_vocabulary(targets[targets != IGNORED_LABEL], vocab_size, "labels")
    return Batch(ids, mask, targets)


def groups(batches: list[Batch], tokens_at_once: int) -> Iterator[list[Batch]]:
    """The batches, so many together as have no more tokens."""
    group: list[Batch] = []
    for batch in batches:
        if group and sum(b.ids.size for b in group) + batch.ids.size > tokens_at_once:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def check_vocabulary(ids: np.ndarray, vocab_size: int, what: str = "input_ids") -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)].ravel()[0])
        raise ValueError(f"{what}: token id {bad} is out of the vocabulary (0 to {vocab_size - 1}): was the text tokenized with "
                         "another model's tokenizer?")


def integer_matrix(value: Any, what: str, flags: bool = False) -> np.ndarray:
    """A copy as C-contiguous int64 [B, T] (uint8 of zeros and ones if flags); one row of tokens becomes a batch of one.

    Takes NumPy arrays, nested lists and anything that speaks DLPack (a PyTorch tensor, say).
    """
    array = _as_numpy(value, what)
    if array.dtype.kind not in ("iub" if flags else "iu"):
        raise TypeError(f"{what}: expected integers, got {array.dtype}")
    if array.ndim == 1:
        array = array[None, :]
    if array.ndim != 2:
        raise ValueError(f"{what}: expected shape [batch, tokens], got {array.shape}")
    return np.array(array != 0, np.uint8, order="C") if flags else np.array(array, np.int64, order="C")


def _as_numpy(value: Any, what: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        try:
            return _core.as_array(value, what)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{what}: cannot read this {type(value).__name__} in place ({error}): move it to the CPU first") from error
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(f"{what}: expected token ids, got {value!r}" + (": tokenize the text first" if value is not None else ""))
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{what}: rows of different lengths: pad them and give an attention_mask") from error
    if array.dtype == object:
        raise TypeError(f"{what}: expected integers, got {type(value).__name__}")
    return array.astype(np.int64) if array.size == 0 else array


def _same_shape(value: Any, ids: np.ndarray, what: str, flags: bool = False) -> np.ndarray | None:
    if value is None:
        return None
    array = integer_matrix(value, what, flags)
    if array.shape != ids.shape:
        raise ValueError(f"{what}: shape {array.shape} differs from input_ids' {ids.shape}")
    return array
