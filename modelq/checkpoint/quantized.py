"""Reading a quantized export: a checkpoint whose packed weights are dequantized one by one, as they are read.

`open_quantized` wraps any folder whose config names a quantization; to the runtime it looks like the unquantized model, and says
besides (`layers`, `input_amax`, `pre_quant_scale`) how activations were quantized.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.base import Checkpoint, TensorInfo
from modelq.checkpoint.dialects import Form, Pair
from modelq.checkpoint.kv_cache import names_of, read_cache
from modelq.checkpoint.quantization_config import find_quantization
from modelq.checkpoint.said import AGAIN, Said
from modelq.checkpoint.spelling import FLOATS, TRANSFORMS, amax_of, matrix_shape

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer

_PACKED_DTYPES = ("uint8", "int8", "int32", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized linear: its algorithm's name in its dialect, what it is, and the names of its tensors by role."""
    dialect: str
    algorithm: str
    form: Form
    tensors: dict[str, str]

    @property
    def scheme(self) -> str:
        return self.form.pair.weight

    @property
    def input_scheme(self) -> str | None:
        return self.form.pair.input

    @property
    def group_size(self) -> int | None:
        return self.form.group_size

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.shape


def open_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself if it is not quantized (or wrapped already), else a QuantizedCheckpoint around it."""
    if isinstance(checkpoint, QuantizedCheckpoint):
        return checkpoint
    quantization = find_quantization(checkpoint.path, checkpoint.config)
    return checkpoint if quantization is None else QuantizedCheckpoint(checkpoint, *quantization)


class QuantizedCheckpoint(Checkpoint):
    """A quantized folder that reads as the model it stands for: `read` dequantizes. Everything is checked on opening.

    layers: module name -> QuantizedLayer. quantization: what the folder's config says. cache: its KV cache, or None. ValueError names
    file, tensor and remedy.
    """

    def __init__(self, inner: Checkpoint, said: Said, quantization: dict[str, Any]):
        self.inner = inner
        self.said = said
        self.quantization = quantization
        self.layers = _find_layers(inner, said)
        dtype = model_dtype(inner.config)
        self.cache = read_cache(inner, quantization, said.dialect)
        hidden = {name for layer in self.layers.values() for name in layer.tensors.values()} | names_of(inner, said.dialect)
        tensors = {}
        for name, info in inner.tensors.items():
            module = _module_of(name, said.dialect)
            if module in self.layers:
                rows, cols = self.layers[module].shape
                nbytes = rows * cols * (4 if dtype == "float32" else 2)
                tensors[f"{module}.weight"] = TensorInfo(f"{module}.weight", dtype, (rows, cols), nbytes, info.file)
            elif name not in hidden:
                tensors[name] = info
        super().__init__(inner.path, {k: v for k, v in inner.config.items() if k != "quantization_config"}, tensors)
        self.side_files = inner.side_files

    @property
    def is_source(self) -> bool:
        """Whether it is the form in which models are published (FP8 in blocks, inputs as they are), to be quantized as if it were not."""
        return self.said.dialect == "fp8" and all(layer.input_scheme is None for layer in self.layers.values())

    def read(self, name: str) -> np.ndarray:
        """The tensor; a quantized weight as element x scale in float32, rounded to the model's dtype."""
        module = name.removesuffix(".weight")
        layer = self.layers.get(module)
        if layer is None or not name.endswith(".weight"):
            self._info(name)
            return self.inner.read(name)
        return dequantized(layer.form, self.parts(module), self.tensors[name].dtype)

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

    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer()

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        return self.inner.save_tokenizer(directory)

    def close(self) -> None:
        self.inner.close()

    def _part(self, layer: QuantizedLayer, role: str) -> Any:
        array = self.inner.read(layer.tensors[role])
        try:
            return dialects.loaded(layer.dialect, layer.form, role, array)
        except ValueError as error:
            raise ValueError(f"{self._where(layer.tensors[role])} {error}") from None

    def _where(self, tensor: str) -> str:
        return f"{self.inner.tensors[tensor].file}: tensor {tensor!r}"


def model_dtype(config: dict[str, Any]) -> str:
    """The dtype that a config.json states for the model."""
    return config.get("dtype") or config.get("torch_dtype") or "bfloat16"


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


def _find_layers(inner: Checkpoint, said: Said) -> dict[str, QuantizedLayer]:
    layers = {}
    for name in inner.tensors:
        module = _module_of(name, said.dialect)
        if module is None or not _looks_packed(inner, name, module):
            continue
        found = said.find(module)
        if found is None:
            raise ValueError(f"{inner.path}: {module} is stored quantized, but the config leaves it out; {AGAIN}")
        layers[module] = _layer(inner, module, said.dialect, *found)
    for module in said.every:
        if module not in layers:
            raise ValueError(f"{inner.path}: quantized_layers lists {module}, whose weight is missing or not quantized; {AGAIN}")
    if not layers and (said.word is not None or said.dialect != "modelopt"):
        raise ValueError(f"{inner.path}: the config says {said.word or said.dialect}, but no layer is stored quantized; {AGAIN}")
    return layers


def _module_of(name: str, dialect: str) -> str | None:
    """The module whose weight a tensor is in this dialect, or None."""
    for table in dialects.NAMES[dialect].values():
        module = name.removesuffix(f".{table['weight'].suffix}")
        if module != name:
            return module
    return None


def _looks_packed(inner: Checkpoint, name: str, module: str) -> bool:
    return inner.tensors[name].dtype in _PACKED_DTYPES or f"{module}.weight_scale" in inner.tensors


def _layer(inner: Checkpoint, module: str, dialect: str, pair: Pair, group_size: int | None, word: str) -> QuantizedLayer:
    table = dialects.names(dialect, pair)
    packed = inner.tensors.get(f"{module}.{table['weight'].suffix}")
    if packed is None:
        raise ValueError(f"{inner.path}: tensor '{module}.{table['weight'].suffix}' is missing, {word} needs it; {AGAIN}")
    if len(packed.shape) != 2:
        raise ValueError(f"{packed.file}: tensor {packed.name!r} has the shape {list(packed.shape)}, a packed weight has two axes; {AGAIN}")
    shape = matrix_shape(table["weight"].transform, pair.weight, packed.shape)
    stage = dialect == "modelopt" and not dialects.schemes()[pair.weight]["second_divisor"] and f"{module}.weight_scale_2" in inner.tensors
    smoothed = "pre_quant_scale" in table and f"{module}.pre_quant_scale" in inner.tensors
    optional = dialects.may_lack_input_scale(pair) and f"{module}.input_scale" not in inner.tensors
    size = shape[1] if group_size == -1 else group_size or _stored_group_size(inner, module, pair.weight, shape)
    branch = inner.tensors.get(f"{module}.{table['low_rank_down'].suffix}") if "low_rank_down" in table else None
    rank = 0 if branch is None or len(branch.shape) != 2 else branch.shape[0]
    form = Form(pair, shape, size, smoothed, stage, not optional, rank)
    names = {}
    for role, (dtype, part_shape) in dialects.stored_layout(dialect, form, model_dtype(inner.config)).items():
        names[role] = f"{module}.{table[role].suffix}"
        if role == "groups" and names[role] not in inner.tensors:    # some writers leave it out where it says nothing
            del names[role]
            continue
        free = TRANSFORMS[table[role].transform].floats or role in ("pre_quant_scale", "low_rank_down", "low_rank_up")
        _check(inner, names[role], FLOATS if free and dtype in FLOATS else (dtype,), part_shape, f"{word} {list(shape)}")
    _refuse_others(inner, module, set(names.values()), word)
    return QuantizedLayer(dialect, word, form, names)


def _stored_group_size(inner: Checkpoint, module: str, scheme: str, shape: tuple[int, int]) -> int | None:
    """The block's length by the shape of the scales: not every config says it."""
    scale = inner.tensors.get(f"{module}.weight_scale")
    rows, columns = dialects.schemes()[scheme]["block"]
    if rows != 1 or not columns or scale is None or len(scale.shape) != 2 or not scale.shape[1] or shape[1] % scale.shape[1]:
        return None
    return shape[1] // scale.shape[1]


def _check(inner: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], what: str) -> None:
    info = inner.tensors.get(name)
    if info is None:
        raise ValueError(f"{inner.path}: tensor {name!r} is missing, {what} needs it; {AGAIN}")
    same_shape = info.shape == shape or (set(info.shape) <= {1} and set(shape) <= {1})     # one number, with more or fewer axes
    if info.dtype not in dtypes or not same_shape:
        raise ValueError(f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, {what} needs {' or '.join(dtypes)} "
                         f"{list(shape)}; {AGAIN}")


def _refuse_others(inner: Checkpoint, module: str, known: set[str], algorithm: str) -> None:
    for extra in ("pre_quant_scale", "weight_scale_2", "weight_zero_point", "weight_g_idx", "svdquant_lora_a"):
        if f"{module}.{extra}" in inner.tensors and f"{module}.{extra}" not in known:
            raise ValueError(f"{inner.path}: {module} is {algorithm} and has {extra}, which modelq does not read yet")
