"""Gradients of the runtime's operations against differences of their formulas in float64."""
import ml_dtypes
import numpy as np
import pytest

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float32, BF16]
# Of the largest gradient: some dozens of roundings of 2^-24 of terms that cancel in part. Differences themselves are exact to 1e-8.
RELATIVE = 1e-5


def values(rng, *shape, dtype=np.float32):
    """Numbers that are exact in both types, so that only arithmetic on gradients rounds."""
    return rng.standard_normal(shape).astype(BF16).astype(dtype)


def differences(function, inputs, d_out, step=1e-4):
    """Gradients of sum(function(*inputs) * d_out) by each of the inputs, from differences of fourth order."""
    found = []
    for index, x in enumerate(inputs):
        gradient = np.empty(x.shape)
        for at in np.ndindex(*x.shape):
            total = 0.0
            for shift, weight in ((2, -1), (1, 8), (-1, -8), (-2, 1)):
                moved = [np.array(value, np.float64) for value in inputs]
                moved[index][at] += shift * step
                total += weight * float((function(*moved) * d_out).sum())
            gradient[at] = total / (12 * step)
        found.append(gradient)
    return found


def check(found, wanted):
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= RELATIVE * np.abs(wanted).max() + 1e-30


def rmsnorm(x, weight):
    return weight * x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 37, 64])
def test_rmsnorm(testing, dtype, width):
    rng = np.random.default_rng(width)
    x, weight, d_out = values(rng, 5, width, dtype=dtype), values(rng, width), values(rng, 5, width)
    d_x, d_weight = differences(rmsnorm, (x, weight), d_out)
    found, added = d_out.copy(), values(rng, 5, width)
    testing.backward_op("rmsnorm_in_place", (found, x, weight), 1e-5)
    scale = np.abs(d_out * weight / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)).max()   # of terms that cancel
    assert np.abs(found - d_x).max() <= RELATIVE * scale
    sums = added.copy()
    testing.backward_op("rmsnorm", (sums, d_out, x, weight), 1e-5)
    np.testing.assert_allclose(sums, added + found, atol=1e-6 * scale + 1e-6)
    sums = np.zeros(width, np.float32)
    testing.backward_op("rmsnorm_weight", (sums, d_out, x), 1e-5)
    check(sums, d_weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 64])
def test_swiglu(testing, dtype, width):
    rng = np.random.default_rng(width)
    gate, up, d_out = values(rng, 4, width, dtype=dtype) * dtype(4), values(rng, 4, width, dtype=dtype), values(rng, 4, width)
    gate.flat[0] = 0
    wanted = differences(lambda g, u: g / (1 + np.exp(-g)) * u, (gate, up), d_out)
    d_gate, d_up = d_out.copy(), np.empty_like(d_out)
    testing.backward_op("swiglu", (d_gate, d_up, gate, up))
    check(d_gate, wanted[0])
    check(d_up, wanted[1])


@pytest.mark.parametrize("head_dim", [2, 20, 64])
def test_rope_backward_is_the_transpose(testing, head_dim):
    """A rotation is linear: <R x, y> = <x, R^T y>, and R^T R = 1."""
    rng = np.random.default_rng(head_dim)
    x, y = values(rng, 9, 3, head_dim), values(rng, 9, 3, head_dim)
    rotated, back, both = x.copy(), y.copy(), x.copy()
    testing.apply_rope((rotated,), 10000.0, 0, (1.0, 1.0, 4.0, 0))
    testing.backward_op("rope", (back,), 10000.0)
    np.testing.assert_allclose((rotated.astype(np.float64) * y).sum(-1), (x.astype(np.float64) * back).sum(-1), atol=3e-6)
    testing.apply_rope((both,), 10000.0, 0, (1.0, 1.0, 4.0, 0))
    testing.backward_op("rope", (both,), 10000.0)
    np.testing.assert_allclose(both, x, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, inner", [(1, 1, 1), (5, 3, 7), (33, 40, 18)])
def test_linear(testing, dtype, rows, columns, inner):
    rng = np.random.default_rng(rows)
    x, weight, d_out = values(rng, rows, inner, dtype=dtype), values(rng, columns, inner, dtype=dtype), values(rng, rows, columns)
    d_x, d_weight = (np.zeros(shape, np.float32) for shape in ((rows, inner), (columns, inner)))
    d_bias, exact = np.ones(columns, np.float32), d_out.astype(np.float64)
    testing.backward_op("linear", (d_x, d_out, weight))
    testing.backward_op("linear_weight", (d_weight, d_out, x))
    testing.backward_op("bias", (d_bias, d_out))
    check(d_x, exact @ weight.astype(np.float64))
    check(d_weight, exact.T @ x.astype(np.float64))
    check(d_bias, 1 + exact.sum(0))
    testing.backward_op("linear", (d_x, d_out, weight), 1)
    testing.backward_op("linear_weight", (d_weight, d_out, x))
    check(d_x, 2 * exact @ weight.astype(np.float64))
    check(d_weight, 2 * exact.T @ x.astype(np.float64))
    if rows <= 5:
        check(d_x / 2, differences(lambda x: x @ weight.astype(np.float64).T, (x,), d_out)[0])


def test_embed(testing):
    rng = np.random.default_rng(0)
    ids, d_out, d_weight = rng.integers(0, 6, 20).astype(np.int32), values(rng, 20, 9), np.zeros((7, 9), np.float32)
    testing.backward_op("embed", (d_weight, d_out, ids))
    check(d_weight, differences(lambda weight: weight[ids], (np.zeros((7, 9)),), d_out)[0])


def test_loss(testing):
    """Mean over labels, in slices of the vocabulary; no label, no gradient."""
    rng = np.random.default_rng(0)
    logits, labels = values(rng, 5, 23) * 3, np.array([0, 22, -1, 11, 10], np.int32)
    factors, losses = np.array([0.25, 0.5, 7, 0.25, 1], np.float32), np.empty(5)

    def nll(x):
        top = x.max(-1, keepdims=True)
        return np.where(labels < 0, 0, np.log(np.exp(x - top).sum(-1)) + top[:, 0] - x[np.arange(5), labels])
    wanted = differences(nll, (logits,), factors)[0]
    gradient = logits.copy()
    testing.backward_op("loss", (gradient, labels, factors, losses))
    np.testing.assert_allclose(losses, nll(logits.astype(np.float64)), rtol=1e-6)
    check(gradient, wanted)
    assert not gradient[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_route(testing, dtype, normalize):
    rng = np.random.default_rng(1)
    logits, d_shares = values(rng, 6, 8, dtype=dtype), values(rng, 6, 3)
    chosen, shares = np.empty((6, 3), np.int32), np.empty((6, 3), np.float32)
    d_logits = np.empty((6, 8), np.float32)
    testing.backward_op("route", (d_logits, d_shares, logits, chosen, shares), normalize)

    def share(x):
        p = np.exp(x - x.max(-1, keepdims=True))
        p = np.take_along_axis(p / p.sum(-1, keepdims=True), chosen.astype(int), -1)
        return p / p.sum(-1, keepdims=True) if normalize else p
    np.testing.assert_allclose(shares, share(logits.astype(np.float64)), rtol=1e-5)
    check(d_logits, differences(share, (logits,), d_shares)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_and_gather(testing, dtype):
    rng = np.random.default_rng(2)
    x, shares, index = values(rng, 4, 19, dtype=dtype), rng.random(4, np.float32), np.array([5, 0, 2, 6])
    d_out = values(rng, 7, 19)

    def scatter(x, shares):
        out = np.zeros((7, 19))
        out[index] = shares[:, None] * x
        return out
    d_x, d_shares = np.empty((4, 19), np.float32), np.empty(4, np.float32)
    testing.backward_op("scatter", (d_x, d_shares, d_out, x, index, shares))
    for found, wanted in zip((d_x, d_shares), differences(scatter, (x, shares), d_out)):
        check(found, wanted)
    sums, d_rows = np.ones((7, 19), np.float32), values(rng, 4, 19)
    testing.backward_op("gather", (sums, d_rows, index))
    check(sums, 1 + differences(lambda x: x[index], (np.zeros((7, 19)),), d_rows)[0])


# Attention -------------------------------------------------------------------------------------------------------------------

def attention(q, k, v, scale, seen):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.where(seen, scale * np.einsum("thd,shd->hts", q, k), -np.inf)
    p = np.exp(scores - np.where(seen.any(-1), scores.max(-1), 0)[..., None])
    p = p / np.where(p.sum(-1) == 0, 1, p.sum(-1))[..., None]
    return np.einsum("hts,shd->thd", p, v), p


def exact_attention(q, k, v, d_out, scale, seen):
    """d_q, d_k, d_v in float64 by the formulas of softmax's gradient; for sizes that differences would take too long for."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    heads, kv = q.shape[1], k.shape[1]
    wide_k, wide_v = np.repeat(k, heads // kv, 1), np.repeat(v, heads // kv, 1)
    _, p = attention(q, k, v, scale, seen)
    d_p = np.einsum("thd,shd->hts", d_out, wide_v)
    d_s = scale * p * (d_p - (d_p * p).sum(-1, keepdims=True))

    def grouped(x):
        return x.reshape(len(x), kv, heads // kv, -1).sum(2)
    return (np.einsum("hts,shd->thd", d_s, wide_k), grouped(np.einsum("hts,thd->shd", d_s, q)),
            grouped(np.einsum("hts,thd->shd", p, d_out)))


def seen_by(tokens, window=0, mask=None):
    at = np.arange(tokens)
    seen = (at[None] <= at[:, None]) & ((window == 0) | (at[None] > at[:, None] - window))
    return seen if mask is None else seen & mask.astype(bool)[None]


def run_attention(testing, q, k, v, d_out, scale, window=0, mask=None):
    gradients = [np.full(x.shape, np.nan, np.float32) for x in (q, k, v)]
    out = np.empty((*q.shape[:2], v.shape[2]), q.dtype)
    testing.attention_backward((*gradients, d_out, q, k, v, out) + (() if mask is None else (mask,)), scale, window)
    return gradients


MASK = np.array([0, 0, 1, 1, 0, 1, 1], np.uint8)


@pytest.mark.parametrize("window, mask", [(0, None), (3, None), (0, MASK), (2, MASK)])
def test_attention_against_differences(testing, window, mask):
    """The first queries under the mask see nothing at all."""
    rng = np.random.default_rng(4)
    q, k, v, d_out = values(rng, 7, 4, 3), values(rng, 7, 2, 3), values(rng, 7, 2, 5), values(rng, 7, 4, 5)
    seen = seen_by(7, window, mask)
    wanted = differences(lambda q, k, v: attention(q, k, v, 0.6, seen)[0], (q, k, v), d_out)
    for found, gradient, exact in zip(run_attention(testing, q, k, v, d_out, 0.6, window, mask), wanted,
                                      exact_attention(q, k, v, d_out, 0.6, seen)):
        np.testing.assert_allclose(exact, gradient, atol=1e-8)
        check(found, gradient)


def attention_with_sinks(q, k, v, sinks, scale, seen):
    """A sink is one more key that every query sees, with a score of its own and a value of zeros."""
    group, tokens = q.shape[1] // k.shape[1], len(q)
    scores = np.where(seen, scale * np.einsum("thd,shd->hts", q, np.repeat(k, group, 1)), -np.inf)
    scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (len(sinks), tokens, 1))], -1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", (p / p.sum(-1, keepdims=True))[..., :-1], np.repeat(v, group, 1))


@pytest.mark.parametrize("tokens, window", [(7, 0), (7, 3), (70, 0)])
def test_attention_with_sinks_against_differences(testing, tokens, window):
    """gpt-oss: by the sinks too, which are added to; the first two queries see nothing but theirs. 70: more than one block of queries."""
    rng, heads = np.random.default_rng(5), 4
    q, k, v, d_out = values(rng, tokens, 4, 3), values(rng, tokens, 2, 3), values(rng, tokens, 2, 5), values(rng, tokens, 4, 5)
    sinks, mask = values(rng, heads), np.r_[[0, 0], np.ones(tokens - 2)].astype(np.uint8)
    seen = seen_by(tokens, window, mask)
    if tokens < 10:
        wanted = differences(lambda q, k, v, sinks: attention_with_sinks(q, k, v, sinks, 0.6, seen), (q, k, v, sinks), d_out)
    else:
        wanted = [None] * 3 + differences(lambda sinks: attention_with_sinks(q, k, v, sinks, 0.6, seen), (sinks,), d_out)
    gradients, out = [np.full(x.shape, np.nan, np.float32) for x in (q, k, v)], np.empty((tokens, 4, 5), np.float32)
    d_sinks = np.full(heads, 3, np.float32)
    testing.attention_backward((*gradients, d_out, q, k, v, out, mask, sinks, d_sinks), 0.6, window)
    np.testing.assert_allclose(out, attention_with_sinks(q, k, v, sinks, 0.6, seen), atol=1e-5)
    for found, gradient in zip((*gradients, d_sinks - 3), wanted, strict=True):
        if gradient is not None:
            check(found, gradient)
    assert np.abs(wanted[3]).min() > 0.01


@pytest.mark.parametrize("tokens, heads, kv, size, value_size, window", [
    (1, 1, 1, 1, 1, 0), (64, 3, 3, 64, 64, 0), (65, 4, 2, 33, 33, 0), (300, 6, 2, 64, 64, 0), (290, 2, 1, 128, 40, 0), (300, 2, 2, 16, 16, 1),
    (300, 4, 1, 16, 16, 127), (300, 2, 1, 16, 16, 130)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_many_blocks(testing, tokens, heads, kv, size, value_size, window, masked):
    rng = np.random.default_rng(tokens)
    q, k, v = values(rng, tokens, heads, size), values(rng, tokens, kv, size), values(rng, tokens, kv, value_size)
    d_out, mask = values(rng, tokens, heads, value_size), (rng.random(tokens) < 0.7).astype(np.uint8) if masked else None
    found = run_attention(testing, q, k, v, d_out, size ** -0.5, window, mask)
    wanted = exact_attention(q, k, v, d_out, size ** -0.5, seen_by(tokens, window, mask))
    scale = max(np.abs(gradient).max() for gradient in wanted)      # those of a query that sees one key cancel to nothing
    for gradient, exact in zip(found, wanted):
        assert np.abs(gradient - exact).max() <= RELATIVE * scale
    if masked:
        assert not found[1][mask == 0].any() and not found[2][mask == 0].any()


def test_attention_in_bfloat16(testing):
    """Probabilities and gradients meet the products rounded to bfloat16: some 2^-9 each."""
    rng = np.random.default_rng(9)
    q, k, v = values(rng, 200, 4, 64, dtype=BF16), values(rng, 200, 2, 64, dtype=BF16), values(rng, 200, 2, 64, dtype=BF16)
    d_out = values(rng, 200, 4, 64)
    found = run_attention(testing, q, k, v, d_out, 0.125)
    for gradient, exact in zip(found, exact_attention(q, k, v, d_out, 0.125, seen_by(200))):
        assert np.linalg.norm(gradient - exact) <= 0.01 * np.linalg.norm(exact)


def test_attention_gives_the_same_bits_for_threads(testing):
    rng = np.random.default_rng(8)
    q, k, v, d_out = values(rng, 200, 6, 32), values(rng, 200, 2, 32), values(rng, 200, 2, 32), values(rng, 200, 6, 32)
    results = []
    for threads in (1, 2, 3):
        testing.pool_threads(threads)
        results.append(b"".join(x.tobytes() for x in run_attention(testing, q, k, v, d_out, 0.2)))
    testing.pool_threads(0)
    assert len(set(results)) == 1
