"""Searches for scales by statistics of inputs, against the same searches by brute force: replayed outputs, quantizers called one by one."""
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq._core as core

F32, F64, BF16 = np.float32, np.float64, ml_dtypes.bfloat16
NVFP4 = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
KINDS = {"int4 blocks": dict(num_bits=4, block_sizes={-1: 16}), "int8 rows": dict(num_bits=8, axis=0), "fp8": dict(num_bits=(4, 3)),
         "nvfp4": dict(num_bits=(2, 1), block_sizes=NVFP4)}
ALPHAS = np.arange(11, dtype=F32) / F32(10)
RATIOS = np.linspace(0.5, 1, 11).astype(F32)
MULTIPLES = np.linspace(0.25, 4, 39).astype(F32)
FP8_SCALES = np.arange(1, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)


def inputs(tokens, width, seed=0):
    """Channels that depend on each other, of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)) @ (np.eye(width) + 0.3 * rng.standard_normal((width, width)))
    return (x * np.exp(1.5 * rng.standard_normal(width))).astype(F32)


def weights(rows, width, seed=0):
    return (np.random.default_rng(seed + 100).standard_t(4, (rows, width)) * 0.05).astype(F32)


def gram(x):
    return (x.T.astype(F64) @ x.astype(F64)).astype(F32)


def diagonal_blocks(h, size):
    count = -(-len(h) // size)
    blocks = np.zeros((count, size, size), F32)
    for block in range(count):
        part = h[block * size:(block + 1) * size, block * size:(block + 1) * size]
        blocks[block, :len(part), :len(part)] = part
    return blocks


def own_maxima(weight, kind):
    if kind.get("axis") == 0:
        return core.amax(weight, axis=0)
    static = "block_sizes" in kind and kind["block_sizes"].get("type") != "dynamic"
    return core.amax(weight, block=kind["block_sizes"][-1]) if static else core.amax(weight)


def rounded_by(kind, weight, amax=None):
    quantizer = core.Quantizer(**kind)
    if quantizer.needs_amax:
        quantizer.amax = own_maxima(weight, kind) if amax is None else amax
    return quantizer(weight)


# The loss by the Gram matrix -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [48, 128, 208])
def test_the_loss_by_the_gram_matrix_is_the_replayed_loss(kind, width):
    x, weight = inputs(700, width), weights(37, width)
    scales = np.exp(np.random.default_rng(1).standard_normal((5, width))).astype(F32)
    found = core.quantization_losses(weight, core.Quantizer(**KINDS[kind]), core.GramLoss(gram(x), "float32"), scales, 1 / scales)
    for scale, loss in zip(scales, found):
        made = rounded_by(KINDS[kind], weight * scale) * (1 / scale)
        outputs = x.astype(F64) @ weight.T.astype(F64), x.astype(F64) @ made.T.astype(F64)
        np.testing.assert_allclose(loss, ((outputs[0] - outputs[1]) ** 2).sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gram_matrix_the_loss_is_of_the_weight(kind):
    weight = weights(21, 96)
    found = core.quantization_losses(weight, core.Quantizer(**KINDS[kind]), factors=np.float32([1]))
    np.testing.assert_allclose(found, ((weight.astype(F64) - rounded_by(KINDS[kind], weight)) ** 2).sum(), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 1000))
def test_any_shape_whole_and_in_blocks(rows, width, size, seed):
    """Blocks lose what the whole matrix would, if what is beside them is zero."""
    weight, h = weights(rows, width, seed), gram(inputs(50, width, seed))
    apart = np.arange(width) // size
    h *= apart[:, None] == apart
    kind = dict(num_bits=4, block_sizes={-1: size})
    whole = core.quantization_losses(weight, core.Quantizer(**kind), core.GramLoss(h, "float32"), factors=RATIOS)
    blocks = core.quantization_losses(weight, core.Quantizer(**kind), core.GramLoss(diagonal_blocks(h, size), "float32", width), factors=RATIOS)
    np.testing.assert_allclose(blocks, whole, rtol=1e-4, atol=1e-6 * np.abs(h).max())


@pytest.mark.parametrize("kind", ["int4 blocks", "nvfp4"])
def test_bfloat16_products_choose_as_float32_ones(kind):
    """Or what they choose loses less than 0.1% more."""
    for seed in range(12):
        x, weight = inputs(400, 144, seed), weights(40, 144, seed)
        scales = core.awq_scales(np.abs(x).mean(0), core.awq_weight_scale(weight, 16), ALPHAS)
        exact, fast = (core.quantization_losses(weight, core.Quantizer(**KINDS[kind]), core.GramLoss(gram(x), compute), scales, 1 / scales)
                       for compute in ("float32", "bfloat16"))
        np.testing.assert_allclose(fast, exact, rtol=1e-2)
        assert exact[np.argmin(fast)] <= exact.min() * 1.001


# Scales of columns ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16, np.float16])
@pytest.mark.parametrize("block", [0, 16, 40])
def test_awq_weight_scale(dtype, block):
    weight = weights(30, 80).astype(dtype)
    weight[3:5] = 0      # rows of zeros count as zeros
    values = np.abs(weight.astype(F64)).reshape(30, -1, block or 80)
    expected = (values / (values.max(-1, keepdims=True) + np.finfo(F64).tiny)).reshape(30, 80).mean(0)
    np.testing.assert_allclose(core.awq_weight_scale(weight, block), expected, rtol=1e-5 if dtype == F32 else 1e-2)


def test_awq_scales():
    """spec/modelopt_spec.md, awq_lite: a^alpha / w^(1 - alpha), between 1e-4 and 1e4, over the root of largest times smallest."""
    rng = np.random.default_rng(0)
    a, w = np.exp(3 * rng.standard_normal(50)).astype(F32), np.exp(rng.standard_normal(50)).astype(F32)
    a[7], w[8], a[9], w[9] = 0, 0, 0, 0
    found = core.awq_scales(a, w, ALPHAS)
    for alpha, scale in zip(ALPHAS.astype(F64), found):
        with np.errstate(divide="ignore", invalid="ignore"):
            raw = np.nan_to_num(a.astype(F64) ** alpha / w.astype(F64) ** (1 - alpha), nan=np.nan, posinf=1e30)
        clamped = np.clip(raw, 1e-4, 1e4)
        expected = clamped / np.sqrt(np.nanmax(clamped) * np.nanmin(clamped))
        known = np.isfinite(expected)
        np.testing.assert_allclose(scale[known], expected[known], rtol=1e-4)
        assert np.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_scale(alpha):
    """spec/modelopt_spec.md, smoothquant; channels that were silent keep 1."""
    a, w = np.exp(inputs(1, 40)[0] / 3).astype(F32), np.exp(weights(1, 40)[0]).astype(F32)
    a[3] = 0
    expected = np.clip(w.astype(F64) ** (1 - alpha) / np.where(a == 0, 1, a).astype(F64) ** alpha, 1e-4, 1e4)
    expected[3] = 1
    np.testing.assert_allclose(core.smoothquant_scale(a, w, alpha), expected, rtol=1e-5)


# Maxima -------------------------------------------------------------------------------------------------------------------------

def by_brute_force(weight, kind, factors, blocks=None):
    """The amax with the least loss, each factor tried by a quantizer of its own."""
    own = own_maxima(weight, kind)
    losses = []
    for factor in factors:
        change = weight.astype(F64) - rounded_by(kind, weight, own * factor)
        if blocks is not None:
            parts = np.zeros((len(weight), len(blocks) * blocks.shape[1]))
            parts[:, :weight.shape[1]] = change
            parts = parts.reshape(len(weight), len(blocks), -1)
            losses.append(np.einsum("rbi,bij,rbj->rb", parts, blocks.astype(F64), parts))
        elif kind.get("axis") == 0:
            losses.append((change ** 2).sum(1))
        elif kind.get("block_sizes"):
            losses.append((change ** 2).reshape(len(weight), -1, kind["block_sizes"][-1]).sum(-1))
        else:
            losses.append((change ** 2).sum())
    losses = np.array(losses)
    return (own.reshape(losses.shape[1:]) * factors[np.argmin(losses, 0)]).ravel(), losses


@pytest.mark.parametrize("kind", ["int4 blocks", "int8 rows", "fp8"])
def test_best_amax(kind):
    weight = weights(60, 96)
    found = core.best_amax(weight, core.Quantizer(**KINDS[kind]), MULTIPLES)
    expected, _ = by_brute_force(weight, KINDS[kind], MULTIPLES)
    assert np.mean(found.ravel() == expected) >= 0.995      # sums of float32 may see a tie where float64 sees none


def test_best_amax_by_blocks_of_inputs():
    weight, blocks = weights(60, 100), diagonal_blocks(gram(inputs(300, 100)), 16)
    kind = dict(num_bits=4, block_sizes={-1: 16})
    found = core.best_amax(weight, core.Quantizer(**kind), RATIOS, core.GramLoss(blocks, "float32", 100))
    expected, losses = by_brute_force(weight, kind, RATIOS, blocks)
    assert np.mean(found.ravel() == expected) >= 0.995
    plain = core.best_amax(weight, core.Quantizer(**kind), RATIOS)
    assert np.mean(plain.ravel() == expected) < 0.9         # inputs matter


def test_the_first_of_equal_ones():
    weight = np.zeros((3, 32), F32)
    weight[:, 0] = 1      # any scale that hits 1 is as good as any other
    found = core.best_amax(weight, core.Quantizer(num_bits=4, block_sizes={-1: 16}), np.float32([1, 1, 0.5]))
    np.testing.assert_array_equal(found.reshape(3, 2), [[1, 0]] * 3)


@pytest.mark.parametrize("with_hessian", [False, True])
def test_sweep_over_all_fp8_scales(with_hessian):
    weight = weights(24, 64)
    h = diagonal_blocks(gram(inputs(200, 64)), 16)
    largest = np.abs(weight).max()
    found = core.sweep_block_scales(weight, float(largest), hessian=h if with_hessian else None)
    grid = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-grid[:0:-1], grid]).astype(F64)
    second = F32(largest) / F32(2688)
    losses = []
    for scale in FP8_SCALES:
        step = F64(F32(scale * second))
        parts = weight.reshape(24, 4, 16).astype(F64)
        change = parts - step * grid[np.abs(parts[..., None] / step - grid).argmin(-1)]
        losses.append(np.einsum("rbi,bij,rbj->rb", change, h.astype(F64), change) if with_hessian else (change ** 2).sum(-1))
    losses = np.array(losses)
    taken = np.abs(FP8_SCALES[:, None, None] * second * 6 / found - 1).argmin(0)       # which of the scales it says
    np.testing.assert_allclose(FP8_SCALES[taken] * second * 6, found, rtol=1e-5)
    picked = np.take_along_axis(losses, taken[None], 0)[0]
    np.testing.assert_allclose(picked, losses.min(0), rtol=1e-4)


# What else may come in --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16, np.float16])
def test_any_layout_and_read_only(dtype):
    weight = weights(16, 64).astype(dtype)
    wide = np.zeros((16, 128), dtype)
    wide[:, ::2] = weight
    frozen = weight.copy()
    frozen.flags.writeable = False
    loss = core.GramLoss(gram(inputs(90, 64)), "float32")
    kind = core.Quantizer(num_bits=4, block_sizes={-1: 16})
    for other in (wide[:, ::2], np.asfortranarray(weight), frozen):
        np.testing.assert_array_equal(core.best_amax(other, kind, RATIOS), core.best_amax(weight, kind, RATIOS))
        np.testing.assert_array_equal(core.quantization_losses(other, kind, loss, factors=RATIOS),
                                      core.quantization_losses(weight, kind, loss, factors=RATIOS))
        np.testing.assert_array_equal(core.awq_weight_scale(other, 16), core.awq_weight_scale(weight, 16))


@pytest.mark.parametrize("call, words", [
    (lambda: core.GramLoss(np.zeros((3, 4), F32)), "gram"),
    (lambda: core.GramLoss(np.zeros(4, F32)), "gram"),
    (lambda: core.GramLoss(np.eye(4, dtype=F32), "int8"), "compute"),
    (lambda: core.quantization_losses(weights(4, 32), core.Quantizer(num_bits=8, axis=0), core.GramLoss(np.eye(16, dtype=F32)),
                                      factors=RATIOS), "16"),
    (lambda: core.quantization_losses(weights(4, 32), core.Quantizer(num_bits=8, axis=0), None, np.ones((2, 31), F32), np.ones((2, 31), F32)),
     "scales"),
    (lambda: core.best_amax(np.zeros(5, F32), core.Quantizer(num_bits=8), RATIOS), "weight"),
    (lambda: core.best_amax(np.zeros((5, 4), np.int32), core.Quantizer(num_bits=8), RATIOS), "weight"),
    (lambda: core.sweep_block_scales(weights(4, 30), 1.0), "16"),
    (lambda: core.awq_scales(np.ones(3, F32), np.ones(4, F32), ALPHAS), "3|4"),
    (lambda: core.subtract_product(weights(4, 32), np.ones((4, 2), F32), np.ones((3, 32), F32)), "2|3")])
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_subtract_product(dtype):
    rng = np.random.default_rng(0)
    weight, up, down = (rng.standard_normal(shape).astype(dtype) for shape in ((33, 70), (33, 5), (5, 70)))
    expected = weight.astype(F64) - up.astype(F64) @ down.astype(F64)
    np.testing.assert_allclose(core.subtract_product(weight, up, down).astype(F64), expected, atol=1e-5 if dtype == F32 else 2e-2, rtol=8e-3)
