"""A native model that stands for a quantized transformers model: the same weights, the same quantizers. What is written of one is what is
written of the other."""
from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelq.arrays import take
from modelq.checkpoint.base import Checkpoint, TensorInfo
from modelq.checkpoint.folder import copy_files, side_files_of
from modelq.model import Model
from modelq.quantizers import found_values, make_quantizer, set_found_values
from modelq.torch_models.quantize import quantizers_of, settings_of


class TorchCheckpoint(Checkpoint):
    """The parameters of a transformers model, by their names on disk; views, not copies."""

    def __init__(self, model: Any):
        self._model, self._parameters = model, _parameters(model)
        infos = {name: TensorInfo(name, take(value, name).dtype.name, tuple(value.shape), value.numel() * value.element_size())
                 for name, value in self._parameters.items()}
        super().__init__(Path(str(model.config._name_or_path or ".")), _config_of(model), infos)
        self.side_files = side_files_of(self.path) if self.path.is_dir() else ()

    def read(self, name: str) -> np.ndarray:
        return take(self._parameters[self._info(name).name], name)

    def release(self, names: Iterable[str] | None = None) -> None:
        """Nothing to let go of: the memory is the model's."""

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


def twin_of(model: Any, for_search: bool = False) -> Model:
    """ValueError: not a transformers model of a family that modelq knows, or a parameter that is not on the CPU."""
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise ValueError(f"an export needs a transformers model, with a config: got {type(model).__name__}")
    settings, quantizers = settings_of(model), quantizers_of(model)
    checkpoint = TorchCheckpoint(model)
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    twin = Model(checkpoint, "float32" if for_search and dtypes == {"float32"} else "bfloat16")
    twin.settings = {name: replace(settings[name], slot=twin.slots[name]) if name in settings else replace(setting, enable=False)
                     for name, setting in twin.settings.items()}
    twin.quantizers = {name: make_quantizer(setting) for name, setting in twin.settings.items()}
    for name, quantizer in quantizers.items():
        if name in twin.quantizers:
            set_found_values(twin.quantizers[name], found_values(quantizer.native))
            twin.quantizers[name].enabled = quantizer.is_enabled
    twin.quantized = twin.own_scales = True
    return twin


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    tied = model.config.tie_word_embeddings
    for name, value in model.named_parameters(remove_duplicate=False):
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on device {value.device}: an export needs every weight on the CPU: model.to('cpu')")
        if not (tied and name == "lm_head.weight"):
            found[name] = value.detach()
    return found


def _config_of(model: Any) -> dict[str, Any]:
    """config.json as save_pretrained writes it."""
    with tempfile.TemporaryDirectory(prefix="modelq-") as folder:
        model.config.save_pretrained(folder)
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config
