"""What a format changes of the outputs of a group of modules, and what that does to the loss.

A hook on a module's output computes it anew with each format's quantizers in the place of the module's own, and adds up sum((g * d)^2) as
soon as the gradient g of that output is there. Parameters want no gradients: the first outputs that are looked at do. Decoder layers are
computed again on the way back (Chen et al. 2016, "Training deep nets with sublinear memory cost"), and only then are differences taken, so
that one layer's are in memory.
"""
from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

from modelq.autoquantize.candidates import Candidate, Scores, Steps, give
from modelq.autoquantize.groups import Group
from modelq.quantizers import rotated_columns
from modelq.rules import stages
from modelq.torch_models.layerwise import decoder_layers
from modelq.torch_models.modules import places
from modelq.torch_models.quantizer_module import make_quantizer

LARGEST = 1e10      # of g * d, as Model Optimizer clamps it
CACHES = ("past_key_values", "past_key_value", "use_cache")


class Formats:
    """The quantizers of every candidate, to be put in the place of the model's own."""

    def __init__(self, model: torch.nn.Module, candidates: Mapping[str, Candidate]):
        self._owners = {name: (owner, attribute) for name, owner, attribute in places(model)}
        self._made = {recipe: self._quantizers(candidate) for recipe, candidate in candidates.items()}

    @staticmethod
    def _quantizers(candidate: Candidate) -> dict[str, Any]:
        made = {}
        for name, values in candidate.values.items():
            setting = candidate.settings[name]
            made[name] = make_quantizer(name, stages(setting))
            made[name].native.rotate = rotated_columns(setting)
            give(made[name].native, values)
        return made

    @contextmanager
    def within(self, group: Group, candidate: Candidate) -> Iterator[None]:
        """Within it a group's modules have that format."""
        made, before = self._made[str(candidate.recipe)], []
        for slot in group.slots:
            if slot.name in made:
                owner, attribute = self._owners[slot.name]
                before.append((owner, attribute, owner._modules[attribute]))
                owner._modules[attribute] = made[slot.name]
        try:
            yield
        finally:
            for owner, attribute, quantizer in before:
                owner._modules[attribute] = quantizer


def gradient_scores(model: torch.nn.Module, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps,
                    batches: Sequence[Any], first: int) -> Generator[tuple[int, Scores], None, None]:
    """Batch by batch. ValueError names the batch whose loss, or gradients, are not finite."""
    taps = _Taps(Formats(model, candidates), candidates)
    with ExitStack() as hooks:
        for module, seen in _points(model, groups):
            hooks.callback(module.register_forward_hook(taps.hook(seen), with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                hooks.callback(module.register_forward_hook(_wants_gradients).remove)
        hooks.enter_context(_no_parameter_learns(model))
        hooks.enter_context(_layers_computed_twice(model))
        for number, batch in enumerate(batches, first):
            with torch.enable_grad():
                _backward(model, steps, batch, f"batch {number} (of {first + len(batches)}, counted from 0)")
            yield 1, taps.take(f"batch {number}")


def _points(model: torch.nn.Module, groups: Sequence[Group]) -> Iterator[tuple[torch.nn.Module, list[Group]]]:
    """Modules whose outputs are looked at, and the groups that are scored there."""
    seen: dict[str, list[Group]] = {}
    for group in groups:
        for point in group.scored_at:
            seen.setdefault(point, []).append(group)
    for point, there in seen.items():
        yield model.get_submodule(point), there


def _backward(model: torch.nn.Module, steps: Steps, batch: Any, where: str) -> None:
    if steps.forward_backward_step is not None:
        steps.forward_backward_step(model, batch)
        return
    assert steps.loss_func is not None
    loss = steps.loss_func(steps.forward_step(model, batch), batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"{where}: loss_func must return one number as a torch tensor, got {_described(loss)}")
    if not torch.isfinite(loss):
        raise ValueError(f"{where}: the loss is {loss.item()}: look for a batch without labels, or weights with NaN or infinity")
    if not loss.requires_grad:
        raise ValueError(f"{where}: no gradient reaches the layers: the loss does not depend on them, or forward_step computes it under "
                         "torch.no_grad")
    loss.backward()


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


class _Taps:
    """Looks at outputs, and adds up what every batch gives."""

    def __init__(self, formats: Formats, candidates: Mapping[str, Candidate]):
        self._formats, self._candidates = formats, candidates
        self._sums: dict[tuple[str, str], torch.Tensor] = {}

    def hook(self, groups: Sequence[Group]) -> Any:
        def look(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():      # a layer that will be computed again, or a difference that is being taken
                return None
            first = output[0] if isinstance(output, tuple) else output
            differences = self._differences(module, arguments, named, first.detach(), groups)
            watched = first if first.requires_grad else first.detach().requires_grad_()
            watched.register_hook(lambda gradient: self._add(gradient, differences))
            if watched is first:
                return None
            given = watched.clone()     # a leaf must not be changed in place, what follows may want to
            return (given, *output[1:]) if isinstance(output, tuple) else given
        return look

    def _differences(self, module: torch.nn.Module, arguments: Any, named: Any, plain: torch.Tensor, groups: Sequence[Group]
                     ) -> dict[tuple[str, str], torch.Tensor]:
        found = {}
        with torch.no_grad():
            for group in groups:
                for recipe in map(str, group.recipes):
                    if recipe in self._candidates:
                        with self._formats.within(group, self._candidates[recipe]):
                            made = module.forward(*arguments, **named)
                        found[group.key, recipe] = (made[0] if isinstance(made, tuple) else made) - plain
        return found

    def _add(self, gradient: torch.Tensor, differences: Mapping[tuple[str, str], torch.Tensor]) -> None:
        for key, difference in differences.items():
            product = gradient.float() * difference.float()
            score = product.clamp_(-LARGEST, LARGEST).square_().sum().double()
            self._sums[key] = score if key not in self._sums else self._sums[key] + score

    def take(self, where: str) -> Scores:
        """What was added up since the last time. One wait for the device."""
        if not self._sums:
            raise ValueError(f"{where}: forward_backward_step took no backward pass through the layers")
        device = next(iter(self._sums.values())).device
        numbers = torch.stack([value.to(device) for value in self._sums.values()]).tolist()
        found: Scores = {}
        for (key, recipe), score in zip(self._sums, numbers):
            if score != score or score == float("inf"):
                raise ValueError(f"{where}: the score of {key} is {score}: its gradients, or its outputs with {recipe}, are not finite")
            found.setdefault(key, {})[recipe] = score
        self._sums.clear()
        return found


def _wants_gradients(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
    """So that layers which are computed again know that something comes back through them."""
    return output.detach().requires_grad_().clone() if torch.is_grad_enabled() and not output.requires_grad else None


@contextmanager
def _no_parameter_learns(model: torch.nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, learns in before:
            parameter.requires_grad_(learns)


@contextmanager
def _layers_computed_twice(model: torch.nn.Module) -> Iterator[None]:
    try:
        layers = [layer for _, layer in decoder_layers(model)]
    except ValueError:
        layers = []
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer in layers:
        layer.forward = _computed_twice(layer.forward)      # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in before:
            del layer.forward       # type: ignore[misc]
            if own is not None:
                layer.forward = own     # type: ignore[method-assign]


def _computed_twice(plain: Any) -> Any:
    def forward(*arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named.get("hidden_states")
        others = [*arguments[1:], *(value for name, value in named.items() if name != "hidden_states")]
        differentiable = [value for value in others if isinstance(value, torch.Tensor) and value.requires_grad]
        if not torch.is_grad_enabled() or not isinstance(hidden, torch.Tensor) or not hidden.requires_grad or differentiable:
            return plain(*arguments, **named)
        rest = {name: None if name in CACHES else value for name, value in named.items() if name != "hidden_states"}

        def run(hidden: torch.Tensor) -> Any:
            return plain(hidden, *arguments[1:], **rest) if arguments else plain(hidden_states=hidden, **rest)
        return torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=True)
    return forward
