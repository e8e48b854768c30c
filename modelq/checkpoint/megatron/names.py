"""Megatron's tensors under Hugging Face's names: fused tensors are split, padding of the vocabulary is left out.

Megatron's own names differ between its generations (megatron.legacy and NeMo's own model, megatron.core with and without Transformer
Engine); all are brought to those of megatron.core without it.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelq.checkpoint.base import TensorInfo
from modelq.checkpoint.megatron.distributed import DistributedFolder
from modelq.checkpoint.megatron.ranks import Shards
from modelq.checkpoint.safetensors import numpy_dtype

_PREFIXES = re.compile(r"^(?:(?:module|model)\.)+")
_SPELLINGS = (
    (r"^language_model\.(?:encoder|transformer)\.", "decoder."), (r"^language_model\.", ""),
    (r"\.attention\.", ".self_attention."), (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."), (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."), (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(?:layer)?norm\.", ".pre_mlp_layernorm."), (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."), (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.mlp\.experts\.local_experts\.(\d+)\.", r".mlp.experts.\1."),
    (r"\.mlp\.experts\.linear_fc([12])\.(weight|bias)(\d+)$", r".mlp.experts.\3.linear_fc\1.\2"),
    (r"\.mlp\.experts\.experts\.", ".mlp.experts."),
)
# Of no use for a forward: states of Transformer Engine, tables that follow from the settings, the embedding once more.
_LEFT_OUT = re.compile(r"_extra_state|\binv_freq$|\bword_embeddings_for_head\b|^optimizer\b|^rng_state|\blocal_tokens_per_expert$")
_SPLIT = re.compile(r"^(?:embedding\.word_embeddings|output_layer)\.weight$|\.linear_(?:qkv|fc1)\.(?:weight|bias)$")
_SPLIT_INPUT = re.compile(r"\.linear_(?:proj|fc2)\.weight$")

NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm",
         "self_attention.q_layernorm": "self_attn.q_norm", "self_attention.k_layernorm": "self_attn.k_norm"}
# By family: the router, and an expert's gate, up and down.
_EXPERT_NAMES = {"mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
                 "qwen3_moe": ("mlp.gate", "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"))}


class Entry(NamedTuple):
    """A whole tensor of Megatron's."""
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    release: Callable[[], None]
    file: Path


class Piece(NamedTuple):
    """A tensor of the Hugging Face model: what of an entry it is."""
    info: TensorInfo
    entry: Entry
    take: Callable[[np.ndarray], np.ndarray]


def plain_name(name: str) -> str | None:
    """A name as megatron.core without Transformer Engine spells it, from the model's root; None for what no forward needs."""
    name = _PREFIXES.sub("", name)
    for pattern, spelling in _SPELLINGS:
        name = re.sub(pattern, spelling, name)
    return None if _LEFT_OUT.search(name) else name


def entries_of_shards(shards: Shards) -> dict[str, Entry]:
    """The whole tensors of a folder with a file per rank."""
    entries = {}
    for stored in shards.pieces:
        name = plain_name(stored)
        if name is None:
            continue
        axis = 0 if _SPLIT.search(name) else 1 if _SPLIT_INPUT.search(name) else None
        parts = 2 if ".linear_fc1." in name else 1
        dtype, shape = shards.shape(stored, axis)

        def read(stored: str = stored, axis: int | None = axis, parts: int = parts) -> np.ndarray:
            return shards.read(stored, axis, parts)

        def release(stored: str = stored) -> None:
            shards.release(stored)

        file = next(iter(shards.pieces[stored].values())).file.region.path
        entries[name] = Entry(dtype, shape, read, release, file)
    return entries


def entries_of_folder(folder: DistributedFolder, file: Path) -> dict[str, Entry]:
    """The tensors of a folder of torch.distributed.checkpoint; those that stack layers or experts as one for each."""
    entries = {}
    for stored, tensor in folder.tensors.items():
        name = plain_name(stored)
        if name is None:
            continue
        for leading, single in _unstacked(name, tensor.shape):
            def read(stored: str = stored, leading: tuple[int, ...] = leading) -> np.ndarray:
                return folder.read(stored, leading)

            def release(stored: str = stored, leading: tuple[int, ...] = leading) -> None:
                folder.release(stored, leading)

            entries[single] = Entry(tensor.dtype, tensor.shape[len(leading):], read, release, file)
    return entries


def _unstacked(name: str, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """(leading indices, name) of each layer's and expert's part."""
    parts: list[tuple[tuple[int, ...], str]] = [((), name)]
    for pattern, axis_name in ((r"^(decoder\.layers)\.(?!\d)", "layer"), (r"^(.*\.mlp\.experts)\.(?!\d)", "expert")):
        if re.search(pattern, name):
            axis = len(parts[0][0])
            if len(shape) <= axis + 1:
                raise ValueError(f"tensor {name!r} has the shape {list(shape)}: no axis for its {axis_name}s")
            parts = [((*leading, i), re.sub(pattern, rf"\1.{i}.", spelt)) for leading, spelt in parts for i in range(shape[axis])]
    return parts


def pieces_of(entries: Mapping[str, Entry], config: Mapping[str, Any], zero_centered: bool) -> dict[str, Piece]:
    """Hugging Face's tensors. zero_centered: norms hold what their weight is above one.

    ValueError for an entry that no tensor of the family is made of, and for one whose shape the settings do not allow.
    """
    mapping = _Mapping(entries, config, zero_centered)
    mapping.outer()
    for layer in range(config["num_hidden_layers"]):
        mapping.layer(layer)
    if left := sorted(entries.keys() - mapping.used):
        raise ValueError(f"tensor {left[0]!r} ({len(left)} such) belongs to nothing that a {config['model_type']} model has: it is of a "
                         "kind of model that is not read")
    return mapping.made


class _Mapping:
    def __init__(self, entries: Mapping[str, Entry], config: Mapping[str, Any], zero_centered: bool):
        self.entries, self.config, self.zero_centered = entries, config, zero_centered
        self.made: dict[str, Piece] = {}
        self.used: set[str] = set()

    def outer(self) -> None:
        vocabulary, hidden = self.config["vocab_size"], self.config["hidden_size"]
        self._rows("embedding.word_embeddings.weight", (None, hidden), {"model.embed_tokens.weight": (0, vocabulary)})
        self._norm("decoder.final_layernorm.weight", "model.norm.weight")
        if self.config["tie_word_embeddings"]:
            self.used.add("output_layer.weight")
        else:
            self._rows("output_layer.weight", (None, hidden), {"lm_head.weight": (0, vocabulary)})

    def layer(self, layer: int) -> None:
        ours, theirs = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        hidden, heads, head = (self.config[key] for key in ("hidden_size", "num_attention_heads", "head_dim"))
        for norm, name in NORMS.items():
            if f"{theirs}{norm}.weight" in self.entries or "self_attention" not in norm:
                self._norm(f"{theirs}{norm}.weight", f"{ours}{name}.weight")
        self._qkv(f"{theirs}self_attention.linear_qkv.", f"{ours}self_attn.")
        self._whole(f"{theirs}self_attention.linear_proj.weight", (hidden, heads * head), f"{ours}self_attn.o_proj.weight")
        if f"{theirs}self_attention.linear_proj.bias" in self.entries:
            self._whole(f"{theirs}self_attention.linear_proj.bias", (hidden,), f"{ours}self_attn.o_proj.bias")
        if f"{theirs}mlp.router.weight" not in self.entries:
            self._mlp(f"{theirs}mlp.", f"{ours}mlp.", ("gate_proj", "up_proj", "down_proj"), self.config["intermediate_size"])
            return
        router, prefix, names = _EXPERT_NAMES[self.config["model_type"]]
        experts = self.config.get("num_experts") or self.config["num_local_experts"]
        inner = self.config.get("moe_intermediate_size") or self.config["intermediate_size"]
        self._whole(f"{theirs}mlp.router.weight", (experts, hidden), f"{ours}{router}.weight")
        for expert in range(experts):
            self._mlp(f"{theirs}mlp.experts.{expert}.", ours + prefix.format(expert), names, inner)

    def _mlp(self, theirs: str, ours: str, names: tuple[str, str, str], inner: int) -> None:
        hidden = self.config["hidden_size"]
        gate, up, down = (ours + name for name in names)
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            if kind == "weight" or f"{theirs}linear_fc1.bias" in self.entries:
                self._rows(f"{theirs}linear_fc1.{kind}", (2 * inner, *rest),
                           {f"{gate}.{kind}": (0, inner), f"{up}.{kind}": (inner, 2 * inner)})
                self._whole(f"{theirs}linear_fc2.{kind}", (hidden, *((inner,) if rest else ())), f"{down}.{kind}")

    def _qkv(self, theirs: str, ours: str) -> None:
        """Per group of queries: its queries, then its key, then its value."""
        groups, head = self.config["num_key_value_heads"], self.config["head_dim"]
        queries = self.config["num_attention_heads"] // groups * head
        bounds = {"q_proj": (0, queries), "k_proj": (queries, queries + head), "v_proj": (queries + head, queries + 2 * head)}
        for kind in ("weight", "bias"):
            if kind == "bias" and f"{theirs}bias" not in self.entries:
                continue
            rest = (self.config["hidden_size"],) if kind == "weight" else ()
            entry = self._entry(f"{theirs}{kind}", (groups * (queries + 2 * head), *rest))
            for name, (start, stop) in bounds.items():
                def take(array: np.ndarray, start: int = start, stop: int = stop) -> np.ndarray:
                    return array.reshape(groups, -1, *array.shape[1:])[:, start:stop].reshape(-1, *array.shape[1:])

                self._make(f"{ours}{name}.{kind}", (groups * (stop - start), *rest), entry, take)

    def _rows(self, name: str, shape: tuple[int | None, ...], made: dict[str, tuple[int, int]]) -> None:
        entry = self._entry(name, shape)
        for spelt, (start, stop) in made.items():
            if stop > entry.shape[0]:
                raise ValueError(f"tensor {name!r} has the shape {list(entry.shape)}, the settings ask for at least {stop} rows")

            def take(array: np.ndarray, start: int = start, stop: int = stop) -> np.ndarray:
                return array[start:stop]

            self._make(spelt, (stop - start, *entry.shape[1:]), entry, take)

    def _whole(self, name: str, shape: tuple[int | None, ...], made: str) -> None:
        entry = self._entry(name, shape)
        self._make(made, entry.shape, entry, lambda array: array)

    def _norm(self, name: str, made: str) -> None:
        entry = self._entry(name, (None,))
        self._make(made, entry.shape, entry, _one_more if self.zero_centered else lambda array: array)

    def _entry(self, name: str, shape: tuple[int | None, ...]) -> Entry:
        if name not in self.entries:
            raise ValueError(f"no tensor {name!r}, which a {self.config['model_type']} model needs: is a file missing?")
        entry = self.entries[name]
        if len(entry.shape) != len(shape) or any(want not in (None, size) for want, size in zip(shape, entry.shape)):
            wanted = ["any" if size is None else size for size in shape]
            raise ValueError(f"tensor {name!r} has the shape {list(entry.shape)}, the settings ask for {wanted}")
        self.used.add(name)
        return entry

    def _make(self, name: str, shape: tuple[int, ...], entry: Entry, take: Callable[[np.ndarray], np.ndarray]) -> None:
        nbytes = int(np.prod(shape, dtype=object)) * numpy_dtype(entry.dtype).itemsize
        self.made[name] = Piece(TensorInfo(name, entry.dtype, shape, nbytes, entry.file), entry, take)


def _one_more(array: np.ndarray) -> np.ndarray:
    """1 + weight, rounded once to the weight's own dtype."""
    return (1 + array.astype(np.float32)).astype(array.dtype)
