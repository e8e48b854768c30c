"""The matrix product against float64, for every micro-kernel that this processor has."""
import itertools

import ml_dtypes
import numpy as np
import pytest

BF16 = ml_dtypes.bfloat16
KERNELS = [(False, "c"), (False, "avx2"), (False, "avx512"),
           (True, "c"), (True, "avx2"), (True, "avx512"), (True, "avx512_bf16"), (True, "amx")]
F32_UNIT = 2.0 ** -24    # unit roundoff of float32
BF16_UNIT = 2.0 ** -8    # of bfloat16


@pytest.fixture(params=KERNELS, ids=lambda case: f"{'bf16' if case[0] else 'f32'}-{case[1]}")
def kernel(request, testing):
    """(bf16, name) with that micro-kernel in use."""
    bf16, name = request.param
    try:
        testing.force_kernel(bf16, name)
    except ValueError:
        pytest.skip(f"this processor has no {name}")
    yield request.param
    testing.force_kernel(bf16, None)


def matrix(rng, rows, columns, dtype=np.float32):
    return rng.standard_normal((rows, columns), dtype=np.float32).astype(dtype)


def product(testing, bf16, a, w, *, out=np.float32, c=None, **options):
    """What the kernel computes, and what float64 does with an error bound for each element.

    The bound: K products and sums in float32, in any order, err by at most (K + 4) units on the sum of |a| |w| (Higham 2002,
    section 3.1); the kernel's scaling, bias and accumulation are four more operations; storing bfloat16 adds one rounding.
    """
    n = w.shape[1] if options.get("transposed") else w.shape[0]
    start = np.zeros((len(a), n), out) if c is None else c
    result = start.copy()
    testing.gemm(bf16, a, w, result, **options)
    exact_a, exact_w = (x.astype(BF16).astype(np.float64) if bf16 else x.astype(np.float64) for x in (a, w))
    exact_w = exact_w if options.get("transposed") else exact_w.T
    alpha, bias = float(np.float32(options.get("alpha", 1.0))), options.get("bias")
    exact, size = alpha * (exact_a @ exact_w), abs(alpha) * (abs(exact_a) @ abs(exact_w))
    for term in ([] if bias is None else [bias]) + ([start] if options.get("accumulate") else []):
        exact, size = exact + term.astype(np.float64), size + abs(term.astype(np.float64))
    bound = (a.shape[1] + 4) * F32_UNIT * size * 1.01
    if out is not np.float32:
        bound += BF16_UNIT * (abs(exact) + bound)
    return result, exact, bound


def check(*args, **options):
    result, exact, bound = product(*args, **options)
    assert result.shape == exact.shape
    assert (abs(result.astype(np.float64) - exact) <= bound).all()
    return result


SMALL = [1, 2, 3, 5, 7, 14, 15, 16, 17, 31, 32, 33, 63, 65, 70]


def test_small_shapes(testing, kernel):
    rng = np.random.default_rng(1)
    for m, n, k in itertools.chain(itertools.product([1, 3, 15, 33], [1, 16, 31, 65], SMALL), zip(SMALL, SMALL[::-1], SMALL[3:])):
        check(testing, kernel[0], matrix(rng, m, k), matrix(rng, n, k))


@pytest.mark.parametrize("m, n, k", [(127, 129, 511), (129, 127, 513), (126, 128, 1025), (257, 160, 576), (1, 300, 1536), (130, 33, 2050)])
def test_around_the_blocks(testing, kernel, m, n, k):
    rng = np.random.default_rng(2)
    for dtype in (np.float32, BF16):
        check(testing, kernel[0], matrix(rng, m, k, dtype), matrix(rng, n, k, dtype))


@pytest.mark.parametrize("a_dtype, w_dtype, out", list(itertools.product([np.float32, BF16], repeat=3)))
def test_types_and_epilogue(testing, kernel, a_dtype, w_dtype, out):
    rng = np.random.default_rng(3)
    for m, n, k in [(5, 33, 64), (37, 47, 65), (32, 64, 576)]:
        a, w, bias = matrix(rng, m, k, a_dtype), matrix(rng, n, k, w_dtype), rng.standard_normal(n, dtype=np.float32)
        check(testing, kernel[0], a, w, out=out, alpha=0.3)
        check(testing, kernel[0], a, w, out=out, bias=bias)
        check(testing, kernel[0], a, w, out=out, bias=bias, alpha=-2.5, accumulate=True, c=matrix(rng, m, n, out))


def test_transposed(testing, kernel):
    rng = np.random.default_rng(4)
    for m, n, k in [(1, 1, 1), (3, 64, 7), (17, 31, 33), (64, 65, 128), (33, 128, 600)]:
        for dtype in (np.float32, BF16):
            check(testing, kernel[0], matrix(rng, m, k), matrix(rng, k, n, dtype), transposed=True)


def test_strides_and_guards(testing, kernel):
    """Only the wanted rows and columns are read and written: what lies between is NaN, and stays what it was."""
    rng = np.random.default_rng(5)
    for dtype, (m, n, k) in itertools.product([np.float32, BF16], [(3, 5, 7), (31, 33, 34), (65, 40, 96)]):
        wide = [np.full((rows + 2, columns + 5), np.nan, dtype) for rows, columns in ((m, k), (n, k), (m, n))]
        a, w, c = (x[1:-1, 2:-3] for x in wide)
        a[:], w[:] = matrix(rng, m, k, dtype), matrix(rng, n, k, dtype)
        testing.gemm(kernel[0], a, w, c)
        assert np.isnan(wide[2]).sum() == wide[2].size - c.size
        expected = np.zeros((m, n), dtype)
        testing.gemm(kernel[0], a.copy(), w.copy(), expected)
        assert (c == expected).all()


def test_unaligned(testing, kernel):
    """Operands as they lie in a mapped file whose header has an odd length."""
    rng = np.random.default_rng(9)
    for dtype in (np.float32, BF16):
        size = np.dtype(dtype).itemsize
        a, w = (np.frombuffer(b"x" + matrix(rng, rows, 96, dtype).tobytes(), np.uint8)[1:].view(dtype).reshape(rows, 96) for rows in (32, 40))
        assert a.ctypes.data % size and w.ctypes.data % size
        check(testing, kernel[0], a, w)


def test_empty(testing, kernel):
    bias = np.arange(5, dtype=np.float32)
    for m, n in [(0, 5), (4, 0)]:
        testing.gemm(kernel[0], np.ones((m, 3), np.float32), np.ones((n, 3), np.float32), np.ones((m, n), np.float32))
    c = np.ones((4, 5), np.float32)
    testing.gemm(kernel[0], np.ones((4, 0), np.float32), np.ones((5, 0), np.float32), c, bias=bias, accumulate=True)
    assert (c == 1 + bias).all()


def test_nan_and_infinity_stay_in_their_rows(testing, kernel):
    rng = np.random.default_rng(6)
    a, w = matrix(rng, 40, 65), matrix(rng, 33, 65)
    a[7, 64], a[20, 0], w[32, 3] = np.nan, np.inf, np.nan
    c = np.zeros((40, 33), np.float32)
    testing.gemm(kernel[0], a, w, c)
    expected = np.isin(np.arange(40), [7])[:, None] | (np.arange(33) == 32)
    assert (np.isnan(c) == expected).all()
    assert np.isinf(c[20, :32]).all()


def test_same_bits_for_threads_and_cuts(testing, kernel):
    rng = np.random.default_rng(7)
    a, w = matrix(rng, 300, 1100), matrix(rng, 270, 1100)
    results = []
    for threads in (1, 2, 3):
        testing.pool_threads(threads)
        results.append(np.zeros((300, 270), np.float32))
        testing.gemm(kernel[0], a, w, results[-1])
    testing.pool_threads(0)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
    for rows in (slice(0, 1), slice(3, 8), slice(100, 299)):
        part = np.zeros((rows.stop - rows.start, 270), np.float32)
        testing.gemm(kernel[0], a[rows], w, part)
        assert (part == results[0][rows]).all()


def test_rounds_to_bfloat16_as_ml_dtypes(testing, kernel):
    """Identity times every bfloat16 tie and neighbour, in and out."""
    values = (np.arange(1 << 15, dtype=np.uint32) << 17 | 0x8000).view(np.float32)
    values = values[np.isfinite(values)]
    values = np.concatenate([values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(np.inf))])
    values = values[np.isfinite(values) & (abs(values) > 1e-37) & (abs(values) < 3e38)]
    values = values[: len(values) // 64 * 64].reshape(-1, 64)
    c = np.zeros(values.shape, BF16)
    testing.gemm(kernel[0], values, np.eye(64, dtype=np.float32), c)
    assert (c == values.astype(BF16)).all()


def test_unknown_kernel(testing):
    with pytest.raises(ValueError):
        testing.force_kernel(False, "amx")
    with pytest.raises(ValueError):
        testing.force_kernel(True, "nothing")
