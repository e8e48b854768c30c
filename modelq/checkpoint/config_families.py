"""What only one family's config.json says: DeepSeek's latent attention and routing, Llama-Nemotron's blocks, Granite's factors."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modelq.checkpoint.config_rope import mscale
from modelq.checkpoint.config_values import Config

FULL, NONE, LINEAR = range(3)       # MQ_BLOCK_* of csrc/model/arch.h
_UNUSED = ("num_sink_tokens", "sparsify", "unshifted_sink", "use_prefill_window_in_sink_attention", "window_length")


def family_config(config: Config, row: Mapping[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    family = row["family"]
    if family in ("granite", "granitemoe"):
        keys = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        return {key: config.real(key, 1.0) for key in keys}
    if family.startswith("gemma"):
        return _gemma(config, flat)
    if "latent" in row["flags"]:
        return _latent(config, family)
    return {}


def granite_experts(config: Config, flat: dict[str, Any]) -> list[bool]:
    """Every layer has experts, as wide as intermediate_size. A softmax of the chosen ones' logits is that of all made to add up to 1."""
    flat |= {"num_experts": config.integer("num_local_experts"), "num_experts_per_tok": config.integer("num_experts_per_tok"),
             "moe_intermediate_size": flat["intermediate_size"], "norm_topk_prob": True}
    return [True] * flat["num_hidden_layers"]


def gpt_oss(config: Config, flat: dict[str, Any]) -> list[bool]:
    """Every layer has experts; what config.json calls silu is gpt-oss's own activation, with the limit that transformers has too."""
    config.only("swiglu_limit", 7.0)
    config.only("swiglu_alpha", 1.702)
    for key in ("experts_per_token", "initial_context_length"):     # what num_experts_per_tok and rope say too
        config.get(key)
    flat |= {"hidden_act": "swiglu_clamped", "swiglu_limit": 7.0, "num_experts": config.integer("num_local_experts"),
             "num_experts_per_tok": config.integer("num_experts_per_tok"), "norm_topk_prob": True}
    return [True] * flat["num_hidden_layers"]


def llama4(config: Config, flat: dict[str, Any]) -> tuple[list[bool], dict[str, list[int]]]:
    """Which layers have experts; and each layer's rope and chunks of attention. The MLP of the others has a size of its own."""
    layers = flat["num_hidden_layers"]
    step, interval = config.integer("interleave_moe_layer_step", 1), config.integer("no_rope_layer_interval", 4)
    experts = config.get("moe_layers", list(range(step - 1, layers, step)))
    roped = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    types = config.get("layer_types", ["chunked_attention" if rope else "full_attention" for rope in roped])
    if not isinstance(experts, list) or not all(type(layer) is int and 0 <= layer < layers for layer in experts):
        raise ValueError(f"config.json: moe_layers {experts!r}: expected numbers of layers, of {layers}")
    if not isinstance(roped, list) or len(roped) != layers or not set(roped) <= {0, 1}:
        raise ValueError(f"config.json: no_rope_layers {roped!r}: expected 0 or 1 for each of {layers}")
    if not isinstance(types, list) or len(types) != layers or not {str(kind) for kind in types} <= {"chunked_attention", "full_attention"}:
        raise ValueError(f"config.json: layer_types {types!r}: expected full_attention or chunked_attention for each of {layers}")
    chunk = config.integer("attention_chunk_size", None) or 0
    tuned = config.boolean("attn_temperature_tuning", True)
    floor, scale = config.integer("floor_scale", 8192), config.real("attn_scale", 0.1)
    inner = flat["intermediate_size"]
    flat |= {"num_experts": config.integer("num_local_experts"), "num_experts_per_tok": config.integer("num_experts_per_tok"),
             "moe_intermediate_size": inner, "shared_intermediate_size": inner, "routing": "sigmoid", "rope_interleaved": True,
             "qk_unit_norm": config.boolean("use_qk_norm", True), "attention_floor": floor if tuned else 0, "attention_scale": scale,
             "intermediate_size": config.integer("intermediate_size_mlp")}
    return [layer in experts for layer in range(layers)], {
        "layer_ropes": list(roped), "layer_chunks": [chunk if kind == "chunked_attention" else 0 for kind in types]}


def _gemma(config: Config, flat: dict[str, Any]) -> dict[str, Any]:
    config.only("use_bidirectional_attention", None, False)
    caps = {key: config.real(key) for key in ("final_logit_softcapping", "attn_logit_softcapping") if config.get(key) is not None}
    return caps | {"embedding_multiplier": math.sqrt(flat["hidden_size"]), "embedding_multiplier_rounded": True,
                   "attention_multiplier": config.real("query_pre_attn_scalar") ** -0.5}


def _latent(config: Config, family: str) -> dict[str, Any]:
    """DeepSeek's attention. In V2 rope turns pairs side by side, always. head_dim in config.json is that of the part that is turned."""
    config.get("head_dim"), config.get("qk_head_dim")
    turned, plain = config.integer("qk_rope_head_dim"), config.integer("qk_nope_head_dim")
    heads = config.integer("num_attention_heads")
    if config.integer("num_key_value_heads", heads) != heads:
        raise ValueError(f"config.json: num_key_value_heads {config.get('num_key_value_heads')} is not supported beside "
                         f"num_attention_heads {heads}: every head has its own keys")
    if family == "deepseek_v2":
        config.only("rope_interleave", True)
    scale = (plain + turned) ** -0.5
    rope = config.get("rope_scaling") or config.get("rope_parameters", {})
    if rope.get("rope_type", rope.get("type", "default")) != "default" and rope.get("mscale_all_dim"):
        scale *= mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return {"head_dim": plain + turned, "value_head_dim": config.integer("v_head_dim"), "qk_rope_head_dim": turned,
            "kv_lora_rank": config.integer("kv_lora_rank"), "q_lora_rank": config.integer("q_lora_rank", None) or 0,
            "rope_interleaved": config.boolean("rope_interleave", True), "attention_multiplier": scale}


def latent_experts(config: Config, flat: dict[str, Any], family: str) -> list[bool]:
    """DeepSeek's experts: which layers have them, and in `flat` the rest."""
    config.only("moe_layer_freq", 1)
    config.get("num_local_experts")
    flat |= _routing_v2(config) if family == "deepseek_v2" else _routing_v3(config)
    layers, first = flat["num_hidden_layers"], config.integer("first_k_dense_replace", 0, 0)
    experts = config.integer("n_routed_experts", 0, 0)
    flat |= {"num_experts_per_tok": config.integer("num_experts_per_tok"), "num_experts": experts,
             "moe_intermediate_size": config.integer("moe_intermediate_size"),
             "routed_scaling_factor": config.real("routed_scaling_factor", 1.0)}
    flat["shared_intermediate_size"] = flat["moe_intermediate_size"] * config.integer("n_shared_experts", 0, 0)
    return [experts > 0 and layer >= first for layer in range(layers)]


def _routing_v2(config: Config) -> dict[str, Any]:
    """A softmax's largest shares, of all experts or of the groups that have the largest. transformers never makes them add up to 1, and
    the models' own code then leaves routed_scaling_factor out: norm_topk_prob is false in all that were published."""
    config.only("scoring_func", "softmax")
    config.only("norm_topk_prob", False)
    config.only("mlp_bias", False)
    method = config.word("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    groups, kept = config.integer("n_group", None), config.integer("topk_group", None)
    if method == "greedy":
        return {}
    if groups is None or kept is None:
        raise ValueError(f"config.json: topk_method {method!r} needs n_group and topk_group, which are {groups} and {kept}")
    return {"expert_groups": groups, "expert_groups_kept": kept, "expert_groups_best": 1}


def _routing_v3(config: Config) -> dict[str, Any]:
    config.only("topk_method", "noaux_tc")
    config.only("scoring_func", "sigmoid")
    return {"routing": "sigmoid", "norm_topk_prob": config.boolean("norm_topk_prob", True),
            "expert_groups": config.integer("n_group", 1), "expert_groups_kept": config.integer("topk_group", 1)}


def blocks(config: Config, flat: dict[str, Any]) -> dict[str, list[int]]:
    """Llama-Nemotron's layers: sizes of their own, halves that are not there, or linears in their place. In `flat` the largest sizes."""
    given, layers, heads = config.get("block_configs"), config.integer("num_hidden_layers"), flat["num_attention_heads"]
    config.get("num_key_value_heads"), config.get("intermediate_size")
    if not isinstance(given, list) or len(given) != layers or not all(isinstance(block, Mapping) for block in given):
        raise ValueError(f"config.json: block_configs must be a list of one dictionary for each of {layers} layers")
    found: dict[str, list[int]] = {"layer_attention": [], "layer_mlp": [], "layer_kv_heads": [], "layer_intermediate_size": []}
    for index, block in enumerate(given):
        attention, ffn = (Config(block.get(part) or {}, {}, f"block_configs[{index}].{part}.") for part in ("attention", "ffn"))
        found["layer_attention"].append(_kind(attention))
        found["layer_mlp"].append(_kind(ffn))
        found["layer_kv_heads"].append(_kv_heads(attention, heads) if found["layer_attention"][-1] == FULL else 0)
        found["layer_intermediate_size"].append(_inner(ffn, flat["hidden_size"]) if found["layer_mlp"][-1] == FULL else 0)
        for part in (attention, ffn):
            part.refuse_unknown("nemotron_nas")
        Config({key: value for key, value in block.items() if key not in ("attention", "ffn")}, {},
               f"block_configs[{index}].").refuse_unknown("nemotron_nas")
    flat["num_key_value_heads"] = max(found["layer_kv_heads"]) or heads
    flat["intermediate_size"] = max(found["layer_intermediate_size"]) or flat["hidden_size"]
    return found


def _kind(part: Config) -> int:
    for key in _UNUSED:
        part.only(key, None)
    if part.boolean("no_op", False):
        kind = NONE
    else:
        kind = LINEAR if part.boolean("replace_with_linear", False) else FULL
    for key in ("replace_with_linear", "n_heads_in_group", "ffn_mult", "intermediate_size"):
        part.get(key)
    return kind


def _kv_heads(part: Config, heads: int) -> int:
    group = part.integer("n_heads_in_group")
    if heads % group:
        raise ValueError(f"config.json: {part.prefix}n_heads_in_group {group} does not divide {heads} heads")
    return heads // int(group)


def _inner(part: Config, hidden: int) -> int:
    """ffn_mult is of a hidden layer without gate, which has 3/2 of it; rounded up to 256 (modeling_decilm.py of the checkpoints)."""
    if part.get("ffn_mult") is None:
        return int(part.integer("intermediate_size"))
    inner = int(2 * part.real("ffn_mult") * hidden / 3)
    return -(-inner // 256) * 256
