"""CUDA kernels of experts, embeddings' gradients, the loss and AutoQuantize's scores: integers and sums in one order exactly, the rest
against formulas in float64."""
import numpy as np
import pytest

from cuda_library import DTYPES, SANITIZED, CudaError
from cuda_operations import LOSS_ROW, cuda, unordered  # noqa: F401 (fixtures)
from test_cuda_emulated import same, strided
from test_cuda_operations import ACTIVATIONS, close
from test_ops import values

F32, BF16, F16 = DTYPES


# ---- experts ----

def routed(cuda, logits, top_k, normalize=0, rounded=0):
    chosen, shares = (np.full((len(logits), top_k), 77, dtype) for dtype in (np.int32, np.float32))
    cuda.run("route", logits=logits, top_k=top_k, normalize=normalize, rounded=rounded, experts=chosen, shares=shares)
    return chosen, shares


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("normalize", [0, 1])
def test_route(cuda, testing, dtype, normalize):
    rng = np.random.default_rng(0)
    for rows, experts, top_k in ((6, 8, 3), (19, 128, 8), (3, 33, 1), (2, 4, 4), (2, 1, 1)):
        logits, d_shares = values(rng, rows, experts, dtype=dtype.type), values(rng, rows, top_k)
        chosen, shares, d_logits = np.empty((rows, top_k), np.int32), np.empty((rows, top_k), np.float32), np.empty((rows, experts), np.float32)
        testing.backward_op("route", (d_logits, d_shares, logits, chosen, shares), normalize)
        for given in (logits, strided(logits)):
            got, found = routed(cuda, given, top_k, normalize)
            np.testing.assert_array_equal(got, chosen)
            np.testing.assert_allclose(found, shares, rtol=2e-6)
            gradient = np.full((rows, experts), 5, np.float32)
            cuda.run("route_backward", "route", logits=given, top_k=top_k, normalize=normalize, experts=got, d_shares=d_shares,
                     d_logits=gradient)
            exact = logits.astype(np.float64)
            p = np.exp(exact - exact.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            picked = np.take_along_axis(p, chosen.astype(int), -1)
            total = picked.sum(-1, keepdims=True) if normalize else 1
            d_p = np.zeros_like(p)
            mean = (d_shares * picked / total).sum(-1, keepdims=True) if normalize else 0
            np.put_along_axis(d_p, chosen.astype(int), (d_shares - mean) / total, -1)
            wanted = p * (d_p - (d_p * p).sum(-1, keepdims=True))
            assert np.abs(gradient - wanted).max() <= 2e-6 * np.abs(d_shares).max() / np.min(total)
            assert np.abs(gradient - d_logits).max() <= 4e-6 * np.abs(d_shares).max() / np.min(total)
        np.testing.assert_array_equal(routed(cuda, logits, top_k, normalize, 1)[1], found.astype(dtype).astype(np.float32))


def test_route_of_equal_and_of_bad_logits(cuda):
    """The earlier one first where equal; experts that exist and differ even where there is nothing to compare."""
    logits = np.float32([[1, 3, 3, 1, 3, 0, 0, 0], [0] * 8, [np.nan] + [0] * 7, [np.inf] * 2 + [0] * 6, [-np.inf] * 8])
    chosen, shares = routed(cuda, logits, 4)
    assert chosen[:2].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]] and chosen[2:].tolist() == [[0, 1, 2, 3]] * 3
    assert np.isnan(shares[2:]).all() and np.isfinite(shares[:2]).all()


def reference_routes(logits, top_k, kept, correction, groups, groups_kept, factor, normalize, groups_best):
    """In float64, of sigmoids: the chosen ones and their shares."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = scores + correction
    chosen, shares = [], []
    for row, own in zip(choice, scores):
        size = len(row) // groups
        best = np.sort(row.reshape(groups, size), -1)[:, ::-1][:, :groups_best].sum(-1)
        groups_in = np.argsort(-best, kind="stable")[:groups_kept]
        allowed = [e for e in np.argsort(-row, kind="stable") if e // size in groups_in][:kept]
        others = [e for e in np.argsort(-row, kind="stable") if e not in allowed][:top_k - kept]
        share = own[allowed] / (own[allowed].sum() if normalize else 1) * factor
        chosen.append(allowed + others)
        shares.append([*share, *[0] * len(others)])
    return np.array(chosen), np.array(shares)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("groups_best", [1, 2])
@pytest.mark.parametrize("experts, groups, groups_kept, top_k, kept", [(64, 8, 3, 6, 6), (16, 4, 1, 5, 2), (12, 1, 1, 3, 3), (32, 32, 6, 4, 4)])
def test_route_by_groups(cuda, dtype, experts, groups, groups_kept, top_k, kept, groups_best):
    """DeepSeek-V3's: sigmoids, a correction where experts are chosen, groups by their two best (V2: by the best), a factor; and experts who
    only look on."""
    rng = np.random.default_rng(1)
    logits, correction = values(rng, 9, experts, dtype=dtype.type), (0.3 * rng.standard_normal(experts)).astype(np.float32)
    d_shares, d_logits = values(rng, 9, top_k), np.full((9, experts), 5, np.float32)
    for normalize in (0, 1):
        wanted, wanted_shares = reference_routes(logits, top_k, kept, correction, groups, groups_kept, 2.5, normalize, groups_best)
        chosen, shares = np.full((9, top_k), 77, np.int32), np.full((9, top_k), 77, np.float32)
        job = dict(logits=logits, top_k=top_k, kept=kept, normalize=normalize, sigmoid=1, correction=correction, groups=groups,
                   groups_kept=groups_kept, groups_best=groups_best, factor=2.5, experts=chosen, shares=shares)
        cuda.run("route", **job)
        np.testing.assert_array_equal(chosen, wanted)
        np.testing.assert_allclose(shares, wanted_shares, rtol=2e-6)
        if kept < top_k:
            continue
        cuda.run("route_backward", "route", **dict(job, d_shares=d_shares, d_logits=d_logits))
        x = logits.astype(np.float64)
        p, slope = 1 / (1 + np.exp(-x)), np.exp(-x) / (1 + np.exp(-x)) ** 2
        picked = np.take_along_axis(p, wanted, -1)
        total = picked.sum(-1, keepdims=True) if normalize else 1
        mean = (d_shares * picked / total).sum(-1, keepdims=True) if normalize else 0
        exact = np.zeros_like(p)
        np.put_along_axis(exact, wanted, 2.5 * (d_shares - mean) / total, -1)
        assert np.abs(d_logits - exact * slope).max() <= 5e-6 * np.abs(d_shares).max() / np.min(total)


@pytest.mark.parametrize("rows, top_k, experts", [(1, 1, 1), (700, 2, 8), (900, 8, 128), (515, 4, 700), (0, 2, 5)])
def test_dispatch(cuda, rows, top_k, experts):
    rng = np.random.default_rng(1)
    chosen = np.argsort(rng.random((rows, experts)), -1)[:, :top_k].astype(np.int32) if experts < 200 else \
        (rng.integers(0, experts - top_k, (rows, 1)) + np.arange(top_k)).astype(np.int32)
    if experts == 8:
        chosen[chosen == 3] = 5             # nobody's expert; one that a row chose twice
    shares, flat = rng.random((rows, top_k)).astype(np.float32), chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    for mask in (None, (rng.random(rows) < 0.5).astype(np.uint8)):
        start, counted = np.full(experts + 1, 9, np.int64), np.full(experts, 9, np.int64)
        tokens, sorted_shares = np.full(rows * top_k, 9, np.int64), np.zeros(rows * top_k, np.float32)
        cuda.run("dispatch", chosen=chosen, chosen_shares=shares, mask=mask, rows=rows, top_k=top_k, experts=experts, start=start,
                 tokens=tokens, shares=sorted_shares, counted=counted)
        np.testing.assert_array_equal(start, np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=experts))]))
        np.testing.assert_array_equal(tokens, order // top_k)
        np.testing.assert_array_equal(sorted_shares, shares.reshape(-1)[order])
        kept = flat if mask is None else flat[np.repeat(mask, top_k) != 0]
        np.testing.assert_array_equal(counted, np.bincount(kept, minlength=experts))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_scatter(cuda, dtype):
    rng = np.random.default_rng(2)
    for width in (1, 8, 70, 2500):
        index, shares = np.array([5, 0, 2, 6]), rng.random(4, np.float32)
        for x in (values(rng, 4, width, dtype=dtype.type), strided(values(rng, 4, width, dtype=dtype.type))):
            start = values(rng, 7, width, dtype=dtype.type)
            weighted = (x.astype(np.float32) * shares[:, None]).astype(dtype)
            shares[2] = 0                       # an expert who only looks on
            x[2, 0] = np.nan
            weighted[2], start[2] = 0, 1
            for given, added in ((shares, weighted), (None, np.where(np.isnan(x), 3, x).astype(dtype))):
                if given is None:
                    x[2, 0] = 3
                wanted, found = start.copy(), start.copy()
                wanted[index] = (start[index].astype(np.float32) + added.astype(np.float32)).astype(dtype)
                cuda.run("scatter", x=x, y=found, index=index, shares=given)
                same(found, wanted)
            d_out, d_in, d_shares = values(rng, 7, width), np.empty((4, width), np.float32), np.empty(4, np.float32)
            cuda.run("scatter_backward", "scatter", x=x, index=index, shares=shares, d_out=d_out, d_in=d_in, d_shares=d_shares)
            np.testing.assert_array_equal(d_in, shares[:, None] * d_out[index])
            products = d_out[index].astype(np.float64) * x.astype(np.float64)
            close(d_shares, products.sum(-1), F32, np.abs(products).sum(-1))


# ---- embeddings ----

@pytest.mark.parametrize("rows, width, tokens", [(1, 1, 1), (20, 9, 6), (300, 8, 7), (600, 20, 400)] if not SANITIZED else [(300, 8, 7)])
def test_embed_backward(cuda, testing, rows, width, tokens):
    """Bit for bit: rows are added in their order."""
    rng = np.random.default_rng(3)
    ids, d_out = rng.integers(0, tokens, rows).astype(np.int32), values(rng, rows, width)
    found, wanted = (np.ones((tokens + 1, width), np.float32) for _ in range(2))
    testing.backward_op("embed", (wanted, d_out, ids))
    cuda.run("embed_backward", "embed", d_weight=found, d_out=d_out, ids=ids, rows=rows, width=width)
    same(found, wanted)


# ---- the loss ----

def losses_of(cuda, logits, labels, cuts):
    """State and losses; columns come in slices that end at cuts."""
    state, losses = np.full(len(logits), 7, LOSS_ROW), np.full(len(logits), 7.0)
    for first, end in zip([0, *cuts], [*cuts, logits.shape[1]]):
        cuda.run("loss", logits=logits[:, first:end], labels=labels, first=first, state=state)
    cuda.run("loss_finish", "loss", logits=logits, labels=labels, state=state, losses=losses)
    return state, losses


@pytest.mark.parametrize("columns, cuts", [(1, []), (23, [11]), (5000, []), (5000, [8, 2600])])
def test_loss(cuda, columns, cuts):
    rng = np.random.default_rng(4)
    logits, labels = values(rng, 5, columns) * 3, np.int32([0, columns - 1, -1, columns // 2, columns // 3])
    factors, exact = np.float32([0.25, 0.5, 7, 0.25, 1]), logits.astype(np.float64)
    top = exact.max(-1, keepdims=True)
    sums = np.exp(exact - top).sum(-1)
    wanted = np.where(labels < 0, 0, np.log(sums) + top[:, 0] - exact[np.arange(5), labels])
    gradient = np.exp(exact - top) / sums[:, None]
    gradient[np.arange(5), labels] -= 1
    gradient *= np.where(labels < 0, 0, factors)[:, None]
    for x in (logits, strided(logits)):
        state, losses = losses_of(cuda, x, labels, cuts)
        np.testing.assert_allclose(losses, wanted, rtol=2e-7, atol=4e-7)
        found = np.full_like(logits, 3)
        narrow = np.full(logits.shape, 3, BF16)
        for first, end in zip([0, *cuts], [*cuts, columns]):
            for to in (found, narrow):
                cuda.run("loss_backward", "loss", logits=x[:, first:end], labels=labels, first=first, state=state, factors=factors,
                         gradient=to[:, first:end])
        assert np.all(np.abs(found - gradient) <= 1e-6 * (np.abs(gradient) + factors[:, None] * 0.1) + 1e-30)
        same(narrow, found.astype(BF16))
        assert not found[2].any()
        at_once = x.copy()
        cuda.run("loss_backward", "loss", logits=at_once, labels=labels, first=0, state=state, factors=factors, gradient=at_once)
        same(at_once, found)


def test_loss_far_out(cuda):
    """Slices that rise and fall by more than exp can hold; a slice that is all minus infinity; NaN."""
    logits = np.float32([[-1000] * 8 + [1000] * 8 + [0] * 8, [5] * 8 + [-np.inf] * 8 + [5] * 8, [-np.inf] * 8 + [1] * 16,
                         [1] * 20 + [np.nan] * 4])
    labels = np.int32([9, 0, 9, 0])
    _, losses = losses_of(cuda, logits, labels, [8, 16])
    np.testing.assert_allclose(losses[:3], np.log([8, 16, 16]), rtol=1e-6)
    assert np.isnan(losses[3])


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_score(cuda, dtype):
    rng = np.random.default_rng(5)
    for width in (1, 70, 2500):
        made, was, gradient = values(rng, 4, width, dtype=dtype.type), values(rng, 4, width, dtype=dtype.type), values(rng, 4, width)
        gradient[0, 0] = 1e20
        for given in (was, None):
            change = made if given is None else (made.astype(np.float32) - was.astype(np.float32)).astype(dtype)
            products = np.clip((change.astype(np.float32) * gradient).astype(np.float64), -1e10, 1e10) ** 2
            for view in (made, strided(made)):
                sums = np.zeros(4)
                cuda.run("score", gradient=gradient, made=view, sums=sums, **({} if given is None else {"was": given}))
                np.testing.assert_allclose(sums, products.sum(-1), rtol=1e-12)


def test_what_is_refused(unordered):
    x = np.ones((3, 40), np.float32)
    for function, struct, fields, text in (
            ("route", None, dict(logits=x, top_k=41), "41 of 40 experts"), ("route", None, dict(logits=x, top_k=0), "0 of 40 experts"),
            ("route", None, dict(logits=x, top_k=8, groups=3, groups_kept=1), "1 of 3 groups of 40"),
            ("route", None, dict(logits=x, top_k=9, groups=5, groups_kept=1), "of which 9 of 9 are kept"),
            ("dispatch", None, dict(rows=3, top_k=2, experts=5000), "among 5000 experts"),
            ("scatter", None, dict(x=x, y=x.astype(BF16), index=np.arange(3)), "y of x's dtype"),
            ("scatter_backward", "scatter", dict(x=x), "needs index, shares"),
            ("loss", None, dict(logits=x.astype(BF16)), "logits: expected float32"),
            ("loss_backward", "loss", dict(logits=x, gradient=x[:, :39]), r"expected \[3, 40\]")):
        with pytest.raises(CudaError, match=text):
            unordered.run(function, struct, **fields)
