"""The config that a command's options choose: a preset or a file, another block size or algorithm, a quantized cache."""
from __future__ import annotations

import copy
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

# As Model Optimizer's hf_ptq.py calls them, and GPTQ.
PRESETS = {
    "nvfp4": "NVFP4_DEFAULT_CFG", "nvfp4_awq": "NVFP4_AWQ_LITE_CFG", "nvfp4_mse": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "nvfp4_local_hessian": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", "nvfp4_svdquant": "NVFP4_SVDQUANT_DEFAULT_CFG",
    "nvfp4_gptq": "NVFP4_GPTQ_CFG", "nvfp4_wo": "W4A16_NVFP4_CFG", "nvfp4_mlp_only": "NVFP4_MLP_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG", "fp8_pb_wo": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int8": "INT8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG", "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG", "int4_gptq": "INT4_GPTQ_CFG", "int4_wo": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "w4a8_nvfp4_fp8": "W4A8_NVFP4_FP8_CFG", "mxfp8": "MXFP8_DEFAULT_CFG", "mxfp4": "MXFP4_DEFAULT_CFG",
}
# What --kv-cache may say, as hf_ptq.py's --kv_cache_qformat.
KV_CACHES = {"none": None, "fp8": "FP8_KV_CFG", "fp8_affine": "FP8_AFFINE_KV_CFG", "nvfp4": "NVFP4_KV_CFG",
             "nvfp4_affine": "NVFP4_AFFINE_KV_CFG", "nvfp4_rotate": "NVFP4_KV_ROTATE_CFG"}


def chosen_config(args: Namespace) -> dict[str, Any]:
    """Of --format or --config, with --block-size, --algorithm and --kv-cache."""
    if args.format and args.config:
        raise ValueError("give --format or --config, not both")
    config = read_config(args.config) if args.config else preset(args.format or "nvfp4")
    if args.block_size:
        config = with_block_size(config, args.block_size)
    if args.algorithm:
        config = {**config, "algorithm": algorithm(args.algorithm)}
    return with_kv_cache(config, args.kv_cache)


def preset_name(name: str) -> str:
    """The full name of a short one, or of one in lower case or without its ending; what is none of these comes back as it is."""
    from modelq import presets

    word = name.strip().upper()
    known = (word + ending for ending in ("", "_CFG", "_DEFAULT_CFG", "_CONFIG"))
    return PRESETS.get(word.lower()) or next((one for one in known if one in presets.choices), name)


def preset(name: str) -> dict[str, Any]:
    """A preset by its short or its full name."""
    from modelq import presets

    full = preset_name(name)
    if full not in presets.choices:
        raise ValueError(f"--format {name}: unknown; known are {', '.join(PRESETS)} and the presets {', '.join(sorted(presets.choices))}")
    if full in KV_CACHES.values():
        word = next(word for word, config in KV_CACHES.items() if config == full)
        raise ValueError(f"--format {name}: this is for the cache of keys and values alone: give it beside a format, as --kv-cache {word}")
    return getattr(presets, full)


def algorithm(text: str) -> list[str]:
    """"rotate+gptq" -> ["rotate", "gptq"]. ValueError names those that are known."""
    from modelq.algorithms import METHODS

    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--algorithm {text}: {name!r} is unknown; known are {', '.join(METHODS)}")
    return names


def with_block_size(config: dict[str, Any], size: int) -> dict[str, Any]:
    """The same with another block size for INT4 weights."""
    changed, found = copy.deepcopy(config), False
    for rule in changed["quant_cfg"]:
        attributes = rule.get("cfg") or {}
        for stage in attributes if isinstance(attributes, (list, tuple)) else [attributes]:
            blocks = stage.get("block_sizes") or {}
            if stage.get("num_bits") == 4 and -1 in blocks:
                blocks[-1], found = size, True
    if not found:
        raise ValueError("--block-size is for INT4 weights in blocks, and this config has none")
    return changed


def kv_cache_config(word: str) -> dict[str, Any] | None:
    from modelq import presets

    return None if KV_CACHES[word] is None else getattr(presets, KV_CACHES[word])


def with_kv_cache(config: dict[str, Any], word: str) -> dict[str, Any]:
    """The same with the rules for keys and values appended (as update_quant_cfg_with_kv_cache_quant does)."""
    cache = kv_cache_config(word)
    if cache is None:
        return config
    from modelq.config import normalize_quant_cfg_list

    rules = config.get("quant_cfg") or []
    if isinstance(rules, dict):     # the older spelling
        rules = [rule.to_dict() for rule in normalize_quant_cfg_list(rules)]
    return {**config, "quant_cfg": [*rules, *copy.deepcopy(cache["quant_cfg"])], "algorithm": config.get("algorithm") or "max"}


def read_config(path: Path) -> dict[str, Any]:
    """A quantization config from a YAML or JSON file. JSON has only strings for keys: "-1" is meant as the axis -1."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping with 'quant_cfg', got {type(config).__name__}")
    return _integer_keys(config)


def _integer_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(key) if isinstance(key, str) and re.fullmatch(r"-?\d+", key) else key: _integer_keys(v) for key, v in value.items()}
    return [_integer_keys(item) for item in value] if isinstance(value, list) else value
