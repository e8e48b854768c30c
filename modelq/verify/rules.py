"""The rules, in the order in which they are tried: the table that `modelq verify` walks over."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from modelq.verify import config_rules, expert_rules, tensor_rules, value_rules
from modelq.verify.findings import Finding
from modelq.verify.opened import Export


class Rule(NamedTuple):
    """engines, dialects: which it is for; () means all. decisive: if it finds an error, the rules behind it have nothing to go by."""
    name: str
    check: Callable[[Export], Iterator[Finding]]
    dialects: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    decisive: bool = False


RULES = (
    Rule("method", config_rules.method, decisive=True),
    Rule("algorithm", config_rules.algorithm, ("modelopt", "compressed-tensors")),
    Rule("both_files", config_rules.both_files, ("modelopt",), ("vllm", "sglang", "tensorrt-llm")),
    Rule("nested_keys", config_rules.nested_keys, ("modelopt",)),
    Rule("group_size", config_rules.group_size),
    Rule("awq_keys", config_rules.awq_keys, ("modelopt",), ("tensorrt-llm",)),
    Rule("mixed", config_rules.mixed, ("modelopt",)),
    Rule("one_format_per_group", config_rules.one_format_per_group),
    Rule("experts", config_rules.experts, ("modelopt",), ("vllm", "tensorrt-llm")),
    Rule("fused_experts", expert_rules.fused_experts, ("compressed-tensors",), ("transformers",)),
    Rule("vllm_experts", expert_rules.vllm_experts, ("modelopt", "compressed-tensors"), ("vllm",)),
    Rule("exclusions", config_rules.exclusions),
    Rule("kv_cache", config_rules.kv_cache, ("modelopt", "compressed-tensors")),
    Rule("parts", tensor_rules.parts),
    Rule("true_shapes", tensor_rules.true_shapes),
    Rule("divisible", tensor_rules.divisible),
    Rule("smoothing", tensor_rules.smoothing),
    Rule("kv_tensors", tensor_rules.kv_tensors),
    Rule("values", value_rules.values),
    Rule("shared", value_rules.shared),
)
