"""What the methods of modelq.calibration ask of a model, for any torch module: linears, their weights as they lie in memory, quantizers
and what the rules said of them."""
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from modelq.arrays import take
from modelq.calibration.resume import digest_of
from modelq.calibration.weights import freeze_scales
from modelq.checkpoint.base import Checkpoint, TensorInfo
from modelq.experts import Place
from modelq.quantizers import found_values, make_quantizer, set_found_values
from modelq.rules import Slot
from modelq.streaming import Part, unread
from modelq.torch_models.experts import is_experts, matrices_of, matrix_of
from modelq.torch_models.modules import is_searched, kind_of
from modelq.torch_models.quantize import quantizers_of, settings_of

# Linears of one parent that read one input, by the end of their names.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
SAMPLE = 4096       # values of each weight that tell it from others of the same shape
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class Weights(Checkpoint):
    """Tensors that live in a torch model, by name; views, not copies."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: Path, config: dict[str, Any]):
        self._live = dict(tensors)
        infos = {name: TensorInfo(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), value.numel() * value.element_size())
                 for name, value in self._live.items()}
        super().__init__(path, config, infos)

    def read(self, name: str) -> np.ndarray:
        return take(self._live[self._info(name).name], name)

    def live(self, name: str) -> torch.Tensor:
        """The tensor itself."""
        return self._live[name]

    def release(self, names: Any = None) -> None:
        """Nothing to let go of: the memory is the model's."""


class StandIn:
    """A model as a calibration method sees it (modelq.model.Model says what the attributes are). own_scales: siblings keep scales of their
    own until an export, as in Model Optimizer."""

    float32_weights = False         # weights have the dtype that they have
    folds_all = False

    def __init__(self, model: torch.nn.Module, own_scales: bool = True):
        self.own_scales = own_scales
        tensors: dict[str, torch.Tensor] = {}
        self.modules = list(_rows(model, tensors))
        self.checkpoint: Any = Weights(tensors, Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or ".")), {})
        self.num_layers = 1 + max((row["layer"] for row in self.modules), default=-1)
        self.settings = {key_of(name): replace(setting, slot=replace(setting.slot, name=key_of(name), layer=_layer_of(name)))
                         for name, setting in settings_of(model).items()}
        self.slots: dict[str, Slot] = {name: setting.slot for name, setting in self.settings.items()}
        self.places = {f"{row['name']}.{side}_quantizer": Place(name) for row in self.modules if row["expert"] is not None
                       for side, name in row["quantizers"].items()}
        self.quantizers: dict[str, Any] = {name: make_quantizer(setting) for name, setting in self.settings.items()}
        for name, quantizer in quantizers_of(model).items():
            set_found_values(self.quantizers[key_of(name)], found_values(quantizer.native))
        self.low_rank = {name.removesuffix(".weight_quantizer"): quantizer.low_rank for name, quantizer in quantizers_of(model).items()
                         if quantizer.low_rank is not None}
        self.search_losses: dict[str, Any] = {}
        self.expert_tokens: dict[int, np.ndarray] = {}
        dtypes = {info.dtype for info in self.checkpoint.tensors.values()}
        self.runtime = SimpleNamespace(compute="float32" if dtypes <= {"float32"} else "bfloat16")

    def modules_of(self, layer: int, expert: int | None = None) -> list[dict[str, Any]]:
        return [row for row in self.modules if (row["layer"], row["expert"]) == (layer, expert)]

    def experts_of(self, layer: int) -> list[int]:
        return sorted({row["expert"] for row in self.modules if row["layer"] == layer and row["expert"] is not None})

    def share_as_exports_do(self) -> None:
        """Give linears that read one input the smoothing scale that an export states for all of them; it stays with the linears."""
        self.own_scales, self.folds_all = False, True
        for layer in range(-1, self.num_layers):
            rows = self.modules_of(layer)
            freeze_scales(self, Part(layer, None, rows, unread(self)), [row for row in rows if row["kind"] == "linear"])    # type: ignore

    def give_values(self, model: torch.nn.Module) -> None:
        """Hand what was found for every quantizer to the model's own."""
        for name, quantizer in quantizers_of(model).items():
            set_found_values(quantizer.native, found_values(self.quantizers[key_of(name)]))

    def digest(self, steps: Sequence[Mapping[str, Any]], compat: str | None) -> str:
        """What a calibration depends on, but for its data."""
        weights = hashlib.sha256()
        for name in self.checkpoint.tensors:
            weights.update(np.ascontiguousarray(self.checkpoint.read(name)).reshape(-1)[:SAMPLE].tobytes())
        return digest_of(self, steps, [], compat) + weights.hexdigest()     # type: ignore[arg-type]

    def connect(self) -> None:
        """The model's own quantizers get what was found when a method is done."""


def _layer_of(name: str) -> int:
    """The first number in a name: which of the layers; -1: outside of them."""
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def key_of(name: str) -> str:
    """What a quantizer is called here: `<module>.weight_quantizer`, though the module be the model itself, which has no name."""
    return name if "." in name else f".{name}"


def _rows(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """A row for every linear, embedding and expert's matrix, and its weight into tensors, but for what is compressed. Tied weights have
    one name."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        layer = _layer_of(name)
        if is_searched(module) and getattr(module, "packed", None) is None:
            parameter = module._parameters["weight"]
            weight = names.setdefault(id(parameter), f"{name}.weight")
            tensors[weight] = live_value(module, "weight", name)
            bias = f"{name}.bias" if module._parameters.get("bias") is not None else ""
            yield {"name": name, "kind": kind_of(module).__name__.lower(), "layer": layer, "expert": None, "shape": list(parameter.shape),
                   "weight": weight, "bias": bias, "site": _site(name)}
        elif is_experts(module):
            for expert in range(module.num_experts):
                for matrix in matrices_of(module):
                    row_name = f"{name}.{matrix}.{expert}"
                    tensors[row_name] = matrix_of(module, live_value(module, matrix, name), expert)
                    yield {"name": row_name, "kind": "linear", "layer": layer, "expert": expert, "shape": list(tensors[row_name].shape),
                           "weight": row_name, "bias": "", "site": f"{name}.{matrix}", "container": name,
                           "quantizers": {"weight": f"{name}.{matrix}_weight_quantizers.{expert}",
                                          "input": f"{name}.{matrix}_input_quantizer"}}


def live_value(module: torch.nn.Module, parameter: str, module_name: str) -> torch.Tensor:
    """A parameter's or buffer's values, though accelerate keep them elsewhere (on disk, on the CPU). ValueError: it has none."""
    value = module._parameters[parameter] if parameter in module._parameters else module._buffers[parameter]
    assert value is not None
    if value.device.type != "meta":
        return value.detach()
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None and parameter in kept:
            return kept[parameter].detach()      # type: ignore[no-any-return]
    raise ValueError(f"{module_name}.{parameter} is on the meta device, it has no values: load the model's weights first (from_pretrained, "
                     "or to_empty and load_state_dict)")


def _site(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{next((group[0] for group in _SIBLINGS if last in group), last)}"
