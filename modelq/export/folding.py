"""Smoothing scales folded into the linear before, for dialects and engines that have no place for a pre_quant_scale.

down_proj reads act(gate) * up and o_proj reads mixtures of v over tokens, so a factor of one of their input's columns can be one of up's
or v's rows instead (Model Optimizer's fuse_prequant_to_linear). Query heads that share a key/value head read the same rows of v: where
their scales differ the rows take the mean, and o_proj is smoothed by that mean instead. Scales of what a norm makes go into the norm,
of any format then.

A row's factor goes into its scales where these are float32 numbers of single rows (INT4, INT8, FP8 by channel): the codes stay what
they were. In other formats, and in high precision, the weight is multiplied, and its amax found anew. Biases are multiplied too.
A cache of v takes the largest factor times its amax: an upper bound, so nothing saturates that did not before. The calibrated amax of
o_proj's input stays as it is under a mean, as it does in Model Optimizer.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.export.engines import choose_dialect
from modelq.groups import pair_of
from modelq.quantizers import found_values, make_quantizer, set_found_values, stage_quantizers
from modelq.smoothing import as_loaded, own_scale, own_weight, previous_linear, set_weight_amax

def model_to_export(model: Any, dtype: str, dialect: str | None, engine: str | None) -> tuple[Any, str]:
    """What to plan an export of, the model or its `folded` stand-in, and the dialect to write it in. ValueError as `choose_dialect`."""
    smoothed = any(own_scale(model, row["name"]) is not None for row in model.modules if row["kind"] == "linear")
    if engine is None or not smoothed:
        chosen = choose_dialect(model, dtype, dialect, engine)
        return (folded(model) if smoothed and "pre_quant_scale" not in dialects.NAMES[chosen][""] else model), chosen
    try:
        return model, choose_dialect(model, dtype, dialect, engine)
    except ValueError:
        stand_in = folded(model)
        return stand_in, choose_dialect(stand_in, dtype, dialect, engine)


def folded(model: Any) -> Any:
    """A stand-in for a smoothed model, which stays as it is: without the scales of o_proj and down_proj.

    Its checkpoint gives the weights and biases that take them up; scale_rows: module to float32 [out], where its scales do instead;
    folds_all: norms take up scales of every format. A scale that nothing before it can take up stays.
    """
    stand_in = copy.copy(model)
    stand_in.quantizers, stand_in.scale_rows, stand_in.folds_all = dict(model.quantizers), {}, True
    stand_in.checkpoint = ScaledCheckpoint(model.checkpoint)
    for row in model.modules:
        scale, previous = own_scale(model, row["name"]) if row["kind"] == "linear" else None, previous_linear(model, row)
        if scale is not None and previous is not None and pair_of(model, row["name"]) is not None:
            rows = _take_scale(stand_in, row, previous, scale)
            if (rows != 1).any():
                _give_rows(stand_in, previous, rows)
    return stand_in


class ScaledCheckpoint:
    """A checkpoint, some of whose tensors are multiplied by a factor per row (or entry), rounded to their dtype. factors: name to
    float32 [rows]."""

    def __init__(self, checkpoint: Any):
        self._checkpoint, self.factors = checkpoint, dict[str, np.ndarray]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str) -> np.ndarray:
        array = self._checkpoint.read(name)
        if name not in self.factors:
            return array
        factor = self.factors[name].reshape(-1, *[1] * (array.ndim - 1))
        return (array.astype(np.float32) * factor).astype(array.dtype)

    def release(self, names: Iterable[str] | None = None) -> None:
        self._checkpoint.release(names)


def _take_scale(model: Any, row: dict[str, Any], previous: dict[str, Any], scale: np.ndarray) -> np.ndarray:
    """Remove a linear's scale; returns what the rows of the linear before are to be multiplied by, float32 [out]."""
    side, weight = (f"{row['name']}.{what}_quantizer" for what in ("input", "weight"))
    model.quantizers[side] = _remade(model, side)
    model.quantizers[side].pre_quant_scale = None
    if scale.size == previous["shape"][0]:
        return scale
    heads, width = _attention(model, row)["shape"]
    grouped = scale.reshape(heads, -1, width)
    mean = _mean(grouped)
    if (grouped != mean).any():
        model.quantizers[weight] = _remade(model, weight)
        model.quantizers[weight].pre_quant_scale = model.quantizers[weight].pre_quant_scale * (grouped / mean).reshape(-1)
        _find_amax(model, row)
    return mean.reshape(-1)


def _mean(scales: np.ndarray) -> np.ndarray:
    """[key/value heads, query heads of each, width] to one for all the query heads of each; of equal ones to the bit what they are."""
    first = scales[:, :1]
    return np.where((scales == first).all(axis=1, keepdims=True), first, scales.mean(axis=1, keepdims=True, dtype=np.float32))


def _attention(model: Any, row: dict[str, Any]) -> dict[str, Any]:
    return next(other for other in model.modules_of(row["layer"]) if other["kind"] == "attention")


def _give_rows(model: Any, row: dict[str, Any], rows: np.ndarray) -> None:
    """Multiply the rows of a linear, and what is made of them on the way."""
    if row["bias"]:
        model.checkpoint.factors[row["bias"]] = rows
    if _has_scales_of_rows(model, row["name"]):
        model.scale_rows[row["name"]] = rows
    else:
        model.checkpoint.factors[row["weight"]] = rows
        name = f"{row['name']}.weight_quantizer"
        if pair_of(model, row["name"]) is not None:
            model.quantizers[name] = _remade(model, name)
            _find_amax(model, row)
    if row["name"].endswith("v_proj"):
        _scale_cache(model, f"{_attention(model, row)['name']}.v_bmm_quantizer", rows)


def _has_scales_of_rows(model: Any, module: str) -> bool:
    pair = pair_of(model, module)
    if pair is None or pair.weight is None:
        return False
    scheme, stages = dialects.schemes()[pair.weight], stage_quantizers(model.quantizers[f"{module}.weight_quantizer"])
    return scheme["block"][0] == 1 and scheme["scale"] == "fp32" and len(stages) == 1


def _scale_cache(model: Any, name: str, rows: np.ndarray) -> None:
    if (quantizer := model.quantizers.get(name)) is None or not quantizer.enabled:
        return
    constant = model.settings[name].attributes.use_constant_amax
    model.quantizers[name] = _remade(model, name)
    if quantizer.amax is not None and not constant:
        model.quantizers[name].amax = quantizer.amax * rows.max()
    if quantizer.bias is not None:
        model.quantizers[name].bias = quantizer.bias * rows.reshape(quantizer.bias.shape)


def _remade(model: Any, name: str) -> Any:
    """A quantizer like the model's, to be changed."""
    made = make_quantizer(model.settings[name])
    set_found_values(made, found_values(model.quantizers[name]))
    made.enabled = model.quantizers[name].enabled
    return made


def _find_amax(model: Any, row: dict[str, Any]) -> None:
    set_weight_amax(model, row, own_weight(model, row, as_loaded(model, model.checkpoint.read(row["weight"]))))
    model.checkpoint.release([row["weight"]])
