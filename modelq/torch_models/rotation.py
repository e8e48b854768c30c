"""Rotation folded into the weights of a transformers model in memory (modelq.rotation says what it does)."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from modelq.arrays import give_back
from modelq.model import Model
from modelq.rotation import HEAD, RotatedCheckpoint
from modelq.torch_models.originals import Originals
from modelq.torch_models.twin import TorchCheckpoint


def rotate(model: Any, rotation: Mapping[str, Any], originals: Originals) -> None:
    """Rotate a model's weights in place; a tied lm_head gets a weight of its own. ValueError: a family that modelq does not know."""
    checkpoint = TorchCheckpoint(model)
    rotated = RotatedCheckpoint(Model(checkpoint, "bfloat16"), rotation["seed"], rotation["residual"], rotation["values"])
    if HEAD in rotated.tensors and HEAD not in checkpoint.tensors:
        _untie(model, give_back(rotated.read(HEAD), torch.empty(0)), originals)
    for name in rotated.rewritten:        # norms last: what is behind them takes up their weights
        weight = checkpoint.live(name)
        made = give_back(rotated.read(name), weight)
        originals.keep(name, weight)
        with torch.no_grad():
            weight.copy_(made)


def _untie(model: Any, head: torch.Tensor, originals: Originals) -> None:
    tied = model.lm_head.weight
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head.to(tied.device))

    def tie() -> None:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = tied
    originals.undo(tie)
