"""compress: weights of linears in memory in their packed form, dequantized when their module computes.

What is packed is what an export writes: linears that read one input share a smoothing scale and a maximum from then on.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modelq.arrays import give_back
from modelq.compression import is_wanted, packed_weight, parse_patterns
from modelq.progress import progress
from modelq.torch_models import unwrapped
from modelq.torch_models.quantize import settings_of
from modelq.torch_models.quantizer_module import SCALES
from modelq.torch_models.stand_in import StandIn


def compress(model: torch.nn.Module, config: Any = None) -> None:
    """See modelq.compression.compress. Stacked experts, convolutions and tied weights stay as they are."""
    model = unwrapped(model)
    settings_of(model)
    patterns, modules = parse_patterns(config), dict(model.named_modules())
    users: dict[int, int] = {}
    for parameter in (parameter for _, parameter in model.named_parameters(remove_duplicate=False)):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    stand_in = StandIn(model)
    stand_in.share_as_exports_do()
    rows = [row for row in stand_in.modules if row["expert"] is None and row["kind"] == "linear" and is_wanted(row["name"], patterns)
            and modules[row["name"]].weight_quantizer.is_enabled
            and users[id(modules[row["name"]]._parameters["weight"])] == 1]
    if not rows:
        raise ValueError("nothing to compress: no weight that fits is quantized; call modelq.quantization.quantize first")
    made = {row["name"]: packed_weight(stand_in, row) for row in progress(rows, "compress", unit="layer")}      # type: ignore[arg-type]
    stand_in.give_values(model)
    for name, packed in made.items():
        _hold(modules[name], packed)


def _hold(module: Any, packed: Any) -> None:
    weight = module._parameters["weight"]
    parts = {role: give_back(np.array(part), weight) for role, part in packed.parts.items()}
    module._parameters["weight"] = torch.nn.Parameter(parts["weight"], requires_grad=False)
    for name, role in zip(SCALES, ("weight_scale", "weight_scale_2")):
        setattr(module.weight_quantizer, name, parts.get(role))
    module.packed = (packed.form, str(weight.dtype).removeprefix("torch."))
