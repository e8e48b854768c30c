"""SmoothQuant and AWQ: how much of a linear's difficulty goes from its inputs' columns into its weight's, or the other way.

SmoothQuant (Xiao et al. 2023) follows maxima, with one exponent for all. AWQ (Lin et al. 2024) tries exponents, and takes the one whose
quantized weight changes the outputs least: ||X (W - Q(W s) / s)^T||^2, which the Gram matrix X^T X of the inputs gives at the same cost
however many tokens were seen. Formulas, grids and roundings are Model Optimizer's (smoothquant, awq_lite, awq_clip in its model_calib.py),
but a weight is clipped by the loss over all tokens, not over some, and where siblings' scales are averaged (they are stated so, but for a
model loaded as float32) the clipping comes after that.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from modelq import _core
from modelq.calibration.statistics import InputStatistics
from modelq.calibration.walk import Method
from modelq.calibration.weights import find_weight_amax, freeze_scales, quantized_weights, share_global_amax, take_amax, tensor_of
from modelq.experts import PARENT, place_of
from modelq.groups import siblings
from modelq.quantizers import block_extents, make_quantizer, needs_amax, stage_quantizers
from modelq.rules import Slot, stages
from modelq.smoothing import as_loaded, dtype_of, is_rounded, own_scale, rounded, set_scale, set_weight_amax
from modelq.streaming import Part
from modelq.tables import listed


class Smoothing(Method):
    """What the methods have in common that give linears a pre_quant_scale. Experts keep their maxima, as in Model Optimizer: no engine has
    a place for scales of their inputs."""

    needs_data = True

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        self.wanted = {row["name"] for row in model.modules if row["kind"] == "linear" and row["expert"] is None and self.takes(row)}

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a linear is smoothed."""
        setting = self.model.settings.get(f"{row['name']}.weight_quantizer")
        return setting is not None and setting.enable

    def begin(self) -> None:
        """Linears that were smoothed before are smoothed anew."""
        for row in self.model.modules:
            if row["name"] in self.wanted:
                if is_rounded(self.model, row):
                    raise ValueError(f"{row['name']}: {self.description}: gptq has rounded its weight already: let it come last")
                for side in ("input", "weight"):
                    self.model.quantizers[f"{row['name']}.{side}_quantizer"].pre_quant_scale = None
        self.model.low_rank = {}
        self.model.connect()

    def searched(self, part: Part) -> list[dict[str, Any]]:
        return [row for row in part.modules if row["name"] in self.wanted]

    def finds_range(self, slot: Slot) -> bool:
        return slot.role != "input" or slot.module not in self.wanted

    def enter(self, part: Part) -> None:
        find_weight_amax(self.model, part, self.wanted)

    def smooth(self, row: dict[str, Any], part: Part, scale: np.ndarray) -> None:
        """Give a linear its scale (of its input's columns, float32), and its weight the amax that follows."""
        set_scale(self.model, row, scale)
        set_weight_amax(self.model, row, tensor_of(self.model, row, part))

    def set_input_amax(self, row: dict[str, Any], amax: np.ndarray, scale: np.ndarray) -> None:
        """The input's range, from maxima by channel [in] before smoothing: products are rounded to the model's dtype."""
        name = f"{row['name']}.input_quantizer"
        setting = self.model.settings[name]
        if setting.enable and needs_amax(setting):
            found = rounded(rounded(amax, dtype_of(self.model, row)) * scale, dtype_of(self.model, row)).max(initial=0)
            take_amax(self.model, name, [np.float32(found)])


@contextmanager
def said_of(module: str) -> Iterator[None]:
    """A ValueError within it names the module."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error


def search_quantizer(model: Any, row: dict[str, Any]) -> Any:
    """A quantizer like the first stage of a linear's weight's, without an amax: the stage that a search tries."""
    made = stage_quantizers(make_quantizer(model.settings[f"{row['name']}.weight_quantizer"]))[0]
    made.enabled = True
    return made


def gram_compute(model: Any) -> str:
    """In which precision losses are computed: bfloat16 products rank candidates as float32 ones do (tests/test_search.py)."""
    return model.runtime.compute


# SmoothQuant ---------------------------------------------------------------------------------------------------------------------

class SmoothQuant(Smoothing):
    """s = max|W|^(1 - alpha) / max|X|^alpha by column; only where weights and inputs are 8-bit integers."""

    description = "smoothquant"
    kinds = {"amax": 0}

    def takes(self, row: dict[str, Any]) -> bool:
        sides = [self.model.settings.get(f"{row['name']}.{side}_quantizer") for side in ("weight", "input")]
        if not all(side is not None and side.enable for side in sides):
            return False
        weight, side = (stages(setting)[0] for setting in sides if setting is not None)
        return weight.num_bits == side.num_bits == 8 and side.axis in (None, -1) and side.block_sizes is None and side.type == "static"

    def begin(self) -> None:
        super().begin()
        rest = [row["name"] for row in self.model.modules if row["kind"] == "linear" and row["name"] not in self.wanted
                and (setting := self.model.settings.get(place_of(self.model, f"{row['name']}.weight_quantizer").name)) and setting.enable]
        if not self.wanted:
            raise ValueError("smoothquant: no linear has 8-bit integer weights and static 8-bit integer inputs: it is for "
                             "INT8_SMOOTHQUANT_CFG and the like; use awq_lite to smooth other formats")
        if any(name for name in rest if self.model.slots[place_of(self.model, f"{name}.weight_quantizer").name].parent != PARENT):
            warnings.warn(f"smoothquant: left alone, as they are not 8-bit integers on both sides: {listed(rest)}", stacklevel=5)

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        for row in self.searched(part):
            weight = as_loaded(self.model, part.tensors[row["weight"]])
            maxima, dtype = inputs[row["name"]].amax, dtype_of(self.model, row)
            with said_of(row["name"]):
                scale = _core.smoothquant_scale(maxima, _core.amax(weight, axis=-1).reshape(-1), self.settings["alpha"], dtype.name)
            self.smooth(row, part, scale)
            self.set_input_amax(row, maxima, scale)


# AWQ -----------------------------------------------------------------------------------------------------------------------------

class AwqLite(Smoothing):
    """s = mean|X|^alpha / mean(|W| / block's max)^(1 - alpha), alpha from a grid, by the loss over all tokens."""

    description = "awq_lite"

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        self.kinds = {"gram": 0, "mean": int(compat == "modelopt")}
        if any(model.settings[f"{name}.input_quantizer"].enable for name in self.wanted):
            self.kinds["amax"] = 0
        self.alphas = alphas(settings.get("alpha_step", 0.1))

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        for members in siblings(self.searched(part)):
            seen = inputs[members[0]["name"]]
            gram = _core.GramLoss(seen.gram, gram_compute(self.model))
            for row in members:
                scale = 1 / self.best_scale(row, part, seen.mean, gram)
                self.smooth(row, part, scale)
                if self.model.settings[f"{row['name']}.input_quantizer"].enable:
                    self.set_input_amax(row, seen.amax, scale)
        share_global_amax(self.model, part.modules, [f"{row['name']}.weight_quantizer" for row in self.searched(part)])

    def best_scale(self, row: dict[str, Any], part: Part, mean: np.ndarray, gram: Any) -> np.ndarray:
        """float32 [in] that the weight's columns are multiplied by."""
        weight, dtype = as_loaded(self.model, part.tensors[row["weight"]]), dtype_of(self.model, row)
        block = block_extents(stages(self.model.settings[f"{row['name']}.weight_quantizer"])[0]).get(-1, 0)
        with said_of(row["name"]):
            scales = _core.awq_scales(mean, _core.awq_weight_scale(weight, block), self.alphas)
        losses = _core.quantization_losses(weight, search_quantizer(self.model, row), gram, rounded(scales, dtype),
                                           rounded(1 / scales, dtype))
        self.losses[row["name"]] = losses
        if not np.isfinite(losses).all():
            raise ValueError(f"{row['name']}: awq_lite: a loss is not finite: NaN or infinity in its weight, or its inputs overflow "
                             "float32")
        return scales[int(np.argmin(losses))]


def alphas(step: float) -> np.ndarray:
    """float32 [n]: 0, step, ... up to 1, as torch.arange(0, 1 + step, step) has them."""
    return (np.arange(math.ceil((1.0 + step) / step)) * step).astype(np.float32)


def clip_ratios(least: float, step: float) -> np.ndarray:
    """float32 [n]: least, least + step, ... below 1, of two decimals, and 1."""
    below = np.arange(math.ceil((1.0 - least) / step)) * step + least
    return np.array([*np.round(below.astype(np.float32).astype(np.float64), 2), 1.0], np.float32)


class Clip:
    """Clipping of weights' maxima: of each block by its own inputs, or, where blocks find their maxima themselves, of the whole weight's.
    Dynamic blocks keep theirs."""

    def __init__(self, model: Any, settings: Mapping[str, Any]):
        self.model = model
        self.ratios = clip_ratios(settings["min_clip_ratio"], settings["shrink_step"])

    def block(self, name: str) -> int:
        """Columns of what is clipped by itself; 0: the whole weight."""
        attributes = stages(self.model.settings[name])[0]
        return 0 if (attributes.block_sizes or {}).get("type") == "dynamic" else block_extents(attributes).get(-1, 0)

    def clip(self, name: str, weight: np.ndarray, gram: np.ndarray, amax_dtype: str) -> None:
        """Replace the amax of a weight quantizer's first stage. gram: of its inputs, whole, or in blocks of those that are clipped."""
        quantizer, size = stage_quantizers(self.model.quantizers[name])[0], self.block(name)
        if size and gram.ndim == 2:
            gram = diagonal_blocks(gram, size)
        loss = _core.GramLoss(gram, gram_compute(self.model), weight.shape[1])
        best = _core.best_amax(weight, quantizer, self.ratios, loss, amax_dtype)
        quantizer.amax = best.reshape(np.shape(quantizer.amax))


def diagonal_blocks(gram: np.ndarray, size: int) -> np.ndarray:
    """[C, C] to its blocks [ceil(C / size), size, size], zero beyond C."""
    columns = len(gram)
    count = -(-columns // size)
    padded = np.zeros((count * size, count * size), np.float32) if columns % size else gram
    if columns % size:
        padded[:columns, :columns] = gram
    return np.ascontiguousarray(padded.reshape(count, size, count, size).transpose(0, 2, 1, 3)[np.arange(count), np.arange(count)])


class AwqClip(Method):
    """Clips the maxima of weights' blocks by what that does to the outputs, block by block."""

    needs_data = True
    description = "awq_clip"

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        self.clipping = Clip(model, settings)
        sizes = {self.clipping.block(name) for name in map(self._name, self._rows(model.modules))}
        self.kinds = {"gram": sizes.pop() if len(sizes) == 1 else 0}

    def _name(self, row: dict[str, Any]) -> str:
        return place_of(self.model, f"{row['name']}.weight_quantizer").name

    def _rows(self, modules: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Linears whose weights have blocks."""
        return [row for row in modules if row["kind"] == "linear" and (row["expert"] is None or self.compat is None)
                and (setting := self.model.settings.get(self._name(row))) is not None and setting.enable
                and stages(setting)[0].block_sizes is not None]

    def searched(self, part: Part) -> list[dict[str, Any]]:
        return self._rows(part.modules) if part.tokens is None or part.tokens else []

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        for name, _, members in quantized_weights(self.model, part):
            if all(row["name"] in inputs for row in members):
                weight = np.concatenate([tensor_of(self.model, row, part) for row in members]) if len(members) > 1 \
                    else tensor_of(self.model, members[0], part)
                self.clipping.clip(name, weight, inputs[members[0]["name"]].gram, weight.dtype.name)


class AwqFull(AwqLite):
    """awq_lite, then awq_clip on the smoothed weights."""

    description = "awq_full"

    def __init__(self, model: Any, settings: Mapping[str, Any], compat: str | None = None):
        super().__init__(model, settings, compat)
        self.clipping = Clip(model, settings)

    def search(self, part: Part, inputs: Mapping[str, InputStatistics]) -> None:
        super().search(part, inputs)
        freeze_scales(self.model, part, self.searched(part))
        for row in self.searched(part):
            setting = self.model.settings[f"{row['name']}.weight_quantizer"]
            if stages(setting)[0].block_sizes is not None:
                scale = own_scale(self.model, row["name"])
                gram = inputs[row["name"]].gram * scale[:, None] * scale
                self.clipping.clip(f"{row['name']}.weight_quantizer", tensor_of(self.model, row, part), gram, "float32")
