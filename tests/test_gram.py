"""H = X^T X against NumPy in float64: every micro-kernel, shapes that divide by nothing, blocks, merging, threads."""
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq._core as core
from modelq.calib import GramCalibrator

BF16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


def tokens(rows, width, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, width)) * np.exp(rng.standard_normal(width))).astype(np.float32).astype(dtype)


def gram_of(*batches, mask=None, **options):
    calibrator = GramCalibrator(**options)
    for batch in batches:
        calibrator.collect(batch, mask)
    return calibrator.compute_gram()


def reference(x):
    x = x.astype(np.float64).reshape(-1, x.shape[-1])
    return x.T @ x


def check(found, x):
    """Errors are of sums of products: relative to what the two channels' magnitudes allow."""
    wanted = reference(x)
    size = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert found.dtype == np.float32 and found.shape == wanted.shape
    np.testing.assert_array_equal(found, found.T)
    assert (np.abs(found - wanted) <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 17), (37, 100), (64, 576), (2049, 33), (8193, 48), (129, 1100)])
def test_against_float64(rows, width, dtype):
    x = tokens(rows, width, dtype)
    calibrator = GramCalibrator()
    calibrator.collect(x.reshape(1, rows, width))
    check(calibrator.compute_gram(), x)
    assert calibrator.count == rows


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(0, 2 ** 31), st.sampled_from([np.float32, BF16]), st.integers(1, 70))
def test_any_shape_whole_and_in_blocks(rows, width, seed, dtype, size):
    x = tokens(rows, width, dtype, seed)
    whole = gram_of(x)
    check(whole, x)
    blocks = gram_of(x, block_size=size)
    count = -(-width // size)
    assert blocks.shape == (count, size, size)
    padded = np.zeros((count * size,) * 2, np.float32)
    padded[:width, :width] = whole
    for i in range(count):
        np.testing.assert_array_equal(blocks[i], padded[i * size:(i + 1) * size, i * size:(i + 1) * size])


@pytest.mark.parametrize("width, options", [(200, {}), (200, {"block_size": 16}), (1500, {})])
def test_same_bits_for_every_number_of_threads_and_every_cut(width, options):
    """However many tokens come at a time, and however many threads work: the same order of tokens, the same bits."""
    x = tokens(9001, width)
    wanted = gram_of(x, **options)
    for threads, cuts in ((1, [100, 5000]), (2, [8192]), (3, [1, 8000, 8193])):
        core.set_threads(threads)
        np.testing.assert_array_equal(gram_of(*np.split(x, cuts), **options), wanted)


def test_masked_rows_count_nowhere():
    x = tokens(50, 40)
    mask = np.random.default_rng(1).integers(0, 2, 50)
    x[mask == 0] = np.nan
    np.testing.assert_array_equal(gram_of(x, mask=mask), gram_of(x[mask == 1]))
    assert gram_of(x, mask=np.zeros(50)) is None


@pytest.mark.parametrize("options", [{}, {"block_size": 16}])
def test_merge_save_and_load(options):
    x = tokens(700, 72)
    first, second, whole = (GramCalibrator(**options) for _ in range(3))
    first.collect(x[:300])
    second.collect(x[300:])
    whole.collect(x)
    restored = GramCalibrator(**options)
    restored.load(first.save())
    np.testing.assert_array_equal(restored.compute_gram(), first.compute_gram())
    restored.merge(second)
    assert restored.count == 700
    scale = np.abs(whole.compute_gram()).max()
    np.testing.assert_allclose(restored.compute_gram(), whole.compute_gram(), atol=1e-6 * scale)
    restored.reset()
    assert restored.compute_gram() is None and restored.count == 0
    with pytest.raises(ValueError, match="different kind, axis or option"):
        first.merge(GramCalibrator(block_size=8))
    with pytest.raises(ValueError, match="load"):
        whole.load(first.save()[:-8])


def test_long_sums_keep_their_precision():
    """Equal positive terms are the worst case of a running float32 sum: 2e5 of them would lose 1e-3."""
    x = np.full((1 << 18, 3), 1.0 + 2.0 ** -7, BF16)
    exact = (1 << 18) * (1.0 + 2.0 ** -7) ** 2
    assert np.abs(gram_of(x) / exact - 1).max() < 1e-4
    assert np.abs(gram_of(x.astype(np.float32)) / exact - 1).max() < 1e-4


def test_mixed_dtypes_and_bad_values():
    x, y = tokens(30, 20, BF16), tokens(30, 20, np.float32, 5)
    check(gram_of(x, y, x), np.concatenate([x.astype(np.float32), y, x.astype(np.float32)]))
    for value in (np.nan, np.inf, -np.inf):
        y[7, 13] = value
        with pytest.raises(ValueError, match="NaN or an infinity was seen in the activations of channel 13"):
            gram_of(y)
        with pytest.raises(ValueError, match="channel 13"):
            gram_of(y, block_size=8)
    calibrator = GramCalibrator()
    calibrator.collect(x)
    with pytest.raises(ValueError, match="20 channels, the data has 7"):
        calibrator.collect(x[:, :7])
    with pytest.raises(ValueError, match="finds no amax"):
        calibrator.statistics.compute_amax()
    with pytest.raises(ValueError, match="no Gram matrix"):
        core.Calibrator("max").compute_gram()


def test_every_allocation_may_fail(no_allocation_faults):
    x, mask = tokens(5000, 40, np.float32), np.arange(5000) % 7 > 0
    core.set_threads(1)
    calibrator = GramCalibrator()
    for n in range(1, 100):
        core._alloc_fail_at(n)
        try:
            calibrator.collect(x, mask)
            found = calibrator.compute_gram()
        except MemoryError:
            calibrator.reset()
            continue
        finally:
            core._alloc_fail_at(0)
        break
    assert n > 4
    np.testing.assert_array_equal(found, gram_of(x[mask]))
