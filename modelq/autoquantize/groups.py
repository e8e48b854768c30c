"""Modules that get one format together, because engines run them as one, and where their error is looked at."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from modelq.autoquantize.recipes import NO_QUANT, Recipe
from modelq.experts import PARENT as EXPERTS
from modelq.presets import FAMILY_PATTERNS
from modelq.rules import Slot

# The first that fits says the group: what it captures first, and a word where one parent has two.
_GROUPS = [(re.compile(pattern), more) for pattern, more in (
    (r"^(.*?)\.(q_proj|k_proj|v_proj|q_a_proj|kv_a_proj_with_mqa)$", ""),
    (r"^(.*?\.mlp\.experts)\.\d+\.(gate_proj|up_proj|down_proj)$", ""),
    (r"^(.*?\.mixer\.experts)\.\d+\.(up_proj|down_proj)$", ""),
    (r"^(.*?\.mlp\.experts\.local_experts)\.\d+\.(linear_fc1|linear_fc2)$", ""),
    (r"^(.*?)\.(gate_proj|up_proj)$", ""),
    (r"^(.*?)\.(\d+\.(w1|w2|w3))$", ""),
    (r"^(.*?)\.((w1_linear|w2_linear|w3_linear)\.\d+)$", ""),
    (r"^(.*?\.linear_attn)\.(in_proj_qkv|in_proj_z)$", "/qkvz"),
    (r"^(.*?\.linear_attn)\.(in_proj_a|in_proj_b)$", "/ba"))]
# Experts that are linears of their own are looked at where their outputs are added up; everything else at its own output.
_SCORED_AT = [re.compile(pattern) for pattern in (
    r"^(.*?\.mlp)\.experts\.\d+\.(?:gate_proj|up_proj|down_proj)$", r"^(.*?\.mixer)\.experts\.\d+\.(?:up_proj|down_proj)$",
    r"^(.*?)\.\d+\.(?:w1|w2|w3)$", r"^(.*?)\.(?:w1_linear|w2_linear|w3_linear)\.\d+$")]


@dataclass(frozen=True)
class Group:
    """name: of its first module. modules: the places of quantizers by module. scored_at: modules at whose output the error counts.
    recipes: what may be chosen, by rising bits, no quantization last."""

    name: str
    modules: Mapping[str, Sequence[Slot]]
    scored_at: tuple[str, ...]
    recipes: tuple[Recipe, ...]

    @property
    def key(self) -> str:
        """Under which a state knows it."""
        return f"{self.name}.quant_recipe"

    @property
    def slots(self) -> list[Slot]:
        return [slot for slots in self.modules.values() for slot in slots]

    @property
    def weights(self) -> int:
        """How many numbers its weights have."""
        return sum(prod(slot.shape or ()) for slot in self.slots if slot.role == "weight")

    def stored_bits(self, recipe: Recipe) -> Any:
        """Of all its weights in a checkpoint, scales included."""
        return sum(recipe.stored_bits(slot) for slot in self.slots if slot.role == "weight")


def make_groups(slots: Iterable[Slot], recipes: Sequence[Recipe], disabled_layers: Any, modules: Iterable[str]) -> list[Group]:
    """Every group of the model, in order. modules: the names of all modules, which disabled_layers may name. ValueError: a pattern that
    fits none; nothing is left to choose for."""
    by_module: dict[str, list[Slot]] = {}
    for slot in slots:
        if slot.parent in ("nn.Linear", EXPERTS) or slot.parent.startswith("nn.Conv"):
            by_module.setdefault(slot.module, []).append(slot)
    by_module = {module: places for module, places in by_module.items() if any(slot.role == "weight" for slot in places)}
    if not by_module:
        raise ValueError("this model has no linear layer to choose formats for")
    disabled = _disabled(disabled_layers, by_module, modules)
    members: dict[str, list[str]] = {}
    for module in by_module:
        members.setdefault(_group_of(module), []).append(module)
    made = []
    for names in members.values():
        choices = (NO_QUANT,) if any(map(disabled, names)) else (*recipes, NO_QUANT)
        made.append(Group(names[0], {name: by_module[name] for name in names}, tuple(dict.fromkeys(map(_scored_at, names))), choices))
    if all(len(group.recipes) == 1 for group in made):
        raise ValueError(f"disabled_layers {listed(disabled_layers)} leave no layer to choose a format for")
    return made


def _group_of(module: str) -> str:
    return next((found[1] + more for pattern, more in _GROUPS if (found := pattern.match(module))), module)


def _scored_at(module: str) -> str:
    return next((found[1] for pattern in _SCORED_AT if (found := pattern.match(module))), module)


def _disabled(patterns: Any, searched: Iterable[str], modules: Iterable[str]) -> Callable[[str], bool]:
    """Whether a module is not to be quantized."""
    given = listed(patterns)
    known = list(dict.fromkeys((*searched, *modules)))
    for pattern in given:
        if pattern not in FAMILY_PATTERNS and not any(fnmatchcase(name, pattern) for name in known):
            near = get_close_matches(pattern.strip("*"), [part for name in known for part in (name, name.rpartition(".")[2])], 1, 0.5)
            raise ValueError(f"disabled_layers: {pattern!r} fits no module of this model" + (f"; did you mean {near[0]!r}?" if near else "")
                             + f"; a module is named like {next(iter(searched))!r}, and * stands for anything")
    return lambda module: any(fnmatchcase(module, pattern) for pattern in given)


def listed(patterns: Any) -> list[str]:
    """One pattern or several, as several. ValueError: neither."""
    given = [patterns] if isinstance(patterns, str) else list(patterns or [])
    if not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"disabled_layers must be a pattern or a list of patterns such as '*lm_head*', got {patterns!r}")
    return given
