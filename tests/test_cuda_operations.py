"""CUDA kernels of the runtime's operations on rows: norms, rope, SwiGLU, sums, conversions, what quantizers do before they round. Bit for
bit where the C operation adds in the same order, else against formulas in float64, within the bounds of the C operations' own tests."""
import numpy as np
import pytest

import modelq._core as core
from cuda_library import DTYPES, CudaError
from cuda_operations import SUM, SUM_MAGNITUDES, cuda, unordered  # noqa: F401 (fixtures)
from test_cuda_emulated import same, spoiled, strided
from test_ops import RELATIVE, values

F32, BF16, F16 = DTYPES
ACTIVATIONS = [F32, BF16]
# Within a group of columns, some lanes of a warp, a warp that goes round again, all of a block, and a block that does.
WIDTHS = [1, 7, 16, 72, 129, 576, 2500]


def close(got, wanted, dtype, scale=None):
    bound = RELATIVE[dtype.type] * (np.abs(wanted) if scale is None else scale) + 1e-30
    assert np.all(np.abs(got.astype(np.float64) - wanted) <= bound)


def both(x):
    """As it is, and where vectors cannot be loaded."""
    return x, strided(x)


# ---- rows and elements ----

@pytest.mark.parametrize("to", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_rows(cuda, source, to):
    rng = np.random.default_rng(0)
    for width in (1, 8, 70):
        for x in both(spoiled(values(rng, 9, width, dtype=source.type))):
            index = rng.integers(0, 9, 14)
            for options, wanted in ((dict(), x), (dict(index=index), x[index]), (dict(ids=index.astype(np.int32)), x[index]),
                                    (dict(repeat=3), np.repeat(x, 3, 0))):
                for y in both(np.zeros(wanted.shape, to)):
                    cuda.run("rows", x=x, y=y, **options)
                    with np.errstate(over="ignore"):
                        same(y, wanted.astype(np.float32).astype(to))


@pytest.mark.parametrize("to", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("source", ACTIVATIONS, ids=str)
def test_add(cuda, source, to):
    """One rounding of a sum of up to three numbers in float32."""
    rng = np.random.default_rng(1)
    for width in (1, 8, 70):
        bias, start = values(rng, width), values(rng, 5, width, dtype=to.type)
        for x in both(values(rng, 5, width, dtype=source.type)):
            for given in (None, bias):
                for accumulate in (0, 1):
                    wanted = x.astype(np.float32) + (np.float32(0) if given is None else given)
                    wanted = wanted + (start.astype(np.float32) if accumulate else np.float32(0))
                    for y in both(start.copy()):
                        cuda.run("add", x=x, y=y, bias=given, accumulate=accumulate)
                        same(y, wanted.astype(to))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_add_scaled(cuda, dtype):
    """Each step rounds to the dtype."""
    rng = np.random.default_rng(1)
    x, start, rows = values(rng, 5, 70, dtype=dtype.type), values(rng, 5, 70, dtype=dtype.type), values(rng, 5)
    for options, factor in ((dict(scale=0.3), np.float32(0.3)), (dict(row_scales=rows), rows[:, None])):
        scaled = (x.astype(np.float32) * factor).astype(dtype)
        for accumulate, wanted in ((0, scaled), (1, (start.astype(np.float32) + scaled.astype(np.float32)).astype(dtype))):
            y = start.copy()
            cuda.run("add", x=x, y=y, accumulate=accumulate, **options)
            same(y, wanted)
    cuda.run("add", x=x, y=x, scale=0.5)
    np.testing.assert_array_equal(np.isfinite(x.astype(np.float32)), True)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_sigmoid(cuda, dtype):
    rng = np.random.default_rng(1)
    x, factors, d_factors, d_x = values(rng, 300, 1, dtype=dtype.type), np.zeros(300, np.float32), values(rng, 300), np.zeros(300, np.float32)
    cuda.run("sigmoid", x=x, factors=factors)
    close(factors, 1 / (1 + np.exp(-x.astype(np.float64)[:, 0])), dtype)
    same(factors, factors.astype(dtype).astype(np.float32))
    cuda.run("sigmoid_backward", "sigmoid", x=x, factors=factors, d_factors=d_factors, d_x=d_x)
    same(d_x, d_factors * factors * (np.float32(1) - factors))


def test_softcap(cuda):
    rng = np.random.default_rng(1)
    for divisor, cap in ((0, 30), (8, 0), (4, 5), (0, 0)):
        x, d = values(rng, 3, 70) * 20, values(rng, 3, 70)
        exact, by, start = x.astype(np.float64), divisor or 1, d.astype(np.float64)
        tanh = np.tanh(exact / by / cap) if cap else 0
        cuda.run("softcap_backward", "softcap", x=x.copy(), gradient=d, divisor=divisor, cap=cap)
        assert np.all(np.abs(d - start * (1 - tanh ** 2) / by) <= 1e-6 * np.abs(start))
        cuda.run("softcap", x=x, divisor=divisor, cap=cap)
        close(x, cap * tanh if cap else exact / by, F32)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_cache_store(cuda, dtype):
    rng = np.random.default_rng(2)
    for head_dim in (5, 64):
        for x in both(values(rng, 7, 3 * head_dim, dtype=dtype.type)):
            cache = np.full((4, 3, 10, head_dim), 9, dtype)
            slots, positions = np.int32([0, 0, 0, 2, 2, 3, 3]), np.int32([4, 5, 6, 0, 1, 9, 8])
            wanted = cache.copy()
            wanted[slots, :, positions] = x.reshape(7, 3, head_dim)
            cuda.run("cache_store", "cache", x=x, cache=cache, heads=3, capacity=10, slot_stride=30 * head_dim, slots=slots,
                     positions=positions)
            same(cache, wanted)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_swiglu(cuda, dtype):
    rng = np.random.default_rng(3)
    for width in (1, 8, 131):
        for up in both(values(rng, 5, width, dtype=dtype.type)):
            gate = values(rng, 5, width, dtype=dtype.type) * dtype.type(4)
            gate.flat[0] = 0
            x, u, d_out = gate.astype(np.float64), up.astype(np.float64), values(rng, 5, width)
            s = 1 / (1 + np.exp(-x))
            for out in both(gate.copy()):
                cuda.run("swiglu", gate=out, up=up)
                close(out, x * s * u, dtype)
            d_gate, d_up = d_out.copy(), np.empty_like(d_out)
            cuda.run("swiglu_backward", "swiglu", gate=gate, up=up, d_gate=d_gate, d_up=d_up)
            close(d_up, d_out * x * s, F32, np.abs(d_out * x * s) + 1e-7)
            close(d_gate, d_out * u * s * (1 + x * (1 - s)), F32, np.abs(d_out * u) * s * (1 + np.abs(x * (1 - s))))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def clamped(gate, up, limit=3.0):
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return g / (1 + np.exp(-1.702 * g)) * (u + 1)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("activation, formula", [(1, lambda gate, up: gelu(gate) * up), (2, clamped)])
def test_other_activations(cuda, dtype, activation, formula):
    """GELU, gpt-oss's: against formulas and, for gradients, central differences of them."""
    rng = np.random.default_rng(3)
    gate, up, d_out = values(rng, 5, 131, dtype=dtype.type), values(rng, 5, 131, dtype=dtype.type), values(rng, 5, 131)
    gate[np.abs(gate.astype(np.float32) - 3) < 0.01] = 1        # no differences where a clamp begins
    up[np.abs(np.abs(up.astype(np.float32)) - 3) < 0.01] = 1
    x, y, step = gate.astype(np.float64), up.astype(np.float64), 1e-5
    size = (1 + np.abs(x)) * (2 + np.abs(y))
    d_gate, d_up = d_out.copy(), np.empty_like(d_out)
    job = dict(struct="swiglu", up=up, activation=activation, limit=3.0)
    cuda.run("swiglu_backward", gate=gate, d_gate=d_gate, d_up=d_up, **job)
    wanted = d_out * (formula(x + step, y) - formula(x - step, y)) / (2 * step), d_out * (formula(x, y + step) - formula(x, y - step)) / (2 * step)
    assert np.all(np.abs(d_gate - wanted[0]) <= 2e-6 * size * np.abs(d_out) + 1e-8)
    assert np.all(np.abs(d_up - wanted[1]) <= 2e-6 * size * np.abs(d_out) + 1e-8)
    cuda.run("swiglu", gate=gate, **job)
    close(gate, formula(x, y), dtype, np.abs(formula(x, y)) + 4e-7 / RELATIVE[dtype.type] * np.abs(x) * (1 + np.abs(y)))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_swiglu_far_out(cuda, dtype):
    """Large gates: x itself on the right, nothing on the left, NaN and infinities not hidden."""
    gate = np.array([[88, 1000, 3e38, -88, -1000, -3e38, np.inf, np.nan, -100.0]], dtype)
    wanted = gate.astype(np.float64)
    cuda.run("swiglu", gate=gate, up=np.ones_like(gate))
    result = gate.astype(np.float64)[0]
    np.testing.assert_array_equal(result[:3], wanted[0, :3])
    assert np.all(np.abs(result[[3, 4, 5, 8]]) < 1e-30) and np.isposinf(result[6]) and np.isnan(result[7])


# ---- norms and rope ----

@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_rmsnorm(cuda, dtype, heads):
    rng = np.random.default_rng(4)
    for width in WIDTHS:
        weight = values(rng, width)
        for x in both(values(rng, 5, heads * width, dtype=dtype.type)):
            exact = x.astype(np.float64).reshape(5, heads, width)
            wanted = weight * exact / np.sqrt((exact ** 2).mean(-1, keepdims=True) + 1e-5)
            for y in (*both(np.zeros_like(x)), x):
                cuda.run("rmsnorm", "norm", x=x, y=y, weight=weight, heads=heads, eps=1e-5)
                close(y, wanted.reshape(5, -1), dtype)
        x, ones = values(rng, 5, heads * width, dtype=dtype.type), np.ones(width, np.float32)
        y, wanted = np.zeros_like(x), np.zeros_like(x)
        for given, out in ((None, y), (ones, wanted)):
            cuda.run("rmsnorm", "norm", x=x, y=out, weight=given, heads=heads, eps=1e-5)
        same(y, wanted)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_rmsnorm_backward(cuda, dtype, heads):
    rng = np.random.default_rng(5)
    for rows, width in ((5, 1), (5, 7), (70, 72), (5, 129), (3, 2500)):
        weight, d_out = values(rng, width), values(rng, rows, heads * width)
        for x in both(values(rng, rows, heads * width, dtype=dtype.type)):
            exact, gradient = x.astype(np.float64).reshape(rows, heads, width), d_out.astype(np.float64).reshape(rows, heads, width)
            r = 1 / np.sqrt((exact ** 2).mean(-1, keepdims=True) + 1e-5)
            along = exact * r ** 2 * (weight * gradient * exact).mean(-1, keepdims=True)
            wanted = (r * (weight * gradient - along)).reshape(rows, -1)
            scale = np.abs(r * weight * gradient).max()
            job = dict(struct="norm", x=x, weight=weight, heads=heads, eps=1e-5)
            for start in (None, values(rng, rows, heads * width)):
                d_in, d_weight = d_out.copy() if start is None else start.copy(), np.ones(width, np.float32)
                cuda.run("rmsnorm_backward", d_out=d_in if start is None else d_out, d_in=d_in, d_weight=d_weight,
                         accumulate=start is not None, **job)
                close(d_in, wanted + (0 if start is None else start), F32, 3 * scale + (0 if start is None else np.abs(start)))
                close(d_weight, 1 + (gradient * exact * r).sum((0, 1)), F32, 1 + np.abs(gradient * exact * r).sum((0, 1)))
            d_in, d_weight = np.zeros_like(d_out), np.zeros(width, np.float32)
            cuda.run("rmsnorm_backward", d_out=d_out, d_in=d_in, **job)
            close(d_in, wanted, F32, 3 * scale)
            cuda.run("rmsnorm_backward", d_out=d_out, d_weight=d_weight, **job)
            close(d_weight, (gradient * exact * r).sum((0, 1)), F32, np.abs(gradient * exact * r).sum((0, 1)))


def rope_table(positions, rotary, theta=10000.0):
    """As mq_rope_table_init makes it."""
    exponent = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    frequency = np.float32(1) / np.power(theta, exponent.astype(np.float64)).astype(np.float32)
    angle = (np.arange(positions, dtype=np.float32)[:, None] * frequency).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("head_dim, rotary", [(2, 2), (20, 20), (64, 64), (64, 32), (80, 20), (128, 128)])
def test_rope(cuda, testing, dtype, head_dim, rotary):
    """Bit for bit: no operation on the way is fused."""
    rng = np.random.default_rng(6)
    cosine, sine = rope_table(40, rotary)
    places = rng.integers(0, 40, 11).astype(np.int32)
    for x in both(values(rng, 11, 3 * head_dim, dtype=dtype.type)):
        for options, at in ((dict(first=7), np.arange(7, 18)), (dict(positions=places), places)):
            a, b = (x.reshape(11, 3, head_dim)[:, :, i * rotary // 2:(i + 1) * rotary // 2].astype(np.float32) for i in (0, 1))
            c, s = cosine[at][:, None], sine[at][:, None]
            wanted, found = x.reshape(11, 3, head_dim).copy(), x.copy()
            wanted[:, :, :rotary] = np.concatenate([a * c - b * s, b * c + a * s], -1).astype(dtype)
            cuda.run("rope", x=found, heads=3, cosine=cosine, sine=sine, rotary=rotary, **options)
            same(found, wanted.reshape(11, -1))
            if dtype == F32:
                wanted[:, :, :rotary] = np.concatenate([a * c + b * s, b * c - a * s], -1)
                found = x.copy()
                cuda.run("rope_backward", "rope", x=found, heads=3, cosine=cosine, sine=sine, rotary=rotary, **options)
                same(found, wanted.reshape(11, -1))
    if rotary == head_dim:
        x = values(rng, 11, 3, head_dim, dtype=dtype.type)
        found = x.reshape(11, -1).copy()
        testing.apply_rope((x,), 10000.0, 0, (1.0, 1.0, 4.0, 0))
        cuda.run("rope", x=found, heads=3, cosine=cosine, sine=sine, rotary=rotary)
        same(found, x.reshape(11, -1))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("rotary, offset, interleaved", [(20, 4, 0), (16, 8, 0), (20, 4, 1), (64, 128, 1), (512, 0, 1), (2, 0, 1)])
def test_rope_of_a_part(cuda, dtype, rotary, offset, interleaved):
    """Columns from offset on; pairs side by side become halves, and back. Bit for bit."""
    rng = np.random.default_rng(6)
    (cosine, sine), head_dim, half = rope_table(40, rotary), offset + rotary + 8, rotary // 2
    for x in both(values(rng, 11, 3 * head_dim, dtype=dtype.type)):
        wanted = x.reshape(11, 3, head_dim).copy()
        part, c, s = wanted[:, :, offset:offset + rotary], cosine[7:18][:, None], sine[7:18][:, None]
        a, b = (z.astype(np.float32) for z in ((part[:, :, ::2], part[:, :, 1::2]) if interleaved else (part[:, :, :half], part[:, :, half:])))
        wanted[:, :, offset:offset + rotary] = np.concatenate([a * c - b * s, b * c + a * s], -1).astype(dtype)
        job = dict(heads=3, cosine=cosine, sine=sine, rotary=rotary, offset=offset, interleaved=interleaved, first=7)
        found = x.copy()
        cuda.run("rope", x=found, **job)
        same(found, wanted.reshape(11, -1))
        if dtype == F32:
            back = found.copy()
            cuda.run("rope_backward", "rope", x=back, **job)
            np.testing.assert_allclose(back, x, atol=1e-5 * np.abs(x).max())


# ---- columns ----

@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_columns(cuda, dtype):
    rng = np.random.default_rng(7)
    for rows, cols in ((1, 1), (70, 300), (200, 65), (4500, 9)):
        for x in both(values(rng, rows, cols, dtype=dtype.type)):
            for mask in (None, (rng.random(rows) < 0.5).astype(np.uint8)):
                kept = x.astype(np.float64)[slice(None) if mask is None else mask != 0]
                for what, exact in ((SUM, kept), (SUM_MAGNITUDES, np.abs(kept))):
                    start, sums = rng.standard_normal(cols), np.zeros(cols, np.float32)
                    found = start.copy()
                    cuda.run("column_sums", "columns", x=x, what=what, mask=mask, sums_f64=found)
                    size = np.abs(start) + np.abs(kept).sum(0)
                    assert np.all(np.abs(found - start - exact.sum(0)) <= 1e-13 * size)
                    cuda.run("column_sums", "columns", x=x, what=what, mask=mask, sums_f32=sums)
                    assert np.all(np.abs(sums - exact.sum(0)) <= 2.0 ** -24 * np.abs(exact.sum(0)) + 1e-13 * size)
                sums, low, high = np.zeros(cols), np.full(cols, 0.5, np.float32), np.full(cols, -0.5, np.float32)
                cuda.run("column_sums", "columns", x=x, what=SUM, mask=mask, sums_f64=sums, lows=low, highs=high)
                np.testing.assert_array_equal(low, np.minimum(kept.min(0, initial=np.inf), 0.5))
                np.testing.assert_array_equal(high, np.maximum(kept.max(0, initial=-np.inf), -0.5))
                low[:], high[:] = np.nan, np.nan         # nothing yet
                cuda.run("column_sums", "columns", x=x, what=SUM, mask=mask, sums_f64=sums, lows=low, highs=high)
                np.testing.assert_array_equal(low, kept.min(0, initial=np.inf))
                np.testing.assert_array_equal(high, kept.max(0, initial=-np.inf))


def test_columns_with_nan(cuda):
    x = np.float32([[1, np.nan], [np.inf, 2], [-3, 4]])
    sums, low, high = np.zeros(2), np.full(2, np.inf, np.float32), np.full(2, -np.inf, np.float32)
    cuda.run("column_sums", "columns", x=x, what=SUM, sums_f64=sums, lows=low, highs=high)
    assert sums[0] == np.inf and np.isnan(sums[1]) and low.tolist() == [-3, 2] and high.tolist() == [np.inf, 4]


# ---- quantizers ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate", [0, 1, 2, 4, 8, 64, 256, 512, 1024])
def test_prepare(cuda, rotate, dtype):
    """Everything that mq_quantizer_apply does, in its three steps, and the first of them alone; bit for bit."""
    rng = np.random.default_rng(8)
    cols = 2048 if rotate > 64 else 192 if rotate >= 8 else 36
    pre_scale, bias = values(rng, cols), values(rng, cols)
    for x in both(values(rng, 3, cols, dtype=dtype.type)):
        plain = np.ascontiguousarray(x)
        for scale in (None, pre_scale):
            quantizer = core.Quantizer(num_bits=(4, 3))
            quantizer.amax, quantizer.rotate, quantizer.pre_quant_scale = 3.0, rotate, scale
            for y in (*both(np.zeros_like(plain)), plain.copy()):
                quantizer.bias = bias
                cuda.run("prepare", x=plain if y is not plain else y, y=y, pre_scale=scale, rotate=rotate, bias=bias, sign=-1.0)
                rounded = cuda.scaled(y, "float", np.float32([3]))
                cuda.run("prepare", x=rounded, y=rounded, bias=bias, sign=1.0)
                same(rounded, quantizer(plain))
            quantizer.enabled = False
            y = np.zeros_like(x)
            cuda.run("prepare", x=x, y=y, pre_scale=scale, rotate=rotate)
            same(y, quantizer(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate", [2, 8, 64, 512, 1024])
def test_straight_through_a_rotation(cuda, testing, rotate, dtype):
    """Bit for bit: x is prepared as it was, and the gradient rotated back."""
    rng = np.random.default_rng(8)
    cols = 2048 if rotate > 64 else 192
    pre_scale, bias = values(rng, cols), values(rng, cols)
    for x in both(values(rng, 3, cols, dtype=dtype.type)):
        plain, gradient = np.ascontiguousarray(x), values(rng, 3, cols, dtype=dtype.type)
        for scale, shift in ((None, None), (pre_scale, bias)):
            quantizer = core.Quantizer(num_bits=8)
            quantizer.amax, quantizer.rotate, quantizer.pre_quant_scale, quantizer.bias = 2.0, rotate, scale, shift
            wanted = core.straight_through(quantizer, plain, gradient)
            same(cuda.straight_through(x, gradient, np.float32([2]), pre_scale=scale, bias=shift, rotate=rotate), wanted)


def test_affine_kv(cuda):
    """NVFP4 with a bias per channel, as an affine KV cache has it."""
    rng = np.random.default_rng(9)
    x, bias = values(rng, 6, 128, dtype=BF16.type), values(rng, 128)
    quantizer = core.Quantizer(num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
    quantizer.amax, quantizer.bias = 4.5, bias
    y = np.zeros_like(x)
    cuda.run("prepare", x=x, y=y, bias=bias, sign=-1.0)
    cuda.fake_quantize(y, quantizer.scheme, out=y, amax=np.float32([4.5]))
    cuda.run("prepare", x=y, y=y, bias=bias, sign=1.0)
    same(y, quantizer(x))


# ---- errors, and nothing to do ----

def test_nothing_to_do(unordered):
    x, wide = np.zeros((0, 8), np.float32), np.zeros((3, 0), np.float32)
    for empty in (x, wide):
        unordered.run("rows", x=empty, y=empty.copy())
        unordered.run("add", x=empty, y=empty.copy())
        unordered.run("swiglu", gate=empty, up=empty)
        unordered.run("rmsnorm", "norm", x=empty, y=empty, eps=1e-5)
        unordered.run("rope", x=empty, heads=1)
        unordered.run("prepare", x=empty, y=empty)
        unordered.run("column_sums", "columns", x=empty, sums_f64=np.zeros(8))


def test_what_is_refused(unordered):
    x, half = np.ones((3, 40), np.float32), np.ones((3, 40), np.float16)
    for function, struct, fields, text in (
            ("rows", None, dict(x=x, y=half), "expected float32 or bfloat16"), ("rows", None, dict(x=x, y=x[:2]), r"expected \[3, 40\]"),
            ("swiglu", None, dict(gate=x, up=x[:, :39]), "expected shape and dtype of x"),
            ("rmsnorm", "norm", dict(x=x, y=x, heads=7), "40 columns in 7 heads"),
            ("rope", None, dict(x=x, heads=4, rotary=12), "of which 12 are rotated"),
            ("rope_backward", "rope", dict(x=x.astype(BF16), heads=4, rotary=8), "gradients are float32"),
            ("prepare", None, dict(x=x, y=x, rotate=16), "a power of two up to 1024 that divides 40"),
            ("column_sums", "columns", dict(x=x), "needs one place for sums"),
            ("cache_store", "cache", dict(x=x, heads=3, capacity=4), "40 columns in 3 heads")):
        with pytest.raises(CudaError, match=text):
            unordered.run(function, struct, **fields)
