"""Checkpoints that hold a layer's experts in one tensor (gpt-oss, Llama 4, Granite), read as a linear of each, and written back as they
were.

`<prefix>.experts.gate_up_proj` is [experts, in, gate and up], `<prefix>.experts.down_proj` [experts, in, out]: the weights of linears
turned over, with gate and up in two halves or (gpt-oss) by turns. Biases are [experts, out]. The parts of a quantized stack have their
role behind the name (`gate_up_proj_weight_scale`): one number for all experts, or turned over as the weights are. Here an expert's linear
is `<prefix>.experts.3.gate_proj`, and its tensors .weight, .bias, .weight_scale and so on.

Granite has `<prefix>.input_linear.weight` [experts, gate and up, in] and `<prefix>.output_linear.weight` [experts, out, in]: linears'
weights as they are, gate before up. Such a stack has no place for the parts of quantized ones: Model Optimizer writes, and vLLM 0.32 reads
(fused_moe/routed_experts.py), `<prefix>.experts.3.gate_proj.weight` and so on, so that is what a quantized one becomes.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo, WrappedCheckpoint
from modelq.checkpoint.mxfp4 import Mxfp4Checkpoint

BY_TURNS, HALVES, ROWS = "by turns", "halves", "rows"
LAYOUTS = {"gpt_oss": BY_TURNS, "llama4": HALVES, "llama4_text": HALVES, "granitemoe": ROWS}
FORMATS = ("fp8", "nvfp4")      # whose parts a stack has room for
_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:_(bias|weight_scale|weight_scale_2|input_scale))?")
_STACK_OF_ROWS = re.compile(r"(.*)\.(input_linear|output_linear)\.(weight)")
_LINEAR = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj(?:\.(\w+))?")


class Place(NamedTuple):
    """Where one tensor of an expert's linear is: the stack, the expert's number, and which of the stack's numbers along the linear's
    outputs, which are its last axis (first of an expert's where the layout is ROWS)."""
    stack: str
    expert: int
    columns: slice

    def part(self, whole: np.ndarray, layout: str) -> np.ndarray:
        """A view of the linear's own numbers in those of its expert."""
        return whole[self.columns] if layout == ROWS else whole[..., self.columns].T


def layout_of(config: Mapping[str, Any]) -> str | None:
    """How a model's experts are stacked, None if they are not."""
    return LAYOUTS.get(str(config.get("model_type")))


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or what reads its stacks as linears around it."""
    layout = layout_of(checkpoint.config)
    return checkpoint if layout is None or isinstance(checkpoint, StackedExperts) else StackedExperts(checkpoint, layout)


def stack_of(name: str, layout: str, width: int = 1) -> Place | None:
    """Where a tensor of an expert's linear goes; width: how many columns the linear has there. None: it is no expert's."""
    match = _LINEAR.fullmatch(name)
    if match is None or match[4] is None:
        return None
    second = int(match[3] == "up")
    columns = slice(None) if match[3] == "down" else \
        slice(second, None, 2) if layout == BY_TURNS else slice(second * width, (second + 1) * width)
    if layout == ROWS:
        matrix, role = ("output_linear" if match[3] == "down" else "input_linear"), f".{match[4]}"
        return Place(f"{match[1].removesuffix('.experts')}.{matrix}{role}", int(match[2]), columns)
    matrix, role = ("down_proj" if match[3] == "down" else "gate_up_proj"), "" if match[4] == "weight" else f"_{match[4]}"
    return Place(f"{match[1]}.{matrix}{role}", int(match[2]), columns)


def container_of(module: str) -> str:
    """What an export's config calls an expert's linear; and Granite's router, whose weight is a part of it on the Hub alone."""
    match = _LINEAR.fullmatch(module)
    return module.removesuffix(".layer") if match is None else f"{match[1]}*"


class StackedExperts(WrappedCheckpoint):
    """See the module. Everything else is the inner checkpoint's. in_mxfp4: the linears that are stored so."""

    def __init__(self, inner: Checkpoint, layout: str):
        self.inner, self.layout = inner, layout
        self._pattern = _STACK_OF_ROWS if layout == ROWS else _STACK
        counts = {match[1]: info.shape[0] for name, info in inner.tensors.items()
                  if (match := self._pattern.fullmatch(name)) and match[3] in (None, "weight") and len(info.shape) == 3}
        self._places: dict[str, Place] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, info in inner.tensors.items():
            match = self._pattern.fullmatch(name)
            if match is None or match[1] not in counts:
                tensors[name] = info
                continue
            for made in self._linears(name, info, counts[match[1]]):
                tensors[made.name] = made
        super().__init__(inner, inner.config, tensors)

        stacks = inner.stacks if isinstance(inner, Mxfp4Checkpoint) else {}
        self.in_mxfp4 = {name.removesuffix(".weight") for name, place in self._places.items() if place.stack in stacks}

    @property
    def is_source(self) -> bool:
        return bool(getattr(self.inner, "is_source", True))

    def parts(self, module: str) -> dict[str, np.ndarray]:
        """An expert's linear as it is stored in MXFP4: weight and weight_scale."""
        place = self._places[f"{module}.weight"]
        assert isinstance(self.inner, Mxfp4Checkpoint)
        return {role: part[place.columns] for role, part in self.inner.expert_parts(place.stack, place.expert).items()}

    def stack_scales(self, module: str) -> np.ndarray:
        """The scales of all experts of its stack."""
        place = self._places[f"{module}.weight"]
        assert isinstance(self.inner, Mxfp4Checkpoint)
        return self.inner.inner.read(self.inner.stacks[place.stack].scales)

    def _linears(self, name: str, info: TensorInfo, experts: int) -> Iterable[TensorInfo]:
        match = self._pattern.fullmatch(name)
        assert match is not None
        both, role = match[2] in ("gate_up_proj", "input_linear"), match[3] or "weight"
        prefix = f"{match[1]}.experts" if self.layout == ROWS else match[1]
        shape = info.shape[1:] if self.layout == ROWS else info.shape[1:][::-1]
        if shape and both:
            shape = (shape[0] // 2, *shape[1:])
        nbytes = info.nbytes // max(1, int(np.prod(info.shape))) * int(np.prod(shape))
        for expert in range(experts):
            for linear in ("gate", "up") if both else ("down",):
                made = f"{prefix}.{expert}.{linear}_proj.{role}"
                place = stack_of(made, self.layout, shape[0] if shape else 1)
                assert place is not None
                self._places[made] = place
                yield TensorInfo(made, info.dtype, shape, nbytes, info.file)

    def read(self, name: str) -> np.ndarray:
        place = self._places.get(name)
        if place is None:
            return self.inner.read(self._info(name).name)
        if hasattr(self.inner, "is_made_by_rows") and self.inner.is_made_by_rows(place.stack):
            whole = self.inner.read_rows(place.stack, place.expert, place.expert + 1)[0]
        else:
            stack = self.inner.read(place.stack)
            whole = stack if stack.ndim == 0 else stack[place.expert]
        return whole if whole.ndim == 0 else np.ascontiguousarray(place.part(whole, self.layout))

    def release(self, names: Iterable[str] | None = None) -> None:
        if names is not None:
            names = list(dict.fromkeys(self._places[name].stack if name in self._places else name for name in names))
        self.inner.release(names)


class StackingWriter:
    """Takes tensors of linears, as `stacked_plan` was made of them, and writes the stacks when all their parts are there."""

    def __init__(self, writer: Any, plan: Iterable[TensorInfo], layout: str):
        self._writer, self._layout = writer, layout
        self._plan = {info.name: info for info in stacked_plan(plan, layout)}
        self._stacked = _members(plan, layout)
        self._left = {name: {key for key, stack in self._stacked.items() if stack == name} for name in self._plan}
        self._made: dict[str, np.ndarray] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        array = np.asarray(array)
        place = stack_of(name, self._layout, array.shape[0] if array.ndim else 1)
        if place is None or name not in self._stacked:
            self._writer.write(name, array)
            return
        info = self._plan[place.stack]
        whole = self._made.setdefault(place.stack, np.zeros(info.shape, array.dtype))
        if array.ndim:
            place.part(whole[place.expert], self._layout)[...] = array
        elif whole.any() and whole != array:
            raise ValueError(f"{place.stack}: {array} for {name}, {whole} for others: a stack has one")
        else:
            whole[...] = array
        self._left[place.stack].discard(name)
        if not self._left[place.stack]:
            self._writer.write(place.stack, self._made.pop(place.stack))

    def write_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        if name not in self._stacked:
            self._writer.write_pieces(name, pieces)
        else:
            self.write(name, np.concatenate(list(pieces)))


def _members(plan: Iterable[TensorInfo], layout: str) -> dict[str, str]:
    """Tensor to the stack that it goes into. Where a stack has no place for parts of quantized linears, one of which there are some is
    none."""
    found = {info.name: place.stack for info in plan if (place := stack_of(info.name, layout)) is not None}
    if layout != ROWS:
        return found
    split = {stack.rpartition(".")[0] for stack in found.values() if not stack.endswith(".weight")}
    return {name: stack for name, stack in found.items() if stack.rpartition(".")[0] not in split}


def stacked_plan(plan: Iterable[TensorInfo], layout: str) -> list[TensorInfo]:
    """What is written of tensors of linears."""
    plan, found = list(plan), {}
    members, experts = _members(plan, layout), {}
    for name, stack in members.items():
        place = stack_of(name, layout)
        assert place is not None
        experts[stack] = max(experts.get(stack, 0), place.expert + 1)
    for info in plan:
        stack = members.get(info.name)
        if stack is None:
            found[info.name] = info
        elif stack not in found:
            shape = list(info.shape if layout == ROWS else info.shape[::-1])
            if shape and re.search(r"\.(gate|up)_proj\.\w+$", info.name):
                shape[0 if layout == ROWS else -1] *= 2
            whole = (experts[stack], *shape) if shape else ()
            nbytes = info.nbytes // max(1, int(np.prod(info.shape))) * int(np.prod(whole))
            found[stack] = TensorInfo(stack, info.dtype, whole, nbytes)
    return list(found.values())
