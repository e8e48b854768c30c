"""Calibration: from data to the amax of every quantizer that needs one, one layer at a time.

Weights are looked at as they come from the checkpoint; activations as the unquantized model makes them, as in Model Optimizer's
"max" (maximum calibration: Wu et al. 2020, "Integer quantization for deep learning inference", section 3.3). A layer after the last
one whose activations are wanted is not computed, nor is lm_head.
"""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core, streaming
from modelq.algorithms import normalize_algorithm
from modelq.experts import PARENT, joined_amax, place_of
from modelq.inputs import Batch
from modelq.progress import progress
from modelq.groups import siblings
from modelq.quantizers import calibrator_of, found_values, has_static_levels, needs_amax, set_found_values, stage_quantizers, weight_amax
from modelq.rules import Setting, Slot
from modelq.smoothing import as_loaded, own_weight

if TYPE_CHECKING:
    from modelq.model import Model


def calibrate(model: Model, algorithm: Any = "max", forward_loop: Callable[..., Any] | None = None) -> Model:
    """Find the amax of every enabled quantizer of the model, by the steps that `algorithm` names (see `modelq.algorithms`).

    forward_loop(model) calls the model with calibration batches; the calls are recorded, and the layers then run one after the
    other over all of them. ValueError if activations need data and none came, or if NaN or infinity shows up. The quantizers'
    earlier amax values come back if anything raises.
    """
    steps = runnable_steps(algorithm)
    model.settle()
    before = {name: found_values(quantizer) for name, quantizer in model.quantizers.items()}
    try:
        with model.unquantized():
            batches = _record(model, forward_loop) if steps and _activation_slots(model) else []
            for step in steps:
                STEPS[step["method"]](model, batches, step)
    except BaseException:
        for name, values in before.items():
            set_found_values(model.quantizers[name], values)
        raise
    finally:
        model.connect()
    return model


def runnable_steps(algorithm: Any) -> list[dict[str, Any]]:
    """The steps of an algorithm, all of which this version can run: else NotImplementedError, before any work."""
    steps = normalize_algorithm(algorithm)
    for step in steps:
        if step["method"] not in STEPS:
            raise NotImplementedError(f"calibration method {step['method']!r} is not available yet: available: {', '.join(STEPS)}")
    return steps


# Max -------------------------------------------------------------------------------------------------------------------------

def _calibrate_max(model: Model, batches: Sequence[Batch], step: dict[str, Any]) -> None:
    """The largest magnitude seen, of every weight and of every activation that needs it."""
    slots = _activation_slots(model)
    model.unseen_experts = {}
    wants_head = any(slot.layer < 0 and slot.parent == "nn.Linear" for slot in slots)
    last = model.num_layers - 1 if wants_head else max((slot.layer for slot in slots), default=-1)
    run = streaming.start(model, batches) if slots else None
    for modules in (model.embedding_modules, model.head_modules):
        _weights(model, modules)
    for layer in progress(range(model.num_layers), "calibrate"):
        if run is not None and layer <= last:
            with _collecting(model, [slot for slot in slots if slot.layer == layer]):
                tokens = streaming.run_layer(model, run, layer, look=partial(_weights, model))
            _note_unseen(model, layer, tokens)
        else:
            for names, modules in streaming.parts(model, layer):
                _weights(model, modules)
                model.checkpoint.release(names)
    if run is not None and wants_head:
        with _collecting(model, [slot for slot in slots if slot.layer < 0]):
            run.finish(streaming.head_tensors(model))
    _warn_unseen(model)


@contextmanager
def _collecting(model: Model, slots: Sequence[Slot]) -> Iterator[None]:
    """Within it statistics are collected at these places; afterwards their quantizers know what was found."""
    calibrators = {slot.name: _core.Calibrator(calibrator_of(model.settings[slot.name])) for slot in slots}
    try:
        for name, calibrator in calibrators.items():
            model.runtime.set_calibrator(name, calibrator)
        yield
    finally:
        for name in calibrators:
            model.runtime.set_calibrator(name, None)
    for name, calibrator in calibrators.items():
        if calibrator.kind != "max":
            model.quantizers[name].bias = calibrator.compute_bias()
        _take(model, name, [_seen(name, calibrator)])


def _weights(model: Model, modules: Sequence[dict[str, Any]], tensors: dict[str, np.ndarray] | None = None) -> None:
    """The amax of every weight quantizer of these modules that needs one. tensors: what was read already."""
    sharing: dict[str, list[dict[str, Any]]] = {}
    found_now: list[str] = []
    for module in modules:
        sharing.setdefault(place_of(model, f"{module['name']}.weight_quantizer").name, []).append(module)
    for name, members in sharing.items():
        setting = model.settings.get(name)
        if setting is not None and setting.enable and needs_amax(setting):
            found = [_weight(model, setting, module, tensors) for module in members]
            _take(model, name, [joined_amax(parts) for parts in zip(*found)])
            found_now.append(name)
    _share_global_amax(model, modules, found_now)


def _share_global_amax(model: Model, modules: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Static blocks of siblings are scaled below one maximum from the start: a search for their scales needs to know it."""
    for rows in siblings(module for module in modules if module["kind"] == "linear"):
        places = [place_of(model, f"{row['name']}.weight_quantizer").name for row in rows]
        found = [stage_quantizers(model.quantizers[name])[0] for name in dict.fromkeys(places) if name in names]
        levels = [quantizer for quantizer in found if has_static_levels(quantizer)]
        for quantizer in levels:
            quantizer.global_amax = max(other.amax.max(initial=0) for other in levels)


def _weight(model: Model, setting: Setting, module: dict[str, Any], tensors: dict[str, np.ndarray] | None) -> Sequence[np.ndarray | None]:
    tensor = tensors[module["weight"]] if tensors is not None else model.checkpoint.read(module["weight"])
    found = weight_amax(setting, own_weight(model, module, as_loaded(model, tensor)))
    if not all(amax is None or np.isfinite(amax).all() for amax in found):
        where = model.checkpoint.tensors[module["weight"]].file or model.checkpoint.path
        raise ValueError(f"{module['weight']} in {where}: NaN or infinity among its values: the checkpoint is damaged, or leave it "
                         f"out with {{'quantizer_name': '{module['name']}.*', 'enable': False}}")
    return found


def _note_unseen(model: Model, layer: int, tokens: np.ndarray | None) -> None:
    """Remember which experts of a layer no token reached, if they are quantized."""
    if tokens is None or not any(slot.parent == PARENT and slot.layer == layer and model.settings[name].enable
                                 for name, slot in model.slots.items()):
        return
    unseen = np.flatnonzero(tokens[:, 1] == 0).tolist()
    if unseen:
        model.unseen_experts[layer] = unseen


def _warn_unseen(model: Model) -> None:
    if model.unseen_experts:
        layers = list(model.unseen_experts.items())
        said = "; ".join(f"layer {layer}: {len(unseen)} of {model.runtime.experts(layer)}" for layer, unseen in layers[:8])
        warnings.warn(f"experts that saw no token ({said}{'; ...' if len(layers) > 8 else ''}): they are calibrated from their weights "
                      f"alone; more or longer calibration texts reach more of them (print_quant_summary names them)", stacklevel=3)


def _take(model: Model, name: str, found: Sequence[np.ndarray | None]) -> None:
    """The amax of each stage of a quantizer."""
    for stage, amax in zip(stage_quantizers(model.quantizers[name]), found):
        if amax is None:
            continue
        if not np.any(amax):
            warnings.warn(f"{name}: amax is zero: nothing but zeros was seen", stacklevel=2)
        stage.amax = amax


def _seen(name: str, calibrator: Any) -> np.ndarray:
    try:
        return np.asarray(calibrator.compute_amax(), dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"{name}: NaN or infinity in the activations that reach it: in bfloat16 or float16 a value overflowed, or a "
                         f"weight before it is damaged ({error})") from error


def _activation_slots(model: Model) -> list[Slot]:
    """The places whose statistics calibration must collect."""
    return [model.slots[name] for name, setting in model.settings.items()
            if setting.slot.role != "weight" and setting.enable and needs_amax(setting)]


# Data ------------------------------------------------------------------------------------------------------------------------

def _record(model: Model, forward_loop: Callable[..., Any] | None) -> list[Batch]:
    if forward_loop is None:
        raise ValueError("no calibration data: this config quantizes activations, so quantize() needs a forward_loop(model) that calls "
                         "the model with token ids (see create_forward_loop), or a weight-only config")
    if not callable(forward_loop):
        raise TypeError(f"forward_loop must be a function that takes the model, got {type(forward_loop).__name__}")
    with model.recording() as batches:
        if _takes_no_argument(forward_loop):
            warnings.warn("a forward_loop without arguments is deprecated: let it take the model", DeprecationWarning, stacklevel=4)
            forward_loop()
        else:
            forward_loop(model)
        recorded = list(batches)
    if not recorded:
        raise ValueError("no calibration data: forward_loop ran without calling the model: is its data empty?")
    if not any(batch.mask is None or batch.mask.any() for batch in recorded):
        raise ValueError("no calibration data: attention_mask is 0 for every token")
    return recorded


def _takes_no_argument(function: Callable[..., Any]) -> bool:
    try:
        return not inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


STEPS: dict[str, Callable[[Any, Sequence[Batch], dict[str, Any]], None]] = {"max": _calibrate_max}
