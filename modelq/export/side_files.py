"""What lies beside the weights: config.json patched, generation_config.json made to validate, everything else copied as it is."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from modelq.checkpoint.base import Checkpoint, read_json_object

SAMPLING = ("temperature", "top_k", "top_p")


class ConfigFiles(NamedTuple):
    """What a dialect says of an export: config.json's quantization_config, and files beside it by name."""
    quantization: dict[str, Any]
    others: dict[str, dict[str, Any]] = {}


def write_json(path: Path, value: Any) -> None:
    """Indented by four, no newline at the end: byte for byte as Model Optimizer writes its configs."""
    path.write_text(json.dumps(value, indent=4), encoding="utf-8")


def patched_config(checkpoint: Checkpoint, dtype: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json with every field that it has, the dtype of the export, and `quantization_config` behind them."""
    config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    known = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    for key in known:
        config[key] = dtype
    return config | {"quantization_config": quantization}


def copy_side_files(checkpoint: Checkpoint, target: Path) -> None:
    """Tokenizer, chat template, generation config, custom code; a GGUF file's tokenizer is written from its metadata."""
    checkpoint.save_tokenizer(target)
    generation = target / "generation_config.json"
    if generation.is_file():
        settings = read_json_object(generation, "the generation config")
        if not settings.get("do_sample") and any(settings.get(key) is not None for key in SAMPLING):
            # transformers refuses to load sampling parameters beside do_sample false
            generation.write_text(json.dumps(settings | {"do_sample": True}, indent=2) + "\n", encoding="utf-8")
