"""The maxima of weights, as their quantizers group them."""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.experts import joined_amax, place_of
from modelq.groups import siblings
from modelq.quantizers import has_static_levels, needs_amax, stage_quantizers, weight_amax
from modelq.smoothing import as_loaded, check_finite, own_scale, own_weight, set_scale, set_weight_amax, stated_scale
from modelq.streaming import Part, is_smoothed

if TYPE_CHECKING:
    from modelq.model import Model
    from modelq.rules import Setting


def quantized_weights(model: Model, part: Part) -> Iterator[tuple[str, Setting, list[dict[str, Any]]]]:
    """(name, setting, modules) of every enabled weight quantizer of a part; several modules where they share it (gate and up of an
    expert)."""
    sharing: dict[str, list[dict[str, Any]]] = {}
    for module in part.modules:
        sharing.setdefault(place_of(model, f"{module['name']}.weight_quantizer").name, []).append(module)
    for name, members in sharing.items():
        setting = model.settings.get(name)
        if setting is not None and setting.enable:
            yield name, setting, members


def freeze_scales(model: Any, part: Part, rows: Sequence[dict[str, Any]]) -> None:
    """Give smoothed siblings the scale that an export will state for all of them, so that what is found for their weights now is what
    is written. (A model loaded as float32, and torch models, follow the reference, which searches first and averages at export.)"""
    if model.float32_weights or model.own_scales:
        return
    scales = {row["name"]: stated_scale(model, row) for row in rows}
    for row in rows:
        scale = scales[row["name"]]
        if scale is not None and not np.array_equal(scale, own_scale(model, row["name"])):
            set_scale(model, row, scale)
            set_weight_amax(model, row, tensor_of(model, row, part))


def find_weight_amax(model: Model, part: Part, but: Iterable[str] = ()) -> None:
    """The amax of every weight quantizer of these modules that needs one, but for those of the modules named in `but`."""
    found_now, left_out = [], set(but)
    for name, setting, members in quantized_weights(model, part):
        kept = getattr(model, "kept_blocks", {})
        if needs_amax(setting) and members[0]["name"] not in kept and not left_out.intersection(module["name"] for module in members):
            found = [_amax_of(model, setting, module, part) for module in members]
            take_amax(model, name, [joined_amax(parts) for parts in zip(*found)])
            found_now.append(name)
    share_global_amax(model, part.modules, found_now)


def share_global_amax(model: Model, modules: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Static blocks of siblings are scaled below one maximum from the start: a search for their scales needs to know it."""
    for rows in siblings(module for module in modules if module["kind"] == "linear"):
        places = [place_of(model, f"{row['name']}.weight_quantizer").name for row in rows]
        found = [stage_quantizers(model.quantizers[name])[0] for name in dict.fromkeys(places) if name in names]
        levels = [quantizer for quantizer in found if has_static_levels(quantizer)]
        for quantizer in levels:
            quantizer.global_amax = max(other.amax.max(initial=0) for other in levels)


def tensor_of(model: Model, module: dict[str, Any], part: Part) -> np.ndarray:
    """A module's weight as its quantizer is to see it: as loaded, smoothed by its own scale."""
    name = module["weight"]
    tensor = model.checkpoint.read(name) if is_smoothed(model, module) else part.tensors[name]      # the part's is smoothed already
    return own_weight(model, module, as_loaded(model, tensor))


def _amax_of(model: Model, setting: Setting, module: dict[str, Any], part: Part) -> Sequence[np.ndarray | None]:
    found = weight_amax(setting, tensor_of(model, module, part))
    if not all(amax is None or np.isfinite(amax).all() for amax in found):
        where = model.checkpoint.tensors[module["weight"]].file or model.checkpoint.path
        raise ValueError(f"{module['weight']} in {where}: NaN or infinity among its values: the checkpoint is damaged, or leave it "
                         f"out with {{'quantizer_name': '{module['name']}.*', 'enable': False}}")
    return found


def take_amax(model: Model, name: str, found: Sequence[np.ndarray | None]) -> None:
    """The amax of each stage of a quantizer."""
    for stage, amax in zip(stage_quantizers(model.quantizers[name]), found):
        if amax is None:
            continue
        check_finite(name, amax)
        if not np.any(amax):
            warnings.warn(f"{name}: amax is zero: nothing but zeros was seen", stacklevel=2)
        stage.amax = amax
