"""The weights of the part of a model that comes next, sent to a device while another part is computed there.

What comes ahead saves reading and sending, and decides nothing: a part is read again when its turn has come, and the runtime takes what
was sent only where it is given the same memory again. Weights that are made anew at every reading are not worth sending.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from modelq.model import Model


def ahead_of(model: Model, layer: int | None, expert: int | None, parts: bool) -> Callable[[], None] | None:
    """What `Run.layer` and `Run.expert` are to call while they wait: it has the weights of a layer, or of one of its experts, come. None:
    nothing comes, or there is no device. parts: packed weights will be loaded by their parts, as `streaming.read_stored` reads them."""
    if layer is None or model.runtime.device is None:
        return None
    return lambda: _begin(model, layer, expert, parts)


def _begin(model: Model, layer: int, expert: int | None, parts: bool) -> None:
    from modelq import streaming

    forget_arrays(model)
    tensors: dict[str, Any] = {}
    for module in model.modules_of(layer, expert):
        if module["kind"] != "linear":
            continue
        found = _for_products(model, module) if parts else None
        if found is None and streaming.is_read_as_stored(model, module):
            found = _kept(model, module["weight"])
        if found is not None:
            tensors[module["weight"]] = found
            if module["bias"] is not None:
                tensors[module["bias"]] = _kept(model, module["bias"])
    if not tensors or not model.runtime.begin_ahead(layer, expert, tensors):
        forget_arrays(model)


def _for_products(model: Model, module: dict[str, Any]) -> Any:
    """A weight as `streaming.read_for_products` gives it, if what is sent is the checkpoint's memory, or what `compress` holds."""
    from modelq import streaming

    name, weight = module["name"], module["weight"]
    packed = model.packed.get(name) or getattr(model.checkpoint, "layers", {}).get(name)
    if packed is not None and packed.form.fp8_stage:
        return None
    if streaming.is_quantized_there(model, module) and name not in model.kept_blocks:
        raw = _kept(model, weight)
        found = streaming.unquantized(model, module, raw)
        return found if found is not None and found[0] is raw else None
    return streaming.stored(model, module)


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


def forget_ahead(model: Model) -> None:
    """After an error: nothing is on its way."""
    forget_arrays(model)
    model.runtime.forget_ahead()
