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
        getattr(module, "num_experts", None), int) and (hasattr(type(module), "_apply_gate") or is_llama4(module))


def is_llama4(module: torch.nn.Module) -> bool:
    """Whether a module is Llama 4's container, which says nothing of its layout: transposed, with a gate in the first half, no biases."""
    return any(base.__name__ == "Llama4TextExperts" for base in type(module).__mro__)


def has_bias(module: torch.nn.Module) -> bool:
    return not is_llama4(module) and bool(module.has_bias)


def is_transposed(module: torch.nn.Module) -> bool:
    return is_llama4(module) or bool(module.is_transposed)


def matrix_shape(module: torch.nn.Module, matrix: str) -> tuple[int, int]:
    """Of one expert's matrix, [out, in]."""
    shape = module._parameters[matrix].shape        # type: ignore[union-attr]
    return (shape[2], shape[1]) if is_transposed(module) else (shape[1], shape[2])


def matrix_of(module: torch.nn.Module, stacked: torch.Tensor, expert: int) -> torch.Tensor:
    """A view of one expert's matrix [out, in] of the stacked ones."""
    return stacked[expert].t() if is_transposed(module) else stacked[expert]


def halves_of(module: torch.nn.Module, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of gate and up, in what one expert has of both: its matrix [out, in] or its bias. ValueError: there is no gate."""
    if not is_llama4(module) and not module.has_gate:
        raise ValueError(f"{type(module).__name__}: experts without a gate are not written yet")
    gate, up = both.chunk(2) if is_llama4(module) or module.is_concatenated else (both[::2], both[1::2])
    return gate, up


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
        bias = self._parameters[f"{matrix}_bias"][expert] if has_bias(self) else None
        return torch.nn.functional.linear(x, weight, bias)


class QuantizedLlama4Experts(QuantizedExperts):
    """Llama 4's: every expert is given every token times its share, which is 0 for those that are not its own. These make nothing and are
    left out, so that statistics are of an expert's own tokens."""

    @torch.compiler.disable
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:        # type: ignore[override]
        """[experts x tokens, hidden], expert by expert."""
        if self.tokens is None and not any(quantizer.is_enabled for quantizer in self.modules() if hasattr(quantizer, "is_enabled")):
            return super(QuantizedExperts, self).forward(hidden_states)      # type: ignore[misc]
        made = []
        try:
            for expert, given in enumerate(hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])):
                own = given.any(-1).nonzero()[:, 0]
                made.append(torch.zeros_like(given))
                if not len(own):
                    continue
                object.__setattr__(self, "running", expert)
                if self.tokens is not None:
                    self.tokens[expert] += len(own)
                gate, up = self._project("gate_up_proj", expert, given[own]).chunk(2, dim=-1)
                outer = self._project("down_proj", expert, up * self.act_fn(gate))
                made[-1] = made[-1].index_add(0, own, outer.to(given.dtype))
        finally:
            object.__setattr__(self, "running", None)
        return torch.cat(made)


def quantizing_class(module: torch.nn.Module) -> type:
    """What a container's class is replaced by a subclass of."""
    return QuantizedLlama4Experts if is_llama4(module) else QuantizedExperts
