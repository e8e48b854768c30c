"""quantize, calibrate and the calls that set quantizers by name."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from modelq.algorithms import split_rotation
from modelq.calibration import calibrate as run_calibration
from modelq.calibration import runnable_steps
from modelq.changed import ChangedCheckpoint
from modelq.compression import repack
from modelq.config import QuantizeConfig, QuantizerAttributeConfig, QuantizerCfgEntry, normalize_quant_cfg_list
from modelq.model import Model
from modelq.quantizers import block_extents, found_values, make_quantizer, set_found_values
from modelq.rotation import RotatedCheckpoint
from modelq.rules import Setting, apply_rules, changed_settings, default_setting, describe_rule, stages, warn_idle
from modelq.supported import check_settings, warn_partial_blocks
from modelq.torch_models import is_torch_model
from modelq.undoing import all_or_nothing
from modelq.weights_only import fitting, warn_misfits

__all__ = ["calibrate", "disable_quantizer", "enable_quantizer", "quantize", "register", "set_quantizer_attributes_full",
           "set_quantizer_attributes_partial", "set_quantizer_by_cfg", "set_quantizer_by_cfg_context", "unregister"]

Pattern = str | Callable[[str], bool]


def quantize(model: Model, config: Any, forward_loop: Callable[..., Any] | None = None, *, checkpoint_dir: Any = None,
             compat: str | None = None) -> Model:
    """Quantize a model in place and return it: from then on it computes with fake-quantized weights and activations.

    config: a preset such as FP8_DEFAULT_CFG or a dictionary like it. forward_loop(model) calls the model on calibration data
    (input_ids as NumPy arrays, lists or any DLPack integer array); weight-only configs need none.
    A model that is quantized already is quantized anew, from its original weights; one opened from a quantized checkpoint from what its
    weights dequantize to (MXFP4 becomes NVFP4 without loss). If anything raises, it is left as it was.
    checkpoint_dir: a folder where progress is kept layer by layer, so that the same call goes on where an interrupted one was, with the
    same result. compat "modelopt": padding and short batches weigh as they do there, experts are searched only where they are there.

    ValueError: a config with a mistake, or one that quantizes nothing; a block size that does not divide a layer's width; no
    calibration data; NaN or infinity in weights or activations. UserWarning: a pattern that fits no quantizer.
    """
    if is_torch_model(model):
        return _for_torch().quantize(model, config, forward_loop, compat, checkpoint_dir)
    check_model(model)
    parsed = QuantizeConfig.parse(config)
    rotation, steps = split_rotation(parsed.algorithm)
    runnable_steps(steps)
    with all_or_nothing(model):
        take_original(model, rotation)
        settings, quantizers, idle = planned_quantizers(model, parsed)
        warn_idle(idle, stacklevel=2)
        warn_partial_blocks(settings.values(), model.head_dim)
        warn_misfits(settings.values())
        model.settings, model.quantizers, model.quantized = settings, quantizers, True
        model.packed, model.low_rank, model.search_losses, model.kept_blocks = {}, {}, {}, {}
        run_calibration(model, steps, forward_loop, checkpoint_dir, compat)
    return model


def take_original(model: Model, rotation: Mapping[str, Any] | None) -> None:
    """Go back to the weights as they were loaded (dequantized, if they are stored quantized), rotated if so wished."""
    while isinstance(model.checkpoint, ChangedCheckpoint):
        model.checkpoint = model.checkpoint.original
    if isinstance(model.checkpoint, RotatedCheckpoint):
        model.take(model.checkpoint.original, model.runtime.compute)
    if stored := next(iter(model.stored_layers.values()), None):
        warnings.warn(f"{model.checkpoint.path}: its weights are stored quantized ({stored.algorithm}): what they stand for is quantized "
                      "anew, and rounded once more", UserWarning, stacklevel=3)
        model.take(model.checkpoint.as_source(), model.runtime.compute)
    if rotation is not None:
        model.take(RotatedCheckpoint(model, rotation["seed"], rotation["residual"], rotation["values"]), model.runtime.compute)


def as_original(model: Model) -> Model:
    """The model, or if it was opened from a quantized checkpoint a copy that is not quantized, of what its weights stand for."""
    if not model.stored_layers:
        return model
    made = copy.copy(model)
    made.take(model.checkpoint.as_source(), model.runtime.compute)
    return made


def check_source(model: Model) -> None:
    """ValueError if the weights were quantized before, other than as models are published."""
    if model.stored_layers:
        raise ValueError(f"{model.checkpoint.path}: its weights are stored quantized already: load and quantize the original checkpoint")


def planned_quantizers(model: Model, parsed: QuantizeConfig) -> tuple[dict[str, Setting], dict[str, Any], list[QuantizerCfgEntry]]:
    """(settings and uncalibrated quantizers by name, the rules that fit nothing); whatever can be refused before any work is refused."""
    settings, idle = apply_rules({name: default_setting(slot) for name, slot in model.slots.items()}, parsed.quant_cfg)
    if model.weights_only:
        settings = fitting(settings)
    _refuse_nothing(settings, parsed.quant_cfg, idle)
    check_settings(settings.values(), model.head_dim)
    return settings, {name: make_quantizer(setting) for name, setting in settings.items()}, idle


def calibrate(model: Model, algorithm: Any = "max", forward_loop: Callable[..., Any] | None = None, *, checkpoint_dir: Any = None,
              compat: str | None = None) -> Model:
    """Find anew the amax of every enabled quantizer of a quantized model; returns the model.

    algorithm: as in a config ("max", {"method": "mse"}, a list of steps). forward_loop, checkpoint_dir, compat, and what is raised: as for
    `quantize`. If anything raises, the model is left as it was. ValueError also if the model is not quantized.
    """
    if is_torch_model(model):
        return _for_torch().calibrate(model, algorithm, forward_loop, compat, checkpoint_dir)
    check_model(model, quantized=True)
    with all_or_nothing(model):
        run_calibration(model, algorithm, forward_loop, checkpoint_dir, compat, finish=repack)
    return model


def disable_quantizer(model: Model, wildcard_or_filter_func: Pattern) -> None:
    """Switch off quantizers. wildcard_or_filter_func: a pattern ("*lm_head*") that their full name fits, or a function of that name. Their
    amax stays. ValueError: the model is not quantized."""
    set_quantizer_attributes_partial(model, wildcard_or_filter_func, {"enable": False})


def enable_quantizer(model: Model, wildcard_or_filter_func: Pattern) -> None:
    """Switch on the quantizers that wildcard_or_filter_func fits, as in `disable_quantizer`."""
    set_quantizer_attributes_partial(model, wildcard_or_filter_func, {"enable": True})


def set_quantizer_by_cfg(model: Model, quant_cfg: Any) -> None:
    """Apply the rules quant_cfg (either spelling) to the quantizers of a quantized model, in order, without calibrating.

    A quantizer that gets new attributes keeps its amax where that has the same meaning (one per tensor, per channel, per block).
    """
    if is_torch_model(model):
        return _for_torch().set_quantizer_by_cfg(model, quant_cfg)
    check_model(model, quantized=True)
    settings, idle = apply_rules(model.settings, normalize_quant_cfg_list(quant_cfg))
    _change(model, settings)
    warn_idle(idle, stacklevel=2)


@contextmanager
def set_quantizer_by_cfg_context(model: Model, quant_cfg: Any) -> Iterator[None]:
    """Within it the rules quant_cfg hold; afterwards every quantizer is as before, but for an amax found meanwhile. ValueError: a rule
    with several quantizers in a row, or a model that is not quantized."""
    rules = normalize_quant_cfg_list(quant_cfg)
    if any(isinstance(rule.cfg, tuple) for rule in rules):
        raise ValueError("set_quantizer_by_cfg_context: a list of attributes (quantizers one after the other) is not allowed here")
    if is_torch_model(model):
        with _for_torch().settings_within(model, rules):
            yield
        return
    check_model(model, quantized=True)
    before = dict(model.settings)
    try:
        set_quantizer_by_cfg(model, rules)
        yield
    finally:
        _change(model, before)


def set_quantizer_attributes_full(model: Model, wildcard_or_filter_func: Pattern, attributes: Any,
                                  parent_class: str | None = None) -> None:
    """Give quantizers exactly these attributes; what is not named goes back to its default.

    wildcard_or_filter_func: which, as in `disable_quantizer`; parent_class: of them, only those in modules of that class ("nn.Linear").
    ValueError: impossible attributes, a model that is not quantized.
    """
    if isinstance(attributes, (list, tuple)):
        attributes = tuple(QuantizerAttributeConfig.parse(a) for a in attributes)
        enable = all(a.enable for a in attributes)
    else:
        attributes = QuantizerAttributeConfig.parse(attributes)
        enable = attributes.enable
    _set(model, wildcard_or_filter_func, parent_class, lambda s, rule: replace(s, attributes=attributes, enable=enable, rule=rule))


def set_quantizer_attributes_partial(model: Model, wildcard_or_filter_func: Pattern, partial_attributes: Mapping[str, Any],
                                     parent_class: str | None = None) -> None:
    """Change only the attributes named in partial_attributes ("enable" among them).

    wildcard_or_filter_func, parent_class, ValueError: as in `set_quantizer_attributes_full`.
    """
    given = dict(partial_attributes)
    enable = given.pop("enable", None)

    def change(setting: Setting, rule: QuantizerCfgEntry) -> Setting:
        merged = tuple(QuantizerAttributeConfig.parse({**a.to_dict(), **given}) if given else a for a in stages(setting))
        attributes = merged if isinstance(setting.attributes, tuple) else merged[0]
        return replace(setting, attributes=attributes, enable=setting.enable if enable is None else enable, rule=rule)
    _set(model, wildcard_or_filter_func, parent_class, change)


def register(original_cls: type, quantized_cls: type) -> None:
    """Let torch modules of original_cls be quantized by quantized_cls, a subclass of it or a mix-in: `_setup(self)` makes its quantizers
    (modelq.nn.TensorQuantizer) as attributes, and forward calls them. `weight_quantizer` is for the parameter `weight`; others see what
    passes. TypeError: not classes of that kind."""
    from modelq.torch_models.modules import register as register_class

    register_class(original_cls, quantized_cls)


def unregister(original_cls: type) -> None:
    """Undo `register` of original_cls. KeyError: the class is not registered."""
    from modelq.torch_models.modules import unregister as unregister_class

    unregister_class(original_cls)


# Parts ---------------------------------------------------------------------------------------------------------------------

def _for_torch() -> Any:
    """The same calls for torch modules."""
    from modelq.torch_models import quantize as module

    return module


def check_model(model: Any, quantized: bool = False) -> None:
    """TypeError: no model that modelq knows; ValueError: one that is not quantized, where it must be."""
    if not isinstance(model, Model):
        raise TypeError(f"expected a model from modelq.load or a torch.nn.Module, got {type(model).__name__}")
    if quantized and not model.quantized:
        raise ValueError("the model is not quantized yet: call quantize first")


def _refuse_nothing(settings: Mapping[str, Setting], rules: Iterable[QuantizerCfgEntry], idle: list[QuantizerCfgEntry]) -> None:
    enabled = [setting.slot.role for setting in settings.values() if setting.enable]
    last = {rule.quantizer_name: rule.enable for rule in rules}
    for_weights = [name for name in last if "weight_quantizer" in name or fnmatchcase("weight_quantizer", name)]
    if enabled and ("weight" in enabled or not any(last[name] for name in for_weights)):
        return
    hint = f"; these patterns fit nothing: {', '.join(describe_rule(r) for r in idle if r.enable)}" if any(r.enable for r in idle) else ""
    misfits = [f"{setting.slot.module}: {setting.why}" for setting in settings.values() if setting.why]
    hint += f"; {misfits[0]}" if misfits else ""
    what = "no weight" if enabled else "nothing"
    raise ValueError(f"this config quantizes {what} in this model{hint}; a quantizer is named like {next(iter(settings), '(none)')!r}, and "
                     "later rules win")


def _set(model: Model, pattern: Pattern, parent_class: str | None, change: Callable[[Setting, QuantizerCfgEntry], Setting]) -> None:
    if is_torch_model(model):
        return _for_torch().set_attributes(model, pattern, parent_class, change)
    check_model(model, quantized=True)
    _change(model, changed_settings(model.settings, pattern, parent_class, change))


def _change(model: Model, settings: dict[str, Setting]) -> None:
    """Take over settings, remaking only the quantizers that they change."""
    check_settings(settings.values(), model.head_dim)
    quantizers = {}
    for name, setting in settings.items():
        quantizers[name] = model.quantizers[name]
        if setting.attributes != model.settings[name].attributes or setting.enable != model.settings[name].enable:
            quantizers[name] = make_quantizer(setting)
            if quantizers[name].amax is None and _grain(setting) == _grain(model.settings[name]):
                set_found_values(quantizers[name], found_values(model.quantizers[name]))
    with all_or_nothing(model):
        model.settings, model.quantizers = settings, quantizers
        repack(model)
        model.connect()


def _grain(setting: Setting) -> Any:
    """What an amax belongs to: the tensor, an axis, or static blocks of some size."""
    attributes = stages(setting)[0]
    static = (attributes.block_sizes or {}).get("type") != "dynamic"
    return attributes.axis, block_extents(attributes) if static else {}, attributes.bias, attributes.rotate
