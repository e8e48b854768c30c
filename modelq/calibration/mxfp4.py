"""MXFP4 to NVFP4 without loss: the scales of a weight that is stored in MXFP4 become those of static NVFP4 blocks (Model Optimizer's
cast_mxfp4_to_nvfp4).

With k the exponent of a block of 32 and K the largest, the second-level scale is 2 ** (K - 8), and a block's FP8 scale 2 ** (k - K + 8),
which FP8 holds exactly for k >= K - 17; so codes stay what they were. Smaller blocks get a scale of their largest value.

The maxima of blocks follow from what the checkpoint holds, so they are made when they are asked for, and never all in memory.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.experts import place_of
from modelq.groups import siblings
from modelq.quantizers import make_quantizer, stage_quantizers
from modelq.rules import Setting, stages

if TYPE_CHECKING:
    from modelq.model import Model

BIAS, LARGEST, SPAN = 127, 8, 17        # of E8M0; the exponent of FP8's largest power of two; how many below it are exact
CODE_MAX, SCALE_MAX = np.float32(6), np.float32(448)


@dataclass(frozen=True)
class KeptBlocks:
    """What the blocks of one weight have to be scaled by. largest: K, of it and its siblings."""
    checkpoint: Any
    module: str
    largest: int

    @property
    def whole(self) -> np.float32:
        """The tensor's maximum, which makes the second-level scale 2 ** (K - 8)."""
        return CODE_MAX * SCALE_MAX * np.float32(2.0 ** (self.largest - LARGEST))

    def maxima(self) -> np.ndarray:
        """float32 [rows, columns / 16]."""
        return block_maxima(self.checkpoint.parts(self.module), self.checkpoint.read(f"{self.module}.weight"), self.largest)


def keep_mxfp4(model: Model) -> dict[str, KeptBlocks]:
    """Give the weights that are stored in MXFP4, and are to become NVFP4, static blocks; module to what scales them. An expert's gate and
    up, which have one quantizer, are two modules here."""
    layers, stacked = getattr(model.checkpoint, "layers", {}), getattr(model.checkpoint, "in_mxfp4", ())
    stored = [row for row in model.modules if row["name"] in stacked or (row["name"] in layers and layers[row["name"]].scheme == "mxfp4")]
    wanted = [row for row in stored if _becomes_nvfp4(model.settings.get(place_of(model, f"{row['name']}.weight_quantizer").name))
              or row["name"] in model.kept_blocks]
    if not wanted:
        return {}
    settings, quantizers, kept = dict(model.settings), dict(model.quantizers), {}
    for rows in _together(wanted):
        largest = max(largest_exponent(model.checkpoint, row["name"]) for row in rows)
        for row in rows:
            kept[row["name"]] = KeptBlocks(model.checkpoint, row["name"], largest)
            name = place_of(model, f"{row['name']}.weight_quantizer").name
            settings[name] = _with_static_blocks(settings[name])
            quantizers[name] = make_quantizer(settings[name])
            stage_quantizers(quantizers[name])[0].global_amax = kept[row["name"]].whole
        model.checkpoint.release([row["weight"] for row in rows])
    model.settings, model.quantizers = settings, quantizers
    return kept


def _together(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Those that read one input."""
    parts: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["layer"], row["expert"]), []).append(row)
    return [group for part in parts.values() for group in siblings(part)]


def _becomes_nvfp4(setting: Setting | None) -> bool:
    """Whether a weight's setting is NVFP4 in dynamic blocks of 16, and nothing behind it."""
    if setting is None or not setting.enable or len(stages(setting)) != 1:
        return False
    attributes = stages(setting)[0]
    blocks = attributes.block_sizes or {}
    return (attributes.num_bits == (2, 1) and blocks.get(-1) == 16 and blocks.get("type") == "dynamic"
            and blocks.get("scale_bits") == (4, 3) and not blocks.get("four_over_six"))


def _with_static_blocks(setting: Setting) -> Setting:
    attributes: Any = setting.attributes
    return replace(setting, attributes=replace(attributes, block_sizes={**(attributes.block_sizes or {}), "type": "static"}))


def largest_exponent(checkpoint: Any, module: str) -> int:
    """K of one weight; blocks of scale 0 hold nothing and do not count."""
    stack = getattr(checkpoint, "stack_scales", None)     # experts in one tensor have one second-level scale
    scales = checkpoint.parts(module)["weight_scale"] if stack is None else stack(module)
    return int(scales.max(initial=0)) - BIAS if scales.any() else 0


def block_maxima(parts: Any, weight: np.ndarray, largest: int) -> np.ndarray:
    """float32 [rows, columns / 16]: what the maxima of NVFP4's blocks have to be. parts: the weight in MXFP4; weight: its values."""
    exponents = parts["weight_scale"].astype(np.int32) - BIAS
    maxima = np.where(exponents >= largest - SPAN, CODE_MAX * np.exp2(exponents.astype(np.float32)), _core.amax(weight, block=(1, 32)))
    empty = CODE_MAX * np.float32(2.0 ** (largest - SPAN))
    return np.repeat(np.where(parts["weight_scale"] == 0, empty, maxima).astype(np.float32), 2, axis=1)
