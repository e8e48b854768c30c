"""Experts of transformers that are held in two stacked matrices: a quantizer per expert and matrix, one for the inputs of a matrix."""
from __future__ import annotations

from typing import Any

import torch


def matrices_of(module: torch.nn.Module) -> tuple[str, str]:
    """The names of the two stacked matrices."""
    return ("gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj", "down_proj")


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module is transformers' container of stacked experts: [experts, inner (twice with a gate), hidden] and [experts, hidden,
    inner], or these transposed."""
    stacked = [module._parameters.get(matrix) for matrix in matrices_of(module)]
    return all(matrix is not None and matrix.ndim == 3 for matrix in stacked) and isinstance(
        getattr(module, "num_experts", None), int) and hasattr(type(module), "_apply_gate")


def matrix_shape(module: torch.nn.Module, matrix: str) -> tuple[int, int]:
    """Of one expert's matrix, [out, in]."""
    shape = module._parameters[matrix].shape        # type: ignore[union-attr]
    return (shape[2], shape[1]) if module.is_transposed else (shape[1], shape[2])


def matrix_of(module: torch.nn.Module, stacked: torch.Tensor, expert: int) -> torch.Tensor:
    """A view of one expert's matrix [out, in] of the stacked ones."""
    return stacked[expert].t() if module.is_transposed else stacked[expert]


class QuantizedExperts:
    """What the replaced class has more than the original. running: the expert whose tokens pass a quantizer of inputs just now; tokens:
    int64 [experts], how many reached each while somebody counts."""

    running: int | None = None
    tokens: torch.Tensor | None = None

    @torch.compiler.disable
    def forward(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Expert by expert, as transformers' own eager implementation does it: the other ones (grouped or batched products) have no place
        for quantizers between their matrices, and compute while every quantizer is off."""
        if self.tokens is None and not any(quantizer.is_enabled for quantizer in self.modules() if hasattr(quantizer, "is_enabled")):
            return super().forward(hidden_states, top_k_index, top_k_weights)       # type: ignore[misc]
        made = torch.zeros_like(hidden_states)
        try:
            for expert in top_k_index.unique().tolist():
                if expert >= self.num_experts:      # a place of padding
                    continue
                object.__setattr__(self, "running", expert)
                choice, token = torch.where(top_k_index.t() == expert)
                if self.tokens is not None:
                    self.tokens[expert] += len(token)
                first, second = matrices_of(self)
                inner = self._project(first, expert, hidden_states[token])
                inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
                outer = self._project(second, expert, inner) * top_k_weights[token, choice, None]
                made.index_add_(0, token, outer.to(made.dtype))
        finally:
            object.__setattr__(self, "running", None)
        return made

    def _project(self: Any, matrix: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        x = getattr(self, f"{matrix}_input_quantizer")(x)
        weight = getattr(self, f"{matrix}_weight_quantizers")[expert](matrix_of(self, self._parameters[matrix], expert))
        bias = self._parameters[f"{matrix}_bias"][expert] if self.has_bias else None
        return torch.nn.functional.linear(x, weight, bias)
