"""Rotation folded into weights (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024, section 3): the model computes what it did, but
in a turned basis, in which no channel of its activations sticks out.

Two rotations. The residual stream's: norms' weights go into the linears behind them, so that what is left of a norm commutes with a
rotation; embedding, and linears that write the stream, turn it, linears that read it turn back, and a tied lm_head gets a weight of its
own. The values': each head's, between v_proj (or the rows that are its in a fused linear, or in that behind a latent vector) and o_proj.
Nothing is left to do at run time: any engine runs the result. A norm of what a half of a layer adds, before it is added, multiplies
channels of the stream itself by its weights, which no linear can take up: families with such norms (OLMo 2, Gemma) are refused.

A rotation of n channels is a random sign for each, and then an orthogonal matrix whose entries are all about n^-0.5: a Hadamard matrix of
the largest power of two in n up to 1024, times one of the rest (again Hadamard's, and for odd numbers Hartley's).
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelq import _core
from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.safetensors import numpy_dtype
from modelq.foreign import foreign_tensors

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer
    from modelq.model import Model

LARGEST_HADAMARD = 1024
IMPASSABLE = ("post_norms", "no_pre_norms")      # flags of families (csrc/model/arch.h) whose norms rotations do not pass
BOTH = ("linear_attn", "linear_mlp")            # linears in the place of a half: they read the stream and write it
HEAD = "lm_head.weight"
PIECE = 16 << 20    # bytes of float32 rows that are turned at a time


class Rotation:
    """An orthogonal matrix Q [n, n], drawn by a seed: `rows` computes x Q."""

    def __init__(self, n: int, seed: int):
        self.size = min(n & -n, LARGEST_HADAMARD)
        self.signs = np.random.default_rng(seed).choice(np.float32([-1, 1]), n)
        self.rest = mixing(n // self.size)

    def rows(self, x: np.ndarray) -> np.ndarray:
        """float32 [..., k * n]: every n columns times Q."""
        n, shape = len(self.signs), x.shape
        turned = x.reshape(-1, n) * self.signs
        if self.size > 1:
            hadamard = _core.Quantizer(enabled=False)
            hadamard.rotate = self.size
            turned = hadamard(turned)
        if len(self.rest) > 1:
            turned = self.rest @ turned.reshape(-1, len(self.rest), self.size)
        return turned.reshape(shape)


@cache
def mixing(m: int) -> np.ndarray:
    """float32 [m, m], symmetric and orthogonal: Sylvester's Hadamard matrix for the powers of two in m, and Hartley's for the rest."""
    odd, matrix = m // (m & -m), np.ones((1, 1))
    for _ in range((m & -m).bit_length() - 1):
        matrix = np.kron(matrix, [[1, 1], [1, -1]]) / np.sqrt(2)
    angles = 2 * np.pi * (np.outer(np.arange(odd), np.arange(odd)) % odd) / odd
    return np.kron((np.cos(angles) + np.sin(angles)) / np.sqrt(odd), matrix).astype(np.float32)


class Turned(NamedTuple):
    """How a tensor is made from one of the original: its columns times the weight of a norm, then turned; its rows turned: of every `group`
    those from the first-th on (group 0: all)."""
    source: str
    norm: str | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    group: int = 0
    first: int = 0


class Rotated(NamedTuple):
    """What of a model was rotated."""
    seed: int
    residual: bool
    values: bool

    @property
    def places(self) -> list[str]:
        return ["the residual stream"] * self.residual + ["values"] * self.values


def rotation_of(checkpoint: Any) -> Rotated | None:
    """How the model of a checkpoint was rotated; None: it was not."""
    return getattr(checkpoint, "rotation", None)


class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are turned as they are read, and rounded to the original's dtypes."""

    def __init__(self, model: Model, seed: int = 0, residual: bool = True, values: bool = True):
        if residual:
            _check(model)
        self.original = model.checkpoint
        self.rotation = Rotated(seed, residual, values)
        stream = Rotation(model.runtime.config["hidden_size"], seed) if residual else None
        head = Rotation(model.runtime.config["value_head_dim"], seed + 1) if values else None
        norms = Norms(model)
        self._ones = {name for names in norms.stream.values() for name in names.values()} if residual else set()
        tied = {row["weight"] for row in model.embedding_modules} & {row["weight"] for row in model.head_modules}
        rows = [row for row in model.modules if row["kind"] == "embedding" or row["weight"] not in tied]
        self._turned = {name: turned for row in rows for name, turned in _tensors(model, norms, row, stream, head)}
        tensors, config = dict(self.original.tensors), dict(self.original.config)
        for embedding in tied if residual else ():
            tensors[HEAD] = replace(self.original.tensors[embedding], name=HEAD)
            self._turned[HEAD] = Turned(embedding, norms.final, stream)
            config["tie_word_embeddings"] = False
        super().__init__(self.original.path, config, tensors)
        self.side_files = self.original.side_files

    @property
    def rewritten(self) -> list[str]:
        """The original's tensors that are turned, and then the norms that become ones."""
        return [name for name in self._turned if name in self.original.tensors] + sorted(self._ones)

    def read(self, name: str) -> np.ndarray:
        if name in self._ones:
            return np.ones(self.tensors[name].shape, numpy_dtype(self.tensors[name].dtype))
        if name not in self._turned:
            return self.original.read(name)
        turned = self._turned[name]
        array = self.original.read(turned.source)
        if turned.rows is not None:
            return self._turn(turned, array)
        result, step = np.empty_like(array), max(1, PIECE // (4 * max(1, array.shape[-1])))
        for start in range(0, len(array), step):
            result[start:start + step] = self._turn(turned, array[start:start + step])
        return result

    def _turn(self, turned: Turned, array: np.ndarray) -> np.ndarray:
        made = array.astype(np.float32)
        if turned.norm is not None:
            made *= self.original.read(turned.norm).astype(np.float32)
        if turned.columns is not None:
            made = turned.columns.rows(made)
        if turned.rows is not None:
            parts = made.reshape(-1, turned.group or len(made), made.shape[-1])
            kept, moved = parts[:, :turned.first], parts[:, turned.first:]
            moved = turned.rows.rows(np.ascontiguousarray(moved.transpose(0, 2, 1))).transpose(0, 2, 1)
            made = np.concatenate([kept, moved], 1).reshape(made.shape)
        return made.astype(array.dtype)

    def release(self, names: Iterable[str] | None = None) -> None:
        self.original.release(None if names is None else [self._turned[name].source if name in self._turned else name for name in names])

    def tokenizer(self) -> Tokenizer:
        return self.original.tokenizer()

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        return self.original.save_tokenizer(directory)

    def close(self) -> None:
        self.original.close()


class Norms:
    """Those of the residual stream, by layer: site to the name of the weight. inner: (layer, site) of linears behind other norms, between
    two linears."""

    def __init__(self, model: Model):
        alone = {(row["layer"], row["site"]) for row in model.modules if row["kind"] == "linear" and row["site"] == f"{row['name']}.input"}
        self.stream: dict[int, dict[str | None, str]] = {}
        self.inner: set[tuple[int, str]] = set()
        for row in model.modules:
            if row["kind"] == "norm" and (row["layer"], row["site"]) in alone:
                self.inner.add((row["layer"], row["site"]))
            elif row["kind"] == "norm" and (row["site"] is not None or row["layer"] < 0):
                self.stream.setdefault(row["layer"], {})[row["site"]] = row["weight"]

    @property
    def final(self) -> str:
        return next(iter(self.stream[-1].values()))

    def before(self, row: dict[str, Any]) -> str:
        """Of what a linear reads; experts and their router read what an MLP would."""
        found = self.stream[row["layer"]]
        return found.get(row["site"]) or list(found.values())[-1]


def _tensors(model: Model, norms: Norms, row: dict[str, Any], stream: Rotation | None, head: Rotation | None
             ) -> Iterable[tuple[str, Turned]]:
    """What of a module changes."""
    if row["kind"] == "embedding" and stream is not None:
        yield row["weight"], Turned(row["weight"], columns=stream)
    if row["kind"] not in ("linear", "router"):
        return
    config, last = model.runtime.config, row["name"].rpartition(".")[2]
    alone = row["layer"] >= 0 and row["site"] == f"{row['name']}.input"      # an input of its own
    writes = (alone and (row["layer"], row["site"]) not in norms.inner) or last in BOTH
    reads = not alone or last in BOTH
    group, first = {"qkv_proj": (0, row["shape"][0] - config["num_key_value_heads"] * config["value_head_dim"]),
                    "kv_b_proj": (row["shape"][0] // config["num_attention_heads"], config["head_dim"] - config["qk_rope_head_dim"])
                    }.get(last, (0, 0))
    columns = head if last == "o_proj" else stream if reads else None
    rows = head if last in ("v_proj", "qkv_proj", "kv_b_proj") else stream if writes else None
    if columns is not None or rows is not None:
        norm = norms.before(row) if reads and stream is not None else None
        yield row["weight"], Turned(row["weight"], norm, columns, rows, group, first)
    if rows is not None and row["bias"]:
        yield row["bias"], Turned(row["bias"], columns=rows)


def _check(model: Model) -> None:
    """ValueError: the stream is not only the model's own, or has norms in it that rotations do not pass."""
    family = next(row for row in _core.archs() if row["family"] == model.runtime.family)
    passable = [row["family"] for row in _core.archs() if not set(IMPASSABLE) & set(row["flags"])]
    if set(IMPASSABLE) & set(family["flags"]):
        raise ValueError(f"rotate: a model of the family {family['family']} has norms of what is added to its residual stream, which "
                         f"rotations do not pass: {{'method': 'rotate', 'residual': False}} rotates its values alone; both is there for "
                         f"{', '.join(passable)}")
    other = next(iter(foreign_tensors(model)), None)
    if other is not None:
        raise ValueError(f"rotate: {other} is no tensor of the family {family['family']}: another part of the checkpoint (a vision tower, "
                         "layers that predict further tokens) reads or writes the model's residual stream as it was: "
                         "{'method': 'rotate', 'residual': False} rotates values alone")
