"""compress: weights in memory in their packed form. fold_weight: fake quantization baked into the weights.

A native model streams its weights from the checkpoint, and fake-quantizes them anew for every pass. A compressed model holds the packed
parts instead, a quarter to a half of the weights' size, and dequantizes a layer when it is its turn; the files are not read again.
A folded model's weights are what their quantizers made of them, whatever happens to the quantizers later; that takes no memory, since
they are made anew as they are read.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core, streaming
from modelq.checkpoint.dialects import Form, scale_divisor
from modelq.checkpoint.quantized import dequantized, second_stage_amax
from modelq.experts import place_of, quantizer_of
from modelq.groups import pair_of
from modelq.quantizers import block_extents, make_quantizer, stage_quantizers
from modelq.rules import stages
from modelq.smoothing import as_loaded, own_weight, stated_weight
from modelq.stated import own_weight_amax, stated_weight_amax
from modelq.torch_models import is_torch_model
from modelq.undoing import all_or_nothing

if TYPE_CHECKING:
    from modelq.model import Model

TWO_STAGES = ["int4", "fp8"]


@dataclass(frozen=True)
class PackedWeight:
    """A weight by its parts, as an export holds them."""
    form: Form
    parts: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, dtype: str) -> np.ndarray:
        """float [out, in]: what the parts stand for."""
        return dequantized(self.form, self.parts, dtype)

    def stored(self, dtype: str) -> tuple[dict[str, np.ndarray], str, str, int | None]:
        """(parts, scheme, dtype, block_size) of what `read` gives, as the runtime takes a weight. One with a second stage is one of FP8."""
        if not self.form.fp8_stage:
            return self.parts, self.form.pair.weight, dtype, self.form.group_size
        first = dequantized(replace(self.form, fp8_stage=False), self.parts, dtype)
        return _core.quantize(first, "fp8", amax=second_stage_amax(self.parts)), "fp8", dtype, None


# Compression -------------------------------------------------------------------------------------------------------------------

def compress(model: Model, config: Any = None) -> Model:
    """Hold the weights of a quantized (or reopened) model in memory in their packed form; returns the model.

    config: {pattern of module names: whether}, later patterns win; None is {"*": True}. {"compress": {...}} is taken too. The model
    computes what it computed before (one loaded as float32, to within the last code of ties: packed weights are those of an export).
    `model.weight_nbytes` says what its weights take. Calibrating anew or other settings of a
    weight pack it anew from the checkpoint. ValueError: nothing to compress; a weight whose quantizer is no scheme of `modelq formats`.
    """
    if is_torch_model(model):
        from modelq.torch_models.packing import compress as compress_torch

        compress_torch(model, config)       # type: ignore[arg-type]
        return model
    patterns = parse_patterns(config)
    wanted = [row for row in model.modules if row["kind"] == "linear" and is_wanted(row["name"], patterns) and _is_packable(model, row)]
    if not wanted:
        raise ValueError("nothing to compress: no weight that fits is quantized; call modelq.quantization.quantize first")
    model.settle()
    pack(model, wanted)
    return model


def parse_patterns(config: Any) -> dict[str, bool]:
    """{pattern of module names: whether}, from what `compress` takes."""
    given = {"*": True} if config is None else config
    if isinstance(given, Mapping) and isinstance(given.get("compress"), Mapping):
        given = given["compress"]
    if not isinstance(given, Mapping) or not all(isinstance(on, bool) for on in given.values()):
        raise ValueError(f"compress: expected a dictionary of patterns such as {{'*': True}}, got {config!r}")
    return {str(pattern): on for pattern, on in given.items()}


def is_wanted(name: str, patterns: dict[str, bool]) -> bool:
    """What the last pattern that fits says."""
    wanted = False
    for pattern, on in patterns.items():
        if fnmatchcase(name, pattern) or pattern == "default":
            wanted = on
    return wanted


def _is_packable(model: Model, row: dict[str, Any]) -> bool:
    quantizer = quantizer_of(model, f"{row['name']}.weight_quantizer")
    return row["name"] in model.stored_layers or (quantizer is not None and quantizer.enabled)


def pack(model: Model, rows: Iterable[dict[str, Any]]) -> None:
    """Put these modules' weights into model.packed, all or none."""
    from modelq.progress import progress

    packed = dict(model.packed)
    for row in progress(list(rows), "compress", unit="layer"):
        packed[row["name"]] = _stored(model, row["name"]) if row["name"] in model.stored_layers else packed_weight(model, row)
        model.checkpoint.release([row["weight"]])
    model.packed = packed


def repack(model: Model) -> None:
    """After a change of quantizers: what is packed is packed anew, or given up where its quantizer is off now."""
    rows = [row for row in model.modules if row["name"] in model.packed]
    model.packed = {}
    pack(model, [row for row in rows if _is_packable(model, row)])


def _stored(model: Model, module: str) -> PackedWeight:
    parts = model.checkpoint.parts(module)
    kept = {role: np.array(part) for role, part in parts.items() if role.startswith("weight")}
    return PackedWeight(model.stored_layers[module].form, kept)


def has_packed_form(model: Model, row: dict[str, Any]) -> bool:
    """Whether `packed_weight` can make one of a weight that its quantizer changes."""
    pair, quantizers = pair_of(model, row["name"]), stage_quantizers(quantizer_of(model, f"{row['name']}.weight_quantizer"))
    schemes = [stage.scheme for stage in quantizers]
    return pair is not None and pair.weight is not None and (len(schemes) == 1 or schemes == TWO_STAGES)


def packed_weight(model: Model, row: dict[str, Any]) -> PackedWeight:
    name = f"{row['name']}.weight_quantizer"
    pair, quantizers = pair_of(model, row["name"]), stage_quantizers(quantizer_of(model, name))
    if pair is None or not has_packed_form(model, row):
        raise ValueError(f"{name}: num_bits {quantizers[0].num_bits} with block_sizes {quantizers[0].block_sizes} is no scheme of `modelq "
                         f"formats`, so it has no packed form; leave it out with {{'*': True, '{row['name']}': False}}")
    size = block_extents(stages(model.settings[place_of(model, name).name])[0]).get(-1)
    weight = as_loaded(model, model.checkpoint.read(row["weight"]))
    if model.float32_weights:    # siblings share nothing in the reference's simulation, which such a model follows
        weight, found = own_weight(model, row, weight), own_weight_amax(model, row)
    else:
        weight, found = stated_weight(model, row, weight), stated_weight_amax(model, row)
    parts = dict(_core.quantize(weight, pair.weight, block_size=size, name=row["weight"], **found[0].arguments()))
    form = Form(pair, tuple(row["shape"]), size, fp8_stage=len(quantizers) > 1)
    if form.fp8_stage:
        second = np.asarray(found[1].amax if found[1].amax is not None else np.abs(weight).max(), np.float32).reshape(())
        parts["weight_scale_2"] = np.asarray(second / np.float32(scale_divisor("fp8")), np.float32)
    return PackedWeight(form, parts)


# Folding -----------------------------------------------------------------------------------------------------------------------

def fold_weight(model: Model, keep_attrs: bool = False) -> Model:
    """Make the fake-quantized weights the model's weights, and switch their quantizers off; returns the model.

    keep_attrs: keep the amax of those quantizers. What the model computes stays as it is; quantizers of activations are left alone.
    Quantizing the model again starts from the folded weights. There is nothing to export then but a model in high precision.
    ValueError: no weight is quantized.
    """
    if is_torch_model(model):
        from modelq.torch_models import quantize as torch_models

        torch_models.fold_weight(model, keep_attrs)
        return model
    rows = [row for row in model.modules if (q := quantizer_of(model, f"{row['name']}.weight_quantizer")) is not None and q.enabled]
    if not rows:
        raise ValueError("nothing to fold: no weight of this model is quantized; call modelq.quantization.quantize first")
    model.settle()
    frozen = copy.copy(model)
    settings, quantizers = dict(model.settings), dict(model.quantizers)
    for row in rows:
        name = place_of(model, f"{row['name']}.weight_quantizer").name
        settings[name] = replace(settings[name], enable=False)
        quantizers[name] = make_quantizer(settings[name])
        if keep_attrs:
            quantizers[name].amax = stage_quantizers(model.quantizers[name])[0].amax
    with all_or_nothing(model):
        model.checkpoint = FoldedCheckpoint(frozen, rows)
        model.settings, model.quantizers = settings, quantizers
        model.packed = {}
        model.connect()
    return model


class FoldedCheckpoint:
    """The checkpoint of a model as it was when its weights were folded; otherwise what it wraps."""

    def __init__(self, frozen: Model, rows: list[dict[str, Any]]):
        self._frozen, self._inner = frozen, frozen.checkpoint
        self._rows = {row["weight"]: row for row in rows}
        dtype = {name: "float32" for name in self._rows} if frozen.float32_weights else {}
        self.tensors = {name: replace(info, dtype=dtype.get(name, info.dtype)) for name, info in self._inner.tensors.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, name: str) -> np.ndarray:
        """A folded weight as its quantizer made it; any other tensor as it is."""
        row = self._rows.get(name)
        if row is None:
            return self._inner.read(name)
        return streaming.simulated(self._frozen, row)
