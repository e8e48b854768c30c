"""The runtime's operations against their formulas in float64, and the max calibrator."""
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import modelq._core as core

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float32, BF16]
WIDTHS = [1, 7, 16, 31, 64, 129, 576]
# float32: a few dozen roundings of 2^-24; bfloat16: two roundings of 2^-9 (before and after the weight, gate and product), and a tie.
RELATIVE = {np.float32: 4e-6, BF16: 2.0 ** -7}


def values(rng, *shape, dtype=np.float32):
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(dtype)


def close(got, wanted, dtype, scale=None):
    """Within RELATIVE of the result, or of scale where terms cancel."""
    bound = RELATIVE[dtype] * (np.abs(wanted) if scale is None else scale) + 1e-30
    assert np.all(np.abs(got.astype(np.float64) - wanted) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rmsnorm(testing, dtype, width):
    rng = np.random.default_rng(width)
    x, weight = values(rng, 5, width, dtype=dtype), values(rng, width)
    out = np.empty_like(x)
    testing.apply_op("rmsnorm", (out, x, weight), 1e-5)
    exact = x.astype(np.float64)
    close(out, weight * exact / np.sqrt((exact ** 2).mean(-1, keepdims=True) + 1e-5), dtype)
    testing.apply_op("rmsnorm", (x, x, weight), 1e-5)
    np.testing.assert_array_equal(x, out, "in place is the same")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(testing, dtype, width):
    rng = np.random.default_rng(width)
    gate, up = values(rng, 5, width, dtype=dtype) * dtype(4), values(rng, 5, width, dtype=dtype)
    gate.flat[0] = 0
    exact = gate.astype(np.float64)
    wanted = exact / (1 + np.exp(-exact)) * up.astype(np.float64)
    testing.apply_op("swiglu", (gate, up))
    close(gate, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_far_out(testing, dtype):
    """Large gates: x itself on the right, nothing on the left, NaN and infinities not hidden."""
    gate = np.array([[88, 1000, 3e38, -88, -1000, -3e38, np.inf, np.nan]], dtype)
    testing.apply_op("swiglu", (gate, np.ones_like(gate)))
    result = gate.astype(np.float64)[0]
    np.testing.assert_allclose(result[:3], np.array([88, 1000, 3e38], dtype).astype(np.float64))
    assert np.all(np.abs(result[3:6]) < [1e-30, 1e-30, 1e5]) and np.isposinf(result[6]) and np.isnan(result[7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add(testing, dtype, width):
    rng = np.random.default_rng(width)
    x, y = values(rng, 5, width, dtype=dtype), values(rng, 5, width, dtype=dtype)
    wanted = (x.astype(np.float32) + y.astype(np.float32)).astype(dtype)
    testing.apply_op("add", (x, y))
    np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [np.float32, BF16, np.float16])
def test_embed(testing, dtype, source):
    rng = np.random.default_rng(0)
    weight = values(rng, 9, 33, dtype=source)
    weight.flat[:4] = np.array([6e-8, -6e-5, 0, -0.0], source)      # denormal in float16
    ids = rng.integers(0, 9, 20).astype(np.int32)
    ids[:1] = 0
    out = np.empty((20, 33), dtype)
    testing.apply_op("embed", (out, ids, weight))
    np.testing.assert_array_equal(out, weight.astype(np.float32).astype(dtype)[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
@pytest.mark.parametrize("head_dim", [2, 20, 64])
def test_rope(testing, dtype, kind, head_dim):
    """Rotation of (x[i], x[i + D/2]) by position * frequency; llama3's frequencies as the Llama 3.1 release defines them."""
    tokens, theta, factor, low, high, original = 40, 10000.0, 8.0, 1.0, 4.0, 16
    x = values(np.random.default_rng(1), tokens, 3, head_dim, dtype=dtype)
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if kind == "linear":
        frequency = frequency / factor
    if kind == "llama3":
        smooth = np.clip((original * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    angle = np.arange(tokens)[:, None, None] * frequency
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    wanted = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
    testing.apply_rope((x,), theta, ["default", "linear", "llama3"].index(kind), (factor, low, high, original))
    close(x, wanted, dtype, scale=np.concatenate([np.hypot(a, b)] * 2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.integers(0, 0xffffffff), min_size=0, max_size=80))
@settings(max_examples=60, deadline=None)
def test_row_amax_has_the_same_bits_everywhere(testing, dtype, bits):
    x = np.array(bits, np.uint32).view(np.float32) if dtype is np.float32 else np.array(bits, np.uint32).astype(np.uint16).view(BF16)
    wanted = int((x.astype(np.float32).view(np.uint32) & 0x7fffffff).max(initial=0)) if dtype is np.float32 else \
        int((x.view(np.uint16) & 0x7fff).max(initial=0)) << 16
    assert {testing.row_amax(x, isa) for isa in range(3)} - {None} == {wanted}


# ---- the calibrator ----

@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("shape", [(300,), (5, 1), (3, 7, 300), (2, 3, 4, 5)])
def test_max_calibrator(dtype, shape):
    x = values(np.random.default_rng(0), *shape, dtype=dtype)
    whole, channels = core.Calibrator(), core.Calibrator("max", -1)
    for calibrator in (whole, channels):
        assert calibrator.compute_amax() is None
        calibrator.collect(x)
        assert calibrator.count == x.size // shape[-1]
    assert whole.compute_amax() == np.abs(x.astype(np.float32)).max()
    np.testing.assert_array_equal(channels.compute_amax(), np.abs(x.astype(np.float32)).reshape(-1, shape[-1]).max(0))


def test_max_calibrator_mask_and_strides():
    x = values(np.random.default_rng(0), 4, 6, 40)
    mask = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6, [1] * 6])
    for view in (x, np.asfortranarray(x), x[:, :, ::-1]):
        whole, channels = core.Calibrator(), core.Calibrator(axis=-1)
        whole.collect(view, mask)
        channels.collect(view, mask.astype(np.float32))
        kept = np.abs(view[mask.astype(bool)])
        assert whole.compute_amax() == kept.max() and whole.count == mask.sum()
        np.testing.assert_array_equal(channels.compute_amax(), kept.max(0))
    with pytest.raises(ValueError, match="mask: 6 entries for 24 rows"):
        core.Calibrator().collect(x, mask[0])
    with pytest.raises(ValueError, match="40 channels, the data has 39"):
        channels.collect(x[..., :39])


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("bad, what", [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_max_calibrator_remembers_what_is_not_finite(axis, bad, what):
    x = np.ones((4, 300), np.float32)
    x[2, 290] = bad
    calibrator = core.Calibrator(axis=axis)
    calibrator.collect(x)
    calibrator.collect(np.ones((4, 300), np.float32))
    with pytest.raises(ValueError, match=what):
        calibrator.compute_amax()
    masked = core.Calibrator(axis=axis)
    masked.collect(x, [1, 1, 0, 1])
    assert np.all(masked.compute_amax() == 1)
    calibrator.reset()
    assert calibrator.compute_amax() is None and calibrator.count == 0


@pytest.mark.parametrize("axis", [None, -1])
def test_max_calibrator_merges_saves_and_loads(axis):
    rng = np.random.default_rng(3)
    parts = [values(rng, 10, 70) for _ in range(3)]
    together = core.Calibrator(axis=axis)
    together.merge(core.Calibrator(axis=axis))
    for part in parts:
        together.collect(part)
    merged = core.Calibrator(axis=axis)
    for part in parts:
        one = core.Calibrator(axis=axis)
        one.collect(part)
        copy = core.Calibrator(axis=axis)
        copy.load(one.save())
        assert copy.save() == one.save()
        merged.merge(copy)
    assert merged.save() == together.save()
    np.testing.assert_array_equal(merged.compute_amax(), together.compute_amax())
    state, fresh = together.save(), core.Calibrator(axis=axis)
    other = core.Calibrator(axis=-1 if axis is None else None)
    for target, damaged in ((fresh, state[:-1]), (fresh, state[:20]), (fresh, b"x" * len(state)), (fresh, b""), (other, state)):
        with pytest.raises(ValueError, match="load"):
            target.load(damaged)
        assert target.compute_amax() is None
    with pytest.raises(ValueError, match="different kind, axis or option"):
        other.merge(together)
    with pytest.raises(ValueError, match="unknown kind 'maximum'"):
        core.Calibrator("maximum")
    with pytest.raises(ValueError, match="axis"):
        core.Calibrator(axis=0)


def test_max_calibrator_from_many_threads():
    rng = np.random.default_rng(3)
    parts = [values(rng, 50, 300) for _ in range(16)]
    calibrator, alone = core.Calibrator(axis=-1), core.Calibrator(axis=-1)
    threads = [threading.Thread(target=calibrator.collect, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in parts:
        alone.collect(part)
    assert calibrator.save() == alone.save()
