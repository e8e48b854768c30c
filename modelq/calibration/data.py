"""Calibration data: the calls that a forward loop makes, recorded."""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modelq.inputs import Batch

if TYPE_CHECKING:
    from modelq.model import Model


def record(model: Model, forward_loop: Callable[..., Any] | None, why: str) -> list[Batch]:
    """The batches that forward_loop(model) calls the model with. ValueError: there are none; `why` says what needs them."""
    if forward_loop is None:
        raise ValueError(f"no calibration data: {why}, so quantize() needs a forward_loop(model) that calls the model with token ids (see "
                         "create_forward_loop), or a weight-only config")
    if not callable(forward_loop):
        raise TypeError(f"forward_loop must be a function that takes the model, got {type(forward_loop).__name__}")
    with model.recording() as batches:
        if _takes_no_argument(forward_loop):
            warnings.warn("a forward_loop without arguments is deprecated: let it take the model", DeprecationWarning, stacklevel=5)
            forward_loop()
        else:
            forward_loop(model)
        recorded = list(batches)
    if not recorded:
        raise ValueError("no calibration data: forward_loop ran without calling the model: is its data empty?")
    if not any(batch.mask is None or batch.mask.any() for batch in recorded):
        raise ValueError("no calibration data: attention_mask is 0 for every token")
    return recorded


def count_tokens(batches: list[Batch]) -> int:
    """Those that are no padding."""
    return sum(batch.ids.size if batch.mask is None else int(batch.mask.sum()) for batch in batches)


def _takes_no_argument(function: Callable[..., Any]) -> bool:
    try:
        return not inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
