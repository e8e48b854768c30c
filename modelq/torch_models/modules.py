"""Modules that quantize: a module's class is replaced by a subclass of it, whose inputs, weight and outputs go through quantizers."""
from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from modelq.arrays import give_back, take
from modelq.checkpoint.dialects import Form
from modelq.checkpoint.quantized import dequantized
from modelq.experts import PARENT as EXPERTS
from modelq.rules import Slot
from modelq.torch_models.attention import intercept, is_attention, let_go
from modelq.torch_models.experts import is_experts, matrices_of, matrix_of, matrix_shape, quantizing_class
from modelq.torch_models.quantizer_module import SCALES, QuantizerModule, SequentialQuantizer

# Class: its name in rules, and where it has quantizers. The order is the reference's.
_CONVOLUTIONS = tuple(getattr(torch.nn, f"Conv{kind}{rank}d") for kind in ("", "Transpose") for rank in (1, 2, 3))
ROLES: dict[type, tuple[str, ...]] = {torch.nn.Linear: ("input", "output", "weight"), torch.nn.Embedding: ("weight", "input", "output"),
                                      **{convolution: ("input", "output", "weight") for convolution in _CONVOLUTIONS}}
ATTENTION_ROLES = ("q_bmm", "k_bmm", "v_bmm")
registered: dict[type, type] = {}       # users' classes to what quantizes them
QUANTIZERS = (QuantizerModule, SequentialQuantizer)


class QuantizedModule:
    """What a replaced class has more than the original."""

    input_quantizer: QuantizerModule
    weight_quantizer: QuantizerModule
    output_quantizer: QuantizerModule
    _in_forward = False
    packed: tuple[Form, str] | None = None      # how a compressed weight is held, and its dtype

    @property
    def weight(self) -> torch.Tensor:
        """The parameter; while the module computes, what its quantizer makes of it."""
        parameter = self._parameters["weight"]      # type: ignore[attr-defined]
        if not self._in_forward:
            return parameter        # type: ignore[no-any-return]
        return self.weight_quantizer(parameter) if self.packed is None else self.dense_weight()

    def dense_weight(self) -> torch.Tensor:
        """What a compressed weight stands for."""
        assert self.packed is not None
        form, dtype = self.packed
        codes = self._parameters["weight"]      # type: ignore[attr-defined]
        parts = {"weight": codes, "weight_scale": self.weight_quantizer._scale, "weight_scale_2": self.weight_quantizer._double_scale}
        held = {role: take(part, role) for role, part in parts.items() if part is not None}
        return give_back(dequantized(form, held, dtype), codes)     # type: ignore[no-any-return]

    def unpack(self) -> None:
        """The weight that the packed parts stand for, as an ordinary parameter again."""
        dense = self.dense_weight()
        self._parameters["weight"] = torch.nn.Parameter(dense)      # type: ignore[attr-defined]
        self.packed = None
        for name in SCALES:
            setattr(self.weight_quantizer, name, None)

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = self.input_quantizer(x)
        object.__setattr__(self, "_in_forward", True)
        try:
            made = super().forward(rounded, *args, **kwargs)      # type: ignore[misc]
        finally:
            object.__setattr__(self, "_in_forward", False)
        return self.output_quantizer(self.weight_quantizer.add_low_rank(made, x, self.input_quantizer))


@cache
def quantized_class(original: type, mixin: type = QuantizedModule) -> type:
    """The class that takes a module's class's place."""
    return type(f"Quant{original.__name__}", (mixin, original), {"__module__": original.__module__, "original_class": original})


# Users' classes ------------------------------------------------------------------------------------------------------------------

def register(original_cls: type, quantized_cls: type) -> None:
    """Let modules of a class be quantized by a user's subclass of it (or a mix-in), whose `_setup(self)` makes TensorQuantizers as
    attributes and whose forward calls them. `weight_quantizer` is for the parameter `weight`; others see what passes. TypeError: no
    classes of modules, or one without _setup."""
    if not (isinstance(original_cls, type) and issubclass(original_cls, torch.nn.Module)):
        raise TypeError(f"register: original_cls must be a class of torch modules, got {original_cls!r}")
    if not (isinstance(quantized_cls, type) and callable(getattr(quantized_cls, "_setup", None))):
        raise TypeError("register: quantized_cls must be a class with a method _setup(self) that makes its quantizers, got "
                        f"{quantized_cls!r}")
    registered[original_cls] = quantized_cls


def unregister(original_cls: type) -> None:
    """Undo `register`. KeyError: it was not registered."""
    if original_cls not in registered:
        raise KeyError(f"{original_cls.__name__} is not registered")
    del registered[original_cls]


def is_custom(module: torch.nn.Module) -> bool:
    """Whether a module is quantized by a user's class."""
    return hasattr(type(module), "_registered_for")


def _custom_class(original: type) -> type | None:
    """The class that takes the place of one that is registered, or whose nearest known base is."""
    known = next((base for base in original.__mro__ if base in registered or base in ROLES), None)
    if known not in registered:
        return None
    quantizing = registered[known]      # type: ignore[index]
    bases = (quantizing,) if issubclass(quantizing, original) else (quantizing, original)
    names = {"__module__": original.__module__, "original_class": original, "_registered_for": known}
    return type(quantizing.__name__, bases, names)


# Places for quantizers -----------------------------------------------------------------------------------------------------------

class Place(NamedTuple):
    """Of one quantizer in a module. path: of the attribute, below the module; shape: of what it quantizes, where that is a weight."""
    path: str
    role: str
    shape: tuple[int, ...] | None


def kind_of(module: torch.nn.Module) -> type | None:
    """The known class that a module is of."""
    return next((known for known in ROLES if isinstance(module, known)), None)


def places_in(module: torch.nn.Module) -> list[Place]:
    """Where a module has quantizers, or could have; nowhere for most."""
    if is_custom(module):
        weight = module._parameters.get("weight")
        return [Place(name, *(("weight", tuple(weight.shape)) if name == "weight_quantizer" and weight is not None else
                              ("output" if name == "output_quantizer" else "input", None)))
                for name, child in module.named_children() if isinstance(child, QUANTIZERS)]
    if (kind := kind_of(module)) is not None:
        shape = tuple(module._parameters["weight"].shape)
        return [Place(f"{role}_quantizer", role, shape) for role in ROLES[kind]]
    if is_experts(module):
        found = []
        for matrix in matrices_of(module):
            found.append(Place(f"{matrix}_input_quantizer", "input", matrix_shape(module, matrix)))
            found += [Place(f"{matrix}_weight_quantizers.{expert}", "weight", matrix_shape(module, matrix))
                      for expert in range(module.num_experts)]
        return found
    if is_attention(module):
        return [Place(f"{role}_quantizer", role, (1, getattr(module, "head_dim", 1))) for role in ATTENTION_ROLES]
    return []


def is_searched(module: torch.nn.Module) -> bool:
    """Whether a module is one whose weight calibration methods know by itself: a linear or an embedding that is not a user's."""
    return not is_custom(module) and kind_of(module) in (torch.nn.Linear, torch.nn.Embedding)


def parent_of(module: torch.nn.Module) -> str:
    """What rules call the class of a module that has places."""
    kind = kind_of(module) if not is_custom(module) else type(module)._registered_for       # type: ignore[attr-defined]
    return f"nn.{kind.__name__}" if kind is not None else EXPERTS if is_experts(module) else "Attention"


def is_inserted(module: torch.nn.Module) -> bool:
    """Whether a module has its quantizers."""
    if is_custom(module):
        return True
    found = places_in(module)
    return bool(found) and isinstance(getattr(module, found[0].path, None), QUANTIZERS)


def places(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """(full name, module, its attribute) of every quantizer of a quantized model."""
    for name, module in model.named_modules():
        if is_inserted(module):
            for place in places_in(module):
                owner, _, attribute = place.path.rpartition(".")
                yield f"{name}.{place.path}".lstrip("."), module.get_submodule(owner), attribute


def weights_of(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(path of its quantizer, tensor) of every weight of a module with quantizers."""
    if is_experts(module):
        return [(f"{matrix}_weight_quantizers.{expert}", matrix_of(module, module._parameters[matrix], expert))
                for matrix in matrices_of(module) for expert in range(module.num_experts)]
    return [("weight_quantizer", module._parameters["weight"])] if isinstance(getattr(module, "weight_quantizer", None), QUANTIZERS) and (
        module._parameters.get("weight") is not None) else []


def slots_of(model: torch.nn.Module) -> Iterator[Slot]:
    """Every place for a quantizer."""
    for name, module in model.named_modules():
        for place in places_in(module):
            yield Slot(f"{name}.{place.path}".lstrip("."), name, place.role, parent_of(module), place.shape)


def is_packed(model: torch.nn.Module) -> bool:
    """Whether any weight is compressed."""
    return any(isinstance(module, QuantizedModule) and module.packed is not None for module in model.modules())


def insert(module: torch.nn.Module) -> None:
    """Give a module quantizers, all switched off, and the class that calls them."""
    if is_inserted(module):
        return
    if (quantizing := _custom_class(type(module))) is not None:
        module.__dict__["_children_before"] = tuple(module._modules)
        _take_class(module, quantizing)
        module._setup()
        return
    found = places_in(module)
    if not found:
        return
    for place in found:
        owner, _, attribute = place.path.rpartition(".")
        if owner and not hasattr(module, owner):
            setattr(module, owner, torch.nn.ModuleList())
        made = QuantizerModule({"enable": False, "num_bits": 8})
        module.get_submodule(owner).add_module(attribute, made)
    if is_attention(module):
        intercept(module)
    else:
        _take_class(module, quantized_class(type(module), quantizing_class(module) if is_experts(module) else QuantizedModule))


def remove(module: torch.nn.Module) -> None:
    """The module as it was before `insert`."""
    if not is_inserted(module):
        return
    if is_custom(module):
        added = set(module._modules) - set(module.__dict__.pop("_children_before"))
    else:
        added = {place.path.partition(".")[0] for place in places_in(module)}
    for attribute in added:
        delattr(module, attribute)
    if is_attention(module) and not is_custom(module):
        let_go(module)
    else:
        _take_class(module, type(module).original_class)        # type: ignore[attr-defined]


def _take_class(module: torch.nn.Module, replacing: type) -> None:
    module.__class__ = replacing
    if "_old_forward" in vars(module):      # accelerate's hooks call the class's forward by what they found it to be
        module._old_forward = types.MethodType(type(module).forward, module)
