"""Factors of Gram matrices, and rounding by them, against LAPACK and the algorithm as published (Frantar et al. 2023, algorithm 1)."""
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq._core as core
from test_search import BF16, F32, F64, gram, inputs, weights

STATIC_NVFP4 = {-1: 16, "type": "static", "scale_bits": (4, 3)}
KINDS = {"int4 blocks": dict(num_bits=4, block_sizes={-1: 16}), "int8 rows": dict(num_bits=8, axis=0), "fp8": dict(num_bits=(4, 3)),
         "nvfp4": dict(num_bits=(2, 1), block_sizes=STATIC_NVFP4)}


def damped(x, share=0.01):
    h = gram(x)
    return h + np.eye(len(h), dtype=F32) * F32(share * np.diag(h).mean())


def quantizer_of(kind, weight):
    quantizer, options = core.Quantizer(**KINDS[kind]), KINDS[kind]
    blocks = options.get("block_sizes")
    quantizer.amax = core.amax(weight, block=blocks[-1]) if blocks else core.amax(weight, axis=options.get("axis"))
    if kind == "nvfp4":
        quantizer.global_amax = quantizer.amax.max()
    return quantizer


def gptq(weight, quantizer, h, order=None, **options):
    factor = h.copy() if order is None else np.ascontiguousarray(h[order][:, order])
    curvature = core.factor(factor)
    return core.gptq(weight, quantizer, factor, curvature, order, **options)


def as_published(weight, quantizer, h, order):
    """Column by column with the Cholesky factor of the whole inverse, in float64; a column is rounded with the others beside it."""
    w = weight.astype(F64)
    rows = np.linalg.cholesky(np.linalg.inv(h.astype(F64)[order][:, order])).T
    result = np.zeros_like(w)
    for step, column in enumerate(order):
        result[:, column] = quantizer(w.astype(F32))[:, column]
        error = (w[:, column] - result[:, column]) / rows[step, step]
        w[:, order[step + 1:]] -= np.outer(error, rows[step, step + 1:])
    return result


def in_groups(weight, quantizer, factor, size):
    """By the factor in float64; the maxima of a group are those of its columns with the feedback of all columns before the group. (As
    published they would also have that of the group's own columns as they are before their rounding: that loses the same on average.)"""
    w, result = weight.astype(F64), np.zeros(weight.shape)
    for begin in range(0, w.shape[1], size):
        for column in range(begin, begin + size):
            target = w + (w - result)[:, :column] @ factor[:column].astype(F64)
            if column == begin:
                amax = np.array(quantizer.amax)
                amax[:, begin // size] = np.abs(target[:, begin:begin + size]).max(1)
                quantizer.amax = amax
            result[:, column] = quantizer(target.astype(F32))[:, column]
    return result


def loss(weight, made, h):
    change = weight.astype(F64) - made.astype(F64)
    return float((change @ h.astype(F64) * change).sum())


# Factors ----------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(0, 1000))
def test_factor_is_a_factor(n, seed):
    h = damped(inputs(2 * n + 5, n, seed))
    upper = h.copy()
    d = core.factor(upper)
    assert (d > 0).all()
    np.testing.assert_array_equal(np.tril(upper, -1), 0)
    np.testing.assert_array_equal(np.diag(upper), 1)
    product = upper.astype(F64) @ np.diag(d.astype(F64)) @ upper.T.astype(F64)
    assert np.abs(product - h).max() <= 2e-5 * np.abs(h).max()


def test_factor_gives_the_inverse_s_cholesky_factor():
    """What GPTQ asks for: rows of the upper factor of inv(H), over its diagonal, are those of inv(U)."""
    h = damped(inputs(400, 60))
    upper = h.copy()
    d = core.factor(upper)
    cholesky = np.linalg.cholesky(np.linalg.inv(h.astype(F64))).T
    np.testing.assert_allclose(d, np.diag(cholesky) ** -2.0, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.inv(upper.astype(F64)), cholesky / np.diag(cholesky)[:, None], atol=1e-3 * np.abs(cholesky).max())


@pytest.mark.parametrize("h, words", [
    (np.zeros((4, 4), F32), "positive definite"), (gram(inputs(3, 8)), "positive definite"), (-np.eye(3, dtype=F32), "positive definite"),
    (np.full((3, 3), np.nan, F32), "positive definite"), (np.diag(F32([1, np.inf, 1])), "positive definite"),
    (np.zeros((3, 4), F32), "square|\\[n, n\\]|3, 4"), (np.eye(3), "float32"), (np.eye(6, dtype=F32)[::2, ::2], "contiguous|float32")])
def test_what_has_no_factor(h, words):
    with pytest.raises((ValueError, TypeError), match=words):
        core.factor(h)


# Rounding ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_as_published(kind, by_size):
    """But for columns whose value is so near to the middle of two numbers that float32 decides otherwise; such a one changes those behind
    it in its row."""
    weight, h = weights(80, 96), damped(inputs(500, 96))
    quantizer = quantizer_of(kind, weight)
    order = np.argsort(-np.diag(h), kind="stable") if by_size else np.arange(96)
    made, amax, said = gptq(weight, quantizer, h, order if by_size else None)
    expected = as_published(weight, quantizer, h, order)
    assert np.mean(np.abs(made - expected) <= 1e-6) >= 0.99
    np.testing.assert_allclose(loss(weight, made, h), loss(weight, expected, h), rtol=5e-3)
    np.testing.assert_allclose(said, loss(weight, made, h), rtol=1e-3)
    np.testing.assert_array_equal(np.ravel(amax), np.ravel(quantizer.amax))
    assert np.mean(made == quantizer(weight)) < 0.95        # it did something
    assert said < 0.85 * loss(weight, quantizer(weight), h)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 30), st.integers(1, 9), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def test_any_shape(kind, rows, blocks, block_size, by_size, seed):
    """Results are numbers of the quantizer, lose what is said, and little more than rounding to nearest even where nothing helps."""
    columns = 16 * blocks
    weight, h = weights(rows, columns, seed), damped(inputs(3 * columns, columns, seed))
    quantizer = quantizer_of(kind, weight)
    order = np.random.default_rng(seed).permutation(columns) if by_size else None
    made, _, said = gptq(weight, quantizer, h, order, block_size=block_size)
    np.testing.assert_allclose(quantizer(made), made, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(said, loss(weight, made, h), rtol=1e-3, atol=1e-9)
    assert said <= 1.5 * loss(weight, quantizer(weight), h) + 1e-9


def test_more_columns_than_a_product_takes():
    weight, h = weights(3, 1100), damped(inputs(1500, 1100))
    quantizer = quantizer_of("int8 rows", weight)
    made, _, said = gptq(weight, quantizer, h, block_size=5000)
    np.testing.assert_allclose(quantizer(made), made, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(said, loss(weight, made, h), rtol=1e-3)
    assert said < 0.75 * loss(weight, quantizer(weight), h)


@pytest.mark.parametrize("columns", [7, 100])
def test_blocks_that_do_not_divide_the_columns(columns):
    weight, h = weights(9, columns), damped(inputs(300, columns))
    for kind in ("int4 blocks", "int8 rows", "fp8"):
        quantizer = quantizer_of(kind, weight)
        made, _, said = gptq(weight, quantizer, h, block_size=24)
        np.testing.assert_allclose(quantizer(made), made, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(said, loss(weight, made, h), rtol=1e-3)


def test_pieces_of_columns_change_next_to_nothing():
    weight, h = weights(40, 160), damped(inputs(500, 160))
    quantizer = quantizer_of("int4 blocks", weight)
    whole = gptq(weight, quantizer, h, block_size=160)[0]
    for size in (1, 16, 33, 128):
        assert np.mean(gptq(weight, quantizer, h, block_size=size)[0] == whole) >= 0.99


def test_without_dependence_it_is_rounding_to_nearest():
    weight = weights(20, 64)
    for kind in KINDS:
        quantizer = quantizer_of(kind, weight)
        made = gptq(weight, quantizer, np.diag(np.linspace(1, 9, 64, dtype=F32)))[0]
        np.testing.assert_allclose(made, quantizer(weight), rtol=1e-6)


@pytest.mark.parametrize("kind", ["int4 blocks", "nvfp4"])
def test_scales_made_when_their_turn_comes(kind):
    """amax says by which scales the result is on the grid; the first block's are those of the weight."""
    weight, h = weights(50, 96), damped(inputs(500, 96))
    quantizer = quantizer_of(kind, weight)
    made, amax, said = gptq(weight, quantizer, h, regroup=True)
    again = quantizer_of(kind, weight)
    core.factor(factor := h.copy())
    expected = in_groups(weight, again, factor, 16)
    assert np.mean(np.abs(made - expected) <= 1e-6) >= 0.98
    np.testing.assert_allclose(loss(weight, made, h), loss(weight, expected, h), rtol=1e-2)
    again.amax = np.reshape(amax, np.shape(quantizer.amax))
    np.testing.assert_allclose(again(made), made, rtol=1e-6, atol=1e-9)
    own = np.reshape(amax, (50, 6)), np.reshape(quantizer.amax, (50, 6))
    np.testing.assert_array_equal(own[0][:, 0], own[1][:, 0])
    assert not np.array_equal(own[0], own[1])
    np.testing.assert_allclose(said, loss(weight, made, h), rtol=1e-3)


@pytest.mark.parametrize("regroup", [False, True])
@pytest.mark.parametrize("kind", ["int4 blocks", "nvfp4"])
def test_groups_of_zeros_stay_zeros(kind, regroup):
    """What is fed to them has no scale to be rounded by, unless maxima are taken anew."""
    weight, h = weights(32, 64) * F32(1000), damped(inputs(300, 64))
    weight[:, 16:32] = 0
    quantizer = quantizer_of(kind, weight)
    made, amax, said = gptq(weight, quantizer, h, regroup=regroup)
    assert (made[:, 16:32] != 0).any() == regroup == (np.reshape(amax, (-1, 4))[:, 1] != 0).any()
    np.testing.assert_allclose(said, loss(weight, made, h), rtol=1e-3)
    assert said < loss(weight, quantizer(weight), h)


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_narrow_weights(dtype):
    weight, h = weights(30, 64).astype(dtype), damped(inputs(300, 64))
    quantizer = quantizer_of("int8 rows", weight)
    made, _, said = gptq(weight, quantizer, h)
    assert made.dtype == dtype
    np.testing.assert_allclose(said, loss(weight, made, h), rtol=0.25)      # before it is rounded to dtype
    wide = np.zeros((30, 128), dtype)
    wide[:, ::2] = weight
    np.testing.assert_array_equal(gptq(wide[:, ::2], quantizer, h)[0], made)


@pytest.mark.parametrize("options, words", [
    (dict(order=np.zeros(64, np.int64)), "order"), (dict(order=np.arange(63)), "order"), (dict(block_size=0), "block_size")])
def test_what_does_not_fit(options, words):
    weight, h = weights(4, 64), damped(inputs(200, 64))
    d = core.factor(h)
    with pytest.raises(ValueError, match=words):
        core.gptq(weight, quantizer_of("fp8", weight), h, d, **options)
    with pytest.raises(ValueError, match="factor|curvature"):
        core.gptq(weights(4, 48), quantizer_of("fp8", weight), h, d)
    dynamic = core.Quantizer(num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
    with pytest.raises(ValueError, match="INT4, INT8, FP8"):
        core.gptq(weight, dynamic, h, d)


def test_ml_dtypes_agrees_on_the_grid():
    """FP8 results are FP8 numbers times the scale."""
    weight, h = weights(10, 32), damped(inputs(200, 32))
    quantizer = quantizer_of("fp8", weight)
    scaled = gptq(weight, quantizer, h)[0] * (F32(448) / quantizer.amax)
    np.testing.assert_allclose(scaled.astype(ml_dtypes.float8_e4m3fn).astype(F32), scaled, rtol=1e-6)


# Products of low rank -----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 90), st.integers(1, 40), st.sampled_from([F32, BF16, np.float16]), st.integers(0, 99))
def test_subtract_product_of_any_shape(rows, columns, rank, dtype, seed):
    """Rounded once: half a unit in the last place, and what sums in float32 may be off by."""
    rng = np.random.default_rng(seed)
    weight, up, down = (rng.standard_normal(shape).astype(F32) for shape in ((rows, columns), (rows, rank), (rank, columns)))
    weight, down = weight.astype(dtype), np.asfortranarray(down)
    expected = weight.astype(F64) - up.astype(F64) @ down.astype(F64)
    made = core.subtract_product(weight, up, down)
    assert made.dtype == dtype
    np.testing.assert_allclose(made.astype(F64), expected, atol=1e-5, rtol=float(ml_dtypes.finfo(dtype).eps) / 2)
