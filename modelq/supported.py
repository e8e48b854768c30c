"""What of a config can work on a model, checked before any work."""
from __future__ import annotations

import warnings
from collections.abc import Iterable

from modelq.attributes import QuantizerAttributeConfig
from modelq.quantizers import KV_BIAS, block_extents, takes_histogram
from modelq.rules import Setting, Slot, describe_rule, stages
from modelq.tables import listed


def check_settings(settings: Iterable[Setting], head_dim: int) -> None:
    """ValueError or NotImplementedError for an enabled quantizer that cannot work where it is."""
    for setting in settings:
        if setting.enable:
            _check_supported(setting)
            _check_blocks(setting.slot, stages(setting)[0], head_dim)


def _check_supported(setting: Setting) -> None:
    attributes = stages(setting)[0]
    unsupported = {
        "a list of attributes (quantizers one after the other) for anything but a weight":
        len(stages(setting)) > 1 and setting.slot.role != "weight",
        "a quantizer here": setting.slot.layer < 0 and (setting.slot.role == "output" or setting.slot.parent != "nn.Linear") and
        setting.slot.role != "weight",
        "rotate": bool(attributes.rotate) and setting.slot.parent != "Attention",
        "rotate with mode 'rotate_back'": isinstance(attributes.rotate, dict) and attributes.rotate.get("mode") == "rotate_back",
        "bias outside attention": attributes.bias is not None and setting.slot.parent != "Attention",
        f"bias {attributes.bias}: anything but {KV_BIAS}": attributes.bias is not None and not _is_kv_bias(attributes),
        "backend": attributes.backend is not None, "fake_quant=False": not attributes.fake_quant,
        f"calibrator={attributes.calibrator!r} here": attributes.calibrator != "max" and not _is_histogram(setting)}
    for what, used in unsupported.items():
        if used:
            rule = f" (rule {describe_rule(setting.rule)})" if setting.rule else ""
            raise NotImplementedError(f"{setting.slot.name}{rule}: {what} is not available yet")


def _is_histogram(setting: Setting) -> bool:
    return stages(setting)[0].calibrator == "histogram" and setting.slot.role != "weight" and takes_histogram(setting)


def _is_kv_bias(attributes: QuantizerAttributeConfig) -> bool:
    bias = attributes.bias or {}
    axes = {axis if axis < 0 else axis - 4 for axis in bias if isinstance(axis, int)}
    return axes == {-2, -4} and bias.get("type", "static") == "static"


def _check_blocks(slot: Slot, attributes: QuantizerAttributeConfig, head_dim: int) -> None:
    if (words := partial_block(slot, attributes, head_dim)) and not _is_simulated_partly(slot, attributes):
        raise ValueError(words)


def partial_block(slot: Slot, attributes: QuantizerAttributeConfig, head_dim: int) -> str:
    """What is wrong if blocks along the columns do not divide them, which no checkpoint can hold; empty if nothing is."""
    blocks = block_extents(attributes)
    if -1 not in blocks or -2 in blocks:  # blocks of rows and columns may be partial at the edges
        return ""
    size, width = blocks[-1], _width(slot, head_dim)
    if width % size == 0:
        return ""
    options = " or ".join(str(option) for option in fitting_blocks(width, size))
    return (f"{slot.name}: {width} columns with block {size}: use block_size {options}, or leave it in high precision with "
            f"{{'quantizer_name': '{slot.module}.*', 'enable': False}}")


def _is_simulated_partly(slot: Slot, attributes: QuantizerAttributeConfig) -> bool:
    """Integer weights with a shorter last block can be tried, if not written."""
    static = (attributes.block_sizes or {}).get("type", "static") == "static"
    return slot.role == "weight" and isinstance(attributes.num_bits, int) and static


def warn_partial_blocks(settings: Iterable[Setting], head_dim: int) -> None:
    found = [words for setting in settings if setting.enable and setting.slot.role == "weight"
             and (words := partial_block(setting.slot, stages(setting)[0], head_dim))]
    if found:
        warnings.warn(f"{listed(found, 1)}. The last block of each row is shorter: this "
                      "can be simulated, but no checkpoint can hold it", UserWarning, stacklevel=3)


def _width(slot: Slot, head_dim: int) -> int:
    """Columns of what the quantizer sees."""
    if slot.shape is None or slot.parent == "Attention":
        return head_dim
    return slot.shape[0] if slot.role == "output" and slot.parent == "nn.Linear" else slot.shape[1]


def fitting_blocks(width: int, size: int) -> list[int]:
    """The block sizes nearest to `size`, below and above, that divide the width: multiples of 64 if there are any, else of 16."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    for multiple in (64, 16, 1):
        if multiple <= size and (fitting := [d for d in divisors if d % multiple == 0]):
            below, above = [d for d in fitting if d < size], [d for d in fitting if d > size]
            return below[-1:] + above[:1]
    return divisors[-1:]
