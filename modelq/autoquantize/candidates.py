"""What calibration found for each format, and what a search asks of a model.

A kind of model (torch modules, native models) is a `Subject`. Its scores come from `Subject.scores`, a generator over batches: whoever has
another way to find them gives {group.key: {str(recipe): score}} for as many batches at a time as suits it.
"""
from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from modelq.autoquantize.groups import Group
from modelq.autoquantize.recipes import Recipe
from modelq.quantizers import Found, found_values, set_found_values
from modelq.rules import Setting, Slot

Scores = dict[str, dict[str, float]]        # by group, by recipe; both in the words of a state
METHODS = ("gradient", "kl_div")


class Calibrated(NamedTuple):
    """One quantizer after calibration. enabled: one that no data reached is off."""
    enabled: bool
    found: list[Found]


def calibrated(quantizers: Mapping[str, Any]) -> dict[str, Calibrated]:
    """Of core's quantizers, those that do anything: one that is off may still smooth."""
    found = {name: Calibrated(quantizer.enabled, found_values(quantizer)) for name, quantizer in quantizers.items()}
    return {name: one for name, one in found.items() if one.enabled or any(value is not None for stage in one.found for value in stage)}


def give(quantizer: Any, values: Calibrated) -> None:
    """Put values into a core's quantizer."""
    set_found_values(quantizer, values.found)
    quantizer.enabled = values.enabled


@dataclass(frozen=True)
class Candidate:
    """One format on the whole model: settings and values of every quantizer that a group has."""
    recipe: Recipe
    settings: Mapping[str, Setting]
    values: Mapping[str, Calibrated]


@dataclass(frozen=True)
class Steps:
    """The user's functions, and which method: forward_step(model, batch) -> output; loss_func(output, batch) -> loss;
    forward_backward_step(model, batch) in the place of both."""
    method: str
    forward_step: Callable[[Any, Any], Any]
    loss_func: Callable[[Any, Any], Any] | None = None
    forward_backward_step: Callable[[Any, Any], Any] | None = None


class Subject(Protocol):
    """A model that is searched. slots: every place for a quantizer; module_names: of all its modules;
    config: its config.json."""

    model: Any
    slots: Mapping[str, Slot]
    module_names: Sequence[str]
    config: Mapping[str, Any]

    def searching(self) -> AbstractContextManager[Any]:
        """Within it the model's quantizers are the search's. It is as it was before if the body raises."""

    def check(self, settings: Mapping[str, Setting]) -> None:
        """ValueError or NotImplementedError: quantizers that this model cannot have."""

    def agree(self, value: Any) -> bool:
        """Whether all processes that search together give the same."""

    def own_folder(self, folder: Any) -> Any:
        """The part of a checkpoint's folder that is this process's."""

    def fingerprint(self) -> str:
        """Of the weights."""

    def calibrate(self, settings: Mapping[str, Setting], steps: Sequence[Mapping[str, Any]], forward_loop: Callable[[Any], Any]
                  ) -> dict[str, Calibrated]:
        """Calibrate with these quantizers, all others off; returns what was found."""

    def scores(self, groups: Sequence[Group], candidates: Mapping[str, Candidate], steps: Steps, batches: Sequence[Any], first: int
               ) -> Generator[tuple[int, Scores], None, None]:
        """(number of batches, what they add to the scores), until all are done; of processes that search together, what all add.
        first: the number of the first batch, for messages."""

    def apply(self, settings: Mapping[str, Setting], values: Mapping[str, Calibrated]) -> None:
        """Give the model these quantizers, all others off."""


def add(total: Scores, found: Scores) -> None:
    """Add scores to others, in place."""
    for key, scores in found.items():
        sums = total.setdefault(key, {})
        for recipe, score in scores.items():
            sums[recipe] = sums.get(recipe, 0.0) + score


def settings_of(groups: Iterable[Group], recipe: Recipe) -> dict[str, Setting]:
    """What a format makes of every group that may take it."""
    return {name: setting for group in groups if recipe in group.recipes for slots in group.modules.values()
            for name, setting in recipe.settings(slots).items()}


def divergences(groups: Sequence[Group], candidates: Mapping[str, Candidate], batches: Sequence[Any],
                logits: Callable[[Any], Any], divergence: Callable[[Any, Any], float],
                quantized: Callable[[Group, Candidate], AbstractContextManager[Any]]) -> Generator[tuple[int, Scores], None, None]:
    """Scores by the Kullback-Leibler divergence of what the model answers when one group only is quantized, batch by batch.

    logits(batch): of the model as it is; divergence(logits, others): summed over all tokens; quantized(group, candidate): within it that
    group has that format.
    """
    for batch in batches:
        plain, found = logits(batch), {}
        for group in groups:
            found[group.key] = {}
            for recipe in group.recipes:
                if str(recipe) in candidates:
                    with quantized(group, candidates[str(recipe)]):
                        found[group.key][str(recipe)] = divergence(plain, logits(batch))
        yield 1, found
