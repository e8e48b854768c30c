"""Absolute maxima as an export states them: linears that read the same input share its scale, and a weight scale that is one number.

Engines fuse q/k/v and gate/up into one product and take one scale for all (TensorRT-LLM asserts that they are equal). So wherever an
amax is a single number (the second level of NVFP4, a matrix of one FP8 block), siblings take the largest, in the export as in the
simulation. Plain FP8 siblings keep their own, as in the reference.
"""
from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.dialects import Pair


PLAIN_FP8 = "fp8"


def siblings(model: Any, modules: Iterable[str]) -> list[list[str]]:
    """The modules that read the same input, by the layer and site that the runtime gives them."""
    wanted = set(modules)
    sites: dict[tuple[Any, Any], list[str]] = {}
    for row in model.modules:
        if row["name"] in wanted:
            sites.setdefault((row["layer"], row["site"]), []).append(row["name"])
    return list(sites.values())


def stated_amax(model: Any, modules: Iterable[str]) -> dict[str, np.ndarray]:
    """Name of the quantizer to float32 amax, for the enabled weight and input quantizers of these modules that have one.

    Siblings take one maximum where theirs is one number and their weights are not plain FP8; siblings of unlike schemes share
    nothing. ValueError names a quantizer whose amax is not finite.
    """
    stated: dict[str, np.ndarray] = {}
    for members in siblings(model, modules):
        for side in ("input", "weight"):
            found = {name: amax for module in members if (amax := _amax(model, name := f"{module}.{side}_quantizer")) is not None}
            for name, amax in found.items():
                kind = _kind(model, name)
                same = [found[other] for other in found if _kind(model, other) == kind]
                shared = kind[0] not in (None, PLAIN_FP8) and all(other.size == 1 for other in same)
                stated[name] = np.max([other.reshape(amax.shape) for other in same], axis=0) if shared else amax
    return stated


def stated_weight_amax(model: Any, module: dict[str, Any]) -> np.ndarray | None:
    """The amax of one module's weight as the export would state it."""
    members = [row["name"] for row in model.modules if row["layer"] == module["layer"] and row["site"] == module["site"]]
    return stated_amax(model, members).get(f"{module['name']}.weight_quantizer")


def _amax(model: Any, name: str) -> np.ndarray | None:
    quantizer = model.quantizers.get(name)
    if quantizer is None or not quantizer.enabled or quantizer.amax is None:
        return None
    amax = np.asarray(quantizer.amax, dtype=np.float32)
    if not np.isfinite(amax).all():
        raise ValueError(f"{name}: the calibrated amax is not finite; look for inf or nan in the weights or the calibration data")
    return amax


def pair_of(model: Any, module: str) -> Pair | None:
    """The schemes of a module's weight and input, None where its weight is not quantized.

    The same settings of a weight can mean another row of the table beside other inputs: NVFP4 weights beside FP8 inputs have a second
    level that leaves the blocks' scales their whole range.
    """
    weight, side = (model.quantizers.get(f"{module}.{what}_quantizer") for what in ("weight", "input"))
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


def _kind(model: Any, name: str) -> tuple[str | None, str | None]:
    """The scheme of the weight that a quantizer belongs to, and its own."""
    pair = pair_of(model, name.rpartition(".")[0])
    own = dialects.input_kind(model.quantizers[name])
    return pair.weight if pair is not None else own, own
