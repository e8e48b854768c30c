"""Calibration: from data to the scales (and weights) of a quantized model, one layer at a time.

`METHODS` has a class for every algorithm that runs here; each looks on while batches go through the layers (`walk.py`), and searches by
statistics of what it saw instead of running the model again for every candidate.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelq.algorithms import normalize_algorithm
from modelq.calibration.data import record
from modelq.calibration.gptq import Gptq
from modelq.calibration.resume import MANIFEST, Progress, Saved, digest_of
from modelq.calibration.search import Histogram, LocalHessian, Mse
from modelq.calibration.smooth import AwqClip, AwqFull, AwqLite, SmoothQuant
from modelq.calibration.statistics import activation_slots
from modelq.calibration.svdquant import SvdQuant
from modelq.calibration.walk import Method, Walk, warn_unseen
from modelq.checkpoint.atomic import check_writable
from modelq.parking import kept_values, put_back
from modelq.weights_only import refuse_data

if TYPE_CHECKING:
    from modelq.model import Model

METHODS: dict[str, type[Method]] = {
    "max": Method, "mse": Mse, "local_hessian": LocalHessian, "smoothquant": SmoothQuant, "awq_lite": AwqLite, "awq_clip": AwqClip,
    "awq_full": AwqFull, "svdquant": SvdQuant, "gptq": Gptq, "histogram": Histogram, "entropy": Histogram, "percentile": Histogram,
}
COMPAT = (None, "modelopt")


def calibrate(model: Model, algorithm: Any = "max", forward_loop: Callable[..., Any] | None = None, checkpoint_dir: Any = None,
              compat: str | None = None, finish: Callable[[Model], None] | None = None) -> Model:
    """Find what every enabled quantizer of the model needs, by the steps that `algorithm` names (see `modelq.algorithms`).

    forward_loop(model) calls the model with calibration batches; the calls are recorded, and the layers then run one after the
    other over all of them. ValueError if data are needed and none came, or if NaN or infinity shows up. Everything is as before if
    anything raises. checkpoint_dir: a folder where progress is kept layer by layer; the same call goes on from there. compat "modelopt":
    padding counts, the means that AWQ takes weigh every call alike, and experts keep their maxima where Model Optimizer leaves them.
    finish: what is to be done with the result before it counts.
    """
    steps = runnable_steps(algorithm)
    if compat not in COMPAT:
        raise ValueError(f"compat must be None or 'modelopt', got {compat!r}")
    refuse_data(model, why_data(model, steps))
    if (folder := progress_folder(checkpoint_dir, steps)) is not None:
        check_writable(folder / MANIFEST)
    model.settle()
    before = _State(model)
    try:
        with model.simulating(weights=False, activations=False):
            batches = record(model, forward_loop, why_data(model, steps)) if why_data(model, steps) else []
            digest = digest_of(model, steps, batches, compat) if folder is not None else ""
            for index, step in enumerate(steps):
                done = _progress(model, checkpoint_dir, index, step, digest)
                model.connect()
                Walk(model, batches, METHODS[step["method"]](model, step, compat), done).go()
                if isinstance(done, Saved):
                    done.finish()
            warn_unseen(model)
        if finish is not None:
            finish(model)
        model.connect()
    except BaseException:
        before.put_back(model)
        model.connect()
        raise
    return model


class _State:
    """What calibration changes of a model."""

    def __init__(self, model: Model):
        self.settings, self.quantizers = model.settings, model.quantizers
        self.values = {name: kept_values(quantizer) for name, quantizer in model.quantizers.items()}
        self.checkpoint, self.low_rank, self.losses = model.checkpoint, model.low_rank, model.search_losses
        self.expert_tokens, self.kept_blocks = model.expert_tokens, model.kept_blocks
        self.changed = dict(getattr(model.checkpoint, "changed", {}))
        model.low_rank = dict(model.low_rank)

    def put_back(self, model: Model) -> None:
        model.settings, model.quantizers = self.settings, self.quantizers
        for name, values in self.values.items():
            put_back(model.quantizers[name], values)
            model.parking.saw(sum(8 * kept.found.amax.size for kept in values if kept.home is not None))
        model.checkpoint, model.low_rank, model.search_losses = self.checkpoint, self.low_rank, self.losses
        model.expert_tokens, model.kept_blocks = self.expert_tokens, self.kept_blocks
        if self.changed or hasattr(model.checkpoint, "changed"):
            model.checkpoint.changed = self.changed


def runnable_steps(algorithm: Any) -> list[dict[str, Any]]:
    """The steps of an algorithm, all of which run here: else NotImplementedError, before any work."""
    steps = normalize_algorithm(algorithm)
    for step in steps:
        if step["method"] == "rotate":
            raise ValueError("algorithm 'rotate' changes the model itself: it can only come first, in quantize()")
        if step["method"] not in METHODS:
            raise NotImplementedError(f"calibration method {step['method']!r} is not available yet: available: {', '.join(METHODS)}")
    return steps


def why_data(model: Any, steps: list[dict[str, Any]]) -> str:
    """Why calibration data are needed; empty if they are not."""
    searching = [step["method"] for step in steps if METHODS[step["method"]].needs_data]
    if searching:
        return f"{searching[0]} looks at activations"
    return "this config quantizes activations" if steps and activation_slots(model) else ""


def progress_folder(checkpoint_dir: Any, steps: list[Mapping[str, Any]]) -> Path | None:
    """Where progress is kept, by what was given or the first step that names it; None: nowhere."""
    named = [step["layerwise"]["checkpoint_dir"] for step in steps if step["layerwise"]["checkpoint_dir"] is not None]
    return Path(checkpoint_dir) if checkpoint_dir is not None else Path(named[0]) if named else None


def _progress(model: Model, checkpoint_dir: Any, index: int, step: Mapping[str, Any], digest: str) -> Progress:
    folder = progress_folder(checkpoint_dir, [step])
    return Progress() if folder is None else Saved(model, folder, index, digest, step["layerwise"]["save_every"])
