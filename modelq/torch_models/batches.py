"""Batches of tokens through a torch model."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from modelq.progress import progress
from modelq.torch_models import unwrapped


def run_batches(model: torch.nn.Module, batches: Iterable[Any]) -> None:
    """Call the model with each batch, a dictionary of arguments or an array of token ids, on its device; without a cache of keys and
    values, which nobody would read."""
    config = getattr(unwrapped(model), "config", None)
    cached = getattr(config, "use_cache", None)
    device = next((parameter.device for parameter in model.parameters() if parameter.device.type != "meta"), torch.device("cpu"))
    if cached:
        config.use_cache = False
    try:
        with torch.no_grad():
            for batch in progress(batches, "calibrate", unit="batch"):
                if isinstance(batch, dict):
                    model(**{name: _on(value, device) for name, value in batch.items()})
                else:
                    model(_on(batch, device))
    finally:
        if cached:
            config.use_cache = cached


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    return value.to(device) if isinstance(value, torch.Tensor) else value
