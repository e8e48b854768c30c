"""From the attributes of a config to quantizers of the C core, and what each needs to know before it can work."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from modelq import _core
from modelq.attributes import QuantizerAttributeConfig
from modelq.rules import Setting, stages

MICROSCALING = (8, 0)
KV_CAST_AMAX = 448.0  # what use_constant_amax stands for: the engine's FP8 attention scale of 1
KV_BIAS = {-2: None, -4: None, "type": "static"}  # a bias per head and channel, averaged over batch and tokens
_BLOCK_WORDS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")


class Sequential:
    """Quantizers one after the other, as one: INT4 blocks, then FP8, say. What is asked of it, the first answers."""

    def __init__(self, stages: tuple[Any, ...]):
        self.stages = stages

    def __call__(self, x: Any) -> Any:
        for stage in self.stages:
            x = stage(x)
        return x

    @property
    def enabled(self) -> bool:
        return all(stage.enabled for stage in self.stages)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for stage in self.stages:
            stage.enabled = value

    @property
    def pre_quant_scale(self) -> Any:
        return self.stages[0].pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        self.stages[0].pre_quant_scale = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stages[0], name)


def stage_quantizers(quantizer: Any) -> tuple[Any, ...]:
    """The `_core.Quantizer`s that a quantizer is made of: one, as a rule."""
    return quantizer.stages if isinstance(quantizer, Sequential) else (quantizer,)


def make_quantizer(setting: Setting) -> Any:
    """A `_core.Quantizer` (or several as one `Sequential`) that does what the setting says, switched as it says, without an amax
    (unless a constant one).

    ValueError names the quantizer, if the core has no such format. A disabled one may have any attributes: it is never asked.
    """
    made = tuple(_make_stage(setting, attributes) for attributes in stages(setting))
    return Sequential(made) if isinstance(setting.attributes, tuple) and len(made) > 1 else made[0]


def _make_stage(setting: Setting, attributes: QuantizerAttributeConfig) -> Any:
    try:
        quantizer = core_quantizer(attributes)
    except (ValueError, NotImplementedError) as error:
        if setting.enable:
            raise type(error)(f"{setting.slot.name}: {error}") from error
        quantizer = core_quantizer(QuantizerAttributeConfig())
    quantizer.enabled = setting.enable
    quantizer.rotate = rotated_columns(setting)
    set_constant_amax(quantizer, attributes)
    return quantizer


def set_constant_amax(quantizer: Any, attributes: QuantizerAttributeConfig) -> None:
    """The amax that attributes state, if they do."""
    constant = KV_CAST_AMAX if attributes.use_constant_amax else attributes.constant_amax
    if constant is not None:
        quantizer.amax = np.float32(constant)


def core_quantizer(attributes: QuantizerAttributeConfig) -> Any:
    return _core.Quantizer(num_bits=attributes.num_bits, axis=attributes.axis, block_sizes=attributes.block_sizes, type=attributes.type,
                           unsigned=attributes.unsigned, narrow_range=attributes.narrow_range)


def needs_amax(setting: Setting) -> bool:
    """Whether calibration must find its amax (of any stage)."""
    return any(attributes_need_amax(attributes) for attributes in stages(setting))


def attributes_need_amax(attributes: QuantizerAttributeConfig) -> bool:
    """Not for scales taken on the fly (dynamic, microscaling) nor for constant ones."""
    blocks = attributes.block_sizes or {}
    microscaling = blocks.get("type") == "dynamic" and blocks.get("scale_bits") == MICROSCALING
    constant = attributes.use_constant_amax or attributes.constant_amax is not None
    return attributes.type != "dynamic" and not microscaling and not constant


def without_rounding(quantizer: Any) -> Any:
    """A quantizer that rotates and smooths as another does, and rounds nothing."""
    plain = _core.Quantizer(enabled=False)
    plain.rotate, plain.pre_quant_scale = quantizer.rotate, quantizer.pre_quant_scale
    return plain


def rotated_columns(setting: Setting) -> int:
    """How many columns of a head are rotated together by a Hadamard matrix, 0 for none: the largest power of two that divides the
    head, unless the rule says. (Rotation of queries and keys alike leaves their products as they were.)"""
    attributes, slot = stages(setting)[0], setting.slot
    rotate = attributes.rotate
    wanted = rotate if isinstance(rotate, dict) else {"enable": rotate}
    if slot.parent != "Attention" or slot.shape is None or not wanted.get("enable", True):
        return 0
    width = slot.shape[-1]
    size = wanted.get("block_size") or width & -width
    if size & (size - 1) or width % size or size < 2:
        raise ValueError(f"{slot.name}: rotate: block_size {size} is no power of two that divides the {width} columns of a head; use "
                         f"{width & -width}")
    return size


def calibrator_of(setting: Setting) -> str:
    """The kind of statistics that the quantizer's amax (and bias) are made of."""
    bias = stages(setting)[0].bias
    if bias is None:
        return "max"
    return "affine" if bias.get("method", "mean") == "mean" else "affine_max_min"


def takes_histogram(setting: Setting) -> bool:
    """Whether a histogram can say an activation quantizer's range: one static scale, of integers or FP8, without a bias."""
    attributes = stages(setting)[0]
    eligible = isinstance(attributes.num_bits, int) or attributes.num_bits == (4, 3)
    return eligible and attributes.axis is None and attributes.block_sizes is None and attributes.bias is None


def weight_amax(setting: Setting, weight: np.ndarray) -> list[np.ndarray | None]:
    """float32 amax of a [O, I] weight for each stage (all look at the weight itself), None where a stage needs none."""
    return [stage_amax(attributes, weight) if attributes_need_amax(attributes) else None for attributes in stages(setting)]


def stage_amax(attributes: QuantizerAttributeConfig, weight: np.ndarray) -> np.ndarray:
    """In the grain that the attributes ask for: one, per axis kept, or per static block."""
    blocks = block_extents(attributes)
    if blocks and (attributes.block_sizes or {}).get("type") != "dynamic":
        return _core.amax(weight, block=(blocks.get(-2, 1), blocks[-1]))
    return _core.amax(weight, axis=attributes.axis)


class Found(NamedTuple):
    """What calibration found for one quantizer."""
    amax: Any = None
    bias: Any = None
    pre_quant_scale: Any = None
    global_amax: Any = None


def found_values(quantizer: Any) -> list[Found]:
    """What calibration found for a quantizer, by stage, to be put back by `set_found_values`."""
    return [Found(stage.amax, stage.bias, stage.pre_quant_scale, stage.global_amax) for stage in stage_quantizers(quantizer)]


def set_found_values(quantizer: Any, values: list[Found]) -> None:
    for stage, found in zip(stage_quantizers(quantizer), values):
        stage.amax, stage.bias, stage.pre_quant_scale = found.amax, found.bias, found.pre_quant_scale
        if has_static_levels(stage):
            stage.global_amax = found.global_amax


def named_values(name: str, quantizer: Any) -> dict[str, np.ndarray]:
    """What was found for a quantizer, by "name:stage:what", for a file."""
    return {f"{name}:{index}:{what}": np.asarray(value) for index, found in enumerate(found_values(quantizer))
            for what, value in found._asdict().items() if value is not None}


def set_named_value(quantizers: Mapping[str, Any], key: str, value: np.ndarray) -> None:
    """Put one of these back."""
    name, stage, what = key.split(":")
    setattr(stage_quantizers(quantizers[name])[int(stage)], what, value)


def has_static_levels(quantizer: Any) -> bool:
    """Whether calibration chooses the maxima of its blocks, beside which the tensor has one of its own (static NVFP4)."""
    return bool(quantizer.second_divisor) and not quantizer.is_dynamic


def block_extents(attributes: QuantizerAttributeConfig) -> dict[int, int]:
    """{-1: columns, -2: rows} of a block, for a matrix; empty if the scale does not go by blocks."""
    blocks = attributes.block_sizes or {}
    return {axis if axis < 0 else axis - 2: size for axis, size in blocks.items() if axis not in _BLOCK_WORDS and size is not None}
