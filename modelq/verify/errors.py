"""How far the weights of an export are from those it was made of, smoothing undone."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from modelq.verify.value_rules import NORMED, NORMS

ROWS = 1024                 # of a weight, converted at a time
ALIKE = 0.04                # an error up to this is rounding; above it may be that of rows or columns that were scaled,
EXPLAINED = 1.5             # if it is so many times smaller once they are scaled back
OTHER_WEIGHT = 0.6          # an error above this is another weight: it was rotated


def dequantized_error(stored: Any, original: Any, module: str) -> tuple[float | None, str]:
    """Of a layer of a QuantizedCheckpoint, beside the original's checkpoint: (see `compared`)."""
    name = f"{module}.weight"
    factor, note = column_factor(original, stored, module, _norm_before(module))
    error, more = compared(original.read(name), stored.read(name), factor, stored.low_rank(module))
    stored.release([name])
    original.release([name])
    return error, more or note


def _norm_before(module: str) -> str | None:
    """By its usual name, the weight of the norm whose output a linear reads."""
    parent, _, leaf = module.rpartition(".")
    block, _, place = parent.rpartition(".")
    return f"{block}.{NORMS[place]}.weight" if leaf in NORMED and place in NORMS else None


def column_factor(original: Any, stored: Any, module: str, norm: str | None) -> tuple[np.ndarray | None, str]:
    """float32 [in]: what a stored column stands for is so many times the original one, by a pre_quant_scale or the norm before it."""
    scale = stored.pre_quant_scale(module)
    if scale is not None:
        return scale, "smoothed by a pre_quant_scale"
    if norm is None or norm not in original.tensors or norm not in stored.tensors:
        return None, ""
    now, was = (checkpoint.read(norm).astype(np.float32) for checkpoint in (stored, original))
    if now.shape != was.shape or np.array_equal(now, was) or not was.all():
        return None, ""
    return now / was, "smoothed by the norm before"


def compared(was: np.ndarray, now: np.ndarray, factor: np.ndarray | None, low_rank: tuple[np.ndarray, np.ndarray] | None
             ) -> tuple[float | None, str]:
    """(root mean square of the difference as a share of the original's, None if it says nothing; why it is not the plain one)."""
    error = relative_error(was, now, factor, low_rank)
    if error > ALIKE and (scaled := scaled_error(was, now)) < error / EXPLAINED:
        return scaled, "up to scales of rows and columns, which went into its neighbours"
    if error > OTHER_WEIGHT:
        return None, "in another basis (rotated), so errors of single weights say nothing"
    return error, ""


def relative_error(was: np.ndarray, now: np.ndarray, factor: np.ndarray | None = None,
                   low_rank: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Root mean square of the difference, as a share of the original's; a branch of low rank is added to what is stored."""
    square, total, start = 0.0, 0.0, 0
    for original, stored in pieces(was, now):
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
    for original, stored in pieces(was, now):
        products += (original * stored).sum(axis=0, dtype=np.float64)
        squares += np.square(original).sum(axis=0, dtype=np.float64)
    columns = _factors(products, squares)
    square = total = 0.0
    for original, stored in pieces(was, now):
        stored = stored / columns
        stored /= _factors((original * stored).sum(axis=1, keepdims=True), np.square(original).sum(axis=1, keepdims=True))
        square += float(np.square(stored - original).sum(dtype=np.float64))
        total += float(np.square(original).sum(dtype=np.float64))
    return float(np.sqrt(square / total)) if total else 0.0


def _factors(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    found = products / np.maximum(squares, 1e-30)
    return np.where(np.abs(found) < 1e-6, 1, found).astype(np.float32)


def pieces(*tensors: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Some rows of each at a time, float32."""
    for start in range(0, len(tensors[0]), ROWS):
        yield tuple(tensor[start:start + ROWS].astype(np.float32) for tensor in tensors)
