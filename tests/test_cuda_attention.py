"""CUDA's attention and its gradients against softmax in float64: many sequences at once, masks, windows, groups of heads, a cache."""
import numpy as np
import pytest

from cuda_library import DTYPES, SANITIZED, CudaError, Staging
from cuda_operations import Operations, cuda, structs, unordered  # noqa: F401 (fixtures)
from test_attention import reference
from test_cuda_emulated import same

F32, BF16, F16 = DTYPES
ACTIVATIONS = [F32, BF16]
F32_UNIT, BF16_UNIT = 2.0 ** -24, 2.0 ** -8     # unit roundoff


def heads(rng, tokens, count, size, dtype):
    return rng.standard_normal((tokens, count, size), dtype=np.float32).astype(dtype)


def job_of(q, k, v, out, lengths, scale=0.125, past=None, **options):
    """The fields for sequences of these lengths that follow each other; arrays [rows, heads, size]."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    size = q.itemsize
    job = dict(dtype=q.dtype, heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[2], value_dim=v.shape[2], q=q, k=k, v=v, out=out,
               ldq=q.strides[0] // size, ldk=k.strides[0] // size, ldv=v.strides[0] // size, ldo=out.strides[0] // size, rows=int(starts[-1]),
               sequences=len(lengths), longest=max(lengths, default=0), starts=starts, scale=scale)
    if past is not None:
        keys = np.asarray(past) + lengths
        job.update(past=np.asarray(past, np.int64), key_starts=np.concatenate([[0], np.cumsum(keys)])[:-1].astype(np.int64),
                   longest_keys=int(max(keys)))
    return dict(job, **options)


def bound_of(q, keys, size, largest, dtype):
    """As test_attention.check has it: a score errs by (head_dim + 4) units of the sum of |q| |k|, which exp turns into a relative error
    of p; sums and the division come on top, and twice that as numerator and denominator both err. In bfloat16 probabilities and the result
    are rounded."""
    relative = 2 * ((q.shape[2] + 4) * largest + keys + 16) * F32_UNIT
    return (relative + (2 * BF16_UNIT if dtype == BF16 else 0)) * size * 1.01 + 1e-30


def check(cuda, q, k, v, lengths, past=None, mask=None, window=0, scale=0.125, **options):
    out = np.full((*q.shape[:2], v.shape[2]), np.nan, q.dtype)
    cuda.run("attention", **job_of(q, k, v, out, lengths, scale, past, key_mask=mask, window=window, **options))
    row, key = 0, 0
    for i, length in enumerate(lengths):
        before = 0 if past is None else past[i]
        rows, keys = slice(row, row + length), slice(key, key + before + length)
        exact, size, largest = reference(q[rows], k[keys], v[keys], scale, before, None if mask is None else mask[keys], window) if length \
            else (np.zeros_like(out[rows]), 0, 0)
        assert (abs(out[rows].astype(np.float64) - exact) <= bound_of(q, before + length, size, largest, q.dtype)).all()
        row, key = row + length, key + before + length
    return out


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("lengths, count, kv, size, value_size", [
    ([5], 2, 1, 8, 8), ([130, 1, 0, 40], 3, 3, 64, 64), ([65, 17], 4, 2, 33, 33), ([150], 2, 1, 128, 128), ([70], 2, 2, 96, 64),
    ([40], 1, 1, 40, 200), ([20, 20], 2, 1, 256, 256)])
def test_causal(cuda, dtype, lengths, count, kv, size, value_size):
    rng, rows = np.random.default_rng(1), sum(lengths)
    check(cuda, heads(rng, rows, count, size, dtype), heads(rng, rows, kv, size, dtype), heads(rng, rows, kv, value_size, dtype), lengths)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("lengths, past", [([1, 7], [300, 0]), ([9, 130], [121, 128]), ([1, 1, 1], [0, 700, 255]), ([1, 0, 1], [3, 3, 256])])
def test_past(cuda, dtype, lengths, past):
    """Some of these are steps: one query a sequence."""
    rng, keys = np.random.default_rng(2), sum(lengths) + sum(past)
    for size, value_size in ((16, 16), (65, 33), (128, 256)):
        q, k, v = heads(rng, sum(lengths), 4, size, dtype), heads(rng, keys, 2, size, dtype), heads(rng, keys, 2, value_size, dtype)
        check(cuda, q, k, v, lengths, past)
        check(cuda, q, k, v, lengths, past, window=130)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_step_of_many_heads(cuda, dtype):
    rng = np.random.default_rng(3)
    q, k, v = heads(rng, 2, 20, 24, dtype), heads(rng, 602, 2, 24, dtype), heads(rng, 602, 2, 24, dtype)
    mask = (rng.random(602) < 0.5).astype(np.uint8)
    mask[256:] = 0
    check(cuda, q, k, v, [1, 1], [100, 500], mask=mask)
    assert not check(cuda, q, k, v, [1, 1], [100, 500], mask=np.zeros(602, np.uint8)).any()


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 64, 129, 1000])
def test_window(cuda, dtype, window):
    rng = np.random.default_rng(4)
    check(cuda, heads(rng, 290, 2, 16, dtype), heads(rng, 290, 1, 16, dtype), heads(rng, 290, 1, 16, dtype), [140, 150], window=window)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_key_mask(cuda, dtype):
    """Queries that see no key get zeros; keys that nobody sees do not matter, whatever they are."""
    rng = np.random.default_rng(5)
    q, k, v = (heads(rng, 200, 2, 16, dtype) for _ in range(3))
    mask = (rng.random(200) < 0.6).astype(np.uint8)
    mask[:140], mask[170] = 0, 255
    out = check(cuda, q, k, v, [200], mask=mask)
    assert (out[:140] == 0).all() and not (out[170] == 0).any()
    other = k.copy()
    other[mask == 0] = np.nan
    maxima, factors = np.full((2, 200), 7, np.float32), np.full((2, 200), 7, np.float32)
    same(check(cuda, q, np.where(np.isnan(other), 7, k).astype(dtype), v, [200], mask=mask), out)
    cuda.run("attention", **job_of(q, other, v, found := np.zeros_like(out), [200], key_mask=mask, maxima=maxima, factors=factors))
    same(found, out)
    assert not maxima[:, :140].any() and not factors[:, :140].any() and (factors[:, 170:] > 0).all()


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_large_scores(cuda, dtype):
    """Scores far outside exp's range, rising along the keys: the maximum changes in every tile."""
    rng = np.random.default_rng(6)
    q, k = (40 * heads(rng, 150, 1, 8, dtype).astype(np.float32)).astype(dtype), heads(rng, 150, 1, 8, dtype)
    q[:, :, 0], k[:, :, 0] = 64, np.arange(150)[:, None]
    assert np.isfinite(check(cuda, q, k, heads(rng, 150, 1, 8, dtype), [150], scale=1.0).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("extra", [0, 8, 3])
def test_strides(cuda, dtype, extra):
    """q, k and v as slices of one row of activations, out within a wider one; in steps too. Aligned or not, the same bits."""
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((90, 8 * 16 + extra), dtype=np.float32).astype(dtype)
    views = [np.lib.stride_tricks.as_strided(rows[:, a * 16:], (90, b - a, 16), (rows.strides[0], 16 * rows.itemsize, rows.itemsize))
             for a, b in ((0, 4), (4, 6), (6, 8))]
    copies = [np.ascontiguousarray(view) for view in views]
    for lengths, past in (([50, 40], None), ([1], [89])):
        q = [views[0][:sum(lengths)], copies[0][:sum(lengths)]]
        wide = np.full((90, 5, 16), np.nan, dtype)
        cuda.run("attention", **job_of(q[0], *views[1:], wide[:sum(lengths), :4], lengths, 0.25, past))
        assert np.isnan(wide[:, 4].astype(np.float32)).all()
        same(wide[:sum(lengths), :4], check(cuda, q[1], *copies[1:], lengths, past, scale=0.25))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("length", [1, 3])
def test_cache(cuda, dtype, length):
    """Keys lie [slots][heads][capacity][size], as mq_cache has them."""
    rng = np.random.default_rng(8)
    cache = heads(rng, 3 * 2 * 40, 1, 16, dtype).reshape(3, 2, 40, 16)
    values, q, past, slots = heads(rng, 3 * 2 * 40, 1, 16, dtype).reshape(cache.shape), heads(rng, 2 * length, 4, 16, dtype), [20, 33], [2, 0]
    k, v = (np.ascontiguousarray(np.concatenate([x[slot, :, :past[i] + length].swapaxes(0, 1) for i, slot in enumerate(slots)]))
            for x in (cache, values))
    wanted, out = check(cuda, q, k, v, [length] * 2, past), np.zeros_like(q)
    job = job_of(q, k, v, out, [length] * 2, past=past)
    cuda.run("attention", **dict(job, k=cache, v=values, ldk=16, ldv=16, head_tokens=40, key_starts=np.int64(slots) * 2 * 40))
    same(out, wanted)


# ---- other kinds of scores ----

def probabilities(q, wide_k, scale, window=0, mask=None, past=0, chunk=0, chunk_first=0, softcap=0.0, sinks=None):
    """In float64 [heads, queries, keys], and the slope of what caps scores."""
    at, key = past + np.arange(len(q))[:, None], np.arange(len(wide_k))[None]
    seen = (key <= at) & ((window == 0) | (key > at - window)) & (True if mask is None else mask.astype(bool)[None])
    if chunk:
        behind = at - chunk_first
        seen &= (behind < 0) | (key >= at - behind % chunk)
    scores = scale * np.einsum("thd,shd->hts", q.astype(np.float64), wide_k.astype(np.float64))
    slope = 1 - np.tanh(scores / softcap) ** 2 if softcap else np.ones_like(scores)
    scores = np.where(seen, softcap * np.tanh(scores / softcap) if softcap else scores, -np.inf)
    sink = np.full((q.shape[1], 1, 1), -np.inf) if sinks is None else sinks.astype(np.float64)[:, None, None]
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), sink)
    p = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = p.sum(-1, keepdims=True) + np.exp(sink - np.where(np.isinf(top), 0, top))
    return p / np.where(total == 0, 1, total), slope


KINDS = {"chunk": dict(chunk=48), "chunk behind padding": dict(chunk=50, chunk_first=17), "cap": dict(softcap=2.0), "sinks": dict(sinks=True),
         "all": dict(chunk=64, softcap=3.0, sinks=True, window=40)}


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_scores(cuda, dtype, kind):
    """Llama 4's chunks, Gemma 2's cap, gpt-oss's sinks; in many queries and in steps."""
    rng, options = np.random.default_rng(11), dict(KINDS[kind])
    sinks = rng.standard_normal(4).astype(np.float32) if options.pop("sinks", False) else None
    for lengths, past in (([150, 30], [0, 0]), ([1, 1], [130, 40])):
        firsts = np.full(2, options.get("chunk_first", 0), np.int64)
        keys = np.asarray(past) + lengths
        q, k, v = heads(rng, sum(lengths), 4, 24, dtype), heads(rng, sum(keys), 2, 24, dtype), heads(rng, sum(keys), 2, 24, dtype)
        out = np.full_like(q, np.nan)
        cuda.run("attention", **dict(job_of(q, k, v, out, lengths, 0.4, past), sinks=sinks, **{**options, "chunk_first": firsts}))
        row, key = 0, 0
        for i, length in enumerate(lengths):
            rows, own = slice(row, row + length), slice(key, key + keys[i])
            p, _ = probabilities(q[rows], np.repeat(k[own], 2, 1), 0.4, past=past[i], sinks=sinks, **options)
            wide = np.repeat(v[own], 2, 1).astype(np.float64)
            bound = (2e-5 if dtype == F32 else 2 * BF16_UNIT) * np.einsum("hts,shd->thd", p, abs(wide)) + 1e-30
            assert np.all(abs(out[rows].astype(np.float64) - np.einsum("hts,shd->thd", p, wide)) <= bound)
            row, key = row + length, key + keys[i]


# ---- gradients ----

def exact_gradients(q, k, v, d_out, scale, **options):
    """In float64: d_q, d_k, d_v; and the sums of the sizes of what is added up, with which errors scale."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    group, tokens = q.shape[1] // k.shape[1], len(q)
    wide_k, wide_v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    p, slope = probabilities(q, wide_k, scale, **options)

    def gradients(change, q, k, d_out):
        def grouped(x):
            return x.reshape(tokens, x.shape[1] // group, group, x.shape[-1]).sum(2)
        return np.einsum("hts,shd->thd", change, k), grouped(np.einsum("hts,thd->shd", change, q)), grouped(np.einsum("hts,thd->shd", p, d_out))
    d_p = np.einsum("thd,shd->hts", d_out, wide_v)
    mean = (d_p * p).sum(-1, keepdims=True)
    sizes = np.einsum("thd,shd->hts", abs(d_out), abs(wide_v)) + (np.einsum("thd,shd->hts", abs(d_out), abs(wide_v)) * p).sum(-1, keepdims=True)
    return gradients(scale * slope * p * (d_p - mean), q, wide_k, d_out), gradients(abs(scale) * p * sizes, abs(q), abs(wide_k), abs(d_out))


def exact_sinks(q, k, v, d_out, scale, sinks, **options):
    """In float64, of what is left for a sink: its gradient [heads], and the sum of sizes."""
    q, d_out, wide_k, wide_v = (x.astype(np.float64) for x in (q, d_out, *(np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))))
    p, _ = probabilities(q, wide_k, scale, sinks=sinks, **options)
    left = 1 - p.sum(-1)
    return tuple(-(left * (np.einsum("thd,shd->hts", a, b) * p).sum(-1)).sum(-1) for a, b in ((d_out, wide_v), (abs(d_out), abs(wide_v))))


def run_backward(cuda: Operations, job, d_out, d_sinks=None):
    """The forward with maxima and factors, then d_q, d_k, d_v; d_sinks is added to."""
    maxima, factors = (np.full((job["heads"], job["rows"]), np.nan, np.float32) for _ in range(2))
    cuda.run("attention", **dict(job, maxima=maxima, factors=factors))
    gradients = [np.full(job[name].shape, np.nan, np.float32) for name in "qkv"]
    here = Staging(cuda.memory)
    filled = cuda.fill("mq_cuda_attention_job", here, dict(job, maxima=maxima, factors=factors))
    to = cuda.fill("mq_cuda_attention_gradient", here, dict(zip(("d_out", "d_q", "d_k", "d_v", "d_sinks"), (d_out, *gradients, d_sinks))))
    cuda.workspace("attention_backward", filled, here)
    cuda.call("attention_backward", filled, here, to)
    return gradients


def check_backward(cuda, dtype, lengths, count, kv, size, value_size, window=0, masked=0.0, scale=0.125, **options):
    rng, rows = np.random.default_rng(9), sum(lengths)
    q, k, v = heads(rng, rows, count, size, dtype), heads(rng, rows, kv, size, dtype), heads(rng, rows, kv, value_size, dtype)
    d_out, out = heads(rng, rows, count, value_size, F32), np.zeros((rows, count, value_size), dtype)
    mask = (rng.random(rows) >= masked).astype(np.uint8) if masked else None
    sinks = rng.standard_normal(count).astype(np.float32) if options.pop("sinks", False) else None
    firsts = np.full(len(lengths), options.get("chunk_first", 0), np.int64)
    job = job_of(q, k, v, out, lengths, scale, key_mask=mask, window=window, sinks=sinks, **{**options, "chunk_first": firsts})
    d_sinks = None if sinks is None else np.full(count, 3, np.float32)
    found, left, row = run_backward(cuda, job, d_out, d_sinks), [], 0
    for length in lengths:
        part = slice(row, row + length)
        wanted, scales = exact_gradients(q[part], k[part], v[part], d_out[part], scale, window=window, sinks=sinks,
                                         mask=None if mask is None else mask[part], **options)
        for got, exact, size_of in zip(found, wanted, scales):
            # float32: sums of `size` and of `length` terms, each side of exp; bfloat16: out, d_out, p and dS are rounded, and O enters D.
            bound = 3e-6 * size_of if dtype == F32 else 4 * BF16_UNIT * size_of
            assert np.all(abs(got[part] - exact) <= bound + 1e-30)
        if sinks is not None:
            left.append(exact_sinks(q[part], k[part], v[part], d_out[part], scale, sinks, window=window,
                                    mask=None if mask is None else mask[part], **options))
        row += length
    if sinks is not None:
        exact, size_of = np.sum(left, 0)
        assert np.all(abs(d_sinks - 3 - exact) <= (3e-6 if dtype == F32 else 4 * BF16_UNIT) * abs(size_of) + 1e-6)
    return found


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("lengths, count, kv, size, value_size", [
    ([7], 2, 1, 8, 8), ([130, 1, 0, 40], 2, 2, 64, 64), ([65, 17], 4, 2, 33, 20), ([140], 2, 1, 128, 96), ([20, 20], 2, 1, 200, 256)])
def test_backward(cuda, dtype, lengths, count, kv, size, value_size):
    check_backward(cuda, dtype, lengths, count, kv, size, value_size)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("window, masked", [(1, 0), (50, 0.4), (0, 0.9), (0, 1.0)])
def test_backward_of_what_is_hidden(cuda, dtype, window, masked):
    """Nothing is NaN where a query sees no key; all zeros where none does."""
    found = check_backward(cuda, dtype, [150, 30], 2, 1, 16, 16, window, masked)
    assert masked < 1 or not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_other_scores(cuda, dtype, kind):
    check_backward(cuda, dtype, [150, 30], 4, 2, 24, 24, scale=0.4, **KINDS[kind])


def test_same_bits_in_every_order(unordered):
    rng = np.random.default_rng(10)
    results = []
    for order in (["random"] if SANITIZED else ["forward", "reverse", "random"]):
        unordered.order(order)
        rng = np.random.default_rng(10)
        q, k, v = heads(rng, 140, 4, 32, BF16), heads(rng, 140, 2, 32, BF16), heads(rng, 140, 2, 32, BF16)
        out = np.zeros_like(q)
        found = run_backward(unordered, job_of(q, k, v, out, [100, 40]), heads(rng, 140, 4, 32, F32))
        results.append([out, *found])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a.tobytes() == b.tobytes()


def test_nothing_to_do_and_what_is_refused(unordered):
    q = np.zeros((0, 2, 8), np.float32)
    for lengths in ([], [0, 0]):
        job = job_of(q, q, q, q, lengths)
        unordered.run("attention", **job)
    job = job_of(*(np.ones((4, 2, 8), np.float32) for _ in range(4)), [4])
    for change, text in ((dict(kv_heads=3), "2 heads of 8 on 3"), (dict(head_dim=257), "up to 256"), (dict(dtype=F16), "float32 or bfloat16"),
                         (dict(starts=None), "needs starts")):
        with pytest.raises(CudaError, match=text):
            unordered.run("attention", **dict(job, **change))
    with pytest.raises(CudaError, match="needs the forward's maxima"):
        here = Staging(unordered.memory)
        filled = unordered.fill("mq_cuda_attention_job", here, job)
        unordered.call("attention_backward", filled, here, structs()["mq_cuda_attention_gradient"]())
    with pytest.raises(CudaError, match="d_sinks of an attention that has no sinks"):
        run_backward(unordered, job, np.ones((4, 2, 8), np.float32), np.zeros(2, np.float32))
