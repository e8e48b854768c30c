"""Model Optimizer's calls on torch modules: rules applied to the places in a model, calibration by what passes through it."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from modelq.config import QuantizeConfig, QuantizerCfgEntry, normalize_quant_cfg_list
from modelq.quantizers import rotated_columns
from modelq.rules import Setting, apply_rules, changed_settings, default_setting, stages, warn_idle
from modelq.torch_models.modules import QuantizedModule, insert, is_inserted, make_quantizer, places, remove, roles_of, slots_of

SETTINGS = "_modelq_settings"       # of a quantized model: name of a quantizer to what the rules made of it
Pattern = str | Callable[[str], bool]


def quantize(model: torch.nn.Module, config: Any, forward_loop: Callable[..., Any] | None = None,
             compat: str | None = None) -> torch.nn.Module:
    """Quantize a model in place and return it; see `modelq.quantization.quantize`. If anything raises, it is as it was."""
    parsed = QuantizeConfig.parse(config)
    steps = _runnable(parsed.algorithm, compat)
    with inserted(model) as defaults:
        settings, idle = apply_rules(defaults, parsed.quant_cfg)
        _refuse_nothing(settings)
        warn_idle(idle, stacklevel=3)
        take_settings(model, settings, keep=False)
        _calibrate(model, steps, forward_loop, compat)
    return model


def calibrate(model: torch.nn.Module, algorithm: Any = "max", forward_loop: Callable[..., Any] | None = None,
              compat: str | None = None) -> torch.nn.Module:
    """Find anew the amax of every enabled quantizer of a quantized model."""
    settings_of(model)
    steps = _runnable(algorithm, compat)
    with _all_or_nothing(model):
        _calibrate(model, steps, forward_loop, compat)
    return model


def set_quantizer_by_cfg(model: torch.nn.Module, quant_cfg: Any) -> None:
    """Apply rules to the quantizers of a quantized model, without calibrating."""
    settings, idle = apply_rules(settings_of(model), normalize_quant_cfg_list(quant_cfg))
    with _all_or_nothing(model):
        take_settings(model, settings)
    warn_idle(idle, stacklevel=3)


@contextmanager
def settings_within(model: torch.nn.Module, rules: Any) -> Iterator[None]:
    """Within it the rules hold; afterwards every quantizer is as before, but for an amax found meanwhile."""
    before = settings_of(model)
    set_quantizer_by_cfg(model, rules)
    try:
        yield
    finally:
        take_settings(model, before)


def set_attributes(model: torch.nn.Module, pattern: Pattern, parent_class: str | None,
                   change: Callable[[Setting, QuantizerCfgEntry], Setting]) -> None:
    """Change the settings of the quantizers that fit."""
    settings = changed_settings(settings_of(model), pattern, parent_class, change)
    with _all_or_nothing(model):
        take_settings(model, settings)


def fold_weight(model: torch.nn.Module, keep_attrs: bool = False) -> None:
    """Weights become what their quantizers make of them, which are then off (and forget their amax, unless keep_attrs)."""
    settings = dict(settings_of(model))
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(module, QuantizedModule) and quantizer.is_enabled:
            with torch.no_grad():
                module._parameters["weight"].copy_(quantizer(module._parameters["weight"]))
            quantizer.disable()
            quantizer.pre_quant_scale = None
            if not keep_attrs:
                quantizer.reset_amax()
            place = f"{name}.weight_quantizer".lstrip(".")
            settings[place] = replace(settings[place], enable=False)
    setattr(model, SETTINGS, settings)


def settings_of(model: torch.nn.Module) -> dict[str, Setting]:
    """ValueError if the model is not quantized."""
    settings = getattr(model, SETTINGS, None)
    if settings is None:
        raise ValueError("the model is not quantized yet: call quantize first")
    return settings


def quantizers_of(model: torch.nn.Module) -> dict[str, Any]:
    """By full name; several in a row are one."""
    return {name: getattr(module, attribute) for name, module, attribute in places(model)}


# Parts ---------------------------------------------------------------------------------------------------------------------------

def _runnable(algorithm: Any, compat: str | None) -> list[dict[str, Any]]:
    from modelq.calibration import COMPAT, runnable_steps

    if compat not in COMPAT:
        raise ValueError(f"compat must be None or 'modelopt', got {compat!r}")
    return runnable_steps(algorithm)


def _calibrate(model: torch.nn.Module, steps: list[dict[str, Any]], forward_loop: Callable[..., Any] | None, compat: str | None) -> None:
    for step in steps:
        if step["method"] == "max":
            _calibrate_max(model, forward_loop)
        else:
            from modelq.torch_models.search import run_step

            run_step(model, step, forward_loop, compat)


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
        if setting.enable and stages(setting)[0].bias is not None:
            raise NotImplementedError(f"{name}: biases are not available for torch modules yet")
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
def inserted(model: torch.nn.Module) -> Iterator[dict[str, Setting]]:
    """Quantizers wherever they can be, whose settings are given as they are before any rule; all as before if the body raises."""
    with _all_or_nothing(model):
        for module in list(model.modules()):
            insert(module)
        yield {slot.name: default_setting(slot) for slot in slots_of(model)}


@contextmanager
def _all_or_nothing(model: torch.nn.Module) -> Iterator[None]:
    """Put modules, settings and what was found back if the body raises, Ctrl-C included."""
    settings = getattr(model, SETTINGS, None)
    before = {name: copy.deepcopy(quantizer) for name, quantizer in quantizers_of(model).items()}
    try:
        yield
    except BaseException:
        for name, module in list(model.named_modules()):
            if not is_inserted(module):
                continue
            old = {role: before.get(f"{name}.{role}_quantizer".lstrip(".")) for role in roles_of(module)}
            if None in old.values():
                remove(module)
                continue
            for role, quantizer in old.items():
                setattr(module, f"{role}_quantizer", quantizer)
        if settings is None:
            vars(model).pop(SETTINGS, None)
        else:
            setattr(model, SETTINGS, settings)
        raise


# Max calibration -----------------------------------------------------------------------------------------------------------------

def _calibrate_max(model: torch.nn.Module, forward_loop: Callable[..., Any] | None) -> None:
    """Weights' maxima from the weights; activations' from what passes while nothing is rounded."""
    _find_weight_amax(model)
    looking = {name: quantizer for name, quantizer in quantizers_of(model).items()
               if quantizer.is_enabled and quantizer.needs_calibration and not name.endswith("weight_quantizer")}
    if not looking:
        return
    if forward_loop is None:
        raise ValueError("this config quantizes activations: calibration data are needed: give a forward_loop")
    with _only_looking(quantizers_of(model), looking.values()), torch.no_grad():
        forward_loop(model)
    idle = [name for name, quantizer in looking.items() if quantizer.compute_amax() is None]
    for name, quantizer in looking.items():
        if name not in idle:
            quantizer.load_calib_amax()
    if len(idle) == len(looking):
        raise ValueError("forward_loop ran nothing through the model: no quantizer saw an array")
    if idle:
        warnings.warn(f"no data reached {', '.join(idle[:4])}{', ...' if len(idle) > 4 else ''}: they stay off", UserWarning, stacklevel=5)
        for name in idle:
            looking[name].disable()


def _find_weight_amax(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(module, QuantizedModule) and quantizer.is_enabled and quantizer.needs_calibration:
            weight = module._parameters["weight"]
            if weight.device.type != "cpu":
                raise ValueError(f"{name}.weight is on device {weight.device}: modelq quantizes torch models on the CPU: move it with "
                                 ".to('cpu')")
            quantizer.reset_calibrator()
            quantizer.collect(weight)
            quantizer.load_calib_amax()
            quantizer.reset_calibrator()


@contextmanager
def _only_looking(quantizers: Mapping[str, Any], looking: Collection[Any]) -> Iterator[None]:
    """Within it nothing is rounded, and these take note."""
    for quantizer in looking:
        quantizer.reset_calibrator()
        quantizer.enable_calib()
    try:
        with rounding(quantizers, activations=False):
            yield
    finally:
        for quantizer in looking:
            quantizer.disable_calib()


@contextmanager
def rounding(quantizers: Mapping[str, Any], activations: bool) -> Iterator[None]:
    """Within it weights are not rounded, activations if so wished."""
    before = {name: quantizer.rounds for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        quantizer.rounds = activations and not name.endswith("weight_quantizer")
    try:
        yield
    finally:
        for name, quantizer in quantizers.items():
            quantizer.rounds = before[name]


