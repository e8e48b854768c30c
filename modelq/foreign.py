"""What of a checkpoint the model's family does not have: layers that predict further tokens, another part of a model of several. It is
neither computed nor quantized; an export copies it and names it."""
from __future__ import annotations

from typing import Any

from modelq.checkpoint.matrices import rows_of

OWN_QUANTIZERS = ("linear", "embedding", "router")     # kinds of modules that an export's config names when they stay unquantized
NOT_WRITTEN = (".rotary_emb.inv_freq",)      # buffers of old checkpoints that follow from the config


def others_of(model: Any) -> list[dict[str, Any]]:
    """Rows of the matrices that are copied because no quantizer has a place there: of an architecture that nobody told whatever is no
    linear nor embedding, of a known family what its row does not have."""
    if getattr(model, "weights_only", False):
        return [row for row in model.modules if row["kind"] not in OWN_QUANTIZERS or row["kind"] == "router"]
    return rows_of({name: model.checkpoint.tensors[name] for name in foreign_tensors(model)}, model.config)


def foreign_tensors(model: Any) -> dict[str, None]:
    """Names of the tensors that the family's row does not have, in order. (A torch model's are all its own.)"""
    if getattr(model, "runtime", None) is None or getattr(model, "weights_only", False):
        return {}
    own = {row[what] for row in model.modules for what in ("weight", "bias")}
    return {name: None for name in model.checkpoint.tensors
            if name not in own and not name.endswith(NOT_WRITTEN) and not (name.endswith("lm_head.weight") and ties(model))}


def ties(model: Any) -> bool:
    """Whether a model's head is its embedding: config.json may leave it to what the family does."""
    runtime = getattr(model, "runtime", None)
    numbers = getattr(runtime, "config", {}) if not getattr(model, "weights_only", False) else {}
    return bool(numbers.get("tie_word_embeddings", model.config.get("tie_word_embeddings")))
