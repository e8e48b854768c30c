"""A model's weights all in memory, and sequences that go on token by token: what generation computes with.

A forward streams weights layer by layer, which costs reading all of them for every token; here they stay, as the model computes with
them, beside keys and values as the quantizers of the cache leave them. Quantized weights stay codes, which products read (csrc/kernels/
gemm_coded.c): a token costs reading a quarter to a half of the bytes.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modelq import _core, streaming
from modelq.checkpoint.config import runtime_config
from modelq.checkpoint.config_rope import ORIGINAL
from modelq.progress import progress

if TYPE_CHECKING:
    from modelq.model import Model


class Decoding:
    """tokens: what each sequence has been through. turn: grows with every `begin`, so that whoever began can tell that it is over."""

    def __init__(self, model: Model):
        family, config = runtime_config(model.checkpoint.config, model.checkpoint.tensors)
        self.runtime = _core.Runtime(family, config, model.runtime.compute)
        self.rope = config["rope_type"]
        # Longer sequences turn keys by other angles.
        self.alike = config[f"rope_{ORIGINAL}"] if self.rope in ("dynamic", "longrope") else sys.maxsize
        for name, quantizer in model.connected.items():
            self.runtime.set_quantizer(name, quantizer)
        head = streaming.read_stored(model, model.runtime.head_tensors(), model.head_modules, pack=True)
        self.decoder = _core.Decoder(self.runtime, self._embedding(model), head)
        for layer in progress(range(self.runtime.layers), "load"):
            for expert in (None, *range(self.runtime.experts(layer))):
                self._load(model, layer, expert)
        self.tokens: list[list[int]] = [[]]
        self.turn = 0

    def _embedding(self, model: Model) -> dict[str, np.ndarray]:
        """No wider than what it is read as: GGUF files give float32."""
        import ml_dtypes

        tensors = streaming.embed_tensors(model)
        if self.runtime.compute == "float32":
            return tensors
        return {name: tensor.astype(ml_dtypes.bfloat16, copy=False) for name, tensor in tensors.items()}

    def _load(self, model: Model, layer: int, expert: int | None) -> None:
        modules = model.modules_of(layer, expert)
        names = self.runtime.layer_tensors(layer) if expert is None else self.runtime.expert_tensors(layer, expert)
        tensors = streaming.read_stored(model, names, modules, pack=True)
        if expert is None:
            self.runtime.load_layer(layer, tensors)
            streaming.load_low_rank(model, self.runtime, modules)
        else:
            self.decoder.load_expert(layer, expert, tensors)
        del tensors
        model.checkpoint.release(names)

    @property
    def nbytes(self) -> int:
        return self.decoder.nbytes

    def begin(self, rows: Sequence[Sequence[int]], reuse: bool = False) -> np.ndarray:
        """Sequences of these tokens. Returns the logits of the token after each: float32 [B, V].

        reuse: where as many sequences were there before, what they begin with in common is not computed again. The last bits of
        logits may then depend on what was there.
        """
        self.turn += 1
        if reuse and len(rows) == len(self.tokens):
            kept = [self._kept(before, row) for before, row in zip(self.tokens, rows)]
            for sequence, length in enumerate(kept):
                self.decoder.keep(sequence, length)
        else:
            self.decoder.reset(len(rows))
            kept = [0] * len(rows)
        self.tokens = [list(row[:length]) for row, length in zip(rows, kept)]
        return self.forward(range(len(rows)), [row[length:] for row, length in zip(rows, kept)])

    def forward(self, sequences: Sequence[int], ids: Sequence[Sequence[int]], every: bool = False) -> np.ndarray:
        """Further tokens of some of the sequences; logits after the last of each, or after every one.

        Rope, where it depends on a sequence's length, is as in transformers: "dynamic" has the base of each call's length, and keys stay as
        they are; for "longrope" all keys are made anew, once, when the sequence becomes long (which transformers 5.17 means to do, too).
        """
        before = [self._forgotten(sequence, len(row)) for sequence, row in zip(sequences, ids)]
        given = [[*old, *row] for old, row in zip(before, ids)]
        logits = self.decoder.forward(sequences, [np.asarray(row, np.int64) for row in given], every)
        for sequence, row in zip(sequences, given):
            self.tokens[sequence] += row
        if every and any(before):
            logits = logits[np.concatenate([np.arange(len(row)) >= len(old) for old, row in zip(before, given)])]
        return logits

    def _kept(self, before: list[int], row: Sequence[int]) -> int:
        """How much of what the cache has of one sequence is as it would be made for another."""
        length = common_prefix(before, row[:-1])
        if max(len(before), len(row)) <= self.alike or (self.rope == "longrope" and length > self.alike):
            return length
        return 0

    def _forgotten(self, sequence: int, new: int) -> list[int]:
        """Tokens of a sequence that must be computed again with so many new ones, since it becomes long."""
        old = self.tokens[sequence] if 0 <= sequence < len(self.tokens) else []
        if self.rope != "longrope" or not old or not len(old) <= self.alike < len(old) + new:
            return []
        self.decoder.keep(sequence, 0)
        self.tokens[sequence] = []
        return old


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items both begin with."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
