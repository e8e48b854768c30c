"""Names for the quantizers of experts: shared as a model in memory shares them, reachable by the names of their tensors too.

transformers holds a layer's experts in two stacked matrices, gate and up in one (rows of gate first), down in the other. So Model
Optimizer gives an expert one quantizer for gate and up together and one for down, and the inputs of all experts of a layer share
one quantizer per matrix: `...mlp.experts.gate_up_proj_weight_quantizers.3`, `...mlp.experts.gate_up_proj_input_quantizer`. On disk
experts are linears of their own, `...mlp.experts.3.up_proj`; a rule may name either.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from modelq.rules import Slot

PARENT = "Experts"


class Place(NamedTuple):
    """Where the quantizer of one linear of an expert is: its name, and which of how many equal parts of its rows the linear has."""
    name: str
    part: int = 0
    parts: int = 1


def expert_places(modules: Iterable[dict[str, Any]]) -> dict[str, Place]:
    """`<linear>.weight_quantizer` and `<linear>.input_quantizer` of every expert, to where they are."""
    places = {}
    containers = {row["layer"]: row["name"] for row in modules if row["kind"] == "experts"}
    experts = (row for row in modules if row.get("expert") is not None)
    for (layer, expert), rows in groupby(experts, key=lambda row: (row["layer"], row["expert"])):
        for index, row in enumerate(rows):          # gate, up, down
            matrix, part, parts = ("gate_up_proj", index, 2) if index < 2 else ("down_proj", 0, 1)
            prefix = f"{containers[layer]}.{matrix}"
            places[f"{row['name']}.weight_quantizer"] = Place(f"{prefix}_weight_quantizers.{expert}", part, parts)
            places[f"{row['name']}.input_quantizer"] = Place(f"{prefix}_input_quantizer")
    return places


def expert_slots(container: dict[str, Any], members: list[dict[str, Any]]) -> Iterator[Slot]:
    """The places for quantizers of one layer's experts; members: their linears, in order."""
    name, layer, experts = container["name"], container["layer"], container["shape"][0]
    for matrix, columns in (("gate_up_proj", (0, 1)), ("down_proj", (2,))):
        first = members[columns[0]]["shape"]
        shape = (len(columns) * first[0], first[1])
        names = [[members[3 * expert + column]["name"] for column in columns] for expert in range(experts)]
        # a rule for some experts only cannot speak for an input that all share: it must fit the first and the last
        both = tuple((f"{a}.input_quantizer", f"{b}.input_quantizer") for a, b in zip(names[0], names[-1]))
        yield Slot(f"{name}.{matrix}_input_quantizer", name, "input", PARENT, shape, layer, both)
        for expert in range(experts):
            own = tuple((f"{linear}.weight_quantizer",) for linear in names[expert])
            yield Slot(f"{name}.{matrix}_weight_quantizers.{expert}", name, "weight", PARENT, shape, layer, own)


def place_of(model: Any, name: str) -> Place:
    """Where the quantizer is that a linear would call `name`: under that name, unless the linear is an expert's."""
    return getattr(model, "places", {}).get(name) or Place(name)


def quantizer_of(model: Any, name: str) -> Any:
    """That quantizer, or None."""
    return model.quantizers.get(place_of(model, name).name)


def own_part(model: Any, name: str, amax: Any) -> Any:
    """The linear's own rows of its quantizer's amax: all of it, if that is one number for the whole matrix."""
    place = place_of(model, name)
    return amax if place.parts == 1 or amax is None or np.ndim(amax) == 0 else np.split(np.asarray(amax), place.parts)[place.part]


def joined_amax(parts: Sequence[Any]) -> Any:
    """The amax of a matrix from those of its parts: the largest where it is one number, else those of the rows in order."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return np.max(parts, axis=0) if np.ndim(parts[0]) == 0 else np.concatenate(parts)
