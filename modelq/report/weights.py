"""What a quantized weight is to the one it was made of: its error, its distribution, and where its format clips."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.verify.errors import column_factor, compared, pieces

if TYPE_CHECKING:
    from modelq.model import Model

BINS = 48
QUANTILES = (0.5, 0.99, 0.9999)
E8M0_BIAS = 127


@dataclass(frozen=True)
class Distribution:
    """Of magnitudes. counts: int [BINS] from 0 to top; quantiles: of QUANTILES; largest: the largest; clips: the smallest, middle and
    largest magnitude that the format has for a block, tensor or row before it clips, None where it has none."""
    counts: list[int]
    top: float
    quantiles: list[float]
    largest: float
    clips: tuple[float, float, float] | None


@dataclass(frozen=True)
class WeightFacts:
    """error: root mean square of (dequantized - original) as a share of the original's; None if the export's weight is not comparable.
    note: what was done to compare them."""
    module: str
    layer: int
    part: str
    algorithm: str
    inputs: str | None
    bits_per_weight: float
    shape: tuple[int, int]
    error: float | None
    note: str
    values: Distribution


def weight_facts(before: Model, after: Model, row: dict[str, Any]) -> WeightFacts:
    """Of a linear that the second model's checkpoint stores quantized. One tensor of each model is in memory."""
    checkpoint, name = after.checkpoint, row["weight"]
    layer = checkpoint.layers[row["name"]]
    was, now = before.checkpoint.read(name), checkpoint.read(name)
    factor, note = column_factor(before.checkpoint, checkpoint, row["name"], _norm(after, row))
    error, more = compared(was, now, factor, checkpoint.low_rank(row["name"]))
    note = more or note
    parts = checkpoint.parts(row["name"])
    comparable = error is not None and not note.startswith("up to")
    seen = was if comparable else now       # in the scale in which it is quantized
    values = distribution(seen, factor if comparable else None, clip_points(layer.form, parts))
    size = sum(checkpoint.inner.tensors[tensor].nbytes for tensor in layer.tensors.values())
    before.checkpoint.release([name])
    checkpoint.release([name])
    return WeightFacts(row["name"], row["layer"], part_of(row), layer.algorithm, layer.input_scheme, 8 * size / was.size,
                       tuple(row["shape"]), error, note, values)


def part_of(row: dict[str, Any]) -> str:
    """What a module is called in its layer: "self_attn.q_proj", "mlp.experts.*.up_proj"; all of its name outside the layers."""
    name = re.sub(r"^(.*?\.)?\d+\.", "", row["name"], count=1) if row["layer"] >= 0 else row["name"]
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _norm(model: Model, row: dict[str, Any]) -> str | None:
    """The name of the weight of the norm whose output a linear reads."""
    rows = model.modules_of(row["layer"], None)
    return next((other["weight"] for other in rows if other["kind"] == "norm" and other["site"] == row["site"]), None)


def distribution(weight: np.ndarray, factor: np.ndarray | None, clips: tuple[float, float, float] | None) -> Distribution:
    """Of a weight's magnitudes, in the scale in which it is stored."""
    def magnitudes() -> Iterator[np.ndarray]:
        for piece, in pieces(weight):
            yield np.abs(piece if factor is None else piece / factor)
    largest = max(float(piece.max()) for piece in magnitudes())
    fine = np.zeros(BINS * 256, np.int64)
    top = max(largest, 1e-30)
    for piece in magnitudes():
        fine += np.bincount(np.minimum((piece.ravel() * (len(fine) / top)).astype(np.int64), len(fine) - 1), minlength=len(fine))
    return summed(fine, top, largest, clips)


def summed(fine: np.ndarray, top: float, largest: float, clips: tuple[float, float, float] | None) -> Distribution:
    """From counts of equal bins from 0 to top: fewer bins that reach as far as values and clip points do."""
    reach = max(largest, clips[2] if clips else 0.0, 1e-30)
    centres = (np.arange(len(fine)) + 0.5) * (top / len(fine))
    counts = np.bincount(np.minimum((centres * (BINS / reach)).astype(np.int64), BINS - 1), weights=fine, minlength=BINS)
    below = np.cumsum(fine)
    at = [min(int(np.searchsorted(below, quantile * below[-1])), len(fine) - 1) for quantile in QUANTILES]
    return Distribution(counts.astype(np.int64).tolist(), reach, [min(largest, float(centres[index])) for index in at], largest, clips)


def clip_points(form: dialects.Form, parts: dict[str, np.ndarray]) -> tuple[float, float, float] | None:
    """The smallest, middle and largest of a weight's clip points: block scale times the largest element."""
    row = dialects.schemes()[form.pair.weight]
    scale = parts.get("weight_scale")
    if scale is None:
        return None
    scale = np.exp2(scale.astype(np.float32) - E8M0_BIAS) if row["scale"] == "e8m0" else scale.astype(np.float32)
    if row["second_divisor"] and "weight_scale_2" in parts:
        scale = scale * np.float32(parts["weight_scale_2"])
    clips = scale.ravel() * dialects.formats()[row["element"]]["max"]
    return float(clips.min()), float(np.median(clips)), float(clips.max())
