"""Native models as a search sees them (modelq.autoquantize.candidates.Subject)."""
from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelq.autoquantize.candidates import Calibrated, Candidate, Scores, Steps, calibrated, divergences, give
from modelq.autoquantize.groups import Group
from modelq.calibration import calibrate as run_calibration
from modelq.checkpoint.stacked import FORMATS
from modelq.experts import PARENT
from modelq.quantization.api import check_model, take_original
from modelq.quantization.native_scores import gradient_scores
from modelq.quantizers import make_quantizer
from modelq.rules import Setting, default_setting
from modelq.stated import stacks_of
from modelq.supported import check_settings, warn_partial_blocks
from modelq.undoing import all_or_nothing

SAMPLE = 64     # numbers of each weight that stand for it in a fingerprint


class NativeSubject:
    """A model from modelq.load."""

    def __init__(self, model: Any, compat: str | None = None):
        check_model(model)
        if model.stored_layers:
            model.checkpoint.as_source()        # refuses what is not all in the weights, by name, before any work
        self.model, self.compat = model, compat
        self.slots, self.config = model.slots, model.config
        self.module_names = [row["name"] for row in model.modules]

    @contextmanager
    def searching(self) -> Iterator[None]:
        model = self.model
        with all_or_nothing(model):
            take_original(model, None)
            model.packed, model.low_rank, model.search_losses, model.quantized = {}, {}, {}, True
            self._take({})
            yield

    def check(self, settings: Mapping[str, Setting]) -> None:
        check_settings(settings.values(), self.model.head_dim)
        warn_partial_blocks(settings.values(), self.model.head_dim)
        self._warn_of_stacks(settings)

    def _warn_of_stacks(self, settings: Mapping[str, Setting]) -> None:
        """Of formats for experts that a checkpoint has in one tensor, and no place for."""
        if stacks_of(self.model) is None:
            return
        for name, setting in settings.items():
            if setting.enable and setting.slot.parent == PARENT and setting.slot.role == "weight" \
                    and (scheme := make_quantizer(setting).scheme) not in FORMATS:
                warnings.warn(f"{name}: a checkpoint of this family has a layer's experts in one tensor, with a place for "
                              f"{' and '.join(FORMATS)} only: where {scheme} is chosen for them, the model computes but cannot be "
                              "exported; disabled_layers='*experts*' leaves them as they are", UserWarning, stacklevel=4)
                return

    def agree(self, value: Any) -> bool:
        return True

    def own_folder(self, folder: Any) -> Any:
        return folder

    def fingerprint(self) -> str:
        found = hashlib.sha256(repr(self.model.float32_weights).encode())
        for name, info in self.model.checkpoint.tensors.items():
            found.update(f"{name} {list(info.shape)} {info.dtype}".encode())
            found.update(np.ascontiguousarray(self.model.checkpoint.read(name).reshape(-1)[:SAMPLE]).tobytes())
        self.model.checkpoint.release()
        return found.hexdigest()

    def calibrate(self, settings: Mapping[str, Setting], steps: Sequence[dict[str, Any]], forward_loop: Callable[[Any], Any]
                  ) -> dict[str, Calibrated]:
        self._take(settings)
        run_calibration(self.model, list(steps), forward_loop, None, self.compat)
        found = calibrated({name: self.model.quantizers[name] for name in settings})
        self._take({})
        return found

    def scores(self, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps, batches: Sequence[Any], first: int
               ) -> Generator[tuple[int, Scores], None, None]:
        if steps.method == "gradient":
            yield from gradient_scores(self.model, groups, candidates, steps, batches, first)
            return

        def log_probabilities(batch: Any) -> np.ndarray:
            return _log_softmax(np.asarray(steps.forward_step(self.model, batch), np.float64))

        @contextmanager
        def quantized(group: Group, candidate: Candidate) -> Iterator[None]:
            self._take({name: candidate.settings[name] for name in (slot.name for slot in group.slots)}, candidate.values)
            try:
                yield
            finally:
                self._take({})
        yield from divergences(groups, candidates, batches, log_probabilities, _divergence, quantized)

    def apply(self, settings: Mapping[str, Setting], values: Mapping[str, Calibrated]) -> None:
        self._take(settings, values)

    def _take(self, settings: Mapping[str, Setting], values: Mapping[str, Calibrated] | None = None) -> None:
        """These quantizers, all others off."""
        model = self.model
        model.settle()
        model.settings = {name: settings.get(name, Setting(slot, default_setting(slot).attributes, False))
                          for name, slot in model.slots.items()}
        model.quantizers = {name: make_quantizer(setting) for name, setting in model.settings.items()}
        for name in settings:
            if values is not None and name in values:
                give(model.quantizers[name], values[name])
        model.connect()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _divergence(plain: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(plain) * (plain - other)).sum())
