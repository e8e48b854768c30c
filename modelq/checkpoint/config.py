"""From config.json to the flat numbers of the C runtime.

Hugging Face configs leave much out, and spell the rotary embedding in two ways (`rope_theta` + `rope_scaling` until transformers 4,
`rope_parameters` since 5). What is left out means what the model's config class in transformers means by it. What the runtime
does not compute is refused by name: a model is never computed wrongly. Which families there are is the core's table (_core.archs()).
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ACTIVATIONS = ("silu", "swish")
_ROPE_TYPES = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_REQUIRED = object()

# What a key means that config.json does not have, where that differs between the config classes of transformers (5.17).
_ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096, "num_experts_per_tok": 8, "num_experts": 128,
                  "moe_intermediate_size": 768},
    "mixtral": {"num_key_value_heads": 8, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8,
                "rms_norm_eps": 1e-5, "rope_theta": 1e6},
}
_HAS_BIAS_KEYS = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",), "qwen3_moe": ("attention_bias",)}
_WINDOW_IN_ALL_LAYERS = ("mistral", "mixtral", "qwen3_moe")
_WINDOW_SWITCHED = ("qwen2", "qwen3", "qwen3_moe")    # by use_sliding_window


class UnknownFamily(ValueError):
    """No row of the core's table is this architecture's."""


def runtime_config(hf_config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(family, flat config) for _core.Runtime.

    The flat dict has the keys of the family's row in _core.archs() ("config_keys"), and layer_windows (tokens that each layer's
    queries see, 0 for all) and layer_experts (whether it has experts) if the layers differ. ValueError names the key and the value
    that cannot be computed.
    """
    row, model_type = _family(hf_config)
    config = _Config(hf_config, _ABSENT.get(model_type, {}))
    flat: dict[str, Any] = {name: config.integer(name) for name in _SIZES}
    flat["num_key_value_heads"] = config.integer("num_key_value_heads", None) or flat["num_attention_heads"]
    flat["head_dim"] = _head_dim(config, flat)
    flat["rms_norm_eps"] = config.real("rms_norm_eps", 1e-6)
    flat["tie_word_embeddings"] = config.boolean("tie_word_embeddings", False)
    for key in ("attention_bias", "mlp_bias"):
        flat[key] = key in _HAS_BIAS_KEYS.get(model_type, ()) and config.boolean(key, False)
    flat["hidden_act"] = config.word("hidden_act", "silu", _ACTIVATIONS)
    flat.update(_rope(config))
    layer_experts = _experts(config, row, flat)
    windows = _windows(config, model_type, flat["num_hidden_layers"])
    flat["sliding_window"] = windows[0] if len(set(windows)) == 1 else 0
    known = {key: value for key, value in flat.items() if key in row["config_keys"]}
    if len(set(windows)) > 1:
        known["layer_windows"] = windows
    if len(set(layer_experts)) > 1:
        known["layer_experts"] = layer_experts
    return row["family"], known


def stated_dtype(hf_config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json states for the model, or for its language model; None if it does not."""
    parts = [hf_config, *(part for part in (hf_config.get("text_config"), hf_config.get("decoder")) if isinstance(part, Mapping))]
    return next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)


def supported() -> str:
    """The supported architectures, for messages: "llama, mistral (LlamaForCausalLM, MistralForCausalLM); ..."."""
    return "; ".join(f"{', '.join(row['model_types'])} ({', '.join(row['architectures'])})" for row in _archs())


def _archs() -> list[dict[str, Any]]:
    from modelq import _core

    return _core.archs()


def _family(hf_config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(row of archs(), model_type). model_type decides; the architecture, where the config names one, must fit."""
    model_type = hf_config.get("model_type")
    architectures = hf_config.get("architectures") or []
    for row in _archs():
        types, classes = row["model_types"], row["architectures"]
        named = any(name in classes for name in architectures) if isinstance(architectures, list) else False
        if model_type in types and (named or not architectures):
            return row, model_type
        if model_type is None and named:
            return row, types[classes.index(next(name for name in architectures if name in classes))]
    raise UnknownFamily(f"config.json: model_type {model_type!r}, architectures {architectures!r}: not supported; supported are "
                        f"{supported()}")


class _Config:
    """Typed access. A key that is absent has the default of the model type, then the caller's; null counts as absent to the caller."""

    def __init__(self, values: Mapping[str, Any], absent: Mapping[str, Any], prefix: str = ""):
        self.values, self.absent, self.prefix = values, absent, prefix

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values[key] if key in self.values else self.absent.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._required(key, default)
        if value is not default and (type(value) is not int or value <= 0):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected an integer > 0")
        return value

    def real(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected a number > 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected true or false")
        return value

    def word(self, key: str, default: str, known: tuple[str, ...]) -> str:
        value = self.get(key, default)
        if value not in known:
            raise ValueError(f"config.json: {self.prefix}{key} {value!r} is not supported; supported are {', '.join(known)}")
        return value

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"config.json: {self.prefix}{key} is missing")
        return value


def _head_dim(config: _Config, flat: dict[str, Any]) -> int:
    head_dim = config.integer("head_dim", None)
    if head_dim is None:
        head_dim, rest = divmod(flat["hidden_size"], flat["num_attention_heads"])
        if rest:
            raise ValueError(
                f"config.json: hidden_size {flat['hidden_size']} is not a multiple of num_attention_heads {flat['num_attention_heads']}"
            )
    return head_dim


def _rope(config: _Config) -> dict[str, Any]:
    """rope_type and its numbers. What is in the dict counts before what is beside it, as in transformers."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key, {})
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        raise ValueError(f"config.json: {key} {values!r} is not supported; one set of values for all layers is")
    rope = _Config(values, {}, f"{key}.")
    kind = rope.word("rope_type" if rope.get("rope_type") is not None else "type", "default", tuple(_ROPE_TYPES))
    for where in (rope, config):
        if where.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"config.json: {where.prefix}partial_rotary_factor {where.get('partial_rotary_factor')!r} is not supported")
    flat = {"rope_type": kind, "rope_theta": (rope if rope.get("rope_theta") is not None else config).real("rope_theta", 10000.0)}
    flat.update({f"rope_{name}": rope.real(name) for name in _ROPE_TYPES[kind]})
    if kind == "llama3":
        original = "original_max_position_embeddings"
        given = config.integer(original, None) or rope.integer(original, None)
        flat[f"rope_{original}"] = given or config.integer("max_position_embeddings")
    return flat


def _experts(config: _Config, row: Mapping[str, Any], flat: dict[str, Any]) -> list[bool]:
    """Which layers have experts, and in `flat` how many, of what size, and how a token's experts share in the result."""
    layers = flat["num_hidden_layers"]
    if "moe" not in row["flags"]:
        return [False] * layers
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"config.json: mlp_only_layers is {dense!r}, expected a list of integers")
    step = config.integer("decoder_sparse_step", 1)
    found = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
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
    return found


def _windows(config: _Config, model_type: str, layers: int) -> list[int]:
    """How many tokens each layer's queries see, 0 for all."""
    if "sliding_window" not in _ABSENT.get(model_type, {}):
        return [0] * layers
    window = config.integer("sliding_window", None) or 0
    if model_type in _WINDOW_SWITCHED and not config.boolean("use_sliding_window", False):
        window = 0
    if model_type in _WINDOW_IN_ALL_LAYERS:
        return [window] * layers
    first = config.get("max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"config.json: max_window_layers is {first!r}, expected an integer")
    types = config.get("layer_types", ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)])
    if not isinstance(types, list) or len(types) != layers or not {str(kind) for kind in types} <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"config.json: layer_types {types!r}: expected full_attention or sliding_attention for each of {layers}")
    return [window if kind == "sliding_attention" else 0 for kind in types]
