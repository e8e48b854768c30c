"""Weights as a model computes with them that simulates their quantization."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.experts import own_part, place_of, quantizer_of
from modelq.groups import pair_of
from modelq.quantizers import Found, block_extents, found_values, make_quantizer, set_found_values, stage_quantizers
from modelq.rules import stages
from modelq.smoothing import as_loaded, own_weight, stated_weight
from modelq.stated import as_divided, of_stack, stacks_of, stated_weight_amax

if TYPE_CHECKING:
    from modelq.model import Model


def fake_quantize(model: Model, module: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """The values that the exported weight will dequantize to. A model loaded as float32 follows the reference's simulation instead,
    which multiplies by reciprocal scales where an export divides: one code apart on ties."""
    name = f"{module['name']}.weight_quantizer"
    quantizer, setting = quantizer_of(model, name), model.settings[place_of(model, name).name]
    if model.float32_weights and module["name"] not in getattr(model, "kept_blocks", {}):
        if place_of(model, name).parts > 1 or (module["expert"] is not None and stacks_of(model) is not None):
            found = [Found(of_stack(model, module, index, own_part(model, name, stage.amax)), global_amax=stage.global_amax)
                     for index, stage in enumerate(stage_quantizers(quantizer))]
            quantizer = make_quantizer(setting)
            set_found_values(quantizer, found)
        branch = model.low_rank.get(module["name"])
        if branch is None:
            return quantizer(as_loaded(model, tensor))
        plain = make_quantizer(setting)
        set_found_values(plain, [found._replace(pre_quant_scale=None) for found in found_values(quantizer)])
        return plain(own_weight(model, module, as_loaded(model, tensor)))
    tensor, pair = stated_weight(model, module, tensor), pair_of(model, module["name"])
    if pair is None or pair.weight is None:
        plain = make_quantizer(setting)
        set_found_values(plain, [Found(stated.amax) for stated in stated_weight_amax(model, module)])
        return plain(tensor)
    dtype, tensor = tensor.dtype, as_divided(model, module, tensor)
    for scheme, size, arguments in weight_stages(model, module):
        tensor = _core.fake_quantize(tensor, scheme, block_size=size, name=module["weight"], **arguments)
    return tensor.astype(dtype, copy=False)


def weight_stages(model: Model, module: dict[str, Any]) -> list[tuple[Any, int | None, dict[str, Any]]]:
    """(scheme, block size, arguments of `_core.quantize`) of each of the quantizers in a row of a weight whose first has a scheme."""
    name, pair = f"{module['name']}.weight_quantizer", pair_of(model, module["name"])
    assert pair is not None
    schemes = [pair.weight] + [stage.scheme for stage in stage_quantizers(quantizer_of(model, name))[1:]]
    sizes = [block_extents(attributes).get(-1) for attributes in stages(model.settings[place_of(model, name).name])]
    return [(scheme, size, stated.arguments()) for scheme, size, stated in zip(schemes, sizes, stated_weight_amax(model, module))]
