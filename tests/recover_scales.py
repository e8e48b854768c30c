"""The columns' scales of a smoothed golden checkpoint, as they were before they were rounded to be stored.

The reference multiplies weights by 1 / s with s in float32, and stores s in bfloat16: what is stored is not enough to make the weights
again. But s lies within half a step of what is stored, and the codes, the scales and the maxima of blocks say where.
"""
import ml_dtypes
import numpy as np

F32, BF16 = np.float32, ml_dtypes.bfloat16
STEPS = 600


def codes_of(weight):
    """int8 [O, I]: of INT4, whose bytes hold two rows each, or INT8."""
    if weight.dtype == np.int8:
        return weight
    pairs = np.stack([weight & 15, weight >> 4], axis=1).reshape(-1, weight.shape[1])
    return ((pairs ^ 8).astype(np.int8) - 8).astype(np.int8)


def recover(weight, stored, shared, packed, scale):
    """float32 [I]: what the columns of bfloat16 `weight` were multiplied by. stored: the linear's own pre_quant_scale; shared: its
    siblings' mean, or the same; packed, scale: what was exported."""
    codes, largest = codes_of(packed), F32(127 if packed.dtype == np.int8 else 7)
    low = -largest - 1
    scale = np.repeat(scale.reshape(len(scale), -1), weight.shape[1] // scale.reshape(len(scale), -1).shape[1], axis=1)
    amax = (scale * largest).astype(BF16).astype(F32)
    best, best_score = np.zeros(weight.shape[1], F32), np.full(weight.shape[1], np.inf)

    def consider(factors):
        factors = np.clip(factors, F32(1 - 2.0**-8) / stored, F32(1 + 2.0**-8) / stored)
        smoothed = (weight.astype(F32) * factors).astype(BF16)
        if not np.array_equal(stored, shared):
            smoothed = (smoothed.astype(F32) * stored / shared).astype(BF16)
        smoothed = smoothed.astype(F32)
        wrong = (np.clip(np.rint(smoothed / scale), low, largest) != codes) | (np.abs(smoothed) > amax)
        score = wrong.sum(axis=0) * 1e6 - (np.abs(smoothed) == amax).sum(axis=0)
        better = score < best_score
        best[better], best_score[better] = factors[better], score[better]

    for reciprocal in neighbours(stored):     # SmoothQuant with alpha 1: s is 1 over a bfloat16 maximum
        exact = F32(1) / (F32(1) / reciprocal)
        consider(np.where((F32(1) / reciprocal).astype(BF16).astype(F32) == stored, exact, F32(1) / stored))
    width = F32(2.0**-8)
    center = F32(1) / stored
    for _ in range(3):                         # ever closer
        for step in np.linspace(-1, 1, STEPS, dtype=F32):
            consider((center * (1 + width * step)).astype(F32))
        center, width = best.copy(), F32(width * 3 / STEPS)
    return best


def neighbours(stored):
    bits = (F32(1) / stored).astype(BF16).view(np.uint16).astype(np.int32)
    for offset in (-1, 0, 1, 2):
        yield (bits + offset).astype(np.uint16).view(BF16).astype(F32)
