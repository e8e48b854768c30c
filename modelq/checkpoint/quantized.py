"""Reading a quantized export: a checkpoint whose packed weights are dequantized one by one, as they are read.

`open_quantized` wraps any folder whose config names a quantization; to the runtime it looks like the unquantized model, and says
besides (`layers`, `input_amax`, `pre_quant_scale`) how activations were quantized.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.base import Checkpoint, TensorInfo, WrappedCheckpoint
from modelq.checkpoint.dialects import Form
from modelq.checkpoint.kv_cache import names_of, read_cache
from modelq.checkpoint.mxfp4 import Mxfp4Checkpoint, is_mxfp4
from modelq.checkpoint.quantization_config import find_quantization
from modelq.checkpoint.quantized_layers import QuantizedLayer, find_layers, model_dtype, module_of
from modelq.checkpoint.said import AGAIN, Said
from modelq.checkpoint.scaled import ScaledCheckpoint
from modelq.checkpoint.scaled_layers import open_scaled
from modelq.checkpoint.spelling import amax_of
from modelq.checkpoint.stacked import unstacked
from modelq.checkpoint.static_fp8 import find_static


def open_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself if it is not quantized (or wrapped already), else what dequantizes it around it."""
    if isinstance(checkpoint, WrappedCheckpoint):
        return checkpoint
    if is_mxfp4(checkpoint.config):
        return unstacked(Mxfp4Checkpoint(checkpoint))
    checkpoint = open_scaled(unstacked(checkpoint))
    quantization = find_static(checkpoint) or find_quantization(checkpoint.path, checkpoint.config)
    if quantization is None:
        return checkpoint
    found = QuantizedCheckpoint(checkpoint, *quantization)
    return found.as_source() if isinstance(checkpoint, ScaledCheckpoint) else found


class QuantizedCheckpoint(WrappedCheckpoint):
    """A quantized folder that reads as the model it stands for: `read` dequantizes. Everything is checked on opening.

    layers: module name -> QuantizedLayer. quantization: what the folder's config says. cache: its KV cache, or None. ValueError names
    file, tensor and remedy.
    """

    def __init__(self, inner: Checkpoint, said: Said, quantization: dict[str, Any]):
        self.inner = inner
        self.said = said
        self._anew = False
        self.quantization = quantization
        self.layers = find_layers(inner, said)
        dtype = model_dtype(inner.config)
        self.cache = read_cache(inner, quantization, said.dialect)
        hidden = {name for layer in self.layers.values() for name in layer.tensors.values()} | names_of(inner, said.dialect)
        tensors = {}
        for name, info in inner.tensors.items():
            module = module_of(name, said.dialect)
            if module in self.layers:
                rows, cols = self.layers[module].shape
                nbytes = rows * cols * (4 if dtype == "float32" else 2)
                tensors[f"{module}.weight"] = TensorInfo(f"{module}.weight", dtype, (rows, cols), nbytes, info.file)
            elif name not in hidden:
                tensors[name] = info
        super().__init__(inner, {k: v for k, v in inner.config.items() if k != "quantization_config"}, tensors)

    @property
    def is_source(self) -> bool:
        """Whether it is to be quantized as if it were not: the form in which models are published (FP8 in blocks, inputs as they are), or
        `as_source` says so."""
        return self._anew or self.is_published

    @property
    def is_published(self) -> bool:
        return self.said.dialect == "fp8" and all(layer.input_scheme is None for layer in self.layers.values())

    def as_source(self) -> QuantizedCheckpoint:
        """The same files as a model to be quantized anew: its weights are what they dequantize to, and nothing else of it counts.
        ValueError names a layer whose weight alone is not what it computes with."""
        for module, layer in self.layers.items():
            if layer.form.smoothed or layer.form.rank:
                what = "a pre_quant_scale" if layer.form.smoothed else "a branch of low rank"
                raise ValueError(f"{self.path}: {module} is stored quantized with {what}, without which its weight is not the original's: "
                                 "load and quantize the original checkpoint")
        made = copy.copy(self)
        made._anew, made.cache = True, None
        return made

    def read(self, name: str) -> np.ndarray:
        """The tensor; a quantized weight as element x scale in float32, rounded to the model's dtype."""
        module = name.removesuffix(".weight")
        layer = self.layers.get(module)
        if layer is None or not name.endswith(".weight"):
            self._info(name)
            return self.inner.read(name)
        return dequantized(layer.form, self.parts(module), self.tensors[name].dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Of a quantized weight, dequantized from the first block that these rows touch."""
        if not self.is_made_by_rows(name):
            return super().read_rows(name, start, stop)
        module = name.removesuffix(".weight")
        layer = self.layers[module]
        parts = {role: part for role, part in self.parts(module).items() if role.startswith("weight")}
        first, rows = rows_of_parts(layer.form, parts, start, min(stop, layer.shape[0]))
        made = dequantized(replace(layer.form, shape=(rows["weight"].shape[0], layer.shape[1])), rows, self.tensors[name].dtype)
        return made[start - first:stop - first]

    def is_made_by_rows(self, name: str) -> bool:
        layer = self.layers.get(name.removesuffix(".weight"))
        return layer is not None and name.endswith(".weight") and not layer.form.fp8_stage

    def parts(self, module: str) -> dict[str, np.ndarray]:
        """What a quantized linear is made of, by role, whatever the dialect: as `_core.quantize` gives it, with its input's scale."""
        layer = self.layers[module]
        parts = {role: self._part(layer, role) for role in layer.tensors}
        return {role: part for role, part in parts.items() if part is not None}

    def input_amax(self, module: str) -> float | None:
        """The calibrated absolute maximum of a layer's input, or None where its quantizer needs none."""
        layer = self.layers[module]
        if "input_scale" not in layer.tensors or layer.input_scheme is None:
            return None
        scale = np.float32(self._part(layer, "input_scale").reshape(()))
        if not np.isfinite(scale) or scale <= 0:
            raise ValueError(f"{self._where(layer.tensors['input_scale'])} is {scale}, not a positive number; {AGAIN}")
        return float(amax_of(scale, np.float32(dialects.scale_divisor(layer.input_scheme))))

    def pre_quant_scale(self, module: str) -> np.ndarray | None:
        """float32 [in]: what multiplies a layer's input before it is quantized; None for most."""
        layer = self.layers[module]
        return self._part(layer, "pre_quant_scale").astype(np.float32) if layer.form.smoothed else None

    def low_rank(self, module: str) -> tuple[np.ndarray, np.ndarray] | None:
        """([rank, in], [out, rank]) of the branch beside a layer's weight; None for most."""
        layer = self.layers[module]
        return (self._part(layer, "low_rank_down"), self._part(layer, "low_rank_up")) if layer.form.rank else None

    def release(self, names: Iterable[str] | None = None) -> None:
        if names is None:
            return self.inner.release()
        for name in names:
            layer = self.layers.get(name.removesuffix(".weight"))
            self.inner.release([name] if layer is None else layer.tensors.values())

    def _part(self, layer: QuantizedLayer, role: str) -> Any:
        array = self.inner.read(layer.tensors[role])
        try:
            return dialects.loaded(layer.dialect, layer.form, role, array)
        except ValueError as error:
            raise ValueError(f"{self._where(layer.tensors[role])} {error}") from None

    def _where(self, tensor: str) -> str:
        return f"{self.inner.tensors[tensor].file}: tensor {tensor!r}"


def rows_of_parts(form: Form, parts: dict[str, np.ndarray], start: int, stop: int) -> tuple[int, dict[str, np.ndarray]]:
    """(the first row, the parts of whole blocks of rows that hold rows start to stop)."""
    scheme = dialects.schemes()[form.pair.weight]
    step = max(scheme["block"][0], 2 if scheme["packing"] == "row_pairs" else 1)
    first, last = start // step * step, -(-stop // step) * step
    packed, scale = parts["weight"], parts["weight_scale"]
    per_row = 2 if scheme["packing"] == "row_pairs" else 1
    rows = {**parts, "weight": packed[first // per_row:last // per_row]}
    if scale.ndim:
        blocks = scheme["block"][0] or 1
        rows["weight_scale"] = scale[first // blocks:-(-last // blocks)]
    return first, rows


def dequantized(form: Form, parts: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    """The weight that parts stand for. A second stage (INT4 codes that engines multiply as FP8) rounds once more."""
    from modelq import _core

    weight = _core.dequantize(parts, form.pair.weight, dtype=dtype, block_size=form.group_size)
    if not form.fp8_stage:
        return weight
    return _core.fake_quantize(weight, "fp8", amax=second_stage_amax(parts))


def second_stage_amax(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The absolute maximum that a second stage's FP8 scale stands for."""
    return amax_of(np.float32(parts["weight_scale_2"]), np.float32(dialects.scale_divisor("fp8")))
