"""Model Optimizer's calls on torch modules: rules applied to the places in a model, calibration by what passes through it."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from modelq.algorithms import split_rotation
from modelq.config import QuantizeConfig, QuantizerCfgEntry, normalize_quant_cfg_list
from modelq.quantizers import rotated_columns
from modelq.rules import Setting, apply_rules, changed_settings, default_setting, stages, warn_idle
from modelq.torch_models import unwrapped
from modelq.torch_models.experts import is_experts
from modelq.torch_models.modules import (insert, is_inserted, is_packed, is_searched, places, places_in, remove, slots_of,
                                         weights_of)
from modelq.torch_models.originals import Originals
from modelq.torch_models.quantizer_module import make_quantizer

SETTINGS = "_modelq_settings"       # of a quantized model: name of a quantizer to what the rules made of it
Pattern = str | Callable[[str], bool]


def quantize(model: torch.nn.Module, config: Any, forward_loop: Callable[..., Any] | None = None,
             compat: str | None = None, checkpoint_dir: Any = None) -> torch.nn.Module:
    """Quantize a model in place and return it; see `modelq.quantization.quantize`. If anything raises, it is as it was."""
    inner = unwrapped(model)
    refuse_packed(inner)
    parsed = QuantizeConfig.parse(config)
    rotation, steps = split_rotation(parsed.algorithm)
    steps = _runnable(steps, compat)
    with inserted(inner) as (defaults, originals):
        settings, idle = apply_rules(defaults, parsed.quant_cfg)
        _refuse_nothing(settings)
        warn_idle(idle, stacklevel=3)
        take_settings(inner, settings, keep=False)
        if rotation is not None:
            from modelq.torch_models.rotation import rotate

            rotate(inner, rotation, originals)
        run_steps(inner, steps, _with_wrapping(forward_loop, model), compat, originals, checkpoint_dir)
    return model


def calibrate(model: torch.nn.Module, algorithm: Any = "max", forward_loop: Callable[..., Any] | None = None,
              compat: str | None = None, checkpoint_dir: Any = None) -> torch.nn.Module:
    """Find anew the amax of every enabled quantizer of a quantized model."""
    inner = unwrapped(model)
    settings_of(inner)
    refuse_packed(inner)
    steps = _runnable(algorithm, compat)
    with _all_or_nothing(inner) as originals:
        run_steps(inner, steps, _with_wrapping(forward_loop, model), compat, originals, checkpoint_dir)
    return model


def set_quantizer_by_cfg(model: torch.nn.Module, quant_cfg: Any) -> None:
    """Apply rules to the quantizers of a quantized model, without calibrating."""
    model = unwrapped(model)
    settings, idle = apply_rules(settings_of(model), normalize_quant_cfg_list(quant_cfg))
    with _all_or_nothing(model):
        take_settings(model, settings)
    warn_idle(idle, stacklevel=3)


@contextmanager
def settings_within(model: torch.nn.Module, rules: Any) -> Iterator[None]:
    """Within it the rules hold; afterwards every quantizer is as before, but for an amax found meanwhile."""
    model = unwrapped(model)
    before = settings_of(model)
    set_quantizer_by_cfg(model, rules)
    try:
        yield
    finally:
        take_settings(model, before)


def set_attributes(model: torch.nn.Module, pattern: Pattern, parent_class: str | None,
                   change: Callable[[Setting, QuantizerCfgEntry], Setting]) -> None:
    """Change the settings of the quantizers that fit."""
    model = unwrapped(model)
    settings = changed_settings(settings_of(model), pattern, parent_class, change)
    with _all_or_nothing(model):
        take_settings(model, settings)


def fold_weight(model: torch.nn.Module, keep_attrs: bool = False) -> None:
    """Weights become what their quantizers make of them, which are then off (and forget their amax, unless keep_attrs)."""
    model = unwrapped(model)
    settings = dict(settings_of(model))
    for name, module in model.named_modules():
        if not is_inserted(module):
            continue
        for place, weight in weights_of(module):
            quantizer, full = module.get_submodule(place), f"{name}.{place}".lstrip(".")
            if quantizer.is_enabled:
                _fold(module, quantizer, weight)
                quantizer.disable()
                quantizer.pre_quant_scale = None
                if not keep_attrs:
                    quantizer.reset_amax()
                settings[full] = replace(settings[full], enable=False)
    setattr(model, SETTINGS, settings)


def _fold(module: Any, quantizer: Any, weight: torch.Tensor) -> None:
    """The module's weight as it computes, a branch of low rank included."""
    branch, made = quantizer.low_rank, None
    if getattr(module, "packed", None) is not None:
        module.unpack()
        weight = made = module._parameters["weight"]
    with torch.no_grad():
        made = quantizer(weight) if made is None else made
        weight.copy_(made if branch is None else made + quantizer.svdquant_lora_b @ quantizer.svdquant_lora_a)
    quantizer.low_rank = None


def settings_of(model: torch.nn.Module) -> dict[str, Setting]:
    """ValueError if the model is not quantized."""
    settings = getattr(model, SETTINGS, None)
    if settings is None:
        raise ValueError("the model is not quantized yet: call quantize first")
    return settings


def quantizers_of(model: torch.nn.Module) -> dict[str, Any]:
    """By full name; several in a row are one."""
    return {name: getattr(module, attribute) for name, module, attribute in places(model)}


def _with_wrapping(forward_loop: Callable[..., Any] | None, model: torch.nn.Module) -> Callable[..., Any] | None:
    """The user's loop is given the user's model, wrapped as it is."""
    return None if forward_loop is None else lambda inner: forward_loop(model)


# Parts ---------------------------------------------------------------------------------------------------------------------------

def _runnable(algorithm: Any, compat: str | None) -> list[dict[str, Any]]:
    from modelq.calibration import COMPAT, runnable_steps

    if compat not in COMPAT:
        raise ValueError(f"compat must be None or 'modelopt', got {compat!r}")
    return runnable_steps(algorithm)


def run_steps(model: torch.nn.Module, steps: list[dict[str, Any]], forward_loop: Callable[..., Any] | None, compat: str | None,
              originals: Originals, checkpoint_dir: Any = None) -> None:
    from modelq.torch_models.calibration import run_step

    for index, step in enumerate(steps):
        run_step(model, step, forward_loop, compat, originals, index, checkpoint_dir)


def refuse_packed(model: torch.nn.Module) -> None:
    if is_packed(model):
        raise ValueError("the model's weights are compressed: the original ones are gone; load the model again, or call fold_weight to go "
                         "on from what they stand for")


def _refuse_nothing(settings: Mapping[str, Setting]) -> None:
    if not settings:
        raise ValueError("no module of this model can be quantized: no linear, convolution or embedding is there")
    if not any(setting.enable for setting in settings.values()):
        raise ValueError(f"this config quantizes nothing in this model; a quantizer is named like {next(iter(settings))!r}, and later "
                         "rules win")


def take_settings(model: torch.nn.Module, settings: dict[str, Setting], keep: bool = True) -> None:
    """Give quantizers what their settings say. keep: those whose attributes stay keep what was found for them."""
    before = getattr(model, SETTINGS, {}) if keep else {}
    for name, module, attribute in list(places(model)):
        setting = settings[name]
        if setting.enable and len(stages(setting)) > 1 and setting.slot.role != "weight":
            raise NotImplementedError(f"{name}: quantizers one after the other are for weights only")
        if name not in before or before[name].attributes != setting.attributes:
            made = make_quantizer(name, stages(setting))
            made.native.rotate = rotated_columns(setting)
            setattr(module, attribute, made)
        quantizer = getattr(module, attribute)
        quantizer.enable() if setting.enable else quantizer.disable()
    setattr(model, SETTINGS, settings)


@contextmanager
def inserted(model: torch.nn.Module) -> Iterator[tuple[dict[str, Setting], Originals]]:
    """Quantizers wherever they can be: their settings before any rule, and where weights are kept that change. All is as before if the
    body raises."""
    with _all_or_nothing(model) as originals:
        for module in list(model.modules()):
            insert(module)
        yield {slot.name: default_setting(slot) for slot in slots_of(model)}, originals


@contextmanager
def _all_or_nothing(model: torch.nn.Module) -> Iterator[Originals]:
    """Put modules, settings, what was found and the weights back if the body raises, Ctrl-C included."""
    settings, originals = getattr(model, SETTINGS, None), Originals()
    before = {name: copy.deepcopy(quantizer) for name, quantizer in quantizers_of(model).items()}
    try:
        yield originals
    except BaseException:
        originals.put_back()
        for name, owner, attribute in list(places(model)):
            if name in before:
                owner.add_module(attribute, before[name])
        for name, module in list(model.named_modules()):
            if is_inserted(module) and f"{name}.{places_in(module)[0].path}".lstrip(".") not in before:
                remove(module)
        if settings is None:
            vars(model).pop(SETTINGS, None)
        else:
            setattr(model, SETTINGS, settings)
        raise


# Weights and switches that calibration uses ---------------------------------------------------------------------------------------

def find_other_weight_amax(model: torch.nn.Module) -> None:
    """Of weights that searches leave alone: all but those of linears and embeddings."""
    for module in model.modules():
        if not is_inserted(module) or is_experts(module) or is_searched(module):
            continue
        for place, weight in weights_of(module):
            quantizer = module.get_submodule(place)
            if quantizer.is_enabled and quantizer.needs_calibration:
                quantizer.reset_calibrator()
                quantizer.collect(weight)
                quantizer.load_calib_amax()
                quantizer.reset_calibrator()


@contextmanager
def rounding(quantizers: Mapping[str, Any], weights: bool, activations: bool) -> Iterator[None]:
    """Within it weights and activations are rounded if so wished."""
    before = {name: quantizer.rounds for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        quantizer.rounds = weights if ".weight_quantizer" in f".{name}" or "_weight_quantizers." in name else activations
    try:
        yield
    finally:
        for name, quantizer in quantizers.items():
            quantizer.rounds = before[name]
