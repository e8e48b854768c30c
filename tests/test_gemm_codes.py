"""Products with quantized weights that stay codes: the bits of products with the dequantized matrix, or sums of the same terms."""
import itertools

import ml_dtypes
import numpy as np
import pytest
from test_gemm import BF16_UNIT, F32_UNIT, kernel  # noqa: F401  (a fixture)

import modelq._core as core

BF16 = ml_dtypes.bfloat16
DTYPES = {"float32": np.float32, "bfloat16": BF16, "float16": np.float32}
# Rows of weights that no panel ends with, columns that no chunk of 64 does; all block lengths of 16 and 32 fit into them.
SHAPES = [(2, 32), (34, 96), (70, 320), (130, 1056)]
SCHEMES = sorted(core.schemes())


def block_size(scheme):
    """INT4's own 128 divides none of the shapes' columns."""
    return 32 if scheme == "int4" else None


def weights(scheme, rows, columns, dtype, seed=0):
    """(parts, the matrix that they stand for as products take it)."""
    w = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    w[:, ::7] *= np.exp2(np.random.default_rng(1).integers(-12, 1, (rows, 1)))      # subnormal codes too, and scales of all sizes
    parts = core.quantize(w, scheme, block_size=block_size(scheme))
    return parts, core.dequantize(parts, scheme, dtype=dtype, block_size=block_size(scheme)).astype(DTYPES[dtype])


def multiplied(testing, bf16, a, parts, scheme, dtype, out=np.float32):
    rows = parts["weight"].shape[0] * (2 if scheme == "int4" else 1)
    c = np.full((len(a), rows), np.nan, out)
    finite = testing.gemm_codes(bf16, a, parts, scheme, dtype, c, block_size=block_size(scheme))[3]
    assert finite
    return c


def inputs(m, columns, dtype=np.float32):
    return np.random.default_rng(m).standard_normal((m, columns), dtype=np.float32).astype(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_rows_have_the_bits_of_numbers(testing, kernel, scheme):  # noqa: F811
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        parts, w = weights(scheme, rows, columns, dtype)
        for m, out in ((9, np.float32), (40, BF16)):
            a, expected = inputs(m, columns, BF16 if m == 40 else np.float32), np.zeros((m, rows), out)
            testing.gemm(kernel[0], a, w, expected)
            assert np.array_equal(multiplied(testing, kernel[0], a, parts, scheme, dtype, out), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_rows_are_within_rounding_of_the_sum(testing, kernel, scheme):  # noqa: F811
    """Against float64, by test_gemm's bound: every number is the dequantized one, or a sum would be off by more."""
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        parts, w = weights(scheme, rows, columns, dtype)
        exact_w = (w.astype(BF16) if kernel[0] else w).astype(np.float64)
        for m in (1, 2, 3, 8):
            a = inputs(m, columns)
            exact_a = (a.astype(BF16) if kernel[0] else a).astype(np.float64)
            exact, size = exact_a @ exact_w.T, abs(exact_a) @ abs(exact_w.T)
            error = abs(multiplied(testing, kernel[0], a, parts, scheme, dtype).astype(np.float64) - exact)
            assert (error <= 1.01 * (columns + 4) * F32_UNIT * size).all()


@pytest.mark.parametrize("scheme", ["nvfp4", "int4", "fp8", "int8", "mxfp8"])
def test_a_row_is_the_same_among_others_and_for_any_threads(testing, kernel, scheme):  # noqa: F811
    parts, _ = weights(scheme, 2050, 160, "bfloat16")
    a = inputs(8, 160)
    whole = multiplied(testing, kernel[0], a, parts, scheme, "bfloat16")
    for first, m in ((0, 1), (2, 1), (1, 2), (3, 3), (1, 5), (0, 7)):
        assert np.array_equal(multiplied(testing, kernel[0], a[first:first + m], parts, scheme, "bfloat16"), whole[first:first + m])
    testing.pool_threads(3)
    try:
        assert np.array_equal(multiplied(testing, kernel[0], a, parts, scheme, "bfloat16"), whole)
        assert np.array_equal(multiplied(testing, kernel[0], a[:1], parts, scheme, "bfloat16"), whole[:1])
    finally:
        testing.pool_threads(1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_kernels_take_the_same_numbers(testing, scheme, bf16):
    """One row of the identity reads a column of numbers exactly, whatever the order of sums."""
    columns = 96
    for dtype in DTYPES:
        parts, w = weights(scheme, 34, columns, dtype)
        expected = w.astype(BF16).astype(np.float32) if bf16 else w
        for name in ("c", "avx2", "avx512") + ("avx512_bf16", "amx") * bf16:
            try:
                testing.force_kernel(bf16, name)
            except ValueError:
                continue
            found = np.concatenate([multiplied(testing, bf16, row, parts, scheme, dtype)
                                    for row in np.split(np.eye(columns, dtype=np.float32), columns // 8)])
            assert np.array_equal(found.T, expected), name
    testing.force_kernel(bf16, None)


@pytest.mark.parametrize("scheme, per_weight", [("nvfp4", 0.5625), ("int4", 0.53125), ("fp8", 1), ("int8", 1), ("mxfp8", 1.03125)])
def test_it_is_as_small_as_the_export(testing, scheme, per_weight):
    w = np.random.default_rng(0).standard_normal((512, 1024), dtype=np.float32)
    parts, c = core.quantize(w, scheme), np.zeros((1, 512), np.float32)
    nbytes = testing.gemm_codes(True, inputs(1, 1024), parts, scheme, "bfloat16", c)[2]
    assert nbytes < per_weight * w.size + 20000      # scales per row, the table of a scale's numbers


@pytest.mark.parametrize("scheme, role, code", [("fp8", "weight", 0x7f), ("mxfp8_e5m2", "weight", 0xfd), ("mxfp8_e5m2", "weight", 0x7c),
                                                ("nvfp4", "weight_scale", 0x7f), ("mxfp4", "weight_scale", 0xff),
                                                ("mxint8", "weight_scale", 0xff), ("fp8", "weight_scale", np.inf), ("int8", "weight_scale", np.nan)])
def test_what_is_not_finite_is_seen(testing, kernel, scheme, role, code):  # noqa: F811
    parts = {name: np.array(part) for name, part in weights(scheme, 34, 96, "bfloat16")[0].items()}
    for name in parts:
        if parts[name].dtype.itemsize == 1:
            parts[name] = parts[name].view(np.uint8)
    parts[role][(-1,) * parts[role].ndim] = code
    assert not testing.gemm_codes(kernel[0], inputs(1, 96), parts, scheme, "bfloat16", np.zeros((1, 34), np.float32))[3]


def test_the_order_of_few_rows_costs_no_precision(testing):
    """bfloat16 out: one rounding more than float32's."""
    parts, w = weights("nvfp4", 70, 320, "bfloat16")
    a = inputs(3, 320, BF16)
    exact = a.astype(np.float64) @ w.astype(np.float64).T
    size = abs(a.astype(np.float64)) @ abs(w.astype(np.float64)).T
    error = abs(multiplied(testing, True, a, parts, "nvfp4", "bfloat16", BF16).astype(np.float64) - exact)
    assert (error <= 1.01 * 324 * F32_UNIT * size + BF16_UNIT * abs(exact)).all()
