"""Torch modules as a search sees them (modelq.autoquantize.candidates.Subject)."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from modelq.autoquantize.candidates import Calibrated, Candidate, Scores, Steps, add, calibrated, divergences, give
from modelq.autoquantize.groups import Group
from modelq.quantizers import has_static_levels, make_quantizer, stage_quantizers
from modelq.rules import Setting, default_setting, stages
from modelq.stated import stated_amax
from modelq.torch_models import unwrapped
from modelq.torch_models.modules import slots_of
from modelq.torch_models.originals import Originals
from modelq.torch_models.processes import agree, are_several, gathered, own_folder, run_together
from modelq.torch_models.quantize import inserted, quantizers_of, refuse_packed, run_steps, take_settings
from modelq.torch_models.scores import Formats, gradient_scores
from modelq.torch_models.stand_in import StandIn

SAMPLE = 64     # numbers of each parameter that stand for it in a fingerprint


class TorchSubject:
    """A torch module."""

    def __init__(self, model: torch.nn.Module, compat: str | None = None):
        model = unwrapped(model)
        refuse_packed(model)
        self.model, self.compat = model, compat
        self.slots = {slot.name: slot for slot in slots_of(model)}
        self.module_names = [name for name, _ in model.named_modules() if name]
        config = getattr(model, "config", None)
        self.config: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
        self._originals: Originals | None = None

    @contextmanager
    def searching(self) -> Iterator[None]:
        training = [(module, module.training) for module in self.model.modules()]
        try:
            with inserted(self.model) as (_, self._originals):
                self.model.eval()
                yield
        finally:
            for module, was in training:
                module.training = was

    def check(self, settings: Mapping[str, Setting]) -> None:
        for name, setting in settings.items():
            if setting.enable and len(stages(setting)) > 1 and setting.slot.role != "weight":
                raise NotImplementedError(f"{name}: quantizers one after the other are for weights only")
            if setting.enable:
                make_quantizer(setting)

    def agree(self, value: Any) -> bool:
        return agree(value)

    def own_folder(self, folder: Any) -> Any:
        return own_folder(folder)

    def fingerprint(self) -> str:
        found = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            found.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            if parameter.device.type != "meta":
                found.update(repr(parameter.detach().reshape(-1)[:SAMPLE].float().tolist()).encode())
        return found.hexdigest()

    def calibrate(self, settings: Mapping[str, Setting], steps: Sequence[dict[str, Any]], forward_loop: Callable[[Any], Any]
                  ) -> dict[str, Calibrated]:
        self._take(settings)
        assert self._originals is not None
        run_steps(self.model, list(steps), forward_loop, self.compat, self._originals)
        if self.compat != "modelopt":
            _share_as_exports_do(self.model)
        found = calibrated({name: quantizer.native for name, quantizer in quantizers_of(self.model).items() if name in settings})
        self._take({})
        return found

    def scores(self, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps, batches: Sequence[Any], first: int
               ) -> Generator[tuple[int, Scores], None, None]:
        own = self._own_scores(groups, candidates, steps, batches, first)
        if not are_several():
            yield from own
            return
        found: Scores = {}

        def run() -> None:
            for _, scores in own:
                add(found, scores)
        with closing(own):
            run_together(run)
        total: Scores = {}
        for scores in gathered(found):
            add(total, scores)
        yield len(batches), total

    def _own_scores(self, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps, batches: Sequence[Any], first: int
                    ) -> Generator[tuple[int, Scores], None, None]:
        """Of this process's data."""
        if steps.method == "gradient":
            yield from gradient_scores(self.model, groups, candidates, steps, batches, first)
            return

        def log_probabilities(batch: Any) -> torch.Tensor:
            with torch.no_grad():
                output = steps.forward_step(self.model, batch)
                return torch.log_softmax(getattr(output, "logits", output).float(), dim=-1)
        yield from divergences(groups, candidates, batches, log_probabilities, _divergence, Formats(self.model, candidates).within)

    def apply(self, settings: Mapping[str, Setting], values: Mapping[str, Calibrated]) -> None:
        self._take(settings)
        for name, quantizer in quantizers_of(self.model).items():
            if name in values:
                give(quantizer.native, values[name])

    def _take(self, settings: Mapping[str, Setting]) -> None:
        off = {slot.name: Setting(slot, default_setting(slot).attributes, False) for slot in slots_of(self.model)}
        take_settings(self.model, {**off, **settings}, keep=False)


def _share_as_exports_do(model: torch.nn.Module) -> None:
    """Linears that read one input get the smoothing scale and the maximum that an export states for all of them, so that what is scored is
    what will be written. (Model Optimizer scores each with its own.)"""
    stand_in: Any = StandIn(model)
    stand_in.share_as_exports_do()
    for layer in range(-1, stand_in.num_layers):
        for name, amax in stated_amax(stand_in, stand_in.modules_of(layer)).items():
            quantizer = stand_in.quantizers.get(name)
            if quantizer is not None and has_static_levels(stage_quantizers(quantizer)[0]):
                quantizer.global_amax = amax
            elif quantizer is not None:
                quantizer.amax = amax
    stand_in.give_values(model)


def _divergence(plain: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.kl_div(other, plain, reduction="sum", log_target=True))
