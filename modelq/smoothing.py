"""Smoothing: the input's columns times a scale, the weight's columns divided by it (AWQ, Lin et al. 2024; SmoothQuant, Xiao et al. 2023).

Two numbers per column, kept on a linear's quantizers: the input's `pre_quant_scale` (rounded to the model's dtype, as it is stored) and
the weight's, which multiplies the original weight's columns and is not rounded. Linears that read one input take the mean of their
scales in an export, since engines fuse them; where a norm makes that input, AWQ's scale is multiplied into the norm's weight.
The model's simulation follows the export, but for a model loaded as float32, which follows the reference's simulation.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelq import _core
from modelq.groups import pair_of
from modelq.quantizers import stage_quantizers, weight_amax

FOLDED_WEIGHTS = ("int4", "nvfp4")    # schemes whose smoothing goes into the norm before; SmoothQuant's INT8 keeps its scales


def smooth(model: Any, scales: Mapping[str, Any]) -> None:
    """Smooth linears of a quantized model: module name to scale, float32 [in]. A linear's input is multiplied by its scale, rounded to
    the model's dtype; its weight's columns by 1 / scale, and the weight's amax is found anew; the input's amax is left to the caller.
    Linears that read one input are to be smoothed together. ValueError: an unknown module, a scale that is not positive and finite."""
    linears = {row["name"]: row for row in model.modules if row["kind"] == "linear"}
    unknown = [module for module in scales if module not in linears]
    if unknown:
        raise ValueError(f"{unknown[0]}: no linear of this model")
    rows = {module: linears[module] for module in scales}
    checked = {module: _checked(rows[module], scale) for module, scale in scales.items()}
    model.settle()
    for module, scale in checked.items():
        side, weight = (model.quantizers[f"{module}.{what}_quantizer"] for what in ("input", "weight"))
        side.pre_quant_scale = scale.astype(dtype_of(model, rows[module])).astype(np.float32)
        weight.pre_quant_scale = np.reciprocal(scale)
        tensor = own_weight(model, rows[module], as_loaded(model, model.checkpoint.read(rows[module]["weight"])))
        set_weight_amax(model, rows[module], tensor)
    model.connect()


def _checked(row: dict[str, Any], scale: Any) -> np.ndarray:
    scale, columns = np.asarray(scale, dtype=np.float32).reshape(-1), row["shape"][1]
    if scale.shape != (columns,) or not np.isfinite(scale).all() or (scale <= 0).any():
        raise ValueError(f"{row['name']}: a pre_quant_scale is {columns} positive finite numbers, got shape {scale.shape}, smallest "
                         f"{scale.min(initial=np.inf)}")
    return scale


def as_loaded(model: Any, tensor: np.ndarray) -> np.ndarray:
    """A weight in the dtype in which it is quantized: the checkpoint's, or float32 if the model was loaded so."""
    return tensor.astype(np.float32) if model.float32_weights and tensor.dtype != np.float32 else tensor


def dtype_of(model: Any, row: dict[str, Any]) -> np.dtype:
    from modelq.checkpoint.safetensors import numpy_dtype

    return np.dtype(np.float32) if model.float32_weights else numpy_dtype(model.checkpoint.tensors[row["weight"]].dtype)


def set_weight_amax(model: Any, row: dict[str, Any], tensor: np.ndarray) -> None:
    name = f"{row['name']}.weight_quantizer"
    for quantizer, amax in zip(stage_quantizers(model.quantizers[name]), weight_amax(model.settings[name], tensor)):
        quantizer.amax = amax


# Weights ---------------------------------------------------------------------------------------------------------------------

def own_weight(model: Any, row: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """A weight (as loaded) with its own columns' scales, as calibration sees it."""
    quantizer = model.quantizers.get(f"{row['name']}.weight_quantizer")
    scale = getattr(quantizer, "pre_quant_scale", None)
    return tensor if scale is None else times_columns(tensor, scale)


def stated_weight(model: Any, row: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """A weight (as loaded) as an export quantizes it: with the mean of the siblings' scales instead of its own."""
    tensor = own_weight(model, row, tensor)
    if not is_resmoothed(model, row):
        return tensor
    old, new = own_scale(model, row["name"]), stated_scale(model, row)
    assert old is not None and new is not None
    return (tensor.astype(np.float32) * old / new).astype(tensor.dtype)


def times_columns(tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Each column (or entry of a vector) times its float32 scale, rounded to the tensor's dtype."""
    quantizer = _core.Quantizer(enabled=False)
    quantizer.pre_quant_scale = scale
    return quantizer(tensor)


# Scales ----------------------------------------------------------------------------------------------------------------------

def own_scale(model: Any, module: str) -> np.ndarray | None:
    return getattr(model.quantizers.get(f"{module}.input_quantizer"), "pre_quant_scale", None)


def stated_scale(model: Any, row: dict[str, Any]) -> np.ndarray | None:
    """float32 [in] that a module's input is multiplied by in an export: its own scale, or the siblings' mean. None: not smoothed.

    ValueError if only some of the siblings are smoothed.
    """
    own = own_scale(model, row["name"])
    if own is None:
        return None
    members = _group(model, row)
    scales = [own_scale(model, other["name"]) for other in members]
    if len(members) == 1:
        return own
    if any(scale is None for scale in scales):
        bare = next(other["name"] for other, scale in zip(members, scales) if scale is None)
        raise ValueError(f"{bare} is not smoothed, but {row['name']}, which reads the same input, is: engines fuse them, so smooth both or "
                         "none")
    mean = np.add.reduce(scales, axis=0, dtype=np.float32) / np.float32(len(scales))
    return mean.astype(dtype_of(model, row)).astype(np.float32)


def is_resmoothed(model: Any, row: dict[str, Any]) -> bool:
    own = own_scale(model, row["name"])
    return own is not None and not np.array_equal(own, stated_scale(model, row))


def folding_norm(model: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """The norm whose weight takes up the scale of this linear's input in an export, or None where the scale is stored beside it."""
    if own_scale(model, row["name"]) is None:
        return None
    members, pair = _group(model, row), pair_of(model, row["name"])
    readers = [other for other in _readers(model, row) if other["kind"] == "linear"]
    folds = pair is not None and (pair.weight in FOLDED_WEIGHTS or folds_all(model))
    if not folds or len(members) < 2 or len(members) < len(readers):
        return None
    return next((other for other in _readers(model, row) if other["kind"] == "norm"), None)


def folds_all(model: Any) -> bool:
    """Whether it stands in for a model that is written where no scale has a place (modelq.export.folding)."""
    return getattr(model, "folds_all", False)


def norm_scales(model: Any, modules: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Name of a norm's weight to what it is multiplied by, for the norms that take up scales of these modules."""
    found: dict[str, np.ndarray] = {}
    for row in modules:
        if row["kind"] == "linear" and (norm := folding_norm(model, row)) is not None:
            scale = stated_scale(model, row)
            assert scale is not None
            found[norm["weight"]] = scale
    return found


def _readers(model: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The linears that read what this one reads, and the norm that makes it."""
    near = model.modules_of(row["layer"], row["expert"])
    return [other for other in near if other["site"] == row["site"]]


def _group(model: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The quantized linears that read what this one reads, in one format with it."""
    pair = pair_of(model, row["name"])
    return [other for other in _readers(model, row) if other["kind"] == "linear" and pair_of(model, other["name"]) == pair]
