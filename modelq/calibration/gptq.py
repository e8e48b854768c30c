"""GPTQ (Frantar et al. 2023): weights are rounded column by column, each column making up for the errors of those before it.

With layerwise.enable (and get_qdq_activations_from_prev_layer, its default here as in Model Optimizer) a layer's inputs are what the
layers before it make when quantized, weights and activations alike; otherwise what the original weights make of quantized activations. The
Gram matrix is of the inputs as their quantizers leave them. Experts are rounded by the tokens that reached them.

Beyond Model Optimizer: act_order rounds the columns with the largest inputs first (their scales stay where the columns are, so nothing
changes for whoever loads the weight); static_groups False makes a block's scale when its turn comes; scale_algorithm chooses the scales
that rounding starts from: {"method": "mse"} or {"method": "local_hessian"} instead of maxima.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from modelq import _core
from modelq.algorithms import normalize_algorithm
from modelq.calibration.search import LocalHessian, Mse
from modelq.calibration.smooth import diagonal_blocks
from modelq.calibration.statistics import InputStatistics
from modelq.calibration.walk import Method
from modelq.calibration.weights import quantized_weights, tensor_of
from modelq.changed import ChangedCheckpoint, Rounded
from modelq.experts import place_of
from modelq.groups import pair_of
from modelq.maxima import choose_maxima
from modelq.quantizers import block_extents, has_static_levels, make_quantizer, stage_quantizers
from modelq.rules import Setting, stages
from modelq.streaming import Part
from modelq.tables import listed

MOST_DAMPING = 1.0      # of the mean of the diagonal: where even that does not help, columns are rounded by themselves


class Gptq(Method):
    needs_data = True
    description = "gptq"
    kinds = {"gram": 0}
    under_quantization = sees_rounded = changes_weights = True

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        self.shared = {row["weight"] for row in model.modules if row["kind"] == "embedding"}
        self.singular: dict[str, tuple[int, int]] = {}      # by weight quantizer: tokens, columns
        self.undamped: list[str] = []
        algorithm = settings.get("scale_algorithm")
        step = normalize_algorithm(algorithm)[0] if algorithm else {"method": "max"}
        self.scales = {"mse": Mse, "local_hessian": LocalHessian}[step["method"]](model, step, compat) if step["method"] != "max" else None

    def begin(self) -> None:
        settings, quantizers = dict(self.model.settings), dict(self.model.quantizers)
        for row in self.model.modules:
            name = place_of(self.model, f"{row['name']}.weight_quantizer").name
            if row["kind"] == "linear" and name in settings and settings[name].enable and self._takes(row):
                settings[name] = _with_static_blocks(settings[name])
                if settings[name] is not self.model.settings[name]:
                    quantizers[name] = make_quantizer(settings[name])
                    quantizers[name].pre_quant_scale = self.model.quantizers[name].pre_quant_scale
                _check(name, settings[name], quantizers[name])
        self.model.settings, self.model.quantizers = settings, quantizers
        if not isinstance(self.model.checkpoint, ChangedCheckpoint):
            self.model.checkpoint = ChangedCheckpoint(self.model.checkpoint)

    def _takes(self, row: dict[str, Any]) -> bool:
        """Not a weight that is the embedding's too, whose rows nobody would look up rounded."""
        return (row["expert"] is None or self.compat is None) and row["weight"] not in self.shared

    def searched(self, part: Part) -> list[dict[str, Any]]:
        if part.tokens == 0:
            return []
        quantized = [row for _, _, members in quantized_weights(self.model, part) for row in members]
        return [row for row in quantized if row["kind"] == "linear" and self._takes(row)]

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        factors: dict[str, tuple[np.ndarray | None, np.ndarray, np.ndarray]] = {}
        for name, setting, members in quantized_weights(self.model, part):
            if not all(row["name"] in inputs for row in members):
                continue
            seen = inputs[members[0]["name"]]
            tensors = [tensor_of(self.model, row, part) for row in members]
            weight = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
            if self.scales is not None:
                self._choose_scales(name, weight, seen.gram)
            if seen.point not in factors:
                factors[seen.point] = self._factor(name, seen)
            self._round(name, setting, members, weight, *factors[seen.point])

    def _choose_scales(self, name: str, weight: np.ndarray, gram: np.ndarray) -> None:
        quantizer = self.model.quantizers[name]
        size = (quantizer.block_sizes or {}).get(-1) or 16
        blocks = diagonal_blocks(gram, size) if isinstance(self.scales, LocalHessian) else None
        assert self.scales is not None
        choose_maxima(quantizer, weight, self.scales.settings, blocks)

    def _factor(self, name: str, seen: InputStatistics) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """(order of the columns, or None; the factor; what squares count) of a damped Gram matrix."""
        gram = seen.gram
        diagonal = np.diagonal(gram).copy()
        if seen.count < len(gram) or not diagonal.all():
            self.singular[name] = (seen.count, len(gram))
        order = np.argsort(-diagonal, kind="stable") if self.settings["act_order"] else None
        damping = self.settings["perc_damp"]
        while damping <= MOST_DAMPING:
            damped = np.ascontiguousarray(gram if order is None else gram[order][:, order])
            damped = damped.copy() if damped is gram else damped
            damped[np.diag_indices_from(damped)] += np.float32(damping * (diagonal.mean(dtype=np.float64) or 1.0))
            try:
                return order, damped, _core.factor(damped)
            except ValueError:
                self.undamped.append(f"{name} ({damping:g})")
                damping *= 10
        return order, np.eye(len(gram), dtype=np.float32), diagonal if order is None else diagonal[order]

    def _round(self, name: str, setting: Setting, members: list[dict[str, Any]], weight: np.ndarray, order: np.ndarray | None,
               factor: np.ndarray, curvature: np.ndarray) -> None:
        quantizer, columns = self.model.quantizers[name], block_extents(stages(setting)[0]).get(-1)
        regroup = not self.settings["static_groups"] and bool(columns) and block_extents(stages(setting)[0]).get(-2, 1) == 1
        rounded, amax, loss = _core.gptq(weight, quantizer, factor, curvature, order, self.settings["block_size"], regroup)
        quantizer.amax = amax.reshape(np.shape(quantizer.amax))
        quantizer.pre_quant_scale = None                    # what was rounded is smoothed already
        self.losses[name] = loss
        start = 0
        for row in members:
            self._keep(row, quantizer, rounded[start:start + row["shape"][0]], columns)
            start += row["shape"][0]

    def _keep(self, row: dict[str, Any], quantizer: Any, weight: np.ndarray, columns: int | None) -> None:
        from modelq.stated import own_weight_amax

        pair = pair_of(self.model, row["name"])
        scheme = pair.weight if pair is not None and pair.weight is not None else quantizer.scheme
        stated = own_weight_amax(self.model, row)[0]
        parts = _core.quantize(weight, scheme, block_size=columns, name=row["weight"], **stated.arguments())
        self.model.checkpoint.put(row["weight"], Rounded(parts, scheme, columns, weight.dtype.name))

    def end(self) -> None:
        if self.singular:
            said = [f"{name}: {tokens} tokens, {columns} channels" for name, (tokens, columns) in self.singular.items()]
            warnings.warn(f"gptq: the Gram matrix of {len(self.singular)} inputs is singular (fewer tokens than channels, or a channel "
                          f"that is always zero), and was damped: {listed(said, 4, '; ')}. More or longer calibration texts help",
                          stacklevel=5)
        if self.undamped:
            warnings.warn(f"gptq: a Gram matrix was not positive definite with the damping in parentheses, and was damped more: "
                          f"{listed(self.undamped, 4)}", stacklevel=5)


def _with_static_blocks(setting: Setting) -> Setting:
    """NVFP4 in dynamic blocks becomes NVFP4 in static ones: the scales that rounding was done by are the scales to be written."""
    attributes = setting.attributes
    blocks = getattr(attributes, "block_sizes", None) or {}
    if isinstance(attributes, tuple) or blocks.get("type") != "dynamic" or blocks.get("scale_bits") != (4, 3):
        return setting
    return replace(setting, attributes=replace(attributes, block_sizes={**blocks, "type": "static"}))


def _check(name: str, setting: Setting, quantizer: Any) -> None:
    found = stage_quantizers(quantizer)
    scales_known = found[0].scheme is not None and not found[0].is_dynamic and (found[0].needs_amax or has_static_levels(found[0]))
    if len(found) > 1 or not scales_known:
        attributes = stages(setting)[0]
        raise ValueError(f"{name}: gptq rounds INT4, INT8, FP8 and NVFP4 weights, not num_bits {attributes.num_bits} with block_sizes "
                         f"{attributes.block_sizes}{' and another stage behind it' if len(found) > 1 else ''}: use one of these, or max")
