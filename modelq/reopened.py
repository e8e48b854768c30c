"""An export opened again: its weights are read as what they stand for, and its inputs are quantized as calibrated then."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.attributes import QuantizerAttributeConfig
from modelq.checkpoint.kv_cache import SCALE_DIVISOR
from modelq.checkpoint.quantized import amax_of
from modelq.experts import place_of
from modelq.low_rank import LowRank
from modelq.quantizers import KV_BIAS, make_quantizer
from modelq.rules import Setting

if TYPE_CHECKING:
    from modelq.model import Model

E4M3, E8M0 = (4, 3), (8, 0)


def restore_quantizers(model: Model) -> None:
    """Give every linear that the checkpoint stores quantized its input quantizer. Weight quantizers stay off: their work is done."""
    settings = {name: replace(setting, enable=False) for name, setting in model.settings.items()}
    amax, smoothing = {}, {}
    for module, stored in model.stored_layers.items():
        if (branch := model.checkpoint.low_rank(module)) is not None:
            model.low_rank[module] = LowRank(*branch)
        if stored.form.smoothed:
            smoothing[place_of(model, f"{module}.input_quantizer").name] = model.checkpoint.pre_quant_scale(module)
        if stored.input_scheme is not None:
            name = place_of(model, f"{module}.input_quantizer").name
            settings[name] = replace(settings[name], attributes=input_attributes(stored.input_scheme), enable=True)
            amax[name] = model.checkpoint.input_amax(module)
    cache = getattr(model.checkpoint, "cache", None)
    if cache is not None:
        settings |= cache_settings(settings, cache)
    model.settings = settings
    model.quantizers = {name: make_quantizer(setting) for name, setting in settings.items()}
    for name, value in amax.items():
        if value is not None:
            model.quantizers[name].amax = np.float32(value)
    if cache is not None:
        restore_cache(model, cache)
    for name, scale in smoothing.items():
        model.quantizers[name].pre_quant_scale = scale
    model.quantized = True
    model.connect()


def cache_settings(settings: dict[str, Setting], cache: Any) -> dict[str, Setting]:
    """The settings of the key and value quantizers as the checkpoint's cache asks for them. Keys may be rotated, then queries too."""
    plain = input_attributes(cache.scheme)
    found = {}
    for name, setting in settings.items():
        which = setting.slot.role.removesuffix("_bmm")
        if which in ("k", "v"):
            bias = KV_BIAS if (setting.slot.module, which) in cache.biases else None
            constant = (setting.slot.module, which) not in cache.scales
            attributes = replace(plain, bias=bias, rotate=cache.rotate and which == "k", use_constant_amax=constant)
            found[name] = replace(setting, attributes=attributes, enable=True)
        elif which == "q" and cache.rotate:
            found[name] = replace(setting, attributes=replace(plain, rotate=True), enable=False)
    return found


def restore_cache(model: Model, cache: Any) -> None:
    for (module, which), scale in cache.scales.items():
        model.quantizers[f"{module}.{which}_bmm_quantizer"].amax = amax_of(scale, np.float32(SCALE_DIVISOR))
    for (module, which), bias in cache.biases.items():
        model.quantizers[f"{module}.{which}_bmm_quantizer"].bias = bias


def input_attributes(scheme: str) -> QuantizerAttributeConfig:
    """The attributes of an activation quantizer of this scheme; "int8" is one integer scale per tensor, "int8_token" one per token."""
    if scheme == "int8":
        return QuantizerAttributeConfig(num_bits=8)
    if scheme == "int8_token":
        return QuantizerAttributeConfig(num_bits=8, type="dynamic", block_sizes={-1: None})
    row: Any = _core.schemes()[scheme]
    rows, columns = row["block"]
    if not columns and rows:    # a scale per row: of activations, per token, taken on the fly
        return QuantizerAttributeConfig(num_bits=row["num_bits"], type="dynamic", block_sizes={-1: None})
    if not columns:
        return QuantizerAttributeConfig(num_bits=row["num_bits"])
    scale_bits = E8M0 if row["scale"] == "e8m0" else E4M3
    return QuantizerAttributeConfig(num_bits=row["num_bits"], block_sizes={-1: columns, "type": "dynamic", "scale_bits": scale_bits})
