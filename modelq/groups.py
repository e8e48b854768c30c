"""Which linears read one input, and which schemes a linear's two sides have."""
from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from modelq.checkpoint import dialects
from modelq.checkpoint.dialects import Pair
from modelq.experts import quantizer_of


def siblings(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The modules that read the same input, by the layer and site that the runtime gives them."""
    sites: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in rows:
        sites.setdefault((row["layer"], row["site"]), []).append(row)
    return list(sites.values())


def pair_of(model: Any, module: str) -> Pair | None:
    """The schemes of a module's weight and input, None where its weight is not quantized.

    The same settings of a weight can mean another row of the table beside other inputs: NVFP4 weights beside FP8 inputs have a second
    level that leaves the blocks' scales their whole range.
    """
    weight, side = (quantizer_of(model, f"{module}.{what}_quantizer") for what in ("weight", "input"))
    if weight is None or not weight.enabled:
        return None
    kind = dialects.input_kind(side) if side is not None and side.enabled else None
    return Pair(_scheme_beside(weight.scheme, kind), kind)


@cache
def _scheme_beside(scheme: str | None, input_kind: str | None) -> str | None:
    rows = dialects.schemes()
    if scheme is None or input_kind is None or rows[scheme]["activations"] in (None, input_kind):
        return scheme
    alike = ("element", "scale", "packing")
    for name, row in rows.items():
        if name != scheme and row["activations"] == input_kind and all(row[key] == rows[scheme][key] for key in alike):
            return name
    return scheme
