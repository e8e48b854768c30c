"""The modules of an architecture that the runtime does not know, told from the names and shapes of a checkpoint's tensors.

A linear is a tensor of two axes named `<module>.weight`, unless its name or shape says that it is something else: an embedding, a router,
the head over the vocabulary. Whatever is left alone has a kind that says why. Layers are what the first number in a name counts; linears
that engines fuse are known by their usual names.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from modelq.checkpoint.base import TensorInfo

FLOATS = ("float32", "bfloat16", "float16")
# Kinds that are never quantized, and why.
LEFT_ALONE = {
    "router": "router: what chooses experts stays as it is",
    "head": "head over the vocabulary",
    "convolution": "convolution: only matrices are quantized",
    "stacked experts": "stacked experts: no engine loads them quantized under this name",
    "conv1d": "Conv1D of transformers: stored [in, out], which no engine loads quantized",
    "parameter": "a parameter, not the weight of a linear",
    "further layer": "predicts further tokens: engines take it in high precision",
    "stored dtype": "not stored as float32, bfloat16 or float16",
}
_EMBEDDING = re.compile(r"embed|(^|_)emb($|_)|^w[tp]e$|^shared$|relative_attention_bias|codebook")
_NO_EMBEDDING = re.compile(r"proj|mapping|dense|linear|_out$")
_ROUTERS = ("gate", "wg", "shared_expert_gate")
_HEADS = ("embed_out",)
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_EXPERTS = re.compile(r"(^|[._])experts($|[._])")
# What engines multiply in one product.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"),
          ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("q_a_proj", "kv_a_proj_with_mqa"))
_READS_ANOTHER = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)      # attention whose q reads another tensor than k and v


def rows_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], stored: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Rows like those of `_core.Runtime.modules`, in the order of the files, of every float tensor with two axes or more: name, kind
    ("linear", "embedding" or one of LEFT_ALONE), layer (-1 outside of layers), shape, weight, bias, site, expert (None).

    stored: modules whose weights are stored quantized, and so are linears whatever their names.
    """
    layers: dict[str, int] = {}
    sure, rows = set(stored), []
    for name, info in tensors.items():
        if len(info.shape) < 2 or "float" not in info.dtype:
            continue
        module = name.removesuffix(".weight")
        prefix = re.match(r"(.*?\.)?\d+(?=\.)", module)
        layer = -1 if prefix is None else layers.setdefault(prefix[0], len(layers))
        kind = "linear" if module in sure else "further layer" if predicts_further(module, config) else kind_of(info, config, layer < 0)
        rows.append({"name": module, "kind": kind, "layer": layer,
                     "shape": tuple(info.shape), "weight": name, "bias": f"{module}.bias" if f"{module}.bias" in tensors else None,
                     "site": site_of(module), "expert": None})
    return rows


def kind_of(info: TensorInfo, config: Mapping[str, Any], outside: bool = False) -> str:
    """What a float tensor of two axes or more is. outside: it is in no layer."""
    parts = info.name.removesuffix(".weight").split(".")
    if len(info.shape) > 2:
        return "stacked experts" if len(info.shape) == 3 and _EXPERTS.search(info.name) else "convolution" \
            if info.name.endswith(".weight") else "parameter"
    if not info.name.endswith(".weight"):
        return "parameter"
    if parts[-1] in _HEADS:
        return "head"
    if is_embedding(info.name.removesuffix(".weight")):
        return "embedding"
    if "router" in parts[-2:] or parts[-1] in _ROUTERS:
        return "router"
    if outside and info.shape[0] == vocabulary_of(config) and "lm_head" not in parts:
        return "head"
    if info.dtype not in FLOATS:
        return "stored dtype"
    return "conv1d" if config.get("model_type") in _CONV1D_TYPES else "linear"


def predicts_further(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module is in one of the layers behind the model's own (num_nextn_predict_layers), as DeepSeek-V3 has them."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
    return bool(found and config.get("num_nextn_predict_layers") and int(found[1]) >= config.get("num_hidden_layers", 1 << 30))


def is_embedding(module: str) -> bool:
    """Whether a module is a table of vectors, by its name."""
    last = module.rpartition(".")[2]
    return _EMBEDDING.search(last) is not None and _NO_EMBEDDING.search(last) is None


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """vocab_size, which a model of several parts says of its text."""
    parts = [config, *(config[key] for key in ("text_config", "decoder", "llm_config") if isinstance(config.get(key), Mapping))]
    return next((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), None)


def site_of(module: str) -> str:
    """The tensor that a linear reads: one with its siblings, where its name is one of those that engines fuse."""
    parent, dot, last = module.rpartition(".")
    group = next((names for names in _FUSED if last in names), (last,))
    if len(group) == 3 and _READS_ANOTHER.search(parent):
        group = group[1:] if last in group[1:] else (last,)
    return f"{parent}{dot}{group[0]}.input"
