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
    sizes = kind["block_sizes"] if static else {}
    return core.amax(weight, block=(sizes.get(-2, 1), sizes[-1])) if static else core.amax(weight)


def rounded_by(kind, weight, amax=None):
    quantizer = core.Quantizer(**kind)
    if quantizer.needs_amax:
        quantizer.amax = own_maxima(weight, kind) if amax is None else amax
    return quantizer(weight)


# The loss by the Gram matrix -------------------------------------------------------------------------------------------------

def replayed(x, weight, made):
    return ((x.astype(F64) @ (weight.astype(F64) - made.astype(F64)).T) ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, dtype", [(48, F32), (128, F32), (208, F32), (64, BF16), (144, np.float16)])
def test_the_loss_by_the_gram_matrix_is_the_replayed_loss(kind, width, dtype):
    """With scales, and back or not; and with factors of maxima, the weight's or others. What is quantized is of the weight's dtype."""
    x, weight = inputs(700, width), weights(137, width).astype(dtype)
    scales = np.exp(np.random.default_rng(1).standard_normal((5, width))).astype(F32)
    quantizer, loss = core.Quantizer(**KINDS[kind]), core.GramLoss(gram(x), "float32")
    made = [rounded_by(KINDS[kind], (weight.astype(F32) * scale).astype(dtype)).astype(F32) for scale in scales]
    found = core.quantization_losses(weight, quantizer, loss, scales)
    np.testing.assert_allclose(found, [replayed(x, weight, one) for one in made], rtol=1e-5)
    found = core.quantization_losses(weight, quantizer, loss, scales, 1 / scales)
    np.testing.assert_allclose(found, [replayed(x, weight, one * (1 / scale)) for one, scale in zip(made, scales)], rtol=1e-5)
    for share in [1, F32(0.7)] if quantizer.needs_amax else []:
        own = own_maxima(weight, KINDS[kind]) * share
        if share != 1:
            quantizer.amax = own
        expected = [replayed(x, weight, rounded_by(KINDS[kind], weight, own * factor)) for factor in RATIOS]
        np.testing.assert_allclose(core.quantization_losses(weight, quantizer, loss, factors=RATIOS), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gram_matrix_the_loss_is_of_the_weight(kind):
    weight = weights(21, 96)
    found = core.quantization_losses(weight, core.Quantizer(**KINDS[kind]), factors=np.float32([1]))
    np.testing.assert_allclose(found, ((weight.astype(F64) - rounded_by(KINDS[kind], weight)) ** 2).sum(), rtol=1e-5)


DYNAMIC = {"int8 by token": dict(num_bits=8, type="dynamic"), "int4 by block": dict(num_bits=4, block_sizes={-1: 16, "type": "dynamic"})}


@pytest.mark.parametrize("kind", [*KINDS, *DYNAMIC])
def test_factors_count_beside_scales(kind):
    """The quantizer multiplies what it finds in the scaled weight, whoever finds it."""
    weight, quantizer, ones = weights(20, 64), core.Quantizer(**{**KINDS, **DYNAMIC}[kind]), np.ones((3, 64), F32)
    apart = [core.quantization_losses(weight, quantizer, factors=np.float32([factor]))[0] for factor in (1, 0.7, 0.4)]
    made = core.quantization_losses(weight, quantizer, None, ones, ones, np.float32([1, 0.7, 0.4]))
    np.testing.assert_allclose(made, apart, rtol=1e-6)
    assert len(set(made)) == 3
    if not quantizer.needs_amax:
        np.testing.assert_allclose(made[0], ((weight.astype(F64) - quantizer(weight)) ** 2).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="no maxima to multiply"):
        core.quantization_losses(weight, core.Quantizer(num_bits=(4, 3), block_sizes={-1: 32, "type": "dynamic", "scale_bits": (8, 0)}),
                                 factors=np.float32([0.7]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 1000))
def test_any_shape_whole_and_in_blocks(rows, width, size, seed):
    """Blocks lose what the whole matrix would, if what is beside them is zero."""
    weight, h = weights(rows, width, seed), gram(inputs(50, width, seed))
    apart = np.arange(width) // size
    h *= apart[:, None] == apart
    kind = dict(num_bits=4, block_sizes={-1: size})
    whole, blocks = (core.quantization_losses(weight, core.Quantizer(**kind), loss, factors=RATIOS)
                     for loss in (core.GramLoss(h, "float32"), core.GramLoss(diagonal_blocks(h, size), "float32", width)))
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

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 140), st.integers(1, 70), st.integers(0, 80), st.sampled_from([F32, BF16, np.float16]), st.integers(0, 99))
def test_awq_weight_scale(rows, columns, block, dtype, seed):
    """Each quotient is rounded to the weight's dtype, as the reference's are."""
    weight = weights(rows, columns, seed).astype(dtype)
    weight[:, ::7] = 0
    weight[rows // 2] = 0      # blocks of zeros count as zeros
    values = np.zeros((rows, -(-columns // (block or columns)), block or columns), F32)
    values.reshape(rows, -1)[:, :columns] = np.abs(weight.astype(F32))
    divisors = (values.max(-1, keepdims=True) + F32(ml_dtypes.finfo(dtype).smallest_normal)).astype(dtype).astype(F32)
    quotients = (values / divisors).astype(dtype).reshape(rows, -1)[:, :columns]
    found = core.awq_weight_scale(weight, block)
    np.testing.assert_allclose(found, quotients.astype(F64).mean(0).astype(dtype).astype(F64), rtol=float(ml_dtypes.finfo(dtype).eps))


def test_awq_scales():
    """spec/modelopt_spec.md, awq_lite: a^alpha / w^(1 - alpha), between 1e-4 and 1e4, over the root of largest times smallest."""
    rng = np.random.default_rng(0)
    a, w = np.exp(3 * rng.standard_normal(50)).astype(F32), np.exp(rng.standard_normal(50)).astype(F32)
    a[7], w[8], a[9], w[9] = 0, 0, 0, 0
    found = core.awq_scales(a, w, ALPHAS)
    for alpha, scale in zip(ALPHAS.astype(F64), found):
        clamped = np.clip(a.astype(F64) ** alpha / (w.astype(F64) ** (1 - alpha) + np.finfo(F32).tiny), 1e-4, 1e4)
        np.testing.assert_allclose(scale, clamped / np.sqrt(clamped.max() * clamped.min()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, np.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_scale(alpha, dtype):
    """spec/modelopt_spec.md, smoothquant; channels that were silent keep 1, those whose weights are zeros get what is least."""
    rng = np.random.default_rng(0)
    a, w = np.exp(4 * rng.standard_normal(40)).astype(F32), np.exp(3 * rng.standard_normal(40)).astype(dtype).astype(F32)
    a[3:6], w[5:8] = [0, 2.0 ** -31, 2.0 ** -32], 0
    power = (w ** F32(1 - alpha)).astype(dtype).astype(F64)
    expected = np.clip(power / np.where(a == 0, 1, a).astype(F64) ** alpha, 1e-4, 1e4)
    expected[3:6] = 1
    found = core.smoothquant_scale(a, w, alpha, np.dtype(dtype).name)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == F32 else 1e-2)     # powf and NumPy's may be rounded apart
    assert np.mean(np.abs(found / expected - 1) <= 1e-5) >= 0.9


# Maxima -------------------------------------------------------------------------------------------------------------------------

TALL = dict(num_bits=4, block_sizes={-1: 16, -2: 110})


def by_cells(change, kind, h=None):
    """What each maximum's share of a change of the weight loses; with h, only where maxima reach over whole rows."""
    rows, columns = change.shape
    losses = change ** 2 if h is None else (change @ h.astype(F64)) * change
    sizes = kind.get("block_sizes") or {-1: columns}
    height = 1 if kind.get("axis") == 0 else sizes.get(-2, 1 if "block_sizes" in kind else rows)
    return np.add.reduceat(np.add.reduceat(losses, np.arange(0, rows, height), 0), np.arange(0, columns, sizes[-1]), 1)


@pytest.mark.parametrize("share", [None, 0.9])
@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("kind", [KINDS["int8 rows"], KINDS["fp8"], KINDS["int4 blocks"], TALL], ids=["rows", "tensor", "blocks", "tall"])
def test_best_amax(kind, with_gram, share):
    """More rows than are tried at a time, and a last block that is not whole. share: maxima are the quantizer's, not the weight's."""
    weight, h, factors = weights(220, 100), gram(inputs(300, 100)), MULTIPLES[::3].copy()
    sizes = kind.get("block_sizes")
    if sizes:
        h *= np.arange(100)[:, None] // 16 == np.arange(100) // 16
    loss = core.GramLoss(*((diagonal_blocks(h, 16), "float32", 100) if sizes else (h,))) if with_gram else None
    start = own_maxima(weight, kind) * F32(share or 1)
    quantizer = core.Quantizer(**kind)
    if share:
        quantizer.amax = start
    for dtype in (F32, BF16):
        products = [(start * factor).astype(dtype).astype(F32) for factor in factors]
        losses = np.array([by_cells(weight.astype(F64) - rounded_by(kind, weight, product), kind, h if with_gram else None).ravel()
                           for product in products])
        products = np.array(products).reshape(losses.shape)
        found = core.best_amax(weight, quantizer, factors, loss, np.dtype(dtype).name)
        taken = np.argmax(products == found, 0)[None]
        np.testing.assert_array_equal(np.take_along_axis(products, taken, 0)[0], found)
        np.testing.assert_allclose(np.take_along_axis(losses, taken, 0)[0], np.min(losses, 0), rtol=1e-4)
        assert np.mean(taken == np.argmin(losses, 0)) >= 0.99      # sums of float32 may see a tie where float64 sees none


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


@pytest.mark.parametrize("dtype, words", [(F32, {}), (BF16, {}), (F32, {"four_over_six": True})])
def test_the_sweep_rounds_as_the_quantizer_will(dtype, words):
    """Each of the 126 numbers tried by a quantizer; blocks of zeros take the first."""
    weight = weights(40, 48).astype(dtype)
    weight[::9, 16:32] = 0
    largest = float(np.abs(weight.astype(F32)).max())
    quantizer, losses = core.Quantizer(num_bits=(2, 1), block_sizes={**NVFP4, "type": "static", **words}), []
    found = core.sweep_block_scales(weight, largest, quantizer.second_divisor)
    maxima = F32(largest) * (FP8_SCALES / F32(quantizer.second_divisor / 6))
    for amax in maxima:
        quantizer.amax, quantizer.global_amax = np.full((40, 3), amax), largest
        change = weight.astype(F64) - quantizer(weight.astype(F32)).astype(F64)
        losses.append((change ** 2).reshape(40, 3, 16).sum(-1))
    assert np.mean(found == maxima[np.argmin(losses, 0)]) >= 0.98
    assert (found[::9, 1] == maxima[0]).all()
    quantizer.amax = found
    change = weight.astype(F64) - quantizer(weight.astype(F32)).astype(F64)
    np.testing.assert_allclose((change ** 2).reshape(40, 3, 16).sum(-1), np.min(losses, 0), rtol=1e-5)


def test_weighed_by_a_hessian_the_sweep_takes_the_codes_of_an_export():
    """Values in the middle of two numbers of some scale, and inputs so alike that it matters in which direction they are off."""
    rng, largest = np.random.default_rng(0), 0.37
    second = F32(largest) / F32(2688)
    middles = F32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) * rng.choice(F32([-1, 1]), (64, 4, 16, 7))
    weight = (rng.choice(FP8_SCALES[60:110], (64, 4, 1)) * second * rng.permuted(middles, axis=-1)[..., 0]).reshape(64, 64)
    weight = np.clip(weight, -F32(largest), F32(largest))
    h = np.broadcast_to(np.full((16, 16), 1, F32) + np.eye(16, dtype=F32) * F32(0.01), (4, 16, 16))
    maxima, losses = F32(largest) * (FP8_SCALES / F32(448)), []
    found = core.sweep_block_scales(weight, largest, hessian=h)
    for amax in maxima:
        exported = core.dequantize(core.quantize(weight, "nvfp4", amax=largest, block_amax=np.full((64, 4), amax)), "nvfp4")
        change = (weight.astype(F64) - exported).reshape(64, 4, 16)
        losses.append(np.einsum("rbi,bij,rbj->rb", change, h.astype(F64), change))
    taken = np.abs(maxima[:, None, None] - found).argmin(0)
    np.testing.assert_allclose(np.take_along_axis(np.array(losses), taken[None], 0)[0], np.min(losses, 0), rtol=1e-3)


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
    (lambda: core.quantization_losses(weights(4, 32), core.Quantizer(num_bits=8, axis=0), None, np.ones((2, 31), F32)), "scales"),
    (lambda: core.quantization_losses(weights(4, 32), core.Quantizer(num_bits=8), None, None, np.ones((2, 32), F32)), "backs: as many"),
    (lambda: core.best_amax(weights(4, 32), core.Quantizer(num_bits=4, block_sizes={-1: 16}), RATIOS, core.GramLoss(np.eye(32, dtype=F32))),
     "blocks of 32 columns, the weight's have 16"),
    (lambda: core.best_amax(weights(4, 32), core.Quantizer(num_bits=8), RATIOS[:0]), "no candidates"),
    (lambda: core.best_amax(weights(4, 32), core.Quantizer(num_bits=8), RATIOS, "gram"), "gram: expected a GramLoss or None, got str"),
    (lambda: core.sweep_block_scales(weights(4, 32), 1.0, hessian=np.ones((1, 16, 16), F32)), r"hessian: expected \[2, 16, 16\]"),
    (lambda: core.smoothquant_scale(np.ones(3, F32), np.ones(3, F32), 0.5, "int8"), "expected float32, bfloat16 or float16, got 'int8'"),
    (lambda: core.best_amax(np.zeros(5, F32), core.Quantizer(num_bits=8), RATIOS), "weight"),
    (lambda: core.best_amax(np.zeros((5, 4), np.int32), core.Quantizer(num_bits=8), RATIOS), "weight"),
    (lambda: core.sweep_block_scales(weights(4, 30), 1.0), "16"),
    (lambda: core.awq_scales(np.ones(3, F32), np.ones(4, F32), ALPHAS), "3|4"),
    (lambda: core.awq_weight_scale(np.ones((0, 4), F32)), r"weight \[0, 4\]: there is no mean over no rows"),
    (lambda: core.subtract_product(weights(4, 32), np.ones((4, 2), F32), np.ones((3, 32), F32)), "2|3")])
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    """In the place it would have been passed on from as a number."""
    one, wrong, h = np.ones(4, F32), F32([1, 1, bad, 1]), np.ones((2, 16, 16), F32)
    for scales in (lambda a, w, alpha: core.awq_scales(a, w, F32([0.5, alpha])), core.smoothquant_scale):
        with pytest.raises(ValueError, match="activations: channel 2 is"):
            scales(wrong, one, 0.5)
        with pytest.raises(ValueError, match="weights: channel 2 is"):
            scales(one, wrong, 0.5)
        with pytest.raises(ValueError, match="alpha"):
            scales(one, one, bad)
    weight = weights(40, 32)
    for amax, divisor in ((bad, 2688), (1, np.nan), (1, 0), (-1, 2688)):
        with pytest.raises(ValueError, match="is no scale"):
            core.sweep_block_scales(weight, amax, divisor)
    h[1, 3, 4] = bad
    with pytest.raises(ValueError, match="hessian"):
        core.sweep_block_scales(weight, 1.0, hessian=h)
    for dtype in (F32, BF16, np.float16):
        weight[[30, 17], 20] = bad
        with pytest.raises(ValueError, match="row 17 holds NaN or infinity"):
            core.sweep_block_scales(weight.astype(dtype), 1.0)


@pytest.mark.parametrize("call", [
    "awq_scales(np.ones(3), None, np.ones(2))", "smoothquant_scale(np.ones(3), None, 0.5)",
    "gptq(np.ones((4, 32)).astype('f'), core.Quantizer(num_bits=(4, 3)), np.eye(32), np.ones(32))",
    "gptq(np.ones((4, 32)).astype('f'), core.Quantizer(num_bits=8, axis=0, enabled=False), np.eye(32), np.ones(32))"])
def test_what_is_missing_is_refused(run_python, call):
    """In a process of its own, which what is not there ended once."""
    code = "import numpy as np, modelq._core as core\ntry: core.{}\nexcept (TypeError, ValueError): print('refused')"
    assert run_python(code.format(call)) == "refused"
