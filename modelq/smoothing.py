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

PREVIOUS = {"o_proj": "v_proj", "down_proj": "up_proj"}
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
        set_scale(model, rows[module], scale)
        tensor = as_loaded(model, model.checkpoint.read(rows[module]["weight"]))
        set_weight_amax(model, rows[module], own_weight(model, rows[module], tensor))
    model.connect()


def set_scale(model: Any, row: dict[str, Any], scale: np.ndarray) -> None:
    """Both quantizers' scales of a linear whose input's columns are to be multiplied by float32 [in]; no amax is changed."""
    side, weight = (model.quantizers[f"{row['name']}.{what}_quantizer"] for what in ("input", "weight"))
    side.pre_quant_scale = rounded(scale, dtype_of(model, row))
    weight.pre_quant_scale = np.reciprocal(scale)


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32, rounded to a dtype."""
    return np.asarray(values, dtype=np.float32).astype(dtype).astype(np.float32)


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
        check_finite(name, amax)
        quantizer.amax = amax


def check_finite(name: str, amax: Any) -> None:
    """ValueError names the quantizer whose range is not one."""
    if amax is not None and not np.isfinite(amax).all():
        raise ValueError(f"{name}: NaN or infinity among what it has to hold: in bfloat16 or float16 a value overflowed, or a weight is "
                         "damaged")


# Weights ---------------------------------------------------------------------------------------------------------------------

def own_weight(model: Any, row: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """A weight (as loaded) with its own columns' scales, as calibration sees it."""
    quantizer = model.quantizers.get(f"{row['name']}.weight_quantizer")
    scale, branch = getattr(quantizer, "pre_quant_scale", None), getattr(model, "low_rank", {}).get(row["name"])
    smoothed = tensor if scale is None else times_columns(tensor, scale)
    return smoothed if branch is None else branch.taken_from(smoothed)


def stated_weight(model: Any, row: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """A weight (as loaded) as an export quantizes it: with the mean of the siblings' scales instead of its own, and with the scales that it
    takes up from the linear behind it."""
    tensor, rows = own_weight(model, row, tensor), taken_rows(model, row)
    if rows is not None:
        tensor = (tensor.astype(np.float32) * rows[:, None]).astype(tensor.dtype)
    if not _is_resmoothed(model, row):
        return tensor
    old, new = own_scale(model, row["name"]), stated_scale(model, row)
    assert old is not None and new is not None
    return (tensor.astype(np.float32) * old / new).astype(tensor.dtype)


def times_columns(tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Each column (or entry of a vector) times its float32 scale, rounded to the tensor's dtype."""
    quantizer = _core.Quantizer(enabled=False)
    quantizer.pre_quant_scale = scale
    return quantizer(tensor)


def times_norm(model: Any, name: str, tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A vector of `norm_scales` times its scale. Gemma's norms multiply by 1 + weight: there it is that which is scaled."""
    offset = next((row.get("offset", 0) for row in model.modules if row["weight"] == name), 0)
    if not offset:
        return times_columns(tensor, scale)
    return ((tensor.astype(np.float32) + offset) * scale - offset).astype(tensor.dtype)


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
    return rounded(np.add.reduce(scales, axis=0, dtype=np.float32) / np.float32(len(scales)), dtype_of(model, row))


def is_restated(model: Any, row: dict[str, Any]) -> bool:
    """Whether what an export quantizes is not the weight that calibration looked at."""
    return _is_resmoothed(model, row) or taken_rows(model, row) is not None


def _is_resmoothed(model: Any, row: dict[str, Any]) -> bool:
    own = own_scale(model, row["name"])
    return own is not None and not np.array_equal(own, stated_scale(model, row))


def is_stored(model: Any, row: dict[str, Any]) -> bool:
    """Whether a smoothed linear's scale is written beside it: nothing before it takes it up."""
    return stated_scale(model, row) is not None and folding_norm(model, row) is None and folding_linear(model, row) is None


def is_rounded(model: Any, row: dict[str, Any]) -> bool:
    """Whether calibration has rounded a linear's weight by itself (GPTQ): then it is not to be changed any more."""
    return row["weight"] in getattr(model.checkpoint, "changed", ())


def previous_linear(model: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """The linear whose rows are the columns of this one's input; None for an expert's, which share their quantizers."""
    parent, _, last = row["name"].rpartition(".")
    name = f"{parent}.{PREVIOUS.get(last)}"
    return next((other for other in model.modules_of(row["layer"]) if other["name"] == name and row["expert"] is None), None)


def folding_linear(model: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """The linear before, where its rows take up this linear's scale: in NVFP4 (Model Optimizer's fuse_prequant_to_linear), where no two
    columns share a row, and no quantized cache lies between."""
    scale, pair = own_scale(model, row["name"]), pair_of(model, row["name"])
    if scale is None or pair is None or pair != ("nvfp4", "nvfp4") or folds_all(model) or row["name"] in getattr(model, "low_rank", {}):
        return None
    previous = previous_linear(model, row)
    if previous is None or previous["shape"][0] != len(scale) or len(_group(model, row)) > 1 or is_rounded(model, previous):
        return None
    cache = model.quantizers.get(f"{row['name'].rpartition('.')[0]}.v_bmm_quantizer")
    return None if previous["name"].endswith("v_proj") and cache is not None and cache.enabled else previous


def taken_rows(model: Any, row: dict[str, Any]) -> np.ndarray | None:
    """float32 [out]: what a linear's rows are multiplied by, being the scale of the linear behind it; None: nothing."""
    parent, _, last = row["name"].rpartition(".")
    behind = next((f"{parent}.{name}" for name, before in PREVIOUS.items() if before == last), None)
    if behind is None or row["kind"] != "linear" or own_scale(model, behind) is None:
        return None
    other = next(other for other in model.modules_of(row["layer"]) if other["name"] == behind)
    return stated_scale(model, other) if folding_linear(model, other) is not None else None


def folding_norm(model: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """The norm whose weight takes up the scale of this linear's input in an export, or None where the scale is stored beside it."""
    if own_scale(model, row["name"]) is None or row["name"] in getattr(model, "low_rank", {}):
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
    """Name of a vector to what it is multiplied by: norms that take up scales of these modules, and biases of those whose rows do."""
    found: dict[str, np.ndarray] = {}
    for row in modules:
        if row["kind"] != "linear":
            continue
        if (norm := folding_norm(model, row)) is not None:
            scale = stated_scale(model, row)
            assert scale is not None
            found[norm["weight"]] = scale
        if row["bias"] and (rows := taken_rows(model, row)) is not None:
            found[row["bias"]] = rows
    return found


def _readers(model: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The linears that read what this one reads, and the norm that makes it."""
    near = model.modules_of(row["layer"], row["expert"])
    return [other for other in near if other["site"] == row["site"]]


def _group(model: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The quantized linears that read what this one reads, in one format with it."""
    pair = pair_of(model, row["name"])
    return [other for other in _readers(model, row) if other["kind"] == "linear" and pair_of(model, other["name"]) == pair]
