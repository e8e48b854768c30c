"""Histogram calibrators: against Model Optimizer's own (tests/data/histogram), and against twins of the formulas in NumPy."""
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq._core as core
from modelq.calib import HistogramCalibrator

DATA = Path(__file__).parent / "data" / "histogram"
sys.path.insert(0, str(DATA))
from cases import CASES, batches_of  # noqa: E402

EXPECTED = json.loads((DATA / "expected.json").read_text())["cases"]


def collected(batches, **options) -> HistogramCalibrator:
    calibrator = HistogramCalibrator(**options)
    for batch in batches:
        calibrator.collect(batch)
    return calibrator


@pytest.mark.parametrize("name", CASES)
def test_as_model_optimizer(name):
    calibrator, expected = collected(batches_of(name), **CASES[name][0]), EXPECTED[name]
    counts, edges = calibrator.histogram
    assert len(counts) == expected["bins"] and counts.sum() == sum(b.size for b in batches_of(name))
    assert edges[-1] == pytest.approx(expected["top"], rel=1e-6)
    assert calibrator.compute_amax("entropy") == pytest.approx(expected["entropy"], rel=1e-6)
    assert calibrator.compute_amax("entropy", stride=16, start_bin=256) == pytest.approx(expected["entropy_coarse"], rel=1e-6)
    assert calibrator.compute_amax("percentile") == pytest.approx(expected["percentile"], rel=1e-6)
    assert calibrator.compute_amax("percentile", percentile=99.0) == pytest.approx(expected["percentile_99"], rel=1e-6)


# ---- twins in NumPy, straight from the definitions ----

def twin_entropy(counts, width, bits, stride=1, start=128):
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    best, amax, levels = np.inf, None, 1 << bits - 1
    for bins in range(start, len(counts) + 1, stride):
        level = np.searchsorted(np.linspace(0, bins, levels + 1), np.arange(bins), "right") - 1
        filled = counts[:bins] > 0
        total, number = (np.bincount(level[filled], w, levels) for w in (counts[:bins][filled], None))
        q = np.where(filled, (total / np.maximum(number, 1))[level], 0)
        p = counts[:bins].copy()
        p[-1] += counts[bins:].sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, p / p.sum() * np.log((p / p.sum()) / (q / q.sum())), 0)
        if terms.sum() <= best:
            best, amax = terms.sum(), bins * width
    return amax


def twin_mse(counts, width, quantize, start=128, stride=1):
    centres = (np.arange(len(counts)) + 0.5) * width
    errors = {i: ((quantize(centres, centres[i]) - centres) ** 2 * counts).sum() for i in range(start, len(counts), stride)}
    return errors, centres


def integers(bits, unsigned=False):
    high = 2 ** (bits - 1 + unsigned) - 1
    return lambda x, amax: np.round(np.minimum(x * (high / amax), high)) * (amax / high)


def e4m3(x, amax):
    return np.minimum(x * (448 / amax), 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * (amax / 448)


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_is_the_least_divergence(bits):
    calibrator = collected(batches_of("float32"), num_bits=bits, num_bins=512)
    counts, edges = calibrator.histogram
    assert calibrator.compute_amax("entropy") == pytest.approx(twin_entropy(counts, edges[1], bits), rel=1e-6)
    assert calibrator.compute_amax("entropy", start_bin=100, stride=7) == pytest.approx(twin_entropy(counts, edges[1], bits, 7, 100), rel=1e-6)


@pytest.mark.parametrize("bits, unsigned, quantize", [(8, False, integers(8)), (4, False, integers(4)), (4, True, integers(4, True)),
                                                      ((4, 3), False, e4m3)])
def test_mse_is_the_least_error(bits, unsigned, quantize):
    calibrator = collected(batches_of("bfloat16_growing"), num_bits=bits, unsigned=unsigned, num_bins=512)
    counts, edges = calibrator.histogram
    errors, centres = twin_mse(counts, edges[1], quantize)
    amax = calibrator.compute_amax("mse")
    chosen = int(np.argmin(np.abs(centres - amax)))
    assert amax == pytest.approx(centres[chosen], rel=1e-6)
    assert errors[chosen] <= min(errors.values()) * (1 + 1e-4)
    assert bits != 4 or amax < 0.7 * edges[-1]                 # four bits are better off without the tail


def test_percentile_edges():
    x = np.arange(1, 2049, dtype=np.float32)[None] - 0.5       # one value to a bin of width 2047.5 / 2048, nearly
    calibrator = collected([x])
    counts, edges = calibrator.histogram
    for percentile in (0.0, 25.0, 50.0, 99.0):
        assert calibrator.compute_amax("percentile", percentile=percentile) == \
            pytest.approx(edges[np.searchsorted(np.cumsum(counts / counts.sum()), percentile / 100)])
    assert edges[-2] <= calibrator.compute_amax("percentile", percentile=100.0) <= edges[-1] * (1 + 1e-6)


# ---- the counts ----

@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_counts_are_numpys(dtype):
    x = (np.random.default_rng(3).standard_normal((64, 100)) * 4).astype(dtype)
    counts, edges = collected([x], num_bins=256).histogram
    wanted, _ = np.histogram(np.abs(x.astype(np.float64)), bins=edges)
    assert counts.sum() == x.size == wanted.sum()
    assert np.abs(np.cumsum(counts) - np.cumsum(wanted)).max() <= counts.max() / 16   # those beside an edge, at the most
    assert edges[-1] == pytest.approx(np.abs(x.astype(np.float64)).max(), rel=1e-6)


def test_bfloat16_counts_are_exact_above_the_lowest_bins():
    """Not only in sum: each bin of 2048 but the first nine holds exactly the values that belong there."""
    x = (np.random.default_rng(4).standard_normal((512, 64)) * 3).astype(ml_dtypes.bfloat16)
    counts, edges = collected([x]).histogram
    magnitudes = np.abs(x.astype(np.float64)).ravel()
    wanted = np.bincount(np.minimum(magnitudes / edges[1], 2047).astype(int), minlength=2048)
    np.testing.assert_array_equal(counts[9:], wanted[9:])
    assert counts[:9].sum() == wanted[:9].sum()


halves = st.lists(st.tuples(st.integers(0, 2 ** 32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1.7, 300.0, 1e30]), st.integers(1, 9)), min_size=2, max_size=5)


@settings(max_examples=30, deadline=None)
@given(halves, st.data())
def test_halves_merge_to_the_whole_exactly(parts, data):
    batches = [(np.random.default_rng(seed).standard_normal((rows, 33)) * scale).astype(np.float32) for seed, scale, rows in parts]
    cut = data.draw(st.integers(1, len(batches) - 1))
    whole, first, second = collected(batches), collected(batches[:cut]), collected(batches[cut:])
    first.merge(second)
    assert first.count == whole.count and first.save()[:32] == whole.save()[:32]
    np.testing.assert_array_equal(first.histogram[0], whole.histogram[0])
    np.testing.assert_array_equal(first.histogram[1], whole.histogram[1])
    other = HistogramCalibrator()
    other.load(first.save())
    np.testing.assert_array_equal(other.histogram[0], whole.histogram[0])
    assert other.compute_amax("percentile") == whole.compute_amax("percentile")


def test_growth_is_bounded():
    calibrator = collected([np.full((4, 8), 1e-6, np.float32), np.linspace(0, 1000, 4096, dtype=np.float32)[None]])
    counts, edges = calibrator.histogram
    assert len(counts) <= 16 * 2048 and edges[-1] == pytest.approx(1000, rel=1e-3) and counts.sum() == 4096 + 32
    assert 0 < calibrator.compute_amax("entropy") <= 1001


def test_zeros_masks_and_what_is_not_finite():
    x = np.random.default_rng(1).standard_normal((6, 40)).astype(np.float32)
    x[0, :7], x[4] = 0.0, np.nan
    mask = np.array([1, 1, 1, 1, 0, 1])
    calibrator = HistogramCalibrator(skip_zeros=True)
    calibrator.collect(x, mask)
    assert calibrator.count == 5 and calibrator.histogram[0].sum() == 200 - 7
    assert calibrator.statistics.histogram()[0].sum() == 200
    assert calibrator.statistics.compute_amax() == np.abs(x[mask > 0]).max()
    calibrator.collect(np.full((1, 40), -np.inf, np.float32))
    for method in ("entropy", "mse", "percentile"):
        with pytest.raises(ValueError, match="an infinity was seen"):
            calibrator.compute_amax(method)
    calibrator.collect(x)
    with pytest.raises(ValueError, match="NaN was seen"):
        calibrator.compute_amax("entropy")
    calibrator.reset()
    assert calibrator.compute_amax("entropy") is None and calibrator.histogram is None
    zeros = collected([np.zeros((3, 4), np.float32)])
    assert zeros.compute_amax("entropy") == zeros.compute_amax("mse") == 0.0 and zeros.histogram[0].sum() == 12


@pytest.mark.parametrize("arguments, words", [
    ({"method": "median"}, "unknown method 'median'"), ({"method": "percentile", "percentile": 101.0}, "between 0 and 100"),
    ({"method": "percentile", "percentile": float("nan")}, "between 0 and 100"), ({"method": "entropy", "start_bin": 4096}, "beyond the 2048 bins"),
    ({"method": "mse", "start_bin": 2048}, "beyond the 2048 bins"), ({"method": "mse", "stride": 0}, "at least 1")])
def test_arguments_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        collected([np.ones((2, 2), np.float32)]).compute_amax(**arguments)


def test_what_there_is_not():
    with pytest.raises(NotImplementedError, match="per tensor"):
        HistogramCalibrator(axis=0)
    with pytest.raises(ValueError, match="num_bits"):
        HistogramCalibrator(num_bits=(5, 2))
    with pytest.raises(ValueError, match="num_bins"):
        HistogramCalibrator(num_bins=1)
    with pytest.raises(ValueError, match="entropy: num_bits"):
        collected([np.ones((2, 2), np.float32)], num_bits=(4, 3)).compute_amax("entropy")
    with pytest.raises(ValueError, match="has no histogram"):
        core.Calibrator("max").compute_range("entropy")
    state = collected([np.ones((2, 2), np.float32)]).save()
    for damaged in (state[:-8], state + b"\0" * 8, state[:72] + b"\xff" * 8 + state[80:]):
        with pytest.raises(ValueError, match="load"):
            HistogramCalibrator().load(damaged)
