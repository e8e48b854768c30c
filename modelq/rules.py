"""Which quantizer does what: name-pattern rules applied in order to the places of a model where a quantizer may sit.

A place (`Slot`) is named by the dotted path of its module and its role: `model.layers.0.self_attn.q_proj.weight_quantizer`.
Patterns match the whole name, case matters, `*` spans dots. Later rules win. A rule with `cfg` replaces every attribute, one with
only `enable` just switches. Before any rule, weights and inputs are 8-bit integers, switched on, and outputs are off.
"""
from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from modelq.config import QuantizerAttributeConfig, QuantizerCfgEntry
from modelq.presets import DEFAULT_DISABLED_CLASSES, FAMILY_PATTERNS

# Classes that a rule's parent_class may name. Language models of the families known here have only the first two.
PARENT_CLASSES = ("nn.Linear", "nn.Embedding", "nn.LayerNorm", "nn.LeakyReLU", "nn.RNN", "nn.LSTM", "nn.GRU", "Conv1D") + tuple(
    f"nn.{name}{rank}d" for name in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool")
    for rank in (1, 2, 3))

_PER_EXPERT = re.compile(r"(weight_quantizer|input_quantizer)s?\.\d+(?=$|\.)")


@dataclass(frozen=True)
class Slot:
    """A place for a quantizer. role: weight, input, output, q_bmm, k_bmm, v_bmm; parent: the class of its module;
    shape: of the weight it belongs to, [out, in], None for attention; aliases: groups of other names, a rule that fits all names of
    one group means this place."""

    name: str
    module: str
    role: str
    parent: str
    shape: tuple[int, ...] | None = None
    layer: int = -1
    aliases: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Setting:
    """What the rules made of one slot. rule: the last rule that touched it, None before any did. why: what else switched it off."""

    slot: Slot
    attributes: QuantizerAttributeConfig | tuple[QuantizerAttributeConfig, ...]
    enable: bool
    rule: QuantizerCfgEntry | None = None
    why: str = ""


def default_setting(slot: Slot) -> Setting:
    per_channel = slot.role == "weight" and slot.parent == "nn.Linear"
    attributes = QuantizerAttributeConfig(num_bits=8, axis=0 if per_channel else None)
    return Setting(slot, attributes, enable=slot.role != "output" and not (slot.parent == "nn.Embedding" and slot.role == "input"))


def matches(pattern: str | Callable[[str], bool], name: str) -> bool:
    """Whether a quantizer's name fits. `..._weight_quantizers.3` of an expert list also fits as `..._weight_quantizer`."""
    if callable(pattern):
        return bool(pattern(name))
    if fnmatchcase(name, pattern):
        return True
    return ("quantizer." in name or "quantizers." in name) and fnmatchcase(_PER_EXPERT.sub(r"\1", name), pattern)


def fits(pattern: str | Callable[[str], bool], slot: Slot) -> bool:
    """Whether a slot is meant, by its name or an alias."""
    return matches(pattern, slot.name) or any(all(matches(pattern, name) for name in group) for group in slot.aliases)


def apply_rules(settings: dict[str, Setting], rules: Iterable[QuantizerCfgEntry]) -> tuple[dict[str, Setting], list[QuantizerCfgEntry]]:
    """(the new settings, the rules whose pattern fitted no name). The given settings stay as they are."""
    result, idle = dict(settings), []
    for rule in rules:
        if rule.parent_class is not None and rule.parent_class not in PARENT_CLASSES:
            raise ValueError(f"quant_cfg rule {rule.quantizer_name!r}: unknown parent_class {rule.parent_class!r}: known are "
                             f"{', '.join(PARENT_CLASSES)}")
        hit = [name for name in result if fits(rule.quantizer_name, result[name].slot)
               and rule.parent_class in (None, result[name].slot.parent)]
        for name in hit:
            result[name] = _apply(result[name], rule)
        if not hit:
            idle.append(rule)
    return result, idle


def _apply(setting: Setting, rule: QuantizerCfgEntry) -> Setting:
    if setting.slot.parent == "nn.Embedding" and setting.slot.role == "input":
        return setting  # token ids are integers: nothing to quantize, whatever a rule says
    if rule.cfg is None:
        attributes = setting.attributes if rule.enable else _without_rotation(setting)
        return replace(setting, attributes=attributes, enable=rule.enable, rule=rule)
    return replace(setting, attributes=rule.cfg, enable=rule.enable, rule=rule)


def _without_rotation(setting: Setting) -> Any:
    """Switching a quantizer off ends its rotation too; only a rule with attributes of its own can rotate and not quantize."""
    plain = tuple(replace(attributes, rotate=False) if attributes.rotate else attributes for attributes in stages(setting))
    return plain if isinstance(setting.attributes, tuple) else plain[0]


def expected_to_be_idle(rule: QuantizerCfgEntry) -> bool:
    """Rules of the presets for parts that only some families have: that they fit nothing needs no warning."""
    if rule.parent_class is not None:
        return rule.parent_class in DEFAULT_DISABLED_CLASSES and not rule.enable
    return rule.quantizer_name in FAMILY_PATTERNS


def describe_rule(rule: QuantizerCfgEntry) -> str:
    words = repr(rule.quantizer_name)
    return words if rule.parent_class is None else f"{words} with parent_class {rule.parent_class!r}"


def changed_settings(settings: Mapping[str, Setting], pattern: str | Callable[[str], bool], parent_class: str | None,
                     change: Callable[[Setting, QuantizerCfgEntry], Setting]) -> dict[str, Setting]:
    """The settings with those changed that the pattern fits. ValueError for an unknown parent_class."""
    if parent_class is not None and parent_class not in PARENT_CLASSES:
        raise ValueError(f"unknown parent_class {parent_class!r}: known are {', '.join(PARENT_CLASSES)}")
    rule = QuantizerCfgEntry(pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "a function"))
    return {name: change(setting, rule) if fits(pattern, setting.slot) and parent_class in (None, setting.slot.parent) else setting
            for name, setting in settings.items()}


def warn_idle(rules: Iterable[QuantizerCfgEntry], stacklevel: int) -> None:
    """UserWarning for rules that fit nothing, but for those of presets for parts that only some families have."""
    unexpected = [describe_rule(rule) for rule in rules if not expected_to_be_idle(rule)]
    if unexpected:
        warnings.warn(f"quant_cfg: no quantizer fits {', '.join(unexpected)}", UserWarning, stacklevel=stacklevel + 1)


def stages(setting: Setting) -> tuple[Any, ...]:
    """The attributes as a tuple: several where quantizers follow each other."""
    return setting.attributes if isinstance(setting.attributes, tuple) else (setting.attributes,)
