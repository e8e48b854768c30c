"""An export opened again: its weights are read as what they stand for, and its inputs are quantized as calibrated then."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.attributes import QuantizerAttributeConfig
from modelq.quantizers import make_quantizer

if TYPE_CHECKING:
    from modelq.model import Model

E4M3, E8M0 = (4, 3), (8, 0)


def restore_quantizers(model: Model) -> None:
    """Give every linear that the checkpoint stores quantized its input quantizer. Weight quantizers stay off: their work is done."""
    settings = {name: replace(setting, enable=False) for name, setting in model.settings.items()}
    amax = {}
    for module, stored in model.stored_layers.items():
        if stored.input_scheme is not None:
            name = f"{module}.input_quantizer"
            settings[name] = replace(settings[name], attributes=input_attributes(stored.input_scheme), enable=True)
            amax[name] = model.checkpoint.input_amax(module)
    model.settings = settings
    model.quantizers = {name: make_quantizer(setting) for name, setting in settings.items()}
    for name, value in amax.items():
        if value is not None:
            model.quantizers[name].amax = np.float32(value)
    model.quantized = True
    model.connect()


def input_attributes(scheme: str) -> QuantizerAttributeConfig:
    """The attributes of an activation quantizer of this scheme; "int8" is one integer scale per tensor."""
    if scheme == "int8":
        return QuantizerAttributeConfig(num_bits=8)
    row: Any = _core.schemes()[scheme]
    rows, columns = row["block"]
    if not columns and rows:    # a scale per row: of activations, per token, taken on the fly
        return QuantizerAttributeConfig(num_bits=row["num_bits"], type="dynamic", block_sizes={-1: None})
    if not columns:
        return QuantizerAttributeConfig(num_bits=row["num_bits"])
    scale_bits = E8M0 if row["scale"] == "e8m0" else E4M3
    return QuantizerAttributeConfig(num_bits=row["num_bits"], block_sizes={-1: columns, "type": "dynamic", "scale_bits": scale_bits})
