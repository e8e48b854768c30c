"""Branches of low rank beside quantized weights (SVDQuant, Li et al. 2024): the part of a weight that its largest singular values make is
computed in high precision, and only the rest, which has a smaller range, is quantized."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from modelq import _core

EXACT_UP_TO = 1024      # rows or columns, whichever are fewer: a full eigendecomposition; beyond, iterations on a subspace
OVERSAMPLING, ITERATIONS = 16, 12


class LowRank(NamedTuple):
    """up [out, rank] @ down [rank, in], in the model's dtype: Model Optimizer's svdquant_lora_b and svdquant_lora_a."""
    down: np.ndarray
    up: np.ndarray

    def taken_from(self, weight: np.ndarray) -> np.ndarray:
        """What is left of a weight [out, in] without it, in the weight's dtype."""
        return _core.subtract_product(weight, self.up, self.down)


def largest_part(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(down [rank, in] with orthonormal rows, up [out, rank]), float64: the best approximation of weight [out, in] of that rank; zeros
    beyond the rank it can have."""
    w = np.asarray(weight, dtype=np.float64)
    most = min(w.shape)
    used = min(rank, most)
    if most <= EXACT_UP_TO or used + OVERSAMPLING > most // 2:
        rows = _exact(w, used)
    else:
        rows = _by_iteration(w, used)
    down, up = np.zeros((rank, w.shape[1])), np.zeros((w.shape[0], rank))
    down[:used], up[:, :used] = rows, w @ rows.T
    return down, up


def _exact(w: np.ndarray, rank: int) -> np.ndarray:
    """The right singular vectors [rank, in] of the largest singular values, from the smaller Gram matrix."""
    if w.shape[1] <= w.shape[0]:
        vectors = np.linalg.eigh(w.T @ w)[1][:, ::-1][:, :rank]
        return vectors.T
    left = np.linalg.eigh(w @ w.T)[1][:, ::-1][:, :rank]
    rows = left.T @ w
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _by_iteration(w: np.ndarray, rank: int) -> np.ndarray:
    """The same by subspace iteration from a fixed start (Halko et al. 2011, algorithm 4.4), in float32 but for the last step."""
    small = w.astype(np.float32)
    basis = np.random.default_rng(0).standard_normal((w.shape[1], rank + OVERSAMPLING), np.float32)
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(small.T @ (small @ basis))[0]
    left, _, rest = np.linalg.svd(w @ basis.astype(np.float64), full_matrices=False)
    return rest[:rank] @ basis.T.astype(np.float64)
