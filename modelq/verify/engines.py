"""The table of engines: what each reads, and how it decides which modules stay unquantized.

Read in vLLM 0.32, SGLang 0.5.23, TensorRT-LLM's PyTorch backend and transformers 5.23. Dynamo runs one of the first three.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch, fnmatchcase
from typing import NamedTuple

Matcher = Callable[[str, Iterable[str]], bool]


class Engine(NamedTuple):
    """algorithms: the modelopt dialect's names (a layer may say), formats: compressed-tensors' "format strategy", methods: native
    quant_methods; kv_cache: names of KV cache formats; fuses: whether q/k/v and gate/up become one product;
    nested_first: whether hf_quant_config.json is read before config.json; strict: whether a tensor that it does not know is an error."""
    algorithms: tuple[str, ...]
    formats: tuple[str, ...]
    methods: tuple[str, ...]
    kv_cache: tuple[str, ...]
    matchers: dict[str, Matcher]
    fuses: bool = True
    nested_first: bool = False
    strict: bool = True


def substring_or_glob(name: str, patterns: Iterable[str]) -> bool:
    return any(pattern in name or fnmatch(name, pattern) for pattern in patterns)


def glob_on_any_part(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns for text in (name, *name.split(".")))


def glob_on_fused(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(fused_name(name), pattern) for pattern in patterns)


def exact_or_regex(name: str, patterns: Iterable[str]) -> bool:
    return any(re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name for pattern in patterns)


def exact(name: str, patterns: Iterable[str]) -> bool:
    return name in patterns


def substring(name: str, patterns: Iterable[str]) -> bool:
    return any(pattern in name for pattern in patterns)


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def fused_name(module: str) -> str:
    """TensorRT-LLM matches the name of the module that the engine has, in which siblings are one."""
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_FUSED[leaf]}" if leaf in _FUSED else module


def siblings(modules: Iterable[str]) -> list[list[str]]:
    """The groups of modules that engines fuse, in the order given."""
    groups: dict[tuple[str, int], list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for number, leaves in enumerate(SIBLINGS):
            if leaf in leaves:
                groups.setdefault((parent, number), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


FLOAT8 = ("float-quantized tensor", "float-quantized channel", "float-quantized block")
INTEGERS = ("pack-quantized group", "pack-quantized channel", "pack-quantized 8-bit group", "pack-quantized 8-bit channel",
            "int-quantized channel", "int-quantized tensor")
NVFP4, MXFP8, MXFP4 = "nvfp4-pack-quantized tensor_group", "mxfp8-quantized group", "mxfp4-pack-quantized group"

ENGINES = {
    "vllm": Engine(
        ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "fp8_pb_wo", "NVFP4", "W4A16_NVFP4", "MXFP8"),
        (*FLOAT8, *INTEGERS, NVFP4, MXFP8, MXFP4), ("fp8", "awq", "gptq"), ("FP8", "NVFP4"),     # its mxfp8 reads no weight_scale_inv
        {"modelopt": substring_or_glob, "compressed-tensors": exact_or_regex, "fp8": exact, "awq": substring}),
    "sglang": Engine(
        ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8"),
        (*FLOAT8, *INTEGERS, NVFP4), ("fp8", "mxfp8", "awq", "gptq"), ("FP8", "NVFP4"),
        {"modelopt": glob_on_any_part, "compressed-tensors": exact_or_regex, "fp8": substring, "mxfp8": substring, "awq": substring}),
    "tensorrt-llm": Engine(
        ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A16_AWQ", "W4A8_AWQ", "MXFP8",
         "W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"),
        ("float-quantized channel", "float-quantized block"), ("fp8", "mxfp8"), ("FP8", "NVFP4"),
        {"modelopt": glob_on_fused, "compressed-tensors": exact_or_regex, "fp8": glob_on_fused, "mxfp8": glob_on_fused},
        nested_first=True, strict=False),
    "transformers": Engine(
        (), (*FLOAT8, *INTEGERS, NVFP4, MXFP8, MXFP4), ("fp8", "mxfp8", "awq", "gptq"), ("FP8",),
        {"compressed-tensors": exact_or_regex, "fp8": substring, "mxfp8": substring, "awq": substring}, fuses=False),
}
MIXED = "MIXED_PRECISION"
