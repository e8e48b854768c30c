"""Data parallel: several processes (torch.distributed) each run a part of the data through the same model, and their statistics become one.

Every process then searches with the same numbers and finds the same; nothing more needs to be sent.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelq import _core
from modelq.nn.tensor_quantizer import TensorQuantizer


def are_several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def run_together(run: Callable[[], Any]) -> None:
    """run(), here and in the other processes. RuntimeError here if it raised in another only, instead of waiting for that one forever."""
    if not are_several():
        run()
        return
    failure = None
    try:
        run()
    except BaseException as error:
        failure = error
    failures = gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, words in enumerate(failures):
        if words is not None:
            raise RuntimeError(f"calibration failed in process {rank}: {words}")


def merge(statistics: Mapping[str, _core.Calibrator], maxima: Mapping[str, TensorQuantizer], tokens: Mapping[str, np.ndarray]) -> None:
    """Make these the statistics of all processes together, in place: calibrators by name, maxima that quantizers have seen, tokens by
    expert. RuntimeError: the processes look at different models."""
    if not are_several():
        return
    names = gathered([*statistics, *maxima, *tokens])
    if any(other != names[0] for other in names):
        raise RuntimeError("the processes of torch.distributed calibrate different models: each must quantize the same one")
    for calibrator in statistics.values():
        first, *others = gathered(calibrator.save())
        calibrator.load(first)
        for state in others:
            other = _core.Calibrator(calibrator.kind, calibrator.axis, calibrator.option)
            other.load(state)
            calibrator.merge(other)
    for quantizer in maxima.values():
        for seen in gathered(quantizer.compute_amax()):
            if seen is not None:
                quantizer.collect_maxima(seen)
    for counts in tokens.values():
        counts[:] = np.sum(gathered(counts), axis=0)


def agree(value: Any) -> bool:
    """Whether every process gives the same."""
    return not are_several() or all(other == value for other in gathered(value))


def own_folder(folder: Any) -> Any:
    """The part of a folder that is this process's."""
    return folder if folder is None or not are_several() else Path(folder) / f"process_{torch.distributed.get_rank()}"


def gathered(value: Any) -> list[Any]:
    """What every process gives, by rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found

