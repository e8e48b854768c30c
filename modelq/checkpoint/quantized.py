"""Reading a quantized export: a checkpoint whose packed weights are dequantized one by one, as they are read.

`open_quantized` wraps any folder whose config names a quantization; to the runtime it looks like the unquantized model, and says
besides (`layers`, `input_amax`) how activations were quantized.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.base import Checkpoint, TensorInfo, read_json_object
from modelq.checkpoint.kv_cache import names_of, read_cache

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer

NESTED_FILE = "hf_quant_config.json"
AGAIN = "export the model again, or download the file again"
_PACKED_DTYPES = ("uint8", "int8", "int32", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized linear: its algorithm's name, the schemes of its two sides, the [out, in] shape it stands for, and the
    names of its tensors by role."""
    algorithm: str
    scheme: str
    input_scheme: str | None
    group_size: int | None
    shape: tuple[int, int]
    tensors: dict[str, str]


def find_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder says of its quantization, in the words of hf_quant_config.json's "quantization", or None.

    config.json's own section wins, as it does for most engines. ValueError names the file if the dialect is not known.
    """
    flat, nested = config.get("quantization_config"), {}
    file = folder / ("config.json" if flat is not None else NESTED_FILE)
    if (folder / NESTED_FILE).exists():
        nested = read_json_object(folder / NESTED_FILE, "the quantization config").get("quantization")
        if not isinstance(nested, dict):
            raise ValueError(f"{folder / NESTED_FILE}: no \"quantization\" section; {AGAIN}")
    elif flat is None:
        return None
    method = flat.get("quant_method", "modelopt") if isinstance(flat, dict) else flat
    if flat is not None and method != "modelopt":
        raise ValueError(f"{file}: the weights are quantized by {method!r}, which modelq does not read "
                         f"(it reads: modelopt); load the unquantized model instead")
    said = {"group_size": nested.get("group_size"), **(nested if flat is None else flat)}
    return _checked(said, file)


def _checked(said: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config, if what will be read of it has the types that it should have."""
    layers = said.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise ValueError(f"{file}: quantized_layers must map layers to objects; {AGAIN}")
    for entry in (said, *layers.values()):
        if not isinstance(entry.get("quant_algo"), (str, type(None))):
            raise ValueError(f"{file}: quant_algo must be a name, found {entry['quant_algo']!r}; {AGAIN}")
        size = entry.get("group_size")
        if size is not None and (type(size) is not int or size <= 0):
            raise ValueError(f"{file}: group_size must be a positive integer, found {size!r}; {AGAIN}")
    return said


def open_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` itself if it is not quantized (or wrapped already), else a QuantizedCheckpoint around it."""
    if isinstance(checkpoint, QuantizedCheckpoint):
        return checkpoint
    quantization = find_quantization(checkpoint.path, checkpoint.config)
    return checkpoint if quantization is None else QuantizedCheckpoint(checkpoint, quantization)


class QuantizedCheckpoint(Checkpoint):
    """A quantized folder that reads as the model it stands for: `read` dequantizes. Everything is checked on opening.

    layers: module name -> QuantizedLayer. quantization: what the folder's config says. cache: its KV cache, or None. ValueError names
    file, tensor and remedy.
    """

    def __init__(self, inner: Checkpoint, quantization: dict[str, Any]):
        self.inner = inner
        self.quantization = quantization
        self.layers = _find_layers(inner, quantization)
        self.cache = read_cache(inner, quantization)
        hidden = {name for layer in self.layers.values() for name in layer.tensors.values()} | names_of(inner)
        dtype = inner.config.get("dtype") or inner.config.get("torch_dtype") or "bfloat16"
        tensors = {}
        for name, info in inner.tensors.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module in self.layers:
                shape = self.layers[module].shape
                tensors[name] = TensorInfo(name, dtype, shape, shape[0] * shape[1] * (4 if dtype == "float32" else 2), info.file)
            elif name not in hidden:
                tensors[name] = info
        super().__init__(inner.path, {k: v for k, v in inner.config.items() if k != "quantization_config"}, tensors)
        self.side_files = inner.side_files

    def read(self, name: str) -> np.ndarray:
        """The tensor; a quantized weight as element x scale in float32, rounded to the model's dtype."""
        layer = self.layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            self._info(name)
            return self.inner.read(name)
        from modelq import _core

        parts = {role: self._part(layer, role) for role in layer.tensors if role != "input_scale"}
        return _core.dequantize(parts, layer.scheme, dtype=self.tensors[name].dtype, block_size=layer.group_size)

    def input_amax(self, module: str) -> float | None:
        """The calibrated absolute maximum of a layer's input, or None where its quantizer needs none."""
        layer = self.layers[module]
        if "input_scale" not in layer.tensors or layer.input_scheme is None:
            return None
        scale = np.float32(self._part(layer, "input_scale").reshape(()))
        if not np.isfinite(scale) or scale <= 0:
            raise ValueError(f"{self._where(layer.tensors['input_scale'])} is {scale}, not a positive number; {AGAIN}")
        return float(amax_of(scale, np.float32(dialects.scale_divisor(layer.input_scheme))))

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

    def _part(self, layer: QuantizedLayer, role: str) -> np.ndarray:
        return dialects.spelled(self.inner.read(layer.tensors[role]), dialects.NAMES["modelopt"][role])

    def _where(self, tensor: str) -> str:
        return f"{self.inner.tensors[tensor].file}: tensor {tensor!r}"


def amax_of(scale: np.float32, divisor: np.float32) -> np.float32:
    """The amax that a scale was made of. Activations are bfloat16 as a rule: if such a number gives the scale, it was that one."""
    import ml_dtypes

    product = scale * divisor
    rounded = product.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded if rounded / divisor == scale else product


def _find_layers(inner: Checkpoint, quantization: dict[str, Any]) -> dict[str, QuantizedLayer]:
    algorithm = quantization.get("quant_algo")
    listed = quantization.get("quantized_layers") if algorithm == "MIXED_PRECISION" else None
    if algorithm == "MIXED_PRECISION" and not isinstance(listed, dict):
        raise ValueError(f"{inner.path}: MIXED_PRECISION without quantized_layers; {AGAIN}")
    layers = {}
    for name in inner.tensors:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or not _looks_packed(inner, module):
            continue
        said = quantization if listed is None else listed.get(module)
        if said is None:
            raise ValueError(f"{inner.path}: {module} is stored quantized, but quantized_layers does not list it; {AGAIN}")
        layers[module] = _layer(inner, module, said)
    for module in listed or {}:
        if module not in layers:
            raise ValueError(f"{inner.path}: quantized_layers lists {module}, whose weight is missing or not quantized; {AGAIN}")
    if not layers and algorithm is not None:
        raise ValueError(f"{inner.path}: the config says {algorithm}, but no layer is stored quantized; {AGAIN}")
    return layers


def _looks_packed(inner: Checkpoint, module: str) -> bool:
    return inner.tensors[f"{module}.weight"].dtype in _PACKED_DTYPES or f"{module}.weight_scale" in inner.tensors


def _layer(inner: Checkpoint, module: str, said: dict[str, Any]) -> QuantizedLayer:
    algorithm, group_size = said.get("quant_algo"), said.get("group_size")
    pair = dialects.pairs("modelopt").get(algorithm)
    if pair is None:
        raise ValueError(f"{inner.path}: {module} is quantized as {algorithm!r}, which modelq does not read; it reads "
                         f"{', '.join(dialects.pairs('modelopt'))}")
    if said.get(dialects.WEIGHT_ONLY_KEY):
        pair = pair._replace(input=None)
    weight = inner.tensors[f"{module}.weight"]
    shape = _logical_shape(pair.weight, weight)
    group_size = group_size or _stored_group_size(inner, module, pair.weight, shape)
    expected: dict[str, tuple[str, tuple[int, ...]]] = dict(dialects.layout(pair.weight, shape, group_size))
    optional = dialects.may_lack_input_scale(pair) and f"{module}.input_scale" not in inner.tensors
    if pair.input is not None and not dialects.is_dynamic_input(pair) and not optional:
        expected["input_scale"] = ("float32", ())
    names = {role: f"{module}.{dialects.NAMES['modelopt'][role].suffix}" for role in expected}
    for role, (dtype, part_shape) in expected.items():
        _check(inner, names[role], dtype, part_shape, f"{algorithm} {list(shape)}")
    _refuse_others(inner, module, set(names.values()), algorithm)
    return QuantizedLayer(algorithm, pair.weight, pair.input, group_size, shape, names)


def _stored_group_size(inner: Checkpoint, module: str, scheme: str, shape: tuple[int, int]) -> int | None:
    """The block's length by the shape of the scales: not every config says it."""
    scale = inner.tensors.get(f"{module}.weight_scale")
    rows, columns = dialects.schemes()[scheme]["block"]
    if rows != 1 or not columns or scale is None or len(scale.shape) != 2 or not scale.shape[1] or shape[1] % scale.shape[1]:
        return None
    return shape[1] // scale.shape[1]


def _logical_shape(scheme: str, weight: TensorInfo) -> tuple[int, int]:
    if len(weight.shape) != 2:
        raise ValueError(f"{weight.file}: tensor {weight.name!r} has the shape {list(weight.shape)}, a packed weight has two axes; {AGAIN}")
    row = dialects.schemes()[scheme]
    rows, cols = weight.shape
    if row["packing"] == "row_pairs":
        return rows * 2, cols
    return rows, cols * 8 // dialects.formats()[row["element"]]["bits"] if row["packing"] == "row" else cols


def _check(inner: Checkpoint, name: str, dtype: str, shape: tuple[int, ...], what: str) -> None:
    info = inner.tensors.get(name)
    if info is None:
        raise ValueError(f"{inner.path}: tensor {name!r} is missing, {what} needs it; {AGAIN}")
    same_shape = info.shape == shape or (shape == () and info.shape == (1,))      # a scalar may be written with one axis
    if info.dtype != dtype or not same_shape:
        raise ValueError(f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, {what} needs {dtype} {list(shape)}; {AGAIN}")


def _refuse_others(inner: Checkpoint, module: str, known: set[str], algorithm: str) -> None:
    for extra in ("pre_quant_scale", "weight_scale_2", "svdquant_lora_a"):
        if f"{module}.{extra}" in inner.tensors and f"{module}.{extra}" not in known:
            raise ValueError(f"{inner.path}: {module} is {algorithm} and has {extra}, which modelq does not read yet")
