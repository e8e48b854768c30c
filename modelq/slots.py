"""The places of a model's quantizers."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modelq.experts import expert_slots
from modelq.rules import Slot

# In the order in which the reference lists them.
ROLES = {"linear": ("input", "output", "weight"), "embedding": ("weight", "input", "output"), "attention": ("q_bmm", "k_bmm", "v_bmm")}
PARENTS = {"linear": "nn.Linear", "embedding": "nn.Embedding", "attention": "Attention"}


def slots_of(modules: list[dict[str, Any]]) -> Iterator[Slot]:
    """Every place for a quantizer, a module's own after those of the modules inside it."""
    waiting: list[dict[str, Any]] = []
    experts: dict[int, list[dict[str, Any]]] = {}
    for module in modules:
        if module["expert"] is not None:
            experts.setdefault(module["layer"], []).append(module)
    for module in [*modules, {"name": "", "kind": "end"}]:
        while waiting and not module["name"].startswith(waiting[-1]["name"] + "."):
            yield from _own_slots(waiting.pop())
        if module["kind"] == "attention":
            waiting.append(module)
        elif module["kind"] == "experts":
            yield from expert_slots(module, experts[module["layer"]])
        elif module["kind"] in ROLES and module["expert"] is None:
            yield from _own_slots(module)


def _own_slots(module: dict[str, Any]) -> Iterator[Slot]:
    for role in ROLES[module["kind"]]:
        shape = tuple(module["shape"]) if module.get("shape") else None
        yield Slot(f"{module['name']}.{role}_quantizer", module["name"], role, PARENTS[module["kind"]], shape, module["layer"])
