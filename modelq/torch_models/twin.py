"""A native model that stands for a quantized transformers model: the same weights, the same quantizers. What is written of one is what is
written of the other."""
from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelq.arrays import take
from modelq.checkpoint.folder import copy_files, side_files_of
from modelq.model import Model
from modelq.quantizers import found_values, make_quantizer, set_found_values
from modelq.torch_models import unwrapped
from modelq.torch_models.experts import halves_of, is_experts, matrix_of
from modelq.torch_models.modules import QuantizedModule
from modelq.torch_models.quantize import quantizers_of, settings_of
from modelq.torch_models.stand_in import Weights, live_value


class TorchCheckpoint(Weights):
    """The parameters of a transformers model, by their names on disk; views, not copies."""

    def __init__(self, model: Any):
        self._model = model
        self._packed = {f"{name}.weight": module for name, module in model.named_modules()
                        if isinstance(module, QuantizedModule) and module.packed is not None}
        super().__init__(_parameters(model, self._packed), Path(str(model.config._name_or_path or ".")), _config_of(model))
        self.side_files = side_files_of(self.path) if self.path.is_dir() else ()

    def read(self, name: str) -> np.ndarray:
        """Of a compressed weight, what its parts stand for, without what calibration made of the weight before it was packed."""
        if name not in self._packed:
            return super().read(name)
        module = self._packed[name]
        quantizer, weight = module.weight_quantizer, module.dense_weight()
        if quantizer.low_rank is not None:
            weight = weight + quantizer.svdquant_lora_b @ quantizer.svdquant_lora_a
        scale = quantizer.pre_quant_scale
        return take(weight if scale is None else (weight / torch.from_numpy(scale)).to(weight.dtype), name)

    def tokenizer(self) -> Any:
        from modelq.checkpoint.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        """What lies beside the weights where the model came from, and its generation config as it is now."""
        written = copy_files(self.side_files, self.path, Path(directory))
        if getattr(self._model, "generation_config", None) is not None:
            self._model.generation_config.save_pretrained(directory)
            written.append(Path(directory) / "generation_config.json")
        return written


def twin_of(model: Any) -> Model:
    """ValueError: not a transformers model of a family that modelq knows, a parameter that is not on the CPU, or something quantized that
    has no place in a checkpoint of that family."""
    model = unwrapped(model)
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise ValueError(f"an export needs a transformers model, with a config: got {type(model).__name__}")
    settings, quantizers = settings_of(model), quantizers_of(model)
    twin = Model(TorchCheckpoint(model), "bfloat16")
    lost = [name for name, quantizer in quantizers.items() if quantizer.is_enabled and name not in twin.settings]
    if lost:
        raise ValueError(f"{lost[0]}: a checkpoint of this family has no place for it: switch it off with mtq.disable_quantizer"
                         + (f" (and {len(lost) - 1} others)" if lost[1:] else ""))
    twin.settings = {name: replace(settings[name], slot=twin.slots[name]) if name in settings else replace(setting, enable=False)
                     for name, setting in twin.settings.items()}
    twin.quantizers = {name: make_quantizer(setting) for name, setting in twin.settings.items()}
    for name, quantizer in quantizers.items():
        if name in twin.quantizers:
            set_found_values(twin.quantizers[name], found_values(quantizer.native))
            twin.quantizers[name].enabled = quantizer.is_enabled
        if (branch := quantizer.low_rank) is not None:
            twin.low_rank[name.removesuffix(".weight_quantizer")] = branch
    twin.quantized = twin.own_scales = True
    return twin


def _parameters(model: Any, packed: Mapping[str, QuantizedModule]) -> dict[str, torch.Tensor]:
    """By names on disk, where experts are linears of their own. Of compressed weights only dtype and shape are there."""
    found: dict[str, torch.Tensor] = {}
    tied, modules = model.config.tie_word_embeddings, dict(model.named_modules())
    experts = {name: module for name, module in modules.items() if is_experts(module)}
    for name, value in model.named_parameters(remove_duplicate=False):
        container, _, matrix = name.rpartition(".")
        if tied and name == "lm_head.weight":
            continue
        if name in packed:
            form, dtype = packed[name].packed       # type: ignore[misc]
            value = torch.empty(form.shape, dtype=getattr(torch, dtype), device="meta")
        else:
            value = live_value(modules[container], matrix, container)
        views = [value] if container not in experts else _by_expert(experts[container], value, matrix)
        names = _names_on_disk(model, name, value)
        if len(names) < len(views):         # a checkpoint of stacks: as modelq.checkpoint.stacked calls their linears
            linears = ("down_proj",) if matrix.startswith("down_proj") else ("gate_proj", "up_proj")
            role = "bias" if matrix.endswith("_bias") else "weight"
            names = [f"{container}.{expert}.{linear}.{role}" for linear in linears for expert in range(experts[container].num_experts)]
        found.update(zip(names, views, strict=True))
    return found | _buffers(model, modules)


def _buffers(model: Any, modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Those that a checkpoint has (what corrects a router's scores), and no quantizer's."""
    found = {}
    for name, value in model.named_buffers():
        owner, _, last = name.rpartition(".")
        if last not in modules[owner]._non_persistent_buffers_set and "_quantizer" not in name:
            found.update(zip(_names_on_disk(model, name, value), [live_value(modules[owner], last, owner)], strict=True))
    return found


def _by_expert(module: torch.nn.Module, stacked: torch.Tensor, matrix: str) -> list[torch.Tensor]:
    """Views of a stacked matrix or of stacked biases, or of their halves (all of gate, then all of up), expert by expert."""
    whole = list(stacked) if matrix.endswith("_bias") else [matrix_of(module, stacked, expert) for expert in range(module.num_experts)]
    if matrix.startswith("down_proj"):
        return whole
    halves = [halves_of(module, view) for view in whole]
    return [half[0] for half in halves] + [half[1] for half in halves]


def _names_on_disk(model: Any, name: str, value: torch.Tensor) -> list[str]:
    """What transformers would call a parameter, or its parts, in a checkpoint."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:     # before version 5 they were called what they are
        return [name]

    return list(revert_weight_conversion(model, {name: value.detach().to("meta")}))


def _config_of(model: Any) -> dict[str, Any]:
    """config.json as save_pretrained writes it."""
    with tempfile.TemporaryDirectory(prefix="modelq-") as folder:
        model.config.save_pretrained(folder)
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config
