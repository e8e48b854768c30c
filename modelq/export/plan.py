"""The plan of an export: every tensor's name, dtype and shape, and what it is made of, before any byte is computed.

Everything that can be refused is refused here: layers without calibration, siblings of unlike formats, pairs
of formats that the dialect has no word for.
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.base import TensorInfo
from modelq.checkpoint.dialects import Form, Pair
from modelq.export.copies import LINEAR_LIKE, planned_copies, tensor_info
from modelq.export.kv_cache import Cache, plan_cache
from modelq.checkpoint.stacked import FORMATS, container_of
from modelq.experts import place_of, quantizer_of
from modelq.foreign import OWN_QUANTIZERS, others_of
from modelq.groups import pair_of, siblings
from modelq.quantizers import stage_quantizers
from modelq.rules import stages
from modelq.smoothing import folding_norm, folds_all, is_stored, norm_scales, stated_scale
from modelq.stated import StatedAmax, layout_of_stacks, layout_written, scaling, stacks_of, stated_amax
from modelq.supported import partial_block
from modelq.tables import listed


@dataclass(frozen=True)
class Linear:
    """One quantized linear: its row of model.modules, how its weight is quantized, the tensors it becomes by role, and those of
    its parts that calibration gives (input_scale, pre_quant_scale, the scale of a second stage). rows: what the weight's scales are
    multiplied by, float32 [out], where they take up what smoothes the input of the linear behind."""
    row: dict[str, Any]
    form: Form
    algorithm: str
    scaling: StatedAmax
    given: dict[str, np.ndarray]
    tensors: dict[str, TensorInfo]
    rows: np.ndarray | None = None

    @property
    def module(self) -> str:
        return self.row["name"]

    @property
    def weight(self) -> str:
        return self.row["weight"]

    @property
    def pair(self) -> Pair:
        return self.form.pair

    @property
    def group_size(self) -> int | None:
        return self.form.group_size


@dataclass(frozen=True)
class Plan:
    """linears (in the order of the model) by the name that their weight has of old; copies: source name to what is written, cast if
    the dtype differs; order: all these names as the checkpoint has them, which is how they are read and written; norms: what
    norms' weights are multiplied by; cache: what comes behind all these."""
    dialect: str
    linears: dict[str, Linear] = field(default_factory=dict)
    copies: dict[str, TensorInfo] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    unquantized_linears: list[str] = field(default_factory=list)
    norms: dict[str, np.ndarray] = field(default_factory=dict)
    cache: Cache = Cache()

    @property
    def unties(self) -> bool:
        """Whether a linear's weight becomes its own that was another module's before: a quantized lm_head beside an embedding that is
        not."""
        return any(linear.weight != name for name, linear in self.linears.items())

    @property
    def tensors(self) -> list[TensorInfo]:
        """Everything that will be written, in the order of writing."""
        weights = [info for name in self.order
                   for info in (self.linears[name].tensors.values() if name in self.linears else (self.copies[name],))]
        return weights + [tensor_info(name, array.dtype.name, array.shape) for name, array in self.cache.tensors.items()]


def make_plan(model: Any, dtype: str, dialect: str, share_all: bool = False, smoothed_words: tuple[str, ...] = ()) -> Plan:
    """ValueError names the layer and what would work; see the module.

    share_all: siblings share plain FP8 scales too. smoothed_words: algorithms whose linears need a pre_quant_scale where they have no
    siblings, of ones if they are not smoothed.
    """
    if getattr(model, "stored_layers", None):
        raise ValueError(f"{model.checkpoint.path}: the model was opened from a quantized export, which is what an export would be: copy "
                         f"that folder, or quantize the original checkpoint")
    quantized = _quantized_rows(model)
    cache = plan_cache(model, dtype, dialect)
    if not quantized and cache.algorithm is None:
        raise ValueError("no layer of this model is quantized: call modelq.quantization.quantize(model, config, forward_loop) first")
    amax = stated_amax(model, quantized, share_all)
    plan = Plan(dialect, norms=norm_scales(model, quantized), cache=cache)
    for row in quantized:
        plan.linears[f"{row['name']}.weight"] = _plan_linear(model, row, amax, dialect, dtype, smoothed_words)
    _check_siblings(model, {linear.module: linear.pair for linear in plan.linears.values()})
    _warn_of_outputs(model)
    tensors, plan.order[:] = planned_copies(model, {key: linear.weight for key, linear in plan.linears.items()}, dtype)
    plan.copies.update(tensors)
    names, others = {row["name"] for row in quantized}, others_of(model)
    plan.unquantized.extend(row["name"] for row in model.modules if row["name"] not in names and row["kind"] in OWN_QUANTIZERS)
    plan.unquantized.extend(row["name"] for row in others if row["weight"].endswith(".weight") or row["kind"] == "stacked experts")
    plan.unquantized_linears.extend(row["name"] for row in model.modules if row["name"] not in names and row["kind"] in LINEAR_LIKE)
    plan.unquantized_linears.extend(row["name"] for row in others if row["kind"] in LINEAR_LIKE)
    if stacks_of(model) is not None and layout_written(model, dialect) is not None:
        _check_stacks(plan)
    if layout_of_stacks(model) is not None:
        containers = {container_of(name) for name in names}
        for found in (plan.unquantized, plan.unquantized_linears):
            found[:] = dict.fromkeys(name if container_of(name) in containers else container_of(name) for name in found)
    return plan


def _check_stacks(plan: Plan) -> None:
    """Experts in one tensor are quantized all alike, in a format whose parts have a place beside it."""
    experts = [linear for linear in plan.linears.values() if linear.row.get("expert") is not None]
    wrong = next((linear for linear in experts if linear.pair.weight not in FORMATS or plan.dialect != "modelopt"), None)
    if wrong is not None:
        raise ValueError(f"{wrong.module}: {wrong.pair.weight} in the {plan.dialect} dialect: experts in one tensor have "
                         f"{' and '.join(FORMATS)} in the modelopt dialect; leave them out with "
                         f"{{'quantizer_name': '{container_of(wrong.module)}', 'enable': False}}")


def _warn_of_outputs(model: Any) -> None:
    outputs = [name for name, found in model.quantizers.items() if name.endswith(".output_quantizer") and found.enabled]
    if outputs:
        warnings.warn(f"{listed(outputs, 1)}: a checkpoint has no place for the "
                      "quantization of outputs: the export computes without", stacklevel=4)


def quantizer(model: Any, module: str, side: str) -> Any:
    """The module's "weight" or "input" quantizer, or None."""
    return quantizer_of(model, f"{module}.{side}_quantizer")


def _quantized_rows(model: Any) -> list[Any]:
    def enabled(row: Any) -> bool:
        found = quantizer(model, row["name"], "weight")
        return found is not None and found.enabled
    return [row for row in model.modules if enabled(row)]


def _plan_linear(model: Any, row: Any, amax: dict[str, np.ndarray], dialect: str, dtype: str, smoothed_words: tuple[str, ...]) -> Linear:
    from modelq.checkpoint.safetensors import numpy_dtype

    module = row["name"]
    form = planned_form(model, row)
    given = _given_parts(model, row, form.pair, amax, dialect, numpy_dtype(dtype))
    form = replace(form, input_scaled="input_scale" in given)
    try:
        algorithm = dialects.algorithm(dialect, form)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    _check_stages(module, form, quantizer(model, module, "weight"), dialect)
    if algorithm in smoothed_words and not form.smoothed and not _has_siblings(model, row):
        given["pre_quant_scale"] = np.ones(form.shape[1], numpy_dtype(dtype))
    form = replace(form, smoothed="pre_quant_scale" in given)    # without what a norm takes up
    tensors = stored_tensors(module, form, dialect, dtype)
    if dialect == "modelopt" and place_of(model, f"{module}.weight_quantizer").parts > 1:
        tensors["weight_scale"] = _stacked(tensors["weight_scale"], form)
    return Linear(row, form, algorithm, scaling(model, module, amax), given, tensors,
                  getattr(model, "scale_rows", {}).get(module))


def planned_form(model: Any, row: dict[str, Any]) -> Form:
    """What a quantized linear is, before anything is calibrated. ValueError: no checkpoint could hold it."""
    weight, pair = quantizer(model, row["name"], "weight"), _pair(model, row["name"])
    setting = getattr(model, "settings", {}).get(place_of(model, f"{row['name']}.weight_quantizer").name)
    if setting is not None and (words := partial_block(setting.slot, stages(setting)[0], model.head_dim)):
        raise ValueError(words)
    if dialects.schemes()[pair.weight]["packing"] == "row_pairs" and row["shape"][0] % 2:
        raise ValueError(f"{row['name']}: {row['shape'][0]} rows: {pair.weight} packs rows in pairs; leave it in high precision with "
                         f"{{'quantizer_name': '{row['name']}.*', 'enable': False}}")
    smoothed = stated_scale(model, row) is not None and not (folds_all(model) and folding_norm(model, row) is not None)
    branch = getattr(model, "low_rank", {}).get(row["name"])
    return Form(pair, tuple(row["shape"]), _group_size(weight), smoothed=smoothed,
                fp8_stage=len(stage_quantizers(weight)) > 1, rank=0 if branch is None else len(branch.down))


def planned_forms(model: Any) -> dict[str, Form]:
    """Module name to form, for every quantized module."""
    return {row["name"]: planned_form(model, row) for row in _quantized_rows(model)}


def _check_stages(module: str, form: Form, weight: Any, dialect: str) -> None:
    """Quantizers in a row are INT4, then FP8, beside FP8 inputs; there, a checkpoint asks for both."""
    schemes = [stage.scheme for stage in stage_quantizers(weight)]
    if schemes != ([form.pair.weight, "fp8"] if form.pair == Pair("int4", "fp8") else [schemes[0]]):
        names = " then ".join(str(scheme) for scheme in schemes)
        raise ValueError(f"{module}.weight_quantizer: {names} with {form.pair.input or 'unquantized'} inputs is no format of the {dialect} "
                         "dialect: beside FP8 inputs it has int4 then fp8 (W4A8_AWQ_BETA_CFG), elsewhere single quantizers")


def _given_parts(model: Any, row: dict[str, Any], pair: Pair, amax: dict[str, np.ndarray], dialect: str, dtype: np.dtype
                 ) -> dict[str, np.ndarray]:
    module, given = row["name"], {}
    input_amax = amax.get(f"{module}.input_quantizer")
    lacks = input_amax is None and dialect == "modelopt" and dialects.may_lack_input_scale(pair)
    if pair.input is not None and not dialects.is_dynamic_input(pair) and not lacks:
        given["input_scale"] = _input_scale(input_amax, module, pair.input)
    if (second := amax.get(f"{module}.weight_quantizer.1")) is not None:
        given["weight_scale_2"] = _scale(second, "fp8")
    if is_stored(model, row):
        given["pre_quant_scale"] = stated_scale(model, row).astype(dtype)
    if (branch := getattr(model, "low_rank", {}).get(module)) is not None:
        given |= {"low_rank_down": branch.down, "low_rank_up": branch.up}
    return given


def _has_siblings(model: Any, row: dict[str, Any]) -> bool:
    return any(other["kind"] == "linear" and other["name"] != row["name"] and (other["layer"], other["site"]) == (row["layer"], row["site"])
               for other in model.modules)


def _stacked(scale: TensorInfo, form: Form) -> TensorInfo:
    """The reference slices the scales of gate and up of an expert from a grid of both: a grid of one block keeps its axes."""
    blocks = dialects.schemes()[form.pair.weight]["block"]
    return replace(scale, shape=(1, 1, 1, 1)) if blocks[0] > 1 and scale.shape == () else scale


def stored_tensors(module: str, form: Form, dialect: str, dtype: str) -> dict[str, TensorInfo]:
    """By role, what a quantized linear becomes in a dialect. ValueError names the module if its shape does not fit."""
    names = dialects.names(dialect, form.pair)
    try:
        found = dialects.stored_layout(dialect, form, dtype)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    return {role: tensor_info(f"{module}.{names[role].suffix}", *stored) for role, stored in found.items()}


def _pair(model: Any, module: str) -> Pair:
    weight, pair = quantizer(model, module, "weight"), pair_of(model, module)
    if pair is None or pair.weight is None:
        raise ValueError(f"{module}.weight_quantizer: num_bits {weight.num_bits} with block_sizes {weight.block_sizes} is no known "
                         f"scheme, so no checkpoint can hold it; known are {', '.join(dialects.schemes())}")
    return pair


def _check_siblings(model: Any, pairs: dict[str, Pair]) -> None:
    """Engines fuse linears that read one input: unlike formats are refused by all of them, a mix with unquantized ones by most."""
    for rows in siblings(row for row in model.modules if row["kind"] == "linear" and row["layer"] >= 0):
        members = [row["name"] for row in rows]
        found = {pairs.get(module) for module in members}
        if len(found - {None}) > 1:
            words = ", ".join(f"{module}: {pairs[module].weight}" for module in members if module in pairs)
            raise ValueError(f"{words}: they read one input and engines fuse them, so they need one format")
        if len(found) > 1:
            rest = ", ".join(module for module in members if module not in pairs)
            warnings.warn(f"{rest} stays in high precision beside quantized siblings: engines that fuse them refuse such a checkpoint",
                          stacklevel=4)


def _group_size(weight: Any) -> int | None:
    sizes = weight.block_sizes
    size = sizes.get(-1) if isinstance(sizes, dict) else None
    return int(size) if size else None


def _input_scale(amax: np.ndarray | None, module: str, scheme: str) -> np.ndarray:
    if amax is None:
        raise ValueError(f"{module}.input_quantizer was never calibrated: no batch of the forward loop reached it; "
                         f"call modelq.quantization.quantize with a forward_loop that runs the model on data")
    return _scale(amax, scheme)


def _scale(amax: np.ndarray, scheme: str) -> np.ndarray:
    largest = dialects.scale_divisor(scheme) if scheme in dialects.INTEGER_INPUTS else \
        dialects.formats()[dialects.schemes()[scheme]["element"]]["max"]
    value = np.float32(amax.reshape(-1)[0]) or np.float32(largest)     # zero on all data: no scale may be 0
    return np.asarray(value / np.float32(dialects.scale_divisor(scheme)), dtype=np.float32)
