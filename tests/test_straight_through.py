"""The gradient of a quantizer: straight through, but nothing where rounding clipped."""
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq._core as core

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@given(rows=st.integers(0, 9), columns=st.integers(1, 70), grain=st.sampled_from(["tensor", "row", "column", "block", "tile"]),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_every_grain(rows, columns, grain, dtype, seed):
    """|x| <= amax of its tensor, row, column, block of 16 columns or tile of 4 x 16; partial blocks at the edges; NaN passes nothing."""
    rng = np.random.default_rng(seed)
    x, gradient = (rng.standard_normal((rows, columns)).astype(dtype) for _ in range(2))
    if x.size:
        x.reshape(-1)[seed % x.size] = [np.nan, np.inf, -0.0, 1e-40][seed % 4]
    blocks = {"tensor": (rows, columns), "row": (1, columns), "column": (rows, 1), "block": (1, 16), "tile": (4, 16)}[grain]
    counts = [-(-length // max(1, size)) if rows else 0 for length, size in zip((rows, columns), blocks)]
    amax = rng.uniform(0.2, 2, counts if grain != "tensor" else ()).astype(np.float32)
    options = {"tensor": {}, "row": {"axis": 0}, "column": {"axis": -1}, "block": {"block_sizes": {-1: 16}},
               "tile": {"block_sizes": {-1: 16, -2: 4}}}[grain]
    quantizer = core.Quantizer(num_bits=8 if grain != "tile" else (4, 3), **options)
    if amax.size:
        quantizer.amax = amax.reshape(-1) if grain in ("row", "column") else amax
    limit = np.broadcast_to(amax, (rows, columns)) if grain == "tensor" else amax.repeat(blocks[0], 0)[:rows].repeat(blocks[1], 1)[:, :columns]
    made = core.straight_through(quantizer, x, gradient)
    assert made.dtype == dtype and made.shape == x.shape
    if amax.size:
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(made, np.where(np.abs(x.astype(np.float32)) <= limit, gradient, 0).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_rotation_bias(dtype):
    """What comes before rounding is undone by the chain rule; the mask looks at what is rounded."""
    rng = np.random.default_rng(0)
    x, gradient = (rng.standard_normal((5, 2304)).astype(dtype) for _ in range(2))     # more than a piece of 1024 columns
    quantizer, scale = core.Quantizer(num_bits=8), rng.uniform(0.5, 2, 2304).astype(np.float32)
    quantizer.amax, quantizer.pre_quant_scale, quantizer.rotate = np.float32(1), scale, 256
    tolerance = {np.float32: 1e-5, np.float16: 5e-3}.get(dtype, 4e-2)
    turn = np.kron(np.eye(9), hadamard(256))
    rounded = ((x.astype(np.float64) * scale).astype(dtype).astype(np.float64) @ turn).astype(dtype).astype(np.float64)
    mask = np.abs(rounded) <= 1
    expected = (np.where(mask, gradient.astype(np.float64), 0) @ turn) * scale
    clear = (np.abs(np.abs(rounded) - 1) > 0.02).reshape(5, 9, 256).all(-1).repeat(256, 1)      # another last bit crosses no limit there
    found = core.straight_through(quantizer, x, gradient).astype(np.float64)
    np.testing.assert_allclose(found[clear], expected[clear], atol=tolerance * 4, rtol=tolerance)
    quantizer.enabled = False       # nothing is clipped then
    np.testing.assert_allclose(core.straight_through(quantizer, x, gradient).astype(np.float64), (gradient.astype(np.float64) @ turn) * scale,
                               atol=tolerance * 4, rtol=tolerance)
    biased = core.Quantizer(num_bits=(4, 3))
    biased.amax, biased.bias = np.float32(1), np.full(2304, 0.5, np.float32)
    centre = (x.astype(np.float32) - np.float32(0.5)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(core.straight_through(biased, x, gradient), np.where(np.abs(centre) <= 1, gradient, 0).astype(dtype))


def test_any_layout_and_what_is_refused():
    rng = np.random.default_rng(1)
    x, gradient = rng.standard_normal((2, 6, 40)).astype(np.float32), rng.standard_normal((2, 6, 40)).astype(np.float32)
    quantizer = core.Quantizer(num_bits=8)
    np.testing.assert_array_equal(core.straight_through(quantizer, x, gradient), gradient)      # no amax: nothing is clipped
    quantizer.amax = np.float32(0.7)
    views = [(a.transpose(1, 0, 2), b.transpose(1, 0, 2)) for a, b in [(x, gradient)]] + [(x[:, ::2, ::-1], gradient[:, ::2, ::-1])]
    for a, b in views:
        np.testing.assert_array_equal(core.straight_through(quantizer, a, b), np.where(np.abs(a) <= np.float32(0.7), b, 0))
    frozen = gradient.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(core.straight_through(quantizer, x, frozen), np.where(np.abs(x) <= np.float32(0.7), gradient, 0))
    for a, b, error, words in [(x, gradient[:1], ValueError, "expected a gradient like x"), (x, gradient.astype(np.float16), ValueError, "like x"),
                               (x.astype(np.float64), gradient.astype(np.float64), TypeError, "float32, bfloat16 or float16"),
                               (x, None, TypeError, "gradient")]:
        with pytest.raises(error, match=words):
            core.straight_through(quantizer, a, b)
    by_column = core.Quantizer(num_bits=8, axis=-1)
    by_column.amax = np.ones(7, np.float32)
    with pytest.raises(ValueError, match="7 values"):
        core.straight_through(by_column, x, gradient)
    with pytest.raises(TypeError, match="Quantizer"):
        core.straight_through(None, x, gradient)
