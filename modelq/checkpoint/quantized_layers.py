"""Which linears of a folder are stored quantized, and how: every tensor checked against what the config says."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelq.checkpoint import dialects
from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.config import stated_dtype
from modelq.checkpoint.dialects import Form, Pair
from modelq.checkpoint.said import AGAIN, Said
from modelq.checkpoint.spelling import FLOATS, POWERS, TRANSFORMS, matrix_shape

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


def model_dtype(config: dict[str, Any]) -> str:
    """The dtype that a config.json states for the model."""
    return stated_dtype(config) or "bfloat16"


def find_layers(inner: Checkpoint, said: Said) -> dict[str, QuantizedLayer]:
    layers = {}
    for name in inner.tensors:
        module = module_of(name, said.dialect)
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


def module_of(name: str, dialect: str) -> str | None:
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
        floats = (*FLOATS, POWERS) if role == "weight_scale" else FLOATS
        _check(inner, names[role], floats if free and dtype in FLOATS else (dtype,), part_shape, f"{word} {list(shape)}")
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
