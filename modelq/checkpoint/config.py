"""From config.json to the flat numbers of the C runtime.

Hugging Face configs leave much out, and spell the rotary embedding in two ways (`rope_theta` + `rope_scaling` until transformers 4,
`rope_parameters` since 5). What is left out means what the model's config class in transformers means by it. What the runtime
does not compute, and every key that it does not know, is refused by name: a model is never computed wrongly. Which families there are
is the core's table (_core.archs()).
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modelq.checkpoint.config_families import blocks, family_config, gpt_oss, granite_experts, latent_experts, llama4
from modelq.checkpoint.config_layers import expert_config, layer_windows
from modelq.checkpoint.config_rope import rope_config
from modelq.checkpoint.config_values import Config

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ACTIVATIONS = {"gemma2": ("gelu_pytorch_tanh",), "gemma3": ("gelu_pytorch_tanh",)}
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True,
          "query_pre_attn_scalar": 256, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "rms_norm_eps": 1e-6}

# What a key means that config.json does not have, where that differs between the config classes of transformers (5.17).
_ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096, "num_experts_per_tok": 8, "num_experts": 128,
                  "moe_intermediate_size": 768},
    "mixtral": {"num_key_value_heads": 8, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8,
                "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2_moe": {"num_key_value_heads": 16, "sliding_window": 4096, "num_experts_per_tok": 4, "num_experts": 60,
                  "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "olmo2": {"rms_norm_eps": 1e-5},
    "phi3": {"sliding_window": None, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "max_position_embeddings": 4096},
    "gemma2": _GEMMA | {"vocab_size": 256000, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _GEMMA | {"vocab_size": 262208},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rms_norm_eps": 1e-5, "attention_bias": True,
                "num_local_experts": 128, "num_experts_per_tok": 4, "rope_theta": 150000.0, "rope_parameters": {
                    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                    "original_max_position_embeddings": 4096}},
    "llama4_text": {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
                    "num_local_experts": 16, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
                    "attention_chunk_size": 8192},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {"q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
                    "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 1407},
    "deepseek_v3": {"num_key_value_heads": 128, "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_group": 8,
                    "topk_group": 4, "n_shared_experts": 1, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
                    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 2048},
}
_HAS_BIAS_KEYS = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",), "qwen3_moe": ("attention_bias",),
                  "granite": ("attention_bias", "mlp_bias"), "olmo2": ("attention_bias",), "gemma2": ("attention_bias",),
                  "gemma3": ("attention_bias",), "deepseek_v2": ("attention_bias",), "deepseek_v3": ("attention_bias",),
                  "granitemoe": ("attention_bias",), "gpt_oss": ("attention_bias",),
                  "llama4_text": ("attention_bias",),
                  "nemotron-nas": ("attention_bias", "mlp_bias"), "deci": ("attention_bias", "mlp_bias")}
# Checkpoints of several models: the language model's config is inside, and its tensors' names begin with one of these.
_NESTED = {"gemma3": "gemma3_text", "llama4": "llama4_text"}


class UnknownFamily(ValueError):
    """No row of the core's table is this architecture's."""


def runtime_config(hf_config: Mapping[str, Any], tensors: Iterable[str] = ()) -> tuple[str, dict[str, Any]]:
    """(family, flat config) for _core.Runtime. tensors: names in the checkpoint, which say what those of the language model begin with.

    The flat dict has the keys of the family's row in _core.archs() ("config_keys"), and where layers differ layer_windows (tokens that
    each layer's queries see, 0 for all), layer_experts (whether it has experts) and layer_ropes (0: none, 1: the config's, 2: local).
    ValueError names the key and the value that cannot be computed, or that is not known.
    """
    names = _names(tensors) if "text_config" in hf_config else {}
    hf_config = language_config(hf_config)
    row, model_type = _family(hf_config)
    family = row["family"]
    config = Config(hf_config, _ABSENT.get(model_type, {}))
    flat: dict[str, Any] = {name: config.integer(name) for name in _SIZES if name != "intermediate_size" or "blocks" not in row["flags"]}
    per_layer: dict[str, list[Any]] = {}
    if "blocks" in row["flags"]:
        per_layer = blocks(config, flat)
    else:
        flat["num_key_value_heads"] = config.integer("num_key_value_heads", None) or flat["num_attention_heads"]
    flat |= family_config(config, row, flat)
    if "latent" not in row["flags"]:
        flat["head_dim"] = _head_dim(config, flat)
    flat["rms_norm_eps"] = config.real("rms_norm_eps", 1e-6)
    flat["tie_word_embeddings"] = config.boolean("tie_word_embeddings", False)
    for key in ("attention_bias", "mlp_bias"):
        flat[key] = key in _HAS_BIAS_KEYS.get(family if family == "gemma3" else model_type, ()) and config.boolean(key, False)
    flat["hidden_act"] = _activation(config, family)
    flat.update(rope_config(config, family, flat["head_dim"]))
    if family == "llama4":
        layer_experts, found = llama4(config, flat)
        per_layer |= found
    else:
        layer_experts = _experts(config, row, flat)
    windows = layer_windows(config, model_type, flat["num_hidden_layers"])
    config.refuse_unknown(family)
    flat["sliding_window"] = windows[0] if len(set(windows)) == 1 else 0
    known = {key: value for key, value in flat.items() if key in row["config_keys"] or key in ("rope_short_factor", "rope_long_factor")}
    per_layer |= {"layer_windows": windows, "layer_experts": layer_experts}
    if "rope_local_theta" in flat:
        per_layer["layer_ropes"] = [2 if window else 1 for window in windows]
    known |= names
    told = ("layer_ropes", "layer_attention", "layer_mlp")      # the others, where all layers are alike, the flat numbers say
    return family, known | {key: values for key, values in per_layer.items() if len(set(values)) > 1 or (key in told and any(values))}


def _experts(config: Config, row: dict[str, Any], flat: dict[str, Any]) -> list[bool]:
    """Which layers have experts; in `flat` what they are."""
    own = {"gpt_oss": gpt_oss, "granitemoe": granite_experts}
    if row["family"] in own:
        return own[row["family"]](config, flat)
    return latent_experts(config, flat, row["family"]) if "latent" in row["flags"] else expert_config(config, row, flat)


def stated_dtype(hf_config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json states for the model, or for its language model; None if it does not."""
    parts = [hf_config, *(part for part in (hf_config.get("text_config"), hf_config.get("decoder")) if isinstance(part, Mapping))]
    return next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)


def supported() -> str:
    """The supported architectures, for messages: "llama, mistral (LlamaForCausalLM, MistralForCausalLM); ..."."""
    return "; ".join(f"{', '.join(row['model_types'])} ({', '.join(row['architectures'])})" for row in _archs())


def language_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: the inner one, where the checkpoint holds more than that."""
    inner = hf_config.get("text_config")
    model_type = _NESTED.get(str(hf_config.get("model_type")))
    if model_type is None or not isinstance(inner, Mapping):
        return hf_config
    outer = {key: hf_config[key] for key in ("tie_word_embeddings",) if key in hf_config}
    return {**outer, **inner, "model_type": inner.get("model_type", model_type), "architectures": hf_config.get("architectures")}


def _names(tensors: Iterable[str]) -> dict[str, str]:
    """Where the language model of a checkpoint of several has its tensors."""
    end = "embed_tokens.weight"
    root = next((name.removesuffix(end) for name in tensors if name.endswith("." + end) and "vision" not in name), "model.")
    head = "language_model.lm_head" if root.startswith("language_model.") else "lm_head"
    return {} if root == "model." else {"name_root": root, "name_head": head}


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


def _head_dim(config: Config, flat: dict[str, Any]) -> int:
    head_dim = config.integer("head_dim", None)
    if head_dim is None:
        head_dim, rest = divmod(flat["hidden_size"], flat["num_attention_heads"])
        if rest:
            raise ValueError(
                f"config.json: hidden_size {flat['hidden_size']} is not a multiple of num_attention_heads {flat['num_attention_heads']}"
            )
    return int(head_dim)


def _activation(config: Config, family: str) -> str:
    known = _ACTIVATIONS.get(family, ("silu", "swish"))
    if family.startswith("gemma"):      # hidden_act is what the first Gemma said, and is not read
        config.get("hidden_act")
        return config.word("hidden_activation", known[0], known)
    return config.word("hidden_act", known[0], known)
