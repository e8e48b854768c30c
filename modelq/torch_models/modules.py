"""Modules that quantize: a module's class is replaced by a subclass of it, whose inputs, weight and outputs go through quantizers."""
from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from modelq.nn.tensor_quantizer import STATE, TensorQuantizer
from modelq.quantizers import Sequential
from modelq.rules import Slot
from modelq.torch_models.attention import intercept, is_attention, let_go

# Class: its name in rules, and where it has quantizers. The order is the reference's.
_CONVOLUTIONS = tuple(getattr(torch.nn, f"Conv{kind}{rank}d") for kind in ("", "Transpose") for rank in (1, 2, 3))
ROLES: dict[type, tuple[str, ...]] = {torch.nn.Linear: ("input", "output", "weight"), torch.nn.Embedding: ("weight", "input", "output"),
                                      **{convolution: ("input", "output", "weight") for convolution in _CONVOLUTIONS}}
ATTENTION_ROLES = ("q_bmm", "k_bmm", "v_bmm")


class QuantizerModule(TensorQuantizer, torch.nn.Module):
    """A TensorQuantizer in a model: seen by named_modules(), kept by state_dict() (`_amax`, `_pre_quant_scale`, ...)."""

    def __init__(self, quant_attribute_cfg: Any = None, amax: Any = None, if_quant: bool = True, if_calib: bool = False,
                 name: str = "quantizer"):
        torch.nn.Module.__init__(self)
        TensorQuantizer.__init__(self, quant_attribute_cfg, amax, if_quant, if_calib, name)

    __call__ = torch.nn.Module.__call__         # its hooks are run

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(x, self)
        return TensorQuantizer.__call__(self, x)

    @property
    def rounds(self) -> bool:
        """Whether it rounds while it is on."""
        return self._if_quant

    @rounds.setter
    def rounds(self, value: bool) -> None:
        self._if_quant = value

    def describe_stages(self, name: str) -> list[tuple[str, str]]:
        """(name, line of a summary), one for each of several in a row."""
        return [(name, self.describe())]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, value in self.state().items():
            destination[f"{prefix}_{name}"] = torch.from_numpy(value.copy())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
                              unexpected_keys: list[str], error_msgs: list[str]) -> None:
        given = {name: state_dict[f"{prefix}_{name}"].numpy() for name in STATE if f"{prefix}_{name}" in state_dict}
        try:
            self.load_state(given)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}: {error}")


class SequentialQuantizer(torch.nn.Sequential):
    """Quantizers one after the other (INT4 blocks, then FP8), as one. What is asked of it, the first answers; all look at the array
    itself."""

    def __init__(self, *stages: QuantizerModule):
        super().__init__(*stages)

    @property
    def native(self) -> Any:
        return Sequential(tuple(stage.core for stage in self))

    @property
    def is_enabled(self) -> bool:
        return all(stage.is_enabled for stage in self)

    @property
    def needs_calibration(self) -> bool:
        return any(stage.needs_calibration for stage in self)

    @property
    def amax(self) -> Any:
        return self[0].amax

    @property
    def pre_quant_scale(self) -> Any:
        return self[0].pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        self[0].pre_quant_scale = value

    @property
    def rounds(self) -> bool:
        return self[0].rounds

    @rounds.setter
    def rounds(self, value: bool) -> None:
        for stage in self:
            stage.rounds = value

    def collect(self, x: torch.Tensor) -> None:
        for stage in self:
            if stage.needs_calibration:
                stage.collect(x)

    def load_calib_amax(self) -> None:
        for stage in self:
            if stage.needs_calibration:
                stage.load_calib_amax()

    def enable(self) -> None:
        for stage in self:
            stage.enable()

    def disable(self) -> None:
        for stage in self:
            stage.disable()

    def reset_calibrator(self) -> None:
        for stage in self:
            stage.reset_calibrator()

    def reset_amax(self) -> None:
        for stage in self:
            stage.reset_amax()

    def describe_stages(self, name: str) -> list[tuple[str, str]]:
        return [(f"{name}.{index}", stage.describe()) for index, stage in enumerate(self)]


def make_quantizer(name: str, stages: Sequence[Any]) -> QuantizerModule | SequentialQuantizer:
    """A module for one place, by the attributes of each of its quantizers."""
    made = [QuantizerModule(attributes, name=name) for attributes in stages]
    return made[0] if len(made) == 1 else SequentialQuantizer(*made)


class _StraightThrough(torch.autograd.Function):
    """Rounded on the way in, as if it were not on the way back (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantizer: QuantizerModule) -> torch.Tensor:
        made = TensorQuantizer.__call__(quantizer, x.detach())
        scale = quantizer.pre_quant_scale
        ctx.scale = None if scale is None else torch.from_numpy(scale).to(x.dtype)
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient if ctx.scale is None else gradient * ctx.scale, None


class QuantizedModule:
    """What a replaced class has more than the original."""

    input_quantizer: QuantizerModule
    weight_quantizer: QuantizerModule
    output_quantizer: QuantizerModule
    _in_forward = False

    @property
    def weight(self) -> torch.Tensor:
        """The parameter; while the module computes, what its quantizer makes of it."""
        parameter = self._parameters["weight"]      # type: ignore[attr-defined]
        return self.weight_quantizer(parameter) if self._in_forward else parameter

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.input_quantizer(x)
        object.__setattr__(self, "_in_forward", True)
        try:
            made = super().forward(x, *args, **kwargs)      # type: ignore[misc]
        finally:
            object.__setattr__(self, "_in_forward", False)
        return self.output_quantizer(made)


@cache
def quantized_class(original: type) -> type:
    """The class that takes a module's class's place."""
    return type(f"Quant{original.__name__}", (QuantizedModule, original), {"__module__": original.__module__, "original_class": original})


def kind_of(module: torch.nn.Module) -> type | None:
    """The known class that a module is of; None: it is left alone."""
    return next((known for known in ROLES if isinstance(module, known)), None)


def roles_of(module: torch.nn.Module) -> tuple[str, ...]:
    """Where a module has quantizers, or could have; nowhere for most."""
    kind = kind_of(module)
    return ROLES[kind] if kind is not None else ATTENTION_ROLES if is_attention(module) else ()


def is_inserted(module: torch.nn.Module) -> bool:
    """Whether a module has its quantizers."""
    roles = roles_of(module)
    return bool(roles) and isinstance(getattr(module, f"{roles[0]}_quantizer", None), (QuantizerModule, SequentialQuantizer))


def places(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """(full name, module, its attribute) of every quantizer of a quantized model."""
    for name, module in model.named_modules():
        if is_inserted(module):
            for role in roles_of(module):
                yield f"{name}.{role}_quantizer".lstrip("."), module, f"{role}_quantizer"


def slots_of(model: torch.nn.Module) -> Iterator[Slot]:
    """Every place for a quantizer."""
    for name, module in model.named_modules():
        kind = kind_of(module)
        shape = tuple(module._parameters["weight"].shape) if kind is not None else (1, getattr(module, "head_dim", 1))
        for role in roles_of(module):
            parent = f"nn.{kind.__name__}" if kind is not None else "Attention"
            yield Slot(f"{name}.{role}_quantizer".lstrip("."), name, role, parent, shape)


def insert(module: torch.nn.Module) -> None:
    """Give a module quantizers, all switched off, and the class that calls them."""
    if not roles_of(module) or is_inserted(module):
        return
    for role in roles_of(module):
        setattr(module, f"{role}_quantizer", QuantizerModule({"enable": False, "num_bits": 8}))
    if kind_of(module) is None:
        intercept(module)
        return
    module.__class__ = quantized_class(type(module))
    if "_old_forward" in vars(module):          # accelerate's hooks call the class's forward by what they found it to be
        module._old_forward = types.MethodType(type(module).forward, module)


def remove(module: torch.nn.Module) -> None:
    """The module as it was before `insert`."""
    if not is_inserted(module):
        return
    for role in roles_of(module):
        delattr(module, f"{role}_quantizer")
    if kind_of(module) is None:
        let_go(module)
    else:
        module.__class__ = type(module).original_class
        if "_old_forward" in vars(module):
            module._old_forward = types.MethodType(type(module).forward, module)
