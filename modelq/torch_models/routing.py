"""moe_calib_experts_ratio: while statistics are collected, tokens pass more experts than a layer's router would choose."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def onlooking(model: torch.nn.Module, ratio: float | None) -> Iterator[None]:
    """Within it every block of experts computes twice: with so large a share of its experts for each token, whose result nobody sees, and
    as it is (Model Optimizer's way). None: once. A block is a module with `experts` and a `gate` that has `top_k`."""
    blocks = [] if ratio is None else [
        module for module in model.modules() if isinstance(getattr(module, "experts", None), torch.nn.Module)
        and isinstance(getattr(getattr(module, "gate", None), "top_k", None), int)]
    for block in blocks:
        block.forward = _twice(block, block.forward, ratio or 1.0)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _twice(block: Any, forward: Callable[..., Any], ratio: float) -> Callable[..., Any]:
    own = block.gate.top_k
    counts = [getattr(part, "num_experts", None) for part in (block.gate, block.experts, block)]
    experts = next((count for count in counts if isinstance(count, int)), own)

    def both(*arguments: Any, **named: Any) -> Any:
        block.gate.top_k = max(own, round(experts * ratio))
        try:
            forward(*arguments, **named)
        finally:
            block.gate.top_k = own
        return forward(*arguments, **named)
    return both
