"""What of a config.json differs from layer to layer: attention windows, and which layers have experts."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelq.checkpoint.config_values import Config

_WINDOW_IN_ALL_LAYERS = ("mistral", "mixtral", "qwen3_moe", "phi3")
_WINDOW_SWITCHED = ("qwen2", "qwen3", "qwen3_moe", "qwen2_moe")    # by use_sliding_window
_KINDS = {"sliding_attention", "full_attention"}


def layer_windows(config: Config, model_type: str, layers: int) -> list[int]:
    """How many tokens each layer's queries see, 0 for all."""
    if "sliding_window" not in config.absent:
        return [0] * layers
    window = config.integer("sliding_window", None, 0) or 0
    for key in ("_sliding_window_pattern", "sliding_window_pattern") if model_type.startswith("gemma") else ():
        config.get(key)     # layer_types counts before these
    if model_type in _WINDOW_SWITCHED and not config.boolean("use_sliding_window", False):
        window = 0
    if model_type in _WINDOW_IN_ALL_LAYERS:
        return [window] * layers
    types = config.get("layer_types", None)
    if types is None:
        types = _layer_types(config, model_type, bool(window), layers)
    if not isinstance(types, list) or len(types) != layers or not {str(kind) for kind in types} <= _KINDS:
        raise ValueError(f"config.json: layer_types {types!r}: expected full_attention or sliding_attention for each of {layers}")
    return [window if kind == "sliding_attention" else 0 for kind in types]


def _layer_types(config: Config, model_type: str, windowed: bool, layers: int) -> list[str]:
    """Where config.json does not say: what the config classes of transformers fill in."""
    if model_type == "gpt_oss":
        sliding = [(i + 1) % 2 == 1 for i in range(layers)]
    elif model_type.startswith("gemma"):
        default = 2 if model_type == "gemma2" else 6
        pattern = config.integer("sliding_window_pattern", None) or config.integer("_sliding_window_pattern", default)
        sliding = [bool((i + 1) % pattern) for i in range(layers)]
    else:
        first = config.get("max_window_layers", 28)
        if type(first) is not int:
            raise ValueError(f"config.json: max_window_layers is {first!r}, expected an integer")
        qwen2_moe = model_type == "qwen2_moe"
        sliding = [windowed and ((i + 1) % 2 == 1 and i < first if qwen2_moe else i >= first) for i in range(layers)]
    return ["sliding_attention" if narrow else "full_attention" for narrow in sliding]


def expert_config(config: Config, row: Mapping[str, Any], flat: dict[str, Any]) -> list[bool]:
    """Which layers have experts, and in `flat` how many, of what size, and how a token's experts share in the result."""
    layers = flat["num_hidden_layers"]
    if "moe" not in row["flags"]:
        return [False] * layers
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"config.json: mlp_only_layers is {dense!r}, expected a list of integers")
    step = config.integer("decoder_sparse_step", 1)
    found = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    for key in ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
        config.get(key)
    if config.get("num_local_experts") == 0 or config.values.get("num_experts") == 0:
        found = [False] * layers
    if any(found):
        # transformers 5 writes num_local_experts for every family
        given = "num_local_experts" if "num_local_experts" in config.values else "num_experts"
        flat["num_experts"] = config.integer(given if given in config.values else next(key for key in (
            "num_experts", "num_local_experts") if key in config.absent))
        flat["num_experts_per_tok"] = config.integer("num_experts_per_tok")
        flat["moe_intermediate_size"] = config.integer("moe_intermediate_size", flat["intermediate_size"])
        flat["norm_topk_prob"] = row["family"] == "mixtral" or config.boolean("norm_topk_prob", False)
    if "shared_gated" in row["flags"]:
        flat["shared_intermediate_size"] = config.integer("shared_expert_intermediate_size")
        flat["qkv_bias"] = config.boolean("qkv_bias", True)
    return found
