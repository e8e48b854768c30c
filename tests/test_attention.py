"""Blockwise attention against the T x T softmax in float64."""
import numpy as np
import pytest

from test_gemm import BF16, BF16_UNIT, F32_UNIT, kernel, matrix  # noqa: F401 (kernel is a fixture)


def reference(q, k, v, scale, past=0, mask=None, window=0):
    """softmax(scale q k^T) v, and the same with |v|: what rounding errors of the probabilities scale with."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    position, key = past + np.arange(len(q))[:, None], np.arange(len(k))[None]
    seen = (key <= position) & ((window == 0) | (key > position - window)) & (True if mask is None else mask.astype(bool)[None])
    scores = np.where(seen, scale * np.einsum("thd,shd->hts", q, k), -np.inf)
    p = np.exp(scores - np.where(seen.any(1), scores.max(2), 0)[:, :, None])
    p = p / np.where(p.sum(2, keepdims=True) == 0, 1, p.sum(2, keepdims=True))
    return np.einsum("hts,shd->thd", p, v), np.einsum("hts,shd->thd", p, abs(v)), abs(scale) * np.einsum("thd,shd->hts", abs(q), abs(k)).max()


def check(testing, bf16, q, k, v, scale=0.125, **options):
    dtype = BF16 if bf16 else np.float32
    q, k, v = (x if x.dtype == dtype else x.astype(dtype) for x in (q, k, v))
    out = np.full((*q.shape[:2], v.shape[2]), np.nan, dtype)
    testing.attention(q, k, v, out, scale, **options)
    exact, size, largest = reference(q, k, v, scale, **options)
    # A score errs by (head_dim + 4) units of the sum of |q| |k|, which exp turns into a relative error of p; its own two units, the
    # sums over T_kv keys and the division come on top, and twice that as numerator and denominator both err.
    relative = 2 * ((q.shape[2] + 4) * largest + len(k) + 16) * F32_UNIT
    bound = (relative + (2 * BF16_UNIT if bf16 else 0)) * size * 1.01 + (1e-30 if bf16 else 0)
    assert (abs(out.astype(np.float64) - exact) <= bound).all()
    return out


def heads(rng, tokens, count, size):
    return matrix(rng, tokens, count * size).reshape(tokens, count, size)


@pytest.mark.parametrize("tokens, count, kv, size, value_size", [
    (1, 1, 1, 1, 1), (5, 2, 1, 8, 8), (64, 3, 3, 64, 64), (65, 4, 2, 33, 33), (129, 9, 3, 64, 64), (300, 2, 1, 128, 128), (200, 2, 2, 96, 64), (70, 1, 1, 40, 300)])
def test_causal(testing, kernel, tokens, count, kv, size, value_size):  # noqa: F811
    rng = np.random.default_rng(1)
    check(testing, kernel[0], heads(rng, tokens, count, size), heads(rng, tokens, kv, size), heads(rng, tokens, kv, value_size))


@pytest.mark.parametrize("tokens, past", [(1, 0), (1, 300), (7, 121), (130, 128)])
def test_past(testing, kernel, tokens, past):  # noqa: F811
    rng = np.random.default_rng(2)
    check(testing, kernel[0], heads(rng, tokens, 4, 16), heads(rng, past + tokens, 2, 16), heads(rng, past + tokens, 2, 16), past=past)


@pytest.mark.parametrize("window", [1, 2, 64, 127, 128, 129, 1000])
def test_window(testing, kernel, window):  # noqa: F811
    rng = np.random.default_rng(3)
    check(testing, kernel[0], heads(rng, 290, 2, 16), heads(rng, 290, 1, 16), heads(rng, 290, 1, 16), window=window)


def test_key_mask(testing, kernel):  # noqa: F811
    rng = np.random.default_rng(4)
    q, k, v = heads(rng, 290, 2, 16), heads(rng, 290, 2, 16), heads(rng, 290, 2, 16)
    mask = (rng.random(290) < 0.6).astype(np.uint8)
    mask[:140], mask[200] = 0, 255
    out = check(testing, kernel[0], q, k, v, mask=mask)
    assert (out[:140] == 0).all() and not (out[200] == 0).any()
    other = k.copy()
    other[mask == 0] = 7
    assert (check(testing, kernel[0], q, other, v, mask=mask) == out).all()


def test_large_scores(testing, kernel):  # noqa: F811
    """Scores far outside exp's range: only differences to the maximum may count."""
    rng = np.random.default_rng(5)
    q, k = 40 * heads(rng, 150, 1, 8), 40 * heads(rng, 150, 1, 8)
    q[:, :, 0], k[:, :, 0] = 64, np.arange(150)[:, None]      # rising along the keys: the maximum changes in every block
    out = check(testing, kernel[0], q, k, heads(rng, 150, 1, 8), scale=1.0)
    assert np.isfinite(out.astype(np.float32)).all()


def test_strides(testing, kernel):  # noqa: F811
    """q, k and v as slices of one row of activations, out within a wider one."""
    rng = np.random.default_rng(6)
    dtype = BF16 if kernel[0] else np.float32
    rows = matrix(rng, 90, 8 * 16 + 3, dtype)
    q, k, v = (rows[:, a * 16:b * 16].reshape(90, b - a, 16) for a, b in ((0, 4), (4, 6), (6, 8)))
    views = [np.lib.stride_tricks.as_strided(rows[:, a * 16:], (90, b - a, 16), (rows.strides[0], 16 * rows.itemsize, rows.itemsize))
             for a, b in ((0, 4), (4, 6), (6, 8))]
    wide = np.full((90, 5, 16), np.nan, dtype)
    testing.attention(*views, wide[:, :4], 0.25)
    assert np.isnan(wide[:, 4]).all() and (wide[:, :4] == check(testing, kernel[0], q, k, v, scale=0.25)).all()


def test_nan_shows(testing, kernel):  # noqa: F811
    rng = np.random.default_rng(7)
    dtype = BF16 if kernel[0] else np.float32
    q, k, v = (heads(rng, 40, 1, 16).astype(dtype) for _ in range(3))
    k[30, 0, 3] = np.nan
    out = np.zeros_like(q)
    testing.attention(q, k, v, out, 0.25)
    assert np.isnan(out[30:]).all() and np.isfinite(out[:30].astype(np.float32)).all()


def test_same_bits_for_threads(testing, kernel):  # noqa: F811
    rng = np.random.default_rng(8)
    dtype = BF16 if kernel[0] else np.float32
    q, k, v = heads(rng, 200, 6, 32).astype(dtype), heads(rng, 200, 2, 32).astype(dtype), heads(rng, 200, 2, 32).astype(dtype)
    results = []
    for threads in (1, 2, 3):
        testing.pool_threads(threads)
        results.append(np.zeros_like(q))
        testing.attention(q, k, v, results[-1], 0.2)
    testing.pool_threads(0)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_exp(testing):
    """Every 1,021st float32 that is not positive: within two units in the last place; c and avx2 give the same bits."""
    x = np.arange(1 << 31, 1 << 32, 1021, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, -np.inf, -87.33654, -87.33655, -86.64, np.nan])])
    with np.errstate(all="ignore"):
        exact = np.exp(x.astype(np.float64))
        unit = np.spacing(exact.astype(np.float32)).astype(np.float64)
    results = []
    for isa in ("c", "avx2", "avx512"):
        try:
            results.append(testing.softmax_exp(isa, x))
        except ValueError:
            continue
    normal = exact >= 2.0 ** -126
    for y in results:
        assert (abs(y[normal] - exact[normal]) <= 2 * unit[normal]).all()
        assert (y[exact < 2.0 ** -126 * (1 - 1e-5)] == 0).all() and np.isnan(y[np.isnan(x)]).all()
    assert len({result[~np.isnan(x)].tobytes() for result in results[:2]}) == 1
