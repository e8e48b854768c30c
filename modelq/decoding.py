"""A model's weights all in memory, and sequences that go on token by token: what generation computes with.

A forward streams weights layer by layer, which costs reading all of them for every token; here they stay, as the model computes with
them, beside keys and values as the quantizers of the cache leave them. Quantized weights stay codes, which products read (csrc/kernels/
gemm_coded.c): a token costs reading a quarter to a half of the bytes.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modelq import _core, streaming
from modelq.checkpoint.config import runtime_config
from modelq.progress import progress

if TYPE_CHECKING:
    from modelq.model import Model


class Decoding:
    """tokens: what each sequence has been through. turn: grows with every `begin`, so that whoever began can tell that it is over."""

    def __init__(self, model: Model):
        self.runtime = _core.Runtime(*runtime_config(model.checkpoint.config, model.checkpoint.tensors), model.runtime.compute)
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
            kept = [common_prefix(before, row[:-1]) for before, row in zip(self.tokens, rows)]
            for sequence, length in enumerate(kept):
                self.decoder.keep(sequence, length)
        else:
            self.decoder.reset(len(rows))
            kept = [0] * len(rows)
        self.tokens = [list(row[:length]) for row, length in zip(rows, kept)]
        return self.forward(range(len(rows)), [row[length:] for row, length in zip(rows, kept)])

    def forward(self, sequences: Sequence[int], ids: Sequence[Sequence[int]], every: bool = False) -> np.ndarray:
        """Further tokens of some of the sequences; logits after the last of each, or after every one."""
        logits = self.decoder.forward(sequences, [np.asarray(row, np.int64) for row in ids], every)
        for sequence, row in zip(sequences, ids):
            self.tokens[sequence] += row
        return logits


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items both begin with."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
