"""save and restore: what quantization made of a model, beside its weights, without pickle.

    path/quantizers.json          which quantizers there are, with which attributes, and how the model was rotated
    path/quantizers.safetensors   what was found for them: ranges, scales, branches of low rank, weights that GPTQ rounded
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modelq.attributes import QuantizerAttributeConfig
from modelq.low_rank import LowRank
from modelq.quantizers import named_values, set_named_value
from modelq.rules import Setting, stages
from modelq.torch_models import is_torch_model, unwrapped
from modelq.undoing import all_or_nothing

JSON_FILE, TENSOR_FILE, VERSION = "quantizers.json", "quantizers.safetensors", 1


def save(model: Any, path: str | Path) -> Path:
    """Write the state of a quantized model (native or torch) into the folder `path`, which is made; returns it.

    ValueError if the model is not quantized. Weights are not written, but for those that GPTQ rounded in a native model.
    """
    from modelq.checkpoint.writer import write_tensors

    settings, found, rotation = _state_of(model)
    said = {"version": VERSION, "rotation": rotation, "quantizers": {name: {"enable": setting.enable, "attributes": [
        attributes.to_dict() for attributes in stages(setting)]} for name, setting in settings.items()}}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).unlink(missing_ok=True)        # no old words beside new numbers, should this be interrupted
    write_tensors(folder / TENSOR_FILE, found)
    (folder / JSON_FILE).write_text(json.dumps(said, indent=1), encoding="utf-8")
    return folder


def restore(model: Any, path: str | Path) -> Any:
    """Quantize a model as `save` found another to be, and wrote into the folder `path`; returns it. Its weights are to be the same.

    FileNotFoundError, ValueError: no such folder, a damaged one, or one of a model with other quantizers. Then nothing is changed.
    """
    from modelq.checkpoint.base import read_json_object
    from modelq.checkpoint.safetensors import read_tensors

    folder = Path(path)
    said = read_json_object(folder / JSON_FILE, "the state of quantizers")
    if said.get("version") != VERSION or not isinstance(said.get("quantizers"), dict):
        raise ValueError(f"{folder / JSON_FILE}: not a state that this version reads; save it again")
    found = read_tensors(folder / TENSOR_FILE)
    (_restore_torch if is_torch_model(model) else _restore_native)(model, said, found, folder)
    return model


def _state_of(model: Any) -> tuple[Mapping[str, Setting], dict[str, np.ndarray], Any]:
    from modelq.calibration.resume import collect
    from modelq.rotation import rotation_of

    if is_torch_model(model):
        from modelq.torch_models.quantize import quantizers_of, settings_of

        found: dict[str, np.ndarray] = {}
        for name, quantizer in quantizers_of(unwrapped(model)).items():
            found |= named_values(name, quantizer.native)
            if quantizer.low_rank is not None:
                found |= {f"{name}:low_rank:{half}": value for half, value in quantizer.low_rank._asdict().items()}
        return settings_of(unwrapped(model)), found, None
    if not model.quantized:
        raise ValueError("the model is not quantized yet: call quantize first")
    found = {}
    for layer in range(-1, model.num_layers):
        found |= {name: array for name, array in collect(model, layer).items() if not name.startswith("layer:")}
    rotation = rotation_of(model.checkpoint)
    return model.settings, found, None if rotation is None else rotation._asdict()


def _settings_from(said: Mapping[str, Any], known: Mapping[str, Setting], folder: Path) -> dict[str, Setting]:
    """ValueError if they are not of these quantizers."""
    given = said["quantizers"]
    if given.keys() != known.keys():
        other = sorted(set(given) ^ set(known))[0]
        raise ValueError(f"{folder}: the state of another model: {other} is in one of them only")
    made = {}
    for name, words in given.items():
        attributes = tuple(QuantizerAttributeConfig.parse(item, name) for item in words["attributes"])
        one = attributes if len(attributes) > 1 else attributes[0]
        made[name] = replace(known[name], attributes=one, enable=bool(words["enable"]), rule=None)
    return made


def _restore_torch(model: Any, said: Mapping[str, Any], found: Mapping[str, np.ndarray], folder: Path) -> None:
    from modelq.torch_models.quantize import inserted, quantizers_of, take_settings

    model = unwrapped(model)
    with inserted(model) as (defaults, _):
        take_settings(model, _settings_from(said, defaults, folder), keep=False)
        quantizers, branches = quantizers_of(model), [key for key in found if ":low_rank:" in key]
        for name in {key.partition(":")[0] for key in branches}:
            quantizers[name].low_rank = LowRank(*(found[f"{name}:low_rank:{half}"] for half in LowRank._fields))
        native = {name: quantizer.native for name, quantizer in quantizers.items()}
        for key in found.keys() - branches:
            set_named_value(native, key, found[key])


def _restore_native(model: Any, said: Mapping[str, Any], found: dict[str, np.ndarray], folder: Path) -> None:
    from modelq.calibration.resume import give_back
    from modelq.quantization.api import check_source, take_original
    from modelq.quantizers import make_quantizer
    from modelq.rules import default_setting

    check_source(model)
    with all_or_nothing(model):
        take_original(model, said.get("rotation"))
        settings = _settings_from(said, {slot.name: default_setting(slot) for slot in model.slots.values()}, folder)
        model.settings, model.quantized = settings, True
        model.quantizers = {name: make_quantizer(setting) for name, setting in settings.items()}
        model.packed, model.low_rank, model.search_losses = {}, {}, {}
        give_back(model, -1, found)
        model.connect()
