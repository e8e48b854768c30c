"""The rotary embedding of a config.json: its type, its numbers, and which layers have which."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modelq.checkpoint.config_values import Config

_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": (), "longrope": (),
    "dynamic": ("factor",)}
_LONGROPE = ("longrope", "su", "yarn")      # all one in Phi-3
_PARTIAL = ("phi3",)                        # families that turn a part of each head only
_LOCAL = ("gemma3",)                        # families whose layers with a sliding window have a rope of their own
ORIGINAL = "original_max_position_embeddings"


def rope_config(config: Config, family: str, head_dim: int) -> dict[str, Any]:
    """The runtime's numbers. What is in the dict counts before what is beside it, as in transformers."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values, flat = config.get(key, {}), {}
    if family in _LOCAL:
        values, flat["rope_local_theta"] = _main_and_local(config, values, key)
    if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
        raise ValueError(f"config.json: {key} {values!r} is not supported; one set of values for all layers is")
    rope = Config(values, {}, f"{key}.")
    config.get("rope_theta")    # counts where the dict has none
    flat |= _partial(config, rope, family)
    flat["rope_theta"] = (rope if rope.get("rope_theta") is not None else config).real("rope_theta", 10000.0)
    kind = _kind(config, rope, family)
    flat["rope_type"] = kind
    flat.update({f"rope_{name}": rope.real(name) for name in _ROPE_TYPES[kind]})
    if kind == "llama3":
        given = config.integer(ORIGINAL, None) or rope.integer(ORIGINAL, None)
        flat[f"rope_{ORIGINAL}"] = given or config.integer("max_position_embeddings")
    elif kind == "dynamic":
        flat[f"rope_{ORIGINAL}"] = config.integer("max_position_embeddings")
    elif kind == "yarn":
        flat |= _yarn(config, rope)
    elif kind == "longrope":
        flat |= _longrope(config, rope, int(head_dim * flat.get("partial_rotary_factor", 1.0)))
    rope.refuse_unknown(family)
    return flat


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many tokens a sequence may have, None where config.json does not say. "dynamic" multiplies them by its factor."""
    length, rope = config.get("max_position_embeddings"), config.get("rope_scaling") or config.get("rope_parameters") or {}
    is_dynamic = "dynamic" in (rope.get("rope_type"), rope.get("type"))
    return int(length * rope["factor"]) if length and is_dynamic else length


def _kind(config: Config, rope: Config, family: str) -> str:
    config.get(ORIGINAL)
    for key in ("type", "rope_type"):
        rope.get(key)
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    if family == "phi3":
        return "default" if rope.word(key, "default", ("default", *_LONGROPE)) == "default" else "longrope"
    return rope.word(key, "default", tuple(kind for kind in _ROPE_TYPES if kind != "longrope"))


def _main_and_local(config: Config, values: Any, key: str) -> tuple[Any, float]:
    """The rope of layers that see everything, and the base of the others', from either of transformers' two spellings."""
    local = config.real("rope_local_base_freq", 10000.0)
    theta = config.get("rope_theta")
    by_type = isinstance(values, Mapping) and any(isinstance(value, Mapping) for value in values.values())
    if not by_type:
        return ({} if not isinstance(values, Mapping) else dict(values)) | ({} if theta is None else {"rope_theta": theta}) or \
            {"rope_theta": 1e6}, local
    if set(values) != {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json: {key} {values!r} is not supported; one set of values for all layers is, or one for full_attention "
                         "and one for sliding_attention")
    narrow = Config(values["sliding_attention"], {}, f"{key}.sliding_attention.")
    narrow.word("rope_type", "default", ("default",))
    return values["full_attention"], narrow.real("rope_theta", local)


def _partial(config: Config, rope: Config, family: str) -> dict[str, float]:
    found = {}
    for where in (config, rope):
        factor = where.get("partial_rotary_factor", 1.0)
        if factor != 1.0 and (family not in _PARTIAL or not isinstance(factor, float) or not 0 < factor < 1):
            raise ValueError(f"config.json: {where.prefix}partial_rotary_factor {factor!r} is not supported")
        if factor != 1.0:
            found["partial_rotary_factor"] = factor
    return found


def mscale(factor: float, weight: float = 1.0) -> float:
    """How much more attention there must be over a context stretched by factor (Peng et al. 2023, "YaRN", equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(config: Config, rope: Config) -> dict[str, Any]:
    original = rope.integer(ORIGINAL, None) or config.integer(ORIGINAL, None) or config.integer("max_position_embeddings")
    factor = rope.real("factor")
    weights = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    scale = mscale(factor, weights[0]) / mscale(factor, weights[1]) if all(weights) else mscale(factor)
    return {"rope_factor": factor, f"rope_{ORIGINAL}": original, "rope_beta_fast": rope.real("beta_fast", 32.0),
            "rope_beta_slow": rope.real("beta_slow", 1.0), "rope_truncate": rope.boolean("truncate", True),
            "rope_attention_factor": rope.real("attention_factor", scale)}


def _longrope(config: Config, rope: Config, rotary: int) -> dict[str, Any]:
    original = rope.integer(ORIGINAL, None) or config.integer(ORIGINAL, None) or config.integer("max_position_embeddings")
    lists = {f"rope_{name}": rope.numbers(name) for name in ("short_factor", "long_factor")}
    for name, factors in lists.items():
        if len(factors) != rotary // 2:
            raise ValueError(f"config.json: {rope.prefix}{name.removeprefix('rope_')} has {len(factors)} numbers, expected {rotary // 2}")
    factor = rope.real("factor", config.integer("max_position_embeddings", original) / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return lists | {f"rope_{ORIGINAL}": original, "rope_attention_factor": rope.real("attention_factor", scale)}
