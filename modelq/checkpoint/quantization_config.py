"""What a folder says of its quantization: config.json's section of any dialect, or Model Optimizer's hf_quant_config.json."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from modelq.checkpoint import compressed, dialects, native
from modelq.checkpoint.base import read_json_object
from modelq.checkpoint.dialects import Pair
from modelq.checkpoint.said import AGAIN, Said

NESTED_FILE = "hf_quant_config.json"


def find_quantization(folder: Path, config: dict[str, Any]) -> tuple[Said, dict[str, Any]] | None:
    """What a folder says of its quantization, read and as it stands, or None.

    config.json's own section wins, as it does for most engines. ValueError names the file if the dialect is not known.
    """
    flat, nested = config.get("quantization_config"), {}
    file = folder / ("config.json" if flat is not None else NESTED_FILE)
    if (folder / NESTED_FILE).exists():
        nested = read_json_object(folder / NESTED_FILE, "the quantization config").get("quantization")
        if not isinstance(nested, dict):
            raise ValueError(f"{folder / NESTED_FILE}: no \"quantization\" section; {AGAIN}")
    elif flat is None:
        return None
    method = flat.get("quant_method", "modelopt") if isinstance(flat, dict) else flat
    if isinstance(flat, dict) and method == compressed.METHOD:
        return compressed.read_config(flat, file), flat
    if isinstance(flat, dict) and method in native.METHODS:
        return native.read_config(flat, file), flat
    if flat is not None and method != "modelopt":
        raise ValueError(f"{file}: the weights are quantized by {method!r}, which modelq does not read (it reads: modelopt, "
                         f"{compressed.METHOD}, {', '.join(native.METHODS)}); load the unquantized model instead")
    said = _checked({"group_size": nested.get("group_size"), **(nested if flat is None else flat)}, file)
    return _said_by_modelopt(said, folder), said


def _said_by_modelopt(said: dict[str, Any], folder: Path) -> Said:
    algorithm = said.get("quant_algo")
    listed = said.get("quantized_layers") if algorithm == "MIXED_PRECISION" else None
    if algorithm == "MIXED_PRECISION" and not isinstance(listed, dict):
        raise ValueError(f"{folder}: MIXED_PRECISION without quantized_layers; {AGAIN}")

    def find(module: str) -> tuple[Pair, int | None, str] | None:
        entry = said if listed is None else listed.get(module)
        if entry is None:
            raise ValueError(f"{folder}: {module} is stored quantized, but quantized_layers does not list it; {AGAIN}")
        word = entry.get("quant_algo")
        pair = dialects.pairs("modelopt").get(word)
        if pair is not None and entry.get(dialects.WEIGHT_ONLY_KEY):
            pair = pair._replace(input=None)
        if pair is None:
            raise ValueError(f"{folder}: {module} is quantized as {word!r}, which modelq does not read; it reads "
                             f"{', '.join(dialects.pairs('modelopt'))}")
        return pair, entry.get("group_size"), word
    return Said("modelopt", find, tuple(listed or ()), algorithm)


def _checked(said: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config, if what will be read of it has the types that it should have."""
    layers = said.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise ValueError(f"{file}: quantized_layers must map layers to objects; {AGAIN}")
    for entry in (said, *layers.values()):
        if not isinstance(entry.get("quant_algo"), (str, type(None))):
            raise ValueError(f"{file}: quant_algo must be a name, found {entry['quant_algo']!r}; {AGAIN}")
        size = entry.get("group_size")
        if size is not None and (type(size) is not int or size <= 0):
            raise ValueError(f"{file}: group_size must be a positive integer, found {size!r}; {AGAIN}")
    return said
