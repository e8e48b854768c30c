"""Absolute maxima as an export states them: linears that read the same input share its scale and one second-level weight scale.

Engines fuse q/k/v and gate/up into one product and take one scale for all (TensorRT-LLM asserts that they are equal). So two-level
schemes take the maximum over such siblings, in the export as in the simulation. Plain FP8 siblings keep their own, as in the
reference.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from modelq.checkpoint import dialects


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

    ValueError names a quantizer whose amax is not finite, and siblings of unlike formats.
    """
    stated: dict[str, np.ndarray] = {}
    for members in siblings(model, modules):
        for side in ("input", "weight"):
            names = [f"{module}.{side}_quantizer" for module in members]
            enabled = [name for name in names if name in model.quantizers and model.quantizers[name].enabled]
            found = {name: amax for name in enabled if (amax := _amax(model, name)) is not None}
            if len(enabled) > 1 and _is_shared(model, enabled) and found:
                found = dict.fromkeys(found, np.max(list(found.values()), axis=0))
            stated.update(found)
    return stated


def _amax(model: Any, name: str) -> np.ndarray | None:
    if model.quantizers[name].amax is None:
        return None
    amax = np.asarray(model.quantizers[name].amax, dtype=np.float32)
    if not np.isfinite(amax).all():
        raise ValueError(f"{name}: the calibrated amax is not finite; look for inf or nan in the weights or the calibration data")
    return amax


def _is_shared(model: Any, names: list[str]) -> bool:
    kinds = {dialects.input_kind(model.quantizers[name]) for name in names}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(names)} share one input, but their formats differ ({', '.join(map(str, kinds))}): "
                         f"engines fuse them, give them one format")
    kind = kinds.pop()
    return kind is not None and bool(dialects.schemes()[kind]["second_divisor"])
