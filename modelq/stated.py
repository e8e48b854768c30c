"""What an export states of its quantizers: shared absolute maxima, and input quantizers with shared scales.

Engines fuse q/k/v and gate/up into one product and take one scale for all (TensorRT-LLM asserts that they are equal). So wherever an
amax is a single number (the second level of NVFP4, a matrix of one FP8 block), siblings take the largest, in the export as in the
simulation. Plain FP8 siblings keep their own, as in the reference.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.compressed import METHOD
from modelq.experts import own_part, place_of, quantizer_of
from modelq.groups import pair_of, siblings
from modelq.quantizers import has_static_levels, make_quantizer, stage_quantizers, weight_amax
from modelq.smoothing import as_loaded, is_restated, is_stored, stated_scale, stated_weight

PLAIN_FP8 = "fp8"
BLOCKS = ".blocks"      # behind the name of a quantizer: the maxima of its blocks, where they are static and have a second level


class StatedAmax(NamedTuple):
    """What a weight is quantized by. block_amax: an array, or what makes it (`maxima`)."""
    amax: np.ndarray | None = None
    block_amax: Any = None
    second_divisor: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Of `_core.quantize`."""
        blocks = self.block_amax.maxima() if hasattr(self.block_amax, "maxima") else self.block_amax
        return {"amax": self.amax, "block_amax": blocks, "second_divisor": self.second_divisor}


class OwnBlocks(NamedTuple):
    """The maxima of one module's blocks, looked up when they are asked for: all of a model's are not to be in memory."""
    model: Any
    module: str

    def maxima(self) -> np.ndarray:
        """float32, as calibration found them."""
        name = f"{self.module}.weight_quantizer"
        amax = _checked(name, own_part(self.model, name, stage_quantizers(quantizer_of(self.model, name))[0].amax))
        note_seen(self.model, amax)
        return amax


def note_seen(model: Any, amax: Any) -> None:
    """Maxima were read that may lie in a file."""
    parking = getattr(model, "parking", None)
    if parking is not None and np.ndim(amax):
        parking.saw(2 * amax.nbytes)


def stated_amax(model: Any, rows: Iterable[dict[str, Any]], share_all: bool = False) -> dict[str, np.ndarray]:
    """Name of the quantizer to float32 amax, for the enabled weight and input quantizers of these modules that have one; the second of
    two quantizers in a row is named "<module>.weight_quantizer.1", the blocks of a static two-level one "<...>.weight_quantizer.blocks".

    Siblings take one maximum where theirs is one number and their weights are not plain FP8; siblings of unlike schemes share
    nothing, nor do gate and up of an expert, which have one quantizer anyway. share_all: plain FP8 siblings share too. ValueError
    names a quantizer whose amax is not finite.
    """
    own = (None,) if share_all else (None, PLAIN_FP8)
    stated: dict[str, np.ndarray] = {}
    for members in siblings(rows):
        for find in (_input_amax, _weight_amax):
            found = {name: (_kind(model, row["name"], name), amax) for row in members for name, amax in find(model, row).items()}
            for name, (kind, amax) in found.items():
                same = [other for other_kind, other in found.values() if other_kind == kind]
                shared = kind[0] not in own and place_of(model, name).parts == 1 and not name.endswith(BLOCKS)
                shared = shared and all(other.size == 1 for other in same)
                stated[name] = np.max([other.reshape(amax.shape) for other in same], axis=0) if shared else amax
    return stated


def stated_weight_amax(model: Any, module: dict[str, Any]) -> list[StatedAmax]:
    """The amax of each stage of one module's weight quantizer as the export would state it."""
    members = [row for row in model.modules_of(module["layer"], module["expert"]) if row["site"] == module["site"]]
    stated, stages = stated_amax(model, members), stage_quantizers(quantizer_of(model, f"{module['name']}.weight_quantizer"))
    return [scaling(model, module["name"], stated, stage) for stage in range(len(stages))]


def own_weight_amax(model: Any, module: dict[str, Any]) -> list[StatedAmax]:
    """The same as calibration found it, nothing shared: what a model loaded as float32 computes with."""
    return [scaling(model, module["name"], _weight_amax(model, module, own=True), stage)
            for stage in range(len(stage_quantizers(quantizer_of(model, f"{module['name']}.weight_quantizer"))))]


def scaling(model: Any, module: str, stated: dict[str, np.ndarray], stage: int = 0) -> StatedAmax:
    """Of one stage of a module's weight quantizer, what `stated_amax` says."""
    name = f"{module}.weight_quantizer"
    quantizer = stage_quantizers(quantizer_of(model, name))[stage]
    amax = stated.get(name if stage == 0 else f"{name}.{stage}")
    return StatedAmax(amax, stated.get(name + BLOCKS), quantizer.second_divisor) if stage == 0 and has_static_levels(quantizer) \
        else StatedAmax(amax)


def stated_input_quantizers(model: Any) -> dict[str, Any]:
    """Input quantizers to take the place of smoothed linears' own: with the siblings' mean scale and largest amax, and without
    the scale where a norm or the linear before takes it up."""
    smoothed = [row for row in model.modules if row["kind"] == "linear" and (row["layer"] >= 0 or row["site"]) and
                getattr(model.quantizers.get(f"{row['name']}.input_quantizer"), "pre_quant_scale", None) is not None]
    stated = stated_amax_of_inputs(model, smoothed)
    found = {}
    for row in smoothed:
        name = f"{row['name']}.input_quantizer"
        found[name] = make_quantizer(model.settings[name])
        found[name].amax = stated.get(name, model.quantizers[name].amax)
        found[name].pre_quant_scale = stated_scale(model, row) if is_stored(model, row) else None
    return found


def stated_amax_of_inputs(model: Any, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    stated = {}
    for members in siblings(rows):
        found = {name: amax for row in members for name, amax in _input_amax(model, row).items()}
        stated |= {name: np.max(list(found.values()), axis=0) for name in found}
    return stated


def _input_amax(model: Any, row: dict[str, Any]) -> dict[str, np.ndarray]:
    name = f"{row['name']}.input_quantizer"
    quantizer = quantizer_of(model, name)
    if quantizer is None or not quantizer.enabled or quantizer.amax is None:
        return {}
    return {name: _checked(name, quantizer.amax)}


def _weight_amax(model: Any, row: dict[str, Any], own: bool = False) -> dict[str, np.ndarray]:
    """By stage. A weight that takes the siblings' mean scale is looked at anew, unless it is its own amax that is asked for."""
    name = f"{row['name']}.weight_quantizer"
    quantizer = quantizer_of(model, name)
    if quantizer is None or not quantizer.enabled:
        return {}
    stages = stage_quantizers(quantizer)
    kept = getattr(model, "kept_blocks", {}).get(row["name"])
    if kept is not None and has_static_levels(stages[0]) and stages[0].amax is None:
        return {name: np.asarray(kept.whole), name + BLOCKS: kept}
    found: list[Any] = [own_part(model, name, stage.amax) for stage in stages]
    found = [of_stack(model, row, stage, amax) for stage, amax in enumerate(found)]
    restated = not own and is_restated(model, row)
    if restated:
        tensor = stated_weight(model, row, as_loaded(model, model.checkpoint.read(row["weight"])))
        found = [new if old is not None else None for old, new in zip(found, weight_amax(model.settings[name], tensor))]
    names = [name] + [f"{name}.{stage}" for stage in range(1, len(found))]
    stated = {name: _checked(name, amax) for name, amax in zip(names, found) if amax is not None}
    if name in stated and has_static_levels(stages[0]) and stages[0].amax.ndim:
        stated[name + BLOCKS] = stated[name] if restated else OwnBlocks(model, row["name"])
        note_seen(model, stages[0].amax)
        whole = None if restated else stages[0].global_amax
        stated[name] = np.float32(stated[name].max(initial=0)) if whole is None else _checked(name, whole)
    return stated


def layout_of_stacks(model: Any) -> str | None:
    """How the experts of a native model's checkpoint are stacked (modelq.checkpoint.stacked), if they are."""
    from modelq.checkpoint.stacked import layout_of
    return None if getattr(model, "runtime", None) is None else layout_of(model.config)


def stacks_of(model: Any) -> str | None:
    """The same if quantized ones too are stacked."""
    from modelq.checkpoint.stacked import ROWS
    layout = layout_of_stacks(model)
    return None if layout == ROWS else layout


def layout_written(model: Any, dialect: str) -> str | None:
    """How an export stacks experts. compressed-tensors quantizes linears alone: where it meets Llama 4, transformers makes a linear of each
    expert's matrices (conversion and quantizers/base.py, SequentialLlama4TextExperts), and vLLM reads their names as well."""
    from modelq.checkpoint.stacked import HALVES
    layout = layout_of_stacks(model)
    return None if (layout, dialect) == (HALVES, METHOD) else layout


def as_divided(model: Any, row: dict[str, Any], weight: np.ndarray) -> np.ndarray:
    """A weight as it meets its scale: the reference divides stacks of experts in float32, and rounds once, other weights in their own
    dtype."""
    return weight.astype(np.float32) if row.get("expert") is not None and stacks_of(model) is not None else weight


def of_stack(model: Any, row: dict[str, Any], stage: int, amax: Any) -> Any:
    """The amax of a stage of a weight's quantizer, or that of all experts: experts in one tensor have one number for all."""
    if amax is None or np.ndim(amax) or row.get("expert") is None or stacks_of(model) is None:
        return amax
    matrix = place_of(model, f"{row['name']}.weight_quantizer").name.rpartition(".")[0]
    return np.max([stage_quantizers(model.quantizers[f"{matrix}.{expert}"])[stage].amax
                   for expert in range(model.runtime.experts(row["layer"]))])


def _checked(name: str, amax: Any) -> np.ndarray:
    amax = np.asarray(amax, dtype=np.float32)
    if not np.isfinite(amax).all():
        raise ValueError(f"{name}: the calibrated amax is not finite; look for inf or nan in the weights or the calibration data")
    return amax


def _kind(model: Any, module: str, name: str) -> tuple[Any, ...]:
    """What an amax must have in common with another to be shared: the scheme of the weight beside it, its own, and its stage."""
    pair, own = pair_of(model, module), name.removeprefix(f"{module}.")
    kind = dialects.input_kind(quantizer_of(model, name)) if own == "input_quantizer" else own
    return (pair.weight if pair is not None else kind), kind
