"""What a quantized weight is to the one it was made of: its error, its distribution, and where its format clips."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint import dialects

if TYPE_CHECKING:
    from modelq.model import Model

BINS = 48
ROWS = 1024                 # of a weight, converted at a time
QUANTILES = (0.5, 0.99, 0.9999)
ALIKE = 0.04                # an error up to this is rounding; above it may be that of rows or columns that were scaled,
EXPLAINED = 1.5             # if it is so many times smaller once they are scaled back
OTHER_WEIGHT = 0.6          # an error above this is another weight: it was rotated
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
    factor, note = column_factor(before, after, row)
    error: float | None = relative_error(was, now, factor, checkpoint.low_rank(row["name"]))
    if error > ALIKE and (scaled := scaled_error(was, now)) < error / EXPLAINED:
        error, note = scaled, "up to scales of rows and columns, which went into its neighbours"
    if error is not None and error > OTHER_WEIGHT:
        error, note = None, "in another basis (rotated), so errors of single weights say nothing"
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


def column_factor(before: Model, after: Model, row: dict[str, Any]) -> tuple[np.ndarray | None, str]:
    """float32 [in]: what a stored column stands for is so many times the original one, by a pre_quant_scale or the norm before it."""
    scale = after.checkpoint.pre_quant_scale(row["name"])
    if scale is not None:
        return scale, "smoothed by a pre_quant_scale"
    norm = next((other for other in after.modules_of(row["layer"], None) if other["kind"] == "norm" and other["site"] == row["site"]), None)
    if norm is None:
        return None, ""
    stored, original = (model.checkpoint.read(norm["weight"]).astype(np.float32) for model in (after, before))
    if np.array_equal(stored, original) or not original.all():
        return None, ""
    return stored / original, "smoothed by the norm before"


def relative_error(was: np.ndarray, now: np.ndarray, factor: np.ndarray | None = None,
                   low_rank: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Root mean square of the difference, as a share of the original's; a branch of low rank is added to what is stored."""
    square, total, start = 0.0, 0.0, 0
    for original, stored in _pieces(was, now):
        if low_rank is not None:
            stored += low_rank[1][start:start + ROWS].astype(np.float32) @ low_rank[0].astype(np.float32)
            start += ROWS
        if factor is not None:
            stored *= factor
        square += float(np.square(stored - original).sum(dtype=np.float64))
        total += float(np.square(original).sum(dtype=np.float64))
    return float(np.sqrt(square / total)) if total else 0.0


def scaled_error(was: np.ndarray, now: np.ndarray) -> float:
    """The error that is left by the best factor of each column, then of each row: smoothing that went into neighbours is such factors."""
    products, squares = (np.zeros(was.shape[1], np.float64) for _ in range(2))
    for original, stored in _pieces(was, now):
        products += (original * stored).sum(axis=0, dtype=np.float64)
        squares += np.square(original).sum(axis=0, dtype=np.float64)
    columns = _factors(products, squares)
    square = total = 0.0
    for original, stored in _pieces(was, now):
        stored = stored / columns
        stored /= _factors((original * stored).sum(axis=1, keepdims=True), np.square(original).sum(axis=1, keepdims=True))
        square += float(np.square(stored - original).sum(dtype=np.float64))
        total += float(np.square(original).sum(dtype=np.float64))
    return float(np.sqrt(square / total)) if total else 0.0


def _factors(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    found = products / np.maximum(squares, 1e-30)
    return np.where(np.abs(found) < 1e-6, 1, found).astype(np.float32)


def _pieces(*tensors: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Some rows of each at a time, float32."""
    for start in range(0, len(tensors[0]), ROWS):
        yield tuple(tensor[start:start + ROWS].astype(np.float32) for tensor in tensors)


def distribution(weight: np.ndarray, factor: np.ndarray | None, clips: tuple[float, float, float] | None) -> Distribution:
    """Of a weight's magnitudes, in the scale in which it is stored."""
    def pieces() -> Iterator[np.ndarray]:
        for piece, in _pieces(weight):
            yield np.abs(piece if factor is None else piece / factor)
    largest = max(float(piece.max()) for piece in pieces())
    fine = np.zeros(BINS * 256, np.int64)
    top = max(largest, 1e-30)
    for piece in pieces():
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
