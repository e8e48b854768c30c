"""Checks of the numbers: finite, positive, the right way up, and shared where engines fuse."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from modelq.checkpoint.base import TensorInfo
from modelq.verify.engines import siblings
from modelq.verify.findings import ERROR, NOTE, Finding
from modelq.verify.layouts import Part
from modelq.verify.opened import Export, Layer

AGAIN = "export again"
# What the largest weight, and the largest activation, of a language model may be. A scale that is upside down leaves this by far.
WEIGHTS, ACTIVATIONS = (1e-9, 1e3), (1e-9, 1e6)
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
NORMED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PLAIN_NORMS = ("llama", "mistral", "qwen2", "qwen3")       # families whose linears read x / rms(x) * weight


def values(export: Export) -> Iterator[Finding]:
    """Every scale is a positive, finite number of a size that weights and activations have."""
    for layer in export.quantized:
        for part in layer.layout.parts if layer.layout else ():
            info = layer.parts.get(part.suffix)
            if info is not None and part.sense and 0 not in info.shape:
                for problem, remedy in SENSES[part.sense](export, layer, part, info):
                    yield Finding("values", info.name, problem, remedy)
    for scales in export.kv_scales().values():
        for info in scales.values():
            for problem, remedy in _multiplier(export.read(info), 448, ACTIVATIONS):
                yield Finding("values", info.name, problem, remedy)


Problems = Iterator[tuple[str, str]]


def _multiplier(scales: np.ndarray, top: float, limits: tuple[float, float], reciprocal: bool = False) -> Problems:
    if not np.isfinite(scales).all() or (scales <= 0).any():
        yield f"holds {_worst(scales)}, not a positive number", "calibrate again, and look for inf and nan in the weights"
        return
    amax = top / float(scales.min()) if reciprocal else float(scales.max()) * top
    if not limits[0] <= amax <= limits[1]:
        direction = "one divided by the scale" if reciprocal else "a factor, amax / largest code"
        yield f"stands for an absolute maximum of {amax:.3g}: upside down?", f"this tensor is {direction}; export again"


def _worst(scales: np.ndarray) -> float:
    wrong = scales[~(np.isfinite(scales) & (scales > 0))]
    return float(wrong.reshape(-1)[0])


def _scale(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    yield from _multiplier(export.read(info), part.top, WEIGHTS)


def _reciprocal(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    yield from _multiplier(export.read(info), part.top, WEIGHTS, reciprocal=True)


def _input(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    """Behind an RMS norm no number is larger than sqrt(n) times the largest weight of the norm."""
    scale, reciprocal = export.read(info), part.sense.endswith("reciprocal")
    limits, bound = ACTIVATIONS, _norm_bound(export, layer)
    yield from _multiplier(scale, part.top, limits, reciprocal)
    if bound is not None and np.isfinite(scale).all() and (scale > 0).all():
        amax = part.top / float(scale.min()) if reciprocal else float(scale.max()) * part.top
        if limits[0] <= amax <= limits[1] and amax > bound * 1.02:      # bfloat16 rounds
            yield (f"stands for inputs of up to {amax:.3g}, the norm before it lets none over {bound:.3g} through: upside down?",
                   "calibrate and export again")


def _norm_bound(export: Export, layer: Layer) -> float | None:
    parent, _, leaf = layer.module.rpartition(".")
    block, _, place = parent.rpartition(".")
    name = f"{block}.{NORMS.get(place)}.weight"
    if leaf not in NORMED or name not in export.checkpoint.tensors or export.checkpoint.config.get("model_type") not in PLAIN_NORMS:
        return None
    if "pre_quant_scale" in layer.parts:
        return None
    weight = export.read(export.checkpoint.tensors[name])
    return float(np.sqrt(weight.size) * np.abs(weight).max())


def _block(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    """E4M3 block scales: 0 is what an empty block may have."""
    scales = export.read(info)
    if not np.isfinite(scales).all() or (scales < 0).any():
        yield "holds a nan or a negative block scale", "export again, and look for inf and nan in the weights"
    elif scales.max() == 0:
        yield "holds only zeros, so the weight is 0", AGAIN


def _exponent(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    bytes_ = export.read(info)
    if (bytes_ == 255).any():
        yield "holds 255, which is nan in E8M0", "export again, and look for inf and nan in the weights"
        return
    amax = 2.0 ** (int(bytes_.max()) - 127) * part.top
    if not WEIGHTS[0] <= amax <= WEIGHTS[1]:
        yield f"stands for an absolute maximum of {amax:.3g}: exponent without its bias of 127, or upside down?", AGAIN


def _smooth(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    yield from _multiplier(export.read(info), 1.0, (0, np.inf))


def _shape(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    stored = tuple(int(size) for size in export.read(info).reshape(-1))
    if layer.shape is not None and stored != tuple(layer.shape):
        yield f"says {list(stored)}, the packed weight stands for {list(layer.shape)}", AGAIN


def _gptq_zeros(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    said = layer.said or {}
    if said.get("sym") and (export.read(info).view(np.uint32) != 0x77777777).any():
        yield "holds zero points other than 8 (stored as 7), and the config says sym", AGAIN


def _group_index(export: Export, layer: Layer, part: Part, info: TensorInfo) -> Problems:
    group = layer.sizes().get("group")
    stored = export.read(info)
    if not (layer.said or {}).get("desc_act") and group and (stored != np.arange(stored.size) // group).any():
        yield "reorders columns, and the config says desc_act false", AGAIN


SENSES: dict[str, Callable[[Export, Layer, Part, TensorInfo], Problems]] = {
    "scale": _scale, "reciprocal": _reciprocal, "input": _input, "input reciprocal": _input, "block": _block, "exponent": _exponent,
    "smooth": _smooth, "shape": _shape, "gptq zeros": _gptq_zeros, "group index": _group_index,
}


def shared(export: Export) -> Iterator[Finding]:
    """Scales that fused siblings have in common are equal in all of them, to the bit."""
    if not export.engine.fuses:
        return
    for group in siblings(export.layers):
        layers = [export.layers[module] for module in group if export.layers[module].stored_quantized]
        if len(layers) > 1 and all(layer.layout == layers[0].layout for layer in layers) and layers[0].layout:
            for part in layers[0].layout.parts:
                yield from _shared(export, layers, part)


def _shared(export: Export, layers: list[Layer], part: Part) -> Iterator[Finding]:
    found = {layer.module: export.read(info).reshape(-1)
             for layer in layers if part.shared and (info := layer.parts.get(part.suffix)) is not None}
    if not found:
        return
    usual = max(found, key=lambda module: sum(np.array_equal(value, found[module]) for value in found.values()))
    for module, value in found.items():
        if not np.array_equal(value, found[usual]):
            rest = usual.rpartition(".")[2]
            if part.shared == "always":
                yield Finding("shared", f"{module}.{part.suffix}", f"differs from {rest}'s, and {export.engine_name} wants them equal",
                              "export again: modelq shares it", ERROR)
            elif part.suffix == "input_scale" and ".experts." in module and export.dialect == "compressed-tensors":
                yield Finding("shared", f"{module}.{part.suffix}", f"differs from {rest}'s, which {export.engine_name} refuses of experts",
                              AGAIN)
            elif part.suffix == "weight_scale":
                yield Finding("shared", f"{module}.{part.suffix}",
                              f"differs from {rest}'s: {export.engine_name} rounds the smaller ones again",
                              "nothing has to be done; per-channel scales avoid it", NOTE)
