"""The weights of the part of a model that comes next, sent to a device while another part is computed there.

What comes ahead saves reading, making and sending, and decides nothing: a part is read again when its turn has come, and the runtime takes
what was sent only where it is given the same memory again. Weights that are made anew at every reading (smoothed, of several quantizers in
a row, of models loaded as float32) are made one by one while the host would wait, and held until their turn; they are taken then if
nothing that they depend on has changed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelq.experts import quantizer_of
from modelq.quantizers import stage_quantizers
from modelq.smoothing import folds_all, is_restated, norm_scales, own_scale

if TYPE_CHECKING:
    from modelq.model import Model


class Made(NamedTuple):
    """What was made of a part's tensors, as `streaming.read_part` gives them, and what they depend on. tensors None: it was of no use."""
    part: tuple[int, int | None, bool]
    state: list[Any]
    tensors: dict[str, Any] | None


def ahead_of(model: Model, layer: int | None, expert: int | None, parts: bool) -> Callable[[], bool] | None:
    """What `Run.layer` and `Run.expert` are to call while they wait: it has the weights of a layer, or of one of its experts, come. None:
    nothing comes, or there is no device. parts: packed weights will be loaded by their parts, as `streaming.read_stored` reads them."""
    if layer is None or model.runtime.device is None:
        return None
    begun: list[Iterator[bool]] = []

    def go_on() -> bool:
        if not begun:
            begun.append(_begin(model, layer, expert, parts) or iter(()))
        return next(begun[0], False)
    return go_on


def _begin(model: Model, layer: int, expert: int | None, parts: bool) -> Iterator[bool] | None:
    """Has those come that are in memory; then each `next` makes another, and says whether there are more. None: there is no room."""
    forget_arrays(model)
    tensors: dict[str, Any] = {}
    others: list[dict[str, Any]] = []
    modules = model.modules_of(layer, expert)
    changed = {} if model.float32_weights else norm_scales(model, modules)
    for module in modules:
        if module["kind"] != "linear":
            continue
        found = _as_held(model, module, parts) if module["bias"] not in changed else None
        if found is None:
            others.append(module)
            continue
        tensors[module["weight"]] = found
        if module["bias"] is not None:
            tensors[module["bias"]] = _kept(model, module["bias"])
    if not model.runtime.begin_ahead(layer, expert, tensors):
        forget_arrays(model)
        return None
    return _make(model, (layer, expert, parts), tensors, others)


def _make(model: Model, part: tuple[int, int | None, bool], tensors: dict[str, Any], others: list[dict[str, Any]]) -> Iterator[bool]:
    from modelq import streaming

    layer, expert, parts = part
    if not others or (model.made_ahead is not None and model.made_ahead.tensors is None):
        return
    yield True
    made: dict[str, Any] = {}
    model.made_ahead = Made(part, _state_of(model, layer, expert), made)
    reader = streaming.read_for_products if parts else streaming.read
    for module in others:
        names = [name for name in (module["weight"], module["bias"]) if name is not None]
        try:
            found = reader(model, names, model.modules_of(layer, expert))
        except (ValueError, RuntimeError, MemoryError):      # if there still is something wrong when its turn comes, it is said then
            return
        for array in found.values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        made.update(found)
        tensors.update(found)
        if not model.runtime.begin_ahead(layer, expert, tensors):
            return
        yield module is not others[-1]


def take_made(model: Model, layer: int, expert: int | None, parts: bool) -> dict[str, Any]:
    """What was made ahead of that part's tensors, which is held no longer. Where it is not what would be made now, no more is made ahead in
    this run: calibration changes each layer when its turn comes."""
    made = model.made_ahead
    if made is None or made.tensors is None or made.part != (layer, expert, parts):
        return {}
    state = _state_of(model, layer, expert)
    is_same = len(state) == len(made.state) and all(one is other or (isinstance(one, int) and one == other)
                                                    for one, other in zip(state, made.state))
    model.made_ahead = None if is_same else made._replace(tensors=None)
    return made.tensors if is_same else {}


def _state_of(model: Model, layer: int, expert: int | None) -> list[Any]:
    """All that the weights of a part are made of, but for the files: objects and numbers. Siblings share scales, linears take up scales of
    those behind them, and stacked experts have one range: so it is the state of the whole layer."""
    modules = [*model.modules_of(layer), *(model.modules_of(layer, expert) if expert is not None else ())]
    changed = getattr(model.checkpoint, "changed", {})
    found: list[Any] = [model, model.checkpoint, model.simulate, model.float32_weights, model.own_scales, folds_all(model)]
    for module in modules:
        found += [changed.get(module["weight"]), *(held.get(module["name"]) for held in (model.packed, model.low_rank, model.kept_blocks))]
    for name in model.slots_of(layer):
        found.append(model.settings[name])
        quantizer = model.quantizers.get(name)
        for stage in stage_quantizers(quantizer) if quantizer is not None else ():
            found += [stage, stage.changes]
    return found


def _as_held(model: Model, module: dict[str, Any], parts: bool) -> Any:
    """A weight that need not be made: the checkpoint's memory, or what `compress` holds. None: it must be."""
    from modelq import streaming

    found = _for_products(model, module) if parts else None
    return _kept(model, module["weight"]) if found is None and streaming.is_read_as_stored(model, module) else found


def _for_products(model: Model, module: dict[str, Any]) -> Any:
    """A weight as `streaming.read_for_products` gives it, if what is sent is the checkpoint's memory, or what `compress` holds."""
    from modelq import streaming

    name, weight = module["name"], module["weight"]
    packed = model.packed.get(name) or getattr(model.checkpoint, "layers", {}).get(name)
    if packed is not None and packed.form.fp8_stage:
        return None
    if streaming.is_quantized_there(model, module) and name not in model.kept_blocks:
        if _is_changed(model, module):
            return None
        raw = _kept(model, weight)
        found = streaming.unquantized(model, module, raw)
        return found if found is not None and found[0] is raw else None
    return streaming.stored(model, module)


def _is_changed(model: Model, module: dict[str, Any]) -> bool:
    """Whether something happens to a weight before its last quantizer."""
    quantizer = quantizer_of(model, f"{module['name']}.weight_quantizer")
    if quantizer is not None and (len(stage_quantizers(quantizer)) > 1 or quantizer.pre_quant_scale is not None):
        return True
    return own_scale(model, module["name"]) is not None or module["name"] in model.low_rank or is_restated(model, module)


def _kept(model: Model, name: str) -> np.ndarray:
    """A tensor of the checkpoint. Where it was decoded rather than mapped, it is kept for the next reading, and nobody may write to it."""
    array: np.ndarray = model.checkpoint.read(name)
    if array.flags.writeable:
        array.flags.writeable = False
        model.read_ahead[name] = _origin(model, name), array
    return array


def take_read(model: Model, name: str) -> np.ndarray | None:
    """A tensor that was read ahead and is kept; it is kept no longer. None: there is none."""
    origin, array = getattr(model, "read_ahead", {}).pop(name, (None, None))
    return array if origin is not None and all(one is other for one, other in zip(origin, _origin(model, name))) else None


def _origin(model: Model, name: str) -> tuple[Any, Any]:
    """A checkpoint, and what stands in the place of its tensor (GPTQ)."""
    return model.checkpoint, getattr(model.checkpoint, "changed", {}).get(name)


def forget_arrays(model: Model) -> None:
    model.read_ahead.clear()
    if model.made_ahead is not None and model.made_ahead.tensors is not None:
        model.made_ahead = None


def forget_ahead(model: Model) -> None:
    """After an error: nothing is on its way."""
    forget_arrays(model)
    model.runtime.forget_ahead()
