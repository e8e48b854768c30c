"""Checkpoints that hold a layer's experts in one tensor (gpt-oss, Llama 4), read as a linear of each, and written back as they were.

`<prefix>.experts.gate_up_proj` is [experts, in, gate and up], `<prefix>.experts.down_proj` [experts, in, out]: the weights of linears
turned over, with gate and up in two halves or (gpt-oss) by turns. Biases are [experts, out]. The parts of a quantized stack have their
role behind the name (`gate_up_proj_weight_scale`): one number for all experts, or turned over as the weights are. Here an expert's linear
is `<prefix>.experts.3.gate_proj`, and its tensors .weight, .bias, .weight_scale and so on.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo, WrappedCheckpoint
from modelq.checkpoint.mxfp4 import Mxfp4Checkpoint

BY_TURNS, HALVES = "by turns", "halves"
LAYOUTS = {"gpt_oss": BY_TURNS, "llama4": HALVES, "llama4_text": HALVES}
FORMATS = ("fp8", "nvfp4")      # whose parts a stack has room for
_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:_(bias|weight_scale|weight_scale_2|input_scale))?")
_LINEAR = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj(?:\.(\w+))?")


class Place(NamedTuple):
    """Where one tensor of an expert's linear is: the stack, the expert's number, and which columns of the stack's."""
    stack: str
    expert: int
    columns: slice


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
    matrix, role = ("down_proj" if match[3] == "down" else "gate_up_proj"), "" if match[4] == "weight" else f"_{match[4]}"
    second = int(match[3] == "up")
    columns = slice(None) if match[3] == "down" else \
        slice(second, None, 2) if layout == BY_TURNS else slice(second * width, (second + 1) * width)
    return Place(f"{match[1]}.{matrix}{role}", int(match[2]), columns)


def container_of(module: str) -> str:
    """What an export's config calls an expert's linear."""
    match = _LINEAR.fullmatch(module)
    return module if match is None else f"{match[1]}*"


class StackedExperts(WrappedCheckpoint):
    """See the module. Everything else is the inner checkpoint's. in_mxfp4: the linears that are stored so."""

    def __init__(self, inner: Checkpoint, layout: str):
        self.inner, self.layout = inner, layout
        counts = {match[1]: info.shape[0] for name, info in inner.tensors.items()
                  if (match := _STACK.fullmatch(name)) and match[3] is None and len(info.shape) == 3}
        self._places: dict[str, Place] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, info in inner.tensors.items():
            match = _STACK.fullmatch(name)
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
        match = _STACK.fullmatch(name)
        assert match is not None
        both, role = match[2] == "gate_up_proj", match[3] or "weight"
        shape = info.shape[1:][::-1]
        if shape and both:
            shape = (shape[0] // 2, *shape[1:])
        nbytes = info.nbytes // max(1, int(np.prod(info.shape))) * int(np.prod(shape))
        for expert in range(experts):
            for linear in ("gate", "up") if both else ("down",):
                made = f"{match[1]}.{expert}.{linear}_proj.{role}"
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
        return whole if whole.ndim == 0 else np.ascontiguousarray(whole[..., place.columns].T)

    def release(self, names: Iterable[str] | None = None) -> None:
        if names is not None:
            names = list(dict.fromkeys(self._places[name].stack if name in self._places else name for name in names))
        self.inner.release(names)


class StackingWriter:
    """Takes tensors of linears, as `stacked_plan` was made of them, and writes the stacks when all their parts are there."""

    def __init__(self, writer: Any, plan: Iterable[TensorInfo], layout: str):
        self._writer, self._layout = writer, layout
        self._plan = {info.name: info for info in stacked_plan(plan, layout)}
        self._left = {name: {key for key, stack in _members(plan, layout).items() if stack == name} for name in self._plan}
        self._made: dict[str, np.ndarray] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        array = np.asarray(array)
        place = stack_of(name, self._layout, array.shape[0] if array.ndim else 1)
        if place is None:
            self._writer.write(name, array)
            return
        info = self._plan[place.stack]
        whole = self._made.setdefault(place.stack, np.zeros(info.shape, array.dtype))
        if array.ndim:
            whole[place.expert][..., place.columns] = array.T
        elif whole.any() and whole != array:
            raise ValueError(f"{place.stack}: {array} for {name}, {whole} for others: a stack has one")
        else:
            whole[...] = array
        self._left[place.stack].discard(name)
        if not self._left[place.stack]:
            self._writer.write(place.stack, self._made.pop(place.stack))

    def write_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        if stack_of(name, self._layout) is None:
            self._writer.write_pieces(name, pieces)
        else:
            self.write(name, np.concatenate(list(pieces)))


def _members(plan: Iterable[TensorInfo], layout: str) -> dict[str, str]:
    return {info.name: place.stack for info in plan if (place := stack_of(info.name, layout)) is not None}


def stacked_plan(plan: Iterable[TensorInfo], layout: str) -> list[TensorInfo]:
    """What is written of tensors of linears."""
    plan, found = list(plan), {}
    experts = {}
    for info in plan:
        place = stack_of(info.name, layout)
        if place is not None:
            experts[place.stack] = max(experts.get(place.stack, 0), place.expert + 1)
    for info in plan:
        place = stack_of(info.name, layout)
        if place is None:
            found[info.name] = info
        elif place.stack not in found:
            shape = info.shape[::-1]
            if shape and "gate_up_proj" in place.stack.rpartition(".experts.")[2]:
                shape = (*shape[:-1], 2 * shape[-1])
            whole = (experts[place.stack], *shape) if shape else ()
            nbytes = info.nbytes // max(1, int(np.prod(info.shape))) * int(np.prod(whole))
            found[place.stack] = TensorInfo(place.stack, info.dtype, whole, nbytes)
    return list(found.values())
