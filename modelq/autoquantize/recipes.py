"""The formats that a search chooses from: configs by name, what they do to one module, and how many bits a weight takes.

A config is applied to each module by itself, as in Model Optimizer: its patterns see `weight_quantizer`, not the path before it. So
"*lm_head*" excludes nothing, and disabled_layers is there for that.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod
from typing import Any

from modelq import presets
from modelq.algorithms import normalize_algorithm
from modelq.checkpoint.dialects import layout
from modelq.checkpoint.safetensors import numpy_dtype
from modelq.config import QuantizeConfig
from modelq.quantizers import block_extents, core_quantizer
from modelq.rules import Setting, Slot, apply_rules, default_setting, stages

NO_QUANT_BITS = Fraction(16)
NO_CANDIDATES = {"svdquant": "it adds a branch beside each weight", "gptq": "it changes the weights that every other format starts from",
                 "lsq": "it trains", "nvfp4_act_headroom": "it is not available here",
                 "rotate": "it changes the weights that every other format starts from"}


@dataclass(frozen=True)
class Recipe:
    """One format. config None: no quantization. bits: of a weight, as Model Optimizer counts them."""

    name: str
    config: QuantizeConfig | None
    bits: Fraction
    _known: dict[tuple[str, str, str], Setting] = field(default_factory=dict, compare=False, repr=False)
    _stored: dict[Any, Fraction] = field(default_factory=dict, compare=False, repr=False)

    @property
    def signature(self) -> str:
        """Equal for equal configs."""
        return json.dumps(plain_config(self.config), sort_keys=True)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [] if self.config is None else self.config.steps

    def __str__(self) -> str:
        return f"{self.name}(effective-bits: {float(self.bits)})"

    def settings(self, slots: Sequence[Slot]) -> dict[str, Setting]:
        """What it makes of one module's places for quantizers, by name. Outputs are not quantized."""
        return {slot.name: replace(self._alone(slot), slot=slot) for slot in slots}

    def stored_bits(self, slot: Slot) -> Fraction:
        """Of a weight, as a checkpoint stores it."""
        key = slot.name.removeprefix(f"{slot.module}."), slot.parent, slot.shape
        if key not in self._stored:
            self._stored[key] = stored_bits(replace(self._alone(slot), slot=slot))
        return self._stored[key]

    def _alone(self, slot: Slot) -> Setting:
        """Of a place called as its module calls it. Modules are alike by the thousand."""
        key = slot.name.removeprefix(f"{slot.module}."), slot.role, slot.parent
        if key not in self._known:
            setting = default_setting(replace(slot, name=key[0], aliases=()))
            if self.config is not None:
                setting = apply_rules({key[0]: setting}, self.config.quant_cfg)[0][key[0]]
            self._known[key] = replace(setting, enable=setting.enable and self.config is not None and slot.role != "output")
        return self._known[key]


def plain_config(config: QuantizeConfig | None) -> Any:
    """As JSON gives it back: lists for tuples, texts for keys."""
    return json.loads(json.dumps(None if config is None else config.to_dict(), default=str))


NO_QUANT = Recipe("NONE", None, NO_QUANT_BITS)


def parse_recipes(quantization_formats: Any) -> list[Recipe]:
    """The formats by rising bits, no quantization not among them. None stands for that, which is always a choice.

    ValueError: none is left, two are the same, an algorithm that cannot be one of several. TypeError: no list.
    """
    if quantization_formats is None:
        quantization_formats = [presets.NVFP4_AWQ_LITE_CFG, presets.FP8_DEFAULT_CFG]
    if not isinstance(quantization_formats, (list, tuple)):
        raise TypeError(f"quantization_formats must be a list of configs, got {type(quantization_formats).__name__}")
    recipes = [(position, _recipe(given, position)) for position, given in enumerate(quantization_formats)
               if given is not None and given != "NONE"]
    if not recipes:
        raise ValueError("quantization_formats is empty: name at least one config to choose from, such as [mtq.NVFP4_DEFAULT_CFG, "
                         "mtq.FP8_DEFAULT_CFG]; no quantization is always a choice")
    seen: dict[str, tuple[int, Recipe]] = {}
    for position, recipe in recipes:
        if (before := seen.setdefault(recipe.signature, (position, recipe)))[0] != position:
            raise ValueError(f"quantization_formats: entries {before[0]} and {position} are the same format ({before[1].name}): remove one")
    return sorted((recipe for _, recipe in recipes), key=lambda recipe: (recipe.bits, recipe.signature))


def _recipe(given: Any, position: int) -> Recipe:
    where = f"quantization_formats[{position}]"
    if isinstance(given, str):
        if given not in presets.choices:
            raise ValueError(f"{where}: unknown format {given!r}: known are {', '.join(sorted(presets.choices))}")
        given = getattr(presets, given)
    try:
        config = QuantizeConfig.parse(given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    name = next((name for name in sorted(presets.choices) if getattr(presets, name) == given), f"CUSTOM_{position}")
    for step in normalize_algorithm(config.algorithm):
        if step["method"] in NO_CANDIDATES:
            raise ValueError(f"{where} ({name}): algorithm {step['method']!r} cannot be one of several formats: "
                             f"{NO_CANDIDATES[step['method']]}; use max, mse, local_hessian, smoothquant or an awq")
        if step["layerwise"]["enable"]:
            raise ValueError(f"{where} ({name}): layerwise calibration cannot be one of several formats: leave layerwise out")
    return Recipe(name, config, _effective_bits(config))


def _effective_bits(config: QuantizeConfig) -> Fraction:
    """The config's own word, else the least of all attributes that it switches on."""
    if config.effective_bits is not None:
        return exact(config.effective_bits)
    found = [_attribute_bits(attributes) for rule in config.quant_cfg if rule.enable and rule.cfg is not None
             for attributes in (rule.cfg if isinstance(rule.cfg, tuple) else (rule.cfg,)) if attributes.enable]
    return min(found, default=NO_QUANT_BITS)


def _attribute_bits(attributes: Any) -> Fraction:
    if attributes.effective_bits is not None:
        return exact(attributes.effective_bits)
    bits = attributes.num_bits
    return Fraction(sum(bits) + 1 if isinstance(bits, tuple) else bits)


def exact(number: float) -> Fraction:
    """The short fraction that a decimal number stands for: 4.8 is 24/5."""
    return Fraction(number).limit_denominator(10**6)


def stored_bits(setting: Setting) -> Fraction:
    """Bits of a whole weight as a checkpoint stores it, scales included; 16 a weight where it is not quantized."""
    rows, columns = setting.slot.shape[0], prod(setting.slot.shape[1:])
    if not setting.enable:
        return NO_QUANT_BITS * rows * columns
    attributes = stages(setting)[0]
    scheme, size = core_quantizer(attributes).scheme, block_extents(attributes).get(-1)
    if scheme is None:
        scales = rows if attributes.axis is not None else 1
        return _attribute_bits(attributes) * rows * columns + 32 * scales
    parts = layout(scheme, (rows, columns), size)
    stored = sum(_bits_of(dtype, shape) for dtype, shape in parts.values())
    return Fraction(stored + 32 * (len(stages(setting)) - 1))


def _bits_of(dtype: str, shape: Sequence[int]) -> int:
    return 8 * numpy_dtype(dtype).itemsize * prod(shape)
