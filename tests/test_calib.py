"""Calibrators by hand: maxima, means, arrays of several frameworks, and what is refused."""
import json

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core
from modelq.calib import GramCalibrator, HistogramCalibrator, MaxCalibrator, MeanCalibrator
from test_runtime import FAMILIES, Source

BF16 = ml_dtypes.bfloat16
ALL = [MaxCalibrator, HistogramCalibrator, GramCalibrator, MeanCalibrator, lambda: MaxCalibrator(axis=-1), lambda: MeanCalibrator("modelopt"),
       lambda: GramCalibrator(16), lambda: HistogramCalibrator(num_bins=100)]


class Dlpack:
    """A producer of DLPack that is no NumPy array."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -2, (1,)])
def test_max_over_any_axis(axis):
    x = normal(3, 5, 8)
    calibrator = MaxCalibrator(axis=axis, track_amax=True)
    calibrator.collect(x[:, :, :].copy())
    calibrator.collect(Dlpack(x * 2 if axis is None else x))
    kept = axis[0] if isinstance(axis, tuple) else axis
    wanted = np.abs(x).max() * 2 if axis is None else np.abs(x).max(tuple(i for i in range(3) if i != kept % 3))
    np.testing.assert_array_equal(calibrator.compute_amax(), wanted)
    assert len(calibrator.amaxs) == 2
    calibrator.reset()
    assert calibrator.compute_amax() is None and calibrator.amaxs == []


def test_max_refuses():
    with pytest.raises(ValueError, match="axis 2 of an array of shape"):
        MaxCalibrator(axis=2).collect(normal(2, 3))
    with pytest.raises(ValueError, match="a mask goes with"):
        MaxCalibrator(axis=0).collect(normal(2, 3), np.ones(2))
    with pytest.raises(ValueError, match="one axis or None"):
        MaxCalibrator(axis=(0, 1))
    calibrator = MaxCalibrator(axis=-1)
    calibrator.collect(normal(2, 3))
    with pytest.raises(ValueError, match="3 channels, the data has 4"):
        calibrator.collect(normal(2, 4))
    calibrator.collect(np.array([[1, np.nan, 3]], np.float32))
    with pytest.raises(ValueError, match="NaN was seen"):
        calibrator.compute_amax()


def test_mean_weighs_by_tokens_or_by_calls():
    batches = [normal(40, 24, dtype=BF16), normal(3, 24, dtype=BF16, seed=1) * BF16(9)]
    plain, calls = MeanCalibrator(), MeanCalibrator(compat="modelopt")
    for batch in batches:
        plain.collect(batch)
        calls.collect(batch)
    exact = np.abs(np.concatenate(batches).astype(np.float64)).mean(0)
    np.testing.assert_allclose(plain.compute_mean(), exact, rtol=1e-6)
    rounded = [np.abs(batch.astype(np.float64)).mean(0).astype(np.float32).astype(BF16).astype(np.float64) for batch in batches]
    np.testing.assert_allclose(calls.compute_mean(), np.mean(rounded, axis=0), rtol=1e-6)
    assert np.abs(plain.compute_mean() / calls.compute_mean() - 1).max() > 0.5


def test_mean_masks_and_bad_values():
    x = normal(10, 6)
    x[3] = np.nan
    calibrator = MeanCalibrator()
    calibrator.collect(x, np.arange(10) != 3)
    np.testing.assert_allclose(calibrator.compute_mean(), np.abs(np.delete(x, 3, 0).astype(np.float64)).mean(0), rtol=1e-6)
    x[3] = 0
    x[2, 4] = np.inf
    calibrator.collect(x)
    with pytest.raises(ValueError, match="channel 4"):
        calibrator.compute_mean()
    with pytest.raises(ValueError, match="compat"):
        MeanCalibrator(compat="torch")


def result(calibrator):
    for name in ("compute_gram", "compute_mean"):
        if hasattr(calibrator, name):
            return getattr(calibrator, name)()
    return calibrator.compute_amax("percentile") if isinstance(calibrator, HistogramCalibrator) else calibrator.compute_amax()


@pytest.mark.parametrize("make", ALL)
def test_one_interface(make):
    """save, load, merge, reset and DLPack of every class; statistics of two halves are those of the whole."""
    x = normal(60, 32)
    whole, first, second, copied = make(), make(), make(), make()
    assert result(whole) is None and whole.count == 0
    whole.collect(x[:30])
    whole.collect(x[30:])
    first.collect(Dlpack(x[:30]))
    second.collect(x[30:].reshape(5, 6, 32))
    first.merge(second)
    np.testing.assert_allclose(result(first), result(whole), rtol=1e-5, atol=1e-5)
    copied.load(first.save())
    np.testing.assert_array_equal(result(copied), result(first))
    assert copied.count == first.count == whole.count == 60 and "60" in repr(copied)
    copied.collect(np.zeros((0, 32), np.float32))
    assert copied.count == 60
    copied.reset()
    assert result(copied) is None and copied.save() == make().save()
    empty = make()
    empty.load(make().save())
    first.merge(empty)
    assert first.count == 60
    for damaged in (b"", b"x" * 100, first.save()[:-3]):
        with pytest.raises(ValueError, match="load"):
            empty.load(damaged)


def test_kinds_do_not_mix():
    with pytest.raises(TypeError, match="expected a MaxCalibrator"):
        MaxCalibrator().merge(MeanCalibrator())
    with pytest.raises(ValueError, match="different kind"):
        MaxCalibrator().merge(MaxCalibrator(axis=-1))
    with pytest.raises(ValueError, match="kind max"):
        MeanCalibrator().load(MaxCalibrator().save())
    for kind, axis, option in (("histogram", -1, 0), ("histogram", None, 1), ("max", None, 1), ("gram", None, -1), ("mean_abs", None, 2)):
        with pytest.raises(ValueError, match="Calibrator: "):
            core.Calibrator(kind, axis, option)
    with pytest.raises(ValueError, match="there are: max, affine, affine_max_min, mean_abs, histogram, gram$"):
        core.Calibrator("median")


# ---- in a model ----

def embedded(source, ids):
    """What reaches layer 0's q, k and v: the norm of the embeddings, float32 [tokens, C]."""
    config = json.loads((source.folder / "config.json").read_text())
    x = source.tensors["model.embed_tokens.weight"].astype(np.float64)[ids].reshape(-1, config["hidden_size"])
    x /= np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
    return (x * source.tensors["model.layers.0.input_layernorm.weight"].astype(np.float64)).astype(np.float32)


def collect_in_model(source, ids, masks, kinds, linears=("self_attn.q_proj", "mlp.down_proj")):
    """{linear: calibrators at its input in layer 0}, all kinds on each."""
    found = {linear: [core.Calibrator(*kind) for kind in kinds] for linear in linears}
    for linear, calibrators in found.items():
        source.runtime.set_calibrator(f"model.layers.0.{linear}.input_quantizer", calibrators)
    run = source.start(ids, masks)
    source.load(0)
    run.layer(0)
    return found


KINDS = [("max", -1), ("histogram",), ("gram",), ("mean_abs", None, 1)]


def test_several_kinds_at_one_site_see_what_reaches_it():
    source, rng = Source(FAMILIES / "llama3"), np.random.default_rng(1)
    ids = [rng.integers(0, 64, shape) for shape in ((3, 20), (2, 700), (9, 3))]
    masks = [np.arange(i.shape[1]) >= rng.integers(0, i.shape[1] // 2 + 1, i.shape[0])[:, None] for i in ids]
    highest, histogram, gram, mean = collect_in_model(source, ids, masks, KINDS)["self_attn.q_proj"]
    batches = [embedded(source, i)[m.ravel()] for i, m in zip(ids, masks)]
    x = np.concatenate(batches)
    assert {c.count for c in (highest, histogram, gram, mean)} == {len(x)}
    np.testing.assert_allclose(highest.compute_amax(), np.abs(x).max(0), rtol=1e-5)
    assert histogram.histogram()[0].sum() == x.size and histogram.compute_amax() == highest.compute_amax().max()
    np.testing.assert_allclose(gram.compute_gram(), x.T @ x, atol=1e-5 * np.abs(x.T @ x).max())
    np.testing.assert_allclose(mean.compute_amax(), np.mean([np.abs(b).mean(0) for b in batches], axis=0), rtol=1e-5)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_statistics_in_a_model_do_not_depend_on_threads(compute):
    """Enough rows for several settlements; also one batch or many, which only the mean of calls tells apart."""
    source, rng = Source(FAMILIES / "mistral", compute), np.random.default_rng(2)
    ids = rng.integers(0, 64, (300, 64))
    masks = rng.integers(0, 4, ids.shape) > 0
    states = set()
    try:
        for threads, cut in ((1, [100]), (2, [100]), (3, [1, 2, 290])):
            core.set_threads(threads)
            found = collect_in_model(source, np.split(ids, cut), np.split(masks, cut), [("max", -1), ("histogram",), ("gram",), ("mean_abs",)])
            states.add(tuple(calibrator.save() for calibrators in found.values() for calibrator in calibrators))
    finally:
        core.set_threads(0)
    assert len(states) == 1


def test_set_calibrator_takes_several():
    runtime, point = Source(FAMILIES / "llama3").runtime, "model.layers.0.mlp.up_proj.input_quantizer"
    runtime.set_calibrator(point, [core.Calibrator(), core.Calibrator("gram")])
    runtime.set_calibrator(point, ())
    with pytest.raises(ValueError, match="room for 4"):
        runtime.set_calibrator(point, [core.Calibrator()] * 5)
    with pytest.raises(TypeError, match="expected a Calibrator"):
        runtime.set_calibrator(point, [core.Calibrator(), 3])


def test_observe_shows_what_comes_to_quantizers(golden):
    import modelq
    import modelq.quantization as mtq
    from modelq.calib import observe

    llama, name = golden["llama"], "model.layers.1.mlp.down_proj.input_quantizer"
    model = modelq.load(llama.source)
    seen = {name: MaxCalibrator(), "model.layers.0.self_attn.k_bmm_quantizer": HistogramCalibrator()}
    mask = np.ones_like(llama.calib[:2])
    mask[0, 5:] = 0
    observe(model, [llama.calib[2:], {"input_ids": llama.calib[:2], "attention_mask": mask}], seen)
    assert seen[name].count == llama.calib[2:].size + mask.sum()
    before = seen[name].compute_amax()
    model(llama.calib).logits       # nobody looks any more
    assert seen[name].compute_amax() == before and seen[name].count == llama.calib[2:].size + mask.sum()
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: [model(llama.calib[2:]), model(llama.calib[:2], mask)])
    assert float(model.quantizers[name].amax) == before
    for batches, calibrators, error in (([llama.calib], {"model.nothing": MaxCalibrator()}, KeyError), ([], seen, ValueError)):
        with pytest.raises(error):
            observe(model, batches, calibrators)
    with pytest.raises(TypeError, match="expected a model from modelq.load"):
        observe("model", [llama.calib], seen)
