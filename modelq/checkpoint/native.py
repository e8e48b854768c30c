"""Hugging Face's own layouts: quantization_config of quant_method awq, gptq, fp8 (DeepSeek's blocks) and mxfp8."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelq.checkpoint.dialects import Pair, algorithms, schemes
from modelq.checkpoint.said import AGAIN, Said

# method -> (dialect, settings that must be as they are here, or be absent)
METHODS: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "awq": ("autoawq", {"bits": (4,), "w_bit": (4,), "version": ("gemm", "GEMM")}),
    "gptq": ("gptq", {"bits": (4,), "sym": (True,), "desc_act": (False,), "checkpoint_format": ("gptq",)}),
    "fp8": ("fp8", {"fmt": ("e4m3", None), "activation_scheme": ("dynamic",), "scale_fmt": (None, "float32", "ue8m0")}),
    "mxfp8": ("fp8", {}),
}
_EXCLUDED = ("modules_to_not_convert", "ignored_layers")


def read_config(config: Mapping[str, Any], file: Path) -> Said:
    """What a quantization_config of one of METHODS says of each module. ValueError names the file and the setting that is not read."""
    method = config["quant_method"]
    dialect, allowed = METHODS[method]
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{file}: {method} with {key} {config[key]!r} is not read; modelq reads {key} {values[0]!r}")
    pair, word = next((pair, word) for pair, word in algorithms(dialect).items() if word == method)
    _check_block(config, pair, file)
    size = _group_size(config, file) if schemes()[pair.weight]["packing"] == "row_pairs" else None
    excluded = [name for key in _EXCLUDED for name in config.get(key) or ()]
    return Said(dialect, _finder(pair, size, word, excluded), (), word)


def _finder(pair: Pair, size: int | None, word: str, excluded: list[str]) -> Callable[[str], tuple[Pair, int | None, str] | None]:
    def find(module: str) -> tuple[Pair, int | None, str] | None:
        return None if module in excluded else (pair, size, word)
    return find


def _check_block(config: Mapping[str, Any], pair: Pair, file: Path) -> None:
    block = list(schemes()[pair.weight]["block"])
    if block[0] > 1 and config.get("weight_block_size", block) != block:
        raise ValueError(f"{file}: weight_block_size {config['weight_block_size']!r} is not read; modelq reads {block}")


def _group_size(config: Mapping[str, Any], file: Path) -> int:
    size = config.get("group_size", config.get("q_group_size"))
    if type(size) is not int or size == 0 or size < -1:
        raise ValueError(f"{file}: group_size must be a positive integer (or -1, whole rows), found {size!r}; {AGAIN}")
    return size
