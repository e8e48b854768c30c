"""From the settings of a training run (Megatron-LM's arguments, NeMo's model_config.yaml or context/model.yaml) to a dict in the shape of
Hugging Face's config.json. What modelq would compute wrongly is refused by name."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelq.checkpoint.megatron.torch_file import plain

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM",
                  "qwen3_moe": "Qwen3MoeForCausalLM"}
_MISSING = object()
# setting -> values that change nothing for a Llama-like forward; whatever else it may be is refused
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",), "normalization": ("RMSNorm", "rmsnorm"), "activation": ("fast-swiglu", "swiglu"),
    "rotary_percent": (1, 1.0), "rotary_percentage": (1, 1.0), "rotary_interleaved": (False,), "multi_latent_attention": (False,),
    "num_experts_shared": (0,), "moe_shared_expert_intermediate_size": (None, 0), "apply_residual_connection_post_layernorm": (False,),
    "moe_router_score_function": ("softmax",), "moe_router_enable_expert_bias": (False,), "moe_router_num_groups": (None,),
    "window_size": (None,), "transformer_block_type": ("pre_ln",), "megatron_legacy": (False, True), "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,), "attention_output_gate": (False,), "softmax_type": ("vanilla",),
    "add_position_embedding": (False, True), "moe_router_topk_scaling_factor": (None, 1.0), "moe_apply_probs_on_input": (False,),
}


class Settings:
    """Settings by any of the names that the generations of Megatron-LM and NeMo gave them."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = {key: plain(value) for key, value in values.items()}
        self.where = where

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _MISSING:
            raise ValueError(f"{self.where}: the setting {names[0]!r} is missing")
        return default

    def size(self, *names: str, default: Any = _MISSING) -> int:
        value = self.get(*names, default=default)
        if value is not default and (type(value) is not int or value <= 0):
            raise ValueError(f"{self.where}: {names[0]} is {value!r}, expected an integer > 0")
        return value

    def flag(self, *names: str, default: bool = False) -> bool:
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {names[0]} is {value!r}, expected true or false")
        return value


def config_of(settings: Settings, names: frozenset[str], embedding_rows: int, vocabulary: int | None) -> dict[str, Any]:
    """A dict in the shape of config.json. names: the tensors (names.plain_name); vocabulary: what a tokenizer that is there says.

    ValueError names the setting that is missing or that no supported family computes.
    """
    _check(settings)
    heads = settings.size("num_attention_heads")
    hidden = settings.size("hidden_size")
    experts = settings.size("num_experts", "num_moe_experts", default=None)
    groups = settings.size("num_query_groups", default=heads)
    if settings.values.get("group_query_attention") is False:    # the argument num_query_groups has a default of 1 that then means nothing
        groups = heads
    config: dict[str, Any] = {
        "model_type": _family(settings, names, experts), "hidden_size": hidden, "num_attention_heads": heads,
        "num_hidden_layers": settings.size("num_layers"), "num_key_value_heads": groups,
        "head_dim": settings.size("kv_channels", default=None) or hidden // heads,
        "intermediate_size": settings.size("ffn_hidden_size", default=None) or 4 * hidden,
        "max_position_embeddings": settings.size("max_position_embeddings", "encoder_seq_length", "seq_length", default=4096),
        "rms_norm_eps": float(settings.get("norm_epsilon", "layernorm_epsilon", default=1e-5)),
        "rope_theta": float(settings.get("rotary_base", default=10000)), "rope_scaling": _rope_scaling(settings),
        "hidden_act": "silu", "dtype": _dtype(settings), "tie_word_embeddings": _is_tied(settings, names),
        "vocab_size": min(settings.size("vocab_size", default=None) or vocabulary or embedding_rows, embedding_rows),
    }
    config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
    _biases(config, settings, names)
    if experts:
        _experts(config, settings, experts)
    return config


def _check(settings: Settings) -> None:
    if settings.values.get("swiglu") is False or (settings.values.get("swiglu") is None and settings.values.get("activation") is None
                                                  and settings.values.get("gated_linear_unit") is not True):
        raise ValueError(f"{settings.where}: not a gated MLP (swiglu); Llama-like and Mixtral-like models are read")
    for name, allowed in _MUST_BE.items():
        value = settings.values.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{settings.where}: {name} is {value!r}, which is not read; {allowed[0]!r} is")


def _family(settings: Settings, names: frozenset[str], experts: int | None) -> str:
    normed = any(name.endswith(".q_layernorm.weight") for name in names)
    if experts:
        return "qwen3_moe" if normed or settings.flag("moe_router_pre_softmax") or settings.values.get("moe_layer_freq") not in (None, 1) \
            else "mixtral"
    if normed:
        return "qwen3"
    biased = {part for part in ("linear_qkv", "linear_proj") if any(name.endswith(f".{part}.bias") for name in names)}
    return "qwen2" if biased == {"linear_qkv"} else "llama"


def _biases(config: dict[str, Any], settings: Settings, names: frozenset[str]) -> None:
    kinds = {kind: any(name.endswith(f".{kind}.bias") for name in names) for kind in ("linear_qkv", "linear_proj", "linear_fc1")}
    norm = next((name for name in names if name.endswith("layernorm.bias")), None)
    if norm:
        raise ValueError(f"{settings.where}: tensor {norm!r}: norms with a bias are not read")
    if config["model_type"] == "llama":
        config["attention_bias"], config["mlp_bias"] = kinds["linear_qkv"], kinds["linear_fc1"]
    elif config["model_type"] in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = kinds["linear_qkv"]


def _experts(config: dict[str, Any], settings: Settings, experts: int) -> None:
    layers = config["num_hidden_layers"]
    chosen = settings.size("moe_router_topk", default=2)
    inner = settings.size("moe_ffn_hidden_size", default=None) or config["intermediate_size"]
    if config["model_type"] == "mixtral":
        config.update(num_local_experts=experts, num_experts_per_tok=chosen, intermediate_size=inner)
        return
    frequency = settings.get("moe_layer_freq", default=1)
    sparse = [i % frequency == 0 for i in range(layers)] if type(frequency) is int else list(frequency)
    config.update(num_experts=experts, num_experts_per_tok=chosen, moe_intermediate_size=inner, decoder_sparse_step=1,
                  norm_topk_prob=not settings.flag("moe_router_pre_softmax"),
                  mlp_only_layers=[i for i, has_experts in enumerate(sparse) if not has_experts])


def _rope_scaling(settings: Settings) -> dict[str, Any] | None:
    """Llama 3.1's, which Megatron-LM writes with fixed numbers but for the factor; or positions divided by a factor."""
    if settings.flag("use_rope_scaling", "scale_positional_embedding") or settings.values.get("scale_factor") is not None:
        return {"rope_type": "llama3", "factor": float(settings.get("rope_scaling_factor", "scale_factor", default=8)),
                "low_freq_factor": float(settings.get("low_freq_factor", default=1)),
                "high_freq_factor": float(settings.get("high_freq_factor", default=4)),
                "original_max_position_embeddings": settings.size("old_context_len", default=8192)}
    factor = settings.get("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", default=1)
    return None if factor == 1 else {"rope_type": "linear", "factor": float(factor)}


def _is_tied(settings: Settings, names: frozenset[str]) -> bool:
    if "share_embeddings_and_output_weights" in settings.values:
        return settings.flag("share_embeddings_and_output_weights")
    if "untie_embeddings_and_output_weights" in settings.values:
        return not settings.flag("untie_embeddings_and_output_weights")
    return "output_layer.weight" not in names


def _dtype(settings: Settings) -> str:
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if settings.values.get(name) is True:
            return dtype
    given = str(settings.get("params_dtype", "precision", default="bfloat16"))
    known = {"bf16": "bfloat16", "bf16-mixed": "bfloat16", "16": "float16", "16-mixed": "float16", "32": "float32",
             "32-true": "float32", "torch.bfloat16": "bfloat16"}
    return known.get(given, given if given in ("bfloat16", "float16", "float32") else "bfloat16")
