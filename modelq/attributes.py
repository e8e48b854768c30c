"""The attributes of one quantizer (Model Optimizer's `QuantizerAttributeConfig`) and the checks on each of them."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# (exponent, mantissa) bits: the first two also with static scales, the others only in dynamic blocks.
_STATIC_FLOATS = ((4, 3), (2, 1))
_BLOCK_FLOATS = ((5, 2), (1, 2), (3, 2), (2, 3))
_BLOCK_WORDS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")


@dataclass(frozen=True)
class QuantizerAttributeConfig:
    """What one quantizer does.

    num_bits: an integer width, or (exponent, mantissa) bits of a float, also spelled "E4M3".
    axis: the axes that keep a scale of their own (None: one scale for the tensor); not together with block_sizes.
    block_sizes: {axis: size}, size None for the whole axis; "type" static or dynamic, "scale_bits" the format of the scales.
    type: "dynamic" takes the scale from each tensor as it passes, so nothing is calibrated.
    use_constant_amax: simulate with amax 448 and export no scale; constant_amax: a fixed amax, also exported.
    """

    enable: bool = True
    num_bits: int | tuple[int, int] | str = 8
    effective_bits: float | None = None
    axis: int | tuple[int, ...] | None = None
    fake_quant: bool = True
    unsigned: bool = False
    narrow_range: bool = False
    learn_amax: bool = False
    type: str = "static"
    block_sizes: dict[Any, Any] | None = None
    bias: dict[Any, Any] | None = None
    trt_high_precision_dtype: str = "Float"
    calibrator: Any = "max"
    rotate: bool | dict[str, Any] = False
    pass_through_bwd: bool = True
    backend: str | None = None
    backend_extra_args: dict[str, Any] | None = None
    use_constant_amax: bool = False
    constant_amax: float | None = None

    def __post_init__(self) -> None:
        for name, normalize in (("num_bits", _pair), ("axis", _axes), ("block_sizes", _block_sizes), ("bias", _integer_keys)):
            object.__setattr__(self, name, normalize(getattr(self, name)))
        _check_plain_fields(self)
        _check_num_bits(self)
        _check_block_sizes(self)
        _check_bias(self.bias)
        _check_amax(self)

    @classmethod
    def parse(cls, given: Any, where: str = "cfg") -> QuantizerAttributeConfig:
        """From what the user wrote. `where` names the rule in error messages."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}: expected a dictionary of quantizer attributes, got {given!r}")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{where}: unknown quantizer attribute {name!r}: known are {', '.join(known)}")
        if dict(given) == {"enable": True}:
            raise ValueError(f"{where}: {{'enable': True}} alone says nothing: give num_bits too, or drop cfg and keep enable")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


# Spellings -------------------------------------------------------------------------------------------------------------------

def _pair(value: Any) -> Any:
    """[4, 3] and "E4M3" as (4, 3); anything else as it is."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    match = re.fullmatch(r"[eE](\d+)[mM](\d+)", value) if isinstance(value, str) else None
    return (int(match[1]), int(match[2])) if match else value


def _axes(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _integer_keys(value: Any) -> Any:
    """JSON knows only text keys: "-1" is read as -1."""
    if not isinstance(value, Mapping):
        return value
    return {int(k) if isinstance(k, str) and re.fullmatch(r"-?\d+", k) else k: v for k, v in value.items()}


def _block_sizes(value: Any) -> Any:
    value = _integer_keys(value)
    if isinstance(value, dict) and "scale_bits" in value:
        value["scale_bits"] = _pair(value["scale_bits"])
    return value


# Checks ----------------------------------------------------------------------------------------------------------------------

def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_effective_bits(value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 16):
        raise ValueError(f"effective_bits must be in (0, 16], got {value!r}")


def _check_plain_fields(attributes: QuantizerAttributeConfig) -> None:
    for name in ("enable", "fake_quant", "unsigned", "narrow_range", "learn_amax", "pass_through_bwd", "use_constant_amax"):
        if not isinstance(getattr(attributes, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(attributes, name)!r}")
    for name, allowed in (("type", ("static", "dynamic")), ("trt_high_precision_dtype", ("Float", "Half", "BFloat16"))):
        if getattr(attributes, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(attributes, name)!r}")
    if isinstance(attributes.calibrator, str) and attributes.calibrator not in ("max", "histogram"):
        raise ValueError(f"calibrator must be max or histogram, got {attributes.calibrator!r}")
    if attributes.learn_amax:
        raise ValueError("learn_amax is no longer supported")
    axis = attributes.axis
    if axis is not None and not all(_is_int(a) for a in (axis if isinstance(axis, tuple) else (axis,))):
        raise ValueError(f"axis must be None, an integer or a tuple of integers, got {axis!r}")
    check_effective_bits(attributes.effective_bits)
    _check_rotate(attributes.rotate)


def _check_rotate(rotate: Any) -> None:
    if isinstance(rotate, bool):
        return
    known = ("enable", "mode", "rotate_fp32", "block_size")
    if not isinstance(rotate, Mapping) or set(rotate) - set(known):
        raise ValueError(f"rotate must be True, False or a dictionary of {', '.join(known)}, got {rotate!r}")
    if rotate.get("mode", "rotate") not in ("rotate", "rotate_back"):
        raise ValueError(f"rotate: mode must be rotate or rotate_back, got {rotate['mode']!r}")
    size = rotate.get("block_size")
    if size is not None and not (_is_int(size) and size > 0):
        raise ValueError(f"rotate: block_size must be a positive integer, got {size!r}")


def _check_num_bits(attributes: QuantizerAttributeConfig) -> None:
    bits = attributes.num_bits
    if attributes.backend is not None:  # a custom backend reads num_bits in its own way
        return
    if _is_int(bits) and bits >= 1:
        return
    if not isinstance(bits, tuple) or len(bits) != 2 or not all(_is_int(b) for b in bits):
        raise ValueError(f"num_bits must be a positive integer, (exponent, mantissa) bits such as (4, 3), or text such as 'E4M3', "
                         f"got {bits!r}")
    if bits not in _STATIC_FLOATS + _BLOCK_FLOATS:
        raise ValueError(f"num_bits {bits!r} is no known float format: FP8 is (4, 3) or (5, 2), FP6 (3, 2) or (2, 3), FP4 (2, 1)")
    if bits in _BLOCK_FLOATS and (attributes.block_sizes or {}).get("type") != "dynamic":
        raise ValueError(f"num_bits {bits!r} is only supported in dynamic blocks: set block_sizes with 'type': 'dynamic'")


def _check_block_sizes(attributes: QuantizerAttributeConfig) -> None:
    blocks = attributes.block_sizes
    if blocks is None:
        return
    if not isinstance(blocks, Mapping):
        raise ValueError(f"block_sizes must be a dictionary such as {{-1: 16, 'type': 'dynamic'}}, got {blocks!r}")
    if attributes.axis is not None:
        raise ValueError("axis must be None when block_sizes is given")
    for key, value in blocks.items():
        if not _is_int(key) and key not in _BLOCK_WORDS:
            raise ValueError(f"block_sizes: unknown key {key!r}: an axis (an integer) or one of {', '.join(_BLOCK_WORDS)}")
        if _is_int(key) and value is not None and not (_is_int(value) and value > 0):
            raise ValueError(f"block_sizes: the size for axis {key} must be a positive integer or None, got {value!r}")
    if blocks.get("type", "static") not in ("static", "dynamic"):
        raise ValueError(f"block_sizes: type must be static or dynamic, got {blocks['type']!r}")
    if blocks.get("type") == "dynamic" and sum(_is_int(key) for key in blocks) != 1:
        raise ValueError("block_sizes: dynamic blocks go along exactly one axis, the last")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ValueError(f"bias must be a dictionary such as {{-2: None, 'type': 'static'}}, got {bias!r}")
    for name, allowed in (("type", ("static", "dynamic")), ("method", ("mean", "max_min"))):
        if bias.get(name, allowed[0]) not in allowed:
            raise ValueError(f"bias: {name} must be one of {', '.join(allowed)}, got {bias[name]!r}")
    axes = [key for key in bias if key not in ("type", "method")]
    if not axes or not all(_is_int(axis) for axis in axes):
        raise ValueError(f"bias: name at least one axis by its integer, got {dict(bias)!r}")


def _check_amax(attributes: QuantizerAttributeConfig) -> None:
    value = attributes.constant_amax
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
        raise ValueError(f"constant_amax must be a positive number, got {value!r}")
    if value is not None and attributes.use_constant_amax:
        raise ValueError("constant_amax and use_constant_amax exclude each other")
