"""MXFP4 to NVFP4 without loss: the scales of a weight that is stored in MXFP4 become those of static NVFP4 blocks (Model Optimizer's
cast_mxfp4_to_nvfp4).

With k the exponent of a block of 32 and K the largest, the second-level scale is 2 ** (K - 8), and a block's FP8 scale 2 ** (k - K + 8),
which FP8 holds exactly for k >= K - 17; so codes stay what they were. Smaller blocks get a scale of their largest value.
"""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.calibration.weights import quantized_weights, take_amax
from modelq.experts import joined_amax
from modelq.groups import siblings
from modelq.quantizers import make_quantizer, stage_quantizers
from modelq.rules import Setting, stages

if TYPE_CHECKING:
    from modelq.model import Model
    from modelq.streaming import Part

BIAS, LARGEST, SPAN = 127, 8, 17        # of E8M0; the exponent of FP8's largest power of two; how many below it are exact
CODE_MAX, SCALE_MAX = np.float32(6), np.float32(448)


def keep_mxfp4(model: Model, part: Part) -> None:
    """Give weights of a part that are stored in MXFP4, and are to become NVFP4, the static blocks that keep their values."""
    layers = getattr(model.checkpoint, "layers", {})
    stored = {row["name"] for row in part.modules if row["name"] in layers and layers[row["name"]].scheme == "mxfp4"}
    stored |= {row["name"] for row in part.modules} & getattr(model.checkpoint, "in_mxfp4", set())
    if not stored:
        return
    found = [(name, setting, members) for name, setting, members in quantized_weights(model, part)
             if becomes_nvfp4(setting) and all(row["name"] in stored for row in members)]
    together = {row["name"]: tuple(other["name"] for other in rows) for rows in siblings(part.modules) for row in rows}
    settings, quantizers = dict(model.settings), dict(model.quantizers)
    for name, setting, members in found:
        largest = max(largest_exponent(model, other) for row in members for other in together[row["name"]] if other in stored)
        settings[name] = with_static_blocks(setting)
        quantizers[name] = make_quantizer(settings[name])
        blocks = [block_maxima(model.checkpoint.parts(row["name"]), part.tensors[row["weight"]], largest) for row in members]
        model.settings, model.quantizers = settings, quantizers
        take_amax(model, name, [joined_amax(blocks)])
        stage_quantizers(quantizers[name])[0].global_amax = global_amax(largest)


def becomes_nvfp4(setting: Setting) -> bool:
    """Whether a weight's setting is NVFP4 in dynamic blocks of 16, and nothing behind it."""
    attributes = stages(setting)[0]
    blocks = attributes.block_sizes or {}
    return (len(stages(setting)) == 1 and attributes.num_bits == (2, 1) and blocks.get(-1) == 16 and blocks.get("type") == "dynamic"
            and blocks.get("scale_bits") == (4, 3) and not blocks.get("four_over_six"))


def with_static_blocks(setting: Setting) -> Setting:
    """NVFP4 in static blocks instead of dynamic ones: the scales found are those to be written."""
    attributes: Any = setting.attributes
    return replace(setting, attributes=replace(attributes, block_sizes={**(attributes.block_sizes or {}), "type": "static"}))


def largest_exponent(model: Model, module: str) -> int:
    """K of one weight; blocks of scale 0 hold nothing and do not count."""
    stack = getattr(model.checkpoint, "stack_scales", None)     # experts in one tensor have one second-level scale
    scales = model.checkpoint.parts(module)["weight_scale"] if stack is None else stack(module)
    return int(scales.max(initial=0)) - BIAS if scales.any() else 0


def block_maxima(parts: Any, weight: np.ndarray, largest: int) -> np.ndarray:
    """float32 [rows, columns / 16]: what the maxima of NVFP4's blocks have to be. parts: the weight in MXFP4; weight: its values."""
    exponents = parts["weight_scale"].astype(np.int32) - BIAS
    maxima = np.where(exponents >= largest - SPAN, CODE_MAX * np.exp2(exponents.astype(np.float32)), _core.amax(weight, block=(1, 32)))
    empty = CODE_MAX * np.float32(2.0 ** (largest - SPAN))
    return np.repeat(np.where(parts["weight_scale"] == 0, empty, maxima).astype(np.float32), 2, axis=1)


def global_amax(largest: int) -> np.float32:
    """The maximum that makes the second-level scale 2 ** (K - 8)."""
    return CODE_MAX * SCALE_MAX * np.float32(2.0 ** (largest - LARGEST))

