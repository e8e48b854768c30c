"""The maxima of static blocks in a file: the same numbers, whoever asks for them."""
import mmap

import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import read_safetensors
from modelq import _core, parking
from modelq.export import export_hf_checkpoint

STATIC = {-1: 16, "type": "static", "scale_bits": (4, 3)}
random = np.random.default_rng(2)


def static_quantizer(x):
    quantizer = _core.Quantizer((2, 1), block_sizes=STATIC)
    quantizer.amax = _core.amax(x, block=(1, 16))
    return quantizer


def test_a_lent_amax_is_the_same():
    x = random.normal(size=(24, 64)).astype(np.float32)
    quantizer = static_quantizer(x)
    amax, before = quantizer.amax, quantizer(x)
    home = mmap.mmap(-1, 1 << 16)
    quantizer.lend(memoryview(home)[64:64 + 8 * amax.size])
    assert quantizer.is_lent and np.array_equal(np.frombuffer(home, np.float32, amax.size, 64).reshape(amax.shape), amax)
    assert np.array_equal(quantizer.amax, amax) and np.array_equal(quantizer(x), before)
    with pytest.raises(BufferError):
        home.close()
    quantizer.global_amax = 2 * amax.max()
    other = static_quantizer(x)
    other.global_amax = 2 * amax.max()
    assert not quantizer.is_lent and np.array_equal(quantizer(x), other(x))
    home.close()


@pytest.mark.parametrize("change", [lambda q: setattr(q, "amax", None), lambda q: setattr(q, "amax", np.ones((24, 4), np.float32))])
def test_another_amax_lets_the_memory_go(change):
    quantizer, home = static_quantizer(np.ones((24, 64), np.float32)), mmap.mmap(-1, 1 << 16)
    quantizer.lend(memoryview(home)[:8 * 96])
    change(quantizer)
    assert not quantizer.is_lent
    home.close()


def test_a_quantizer_that_goes_lets_the_memory_go():
    quantizer, home = static_quantizer(np.ones((24, 64), np.float32)), mmap.mmap(-1, 1 << 16)
    quantizer.lend(memoryview(home)[:8 * 96])
    del quantizer
    home.close()


def test_what_cannot_be_lent_is_refused():
    quantizer, home = static_quantizer(np.ones((24, 64), np.float32)), bytearray(8 * 96 + 1)
    for memory, error, words in ((bytearray(8 * 96 - 8), ValueError, "expected 768 aligned bytes"), (bytes(8 * 96), BufferError, "writable"),
                                 (memoryview(home)[1:], ValueError, "aligned"), (3, TypeError, "bytes-like")):
        with pytest.raises(error, match=words):
            quantizer.lend(memory)
    quantizer.lend(bytearray(8 * 96))
    with pytest.raises(ValueError, match="not lent yet"):
        quantizer.lend(bytearray(8 * 96))
    plain = _core.Quantizer((4, 3))
    plain.amax = 1.0
    with pytest.raises(ValueError, match="only the amax of static blocks"):
        plain.lend(bytearray(8))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_searched_model_is_the_same(golden, tmp_path, monkeypatch, name, compute):
    """Simulated, exported, and searched once more, of experts too."""
    if name not in golden:
        pytest.skip("not in the golden set")
    case, found = golden[name], []
    for kept in (1 << 40, 0):
        monkeypatch.setattr(parking, "KEPT", kept)
        monkeypatch.setattr(parking, "CHUNK", 1 << 16)
        model = modelq.load(case.source, compute=compute)
        logits = []
        for again in (False, True):
            if again:
                mtq.calibrate(model, "mse", lambda model: model(case.calib[:1]))
            else:
                mtq.quantize(model, mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, lambda model: model(case.calib[:1]))
            lent = [quantizer for quantizer in model.quantizers.values() if getattr(quantizer, "is_lent", False)]
            assert bool(lent) == (kept == 0)
            logits.append(np.asarray(model(case.calib[:1]).logits))
        export_hf_checkpoint(model, tmp_path / str(kept))
        found.append((logits, {slot: quantizer.amax for slot, quantizer in model.quantizers.items()}))
    (first, amax), (second, other) = found
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert all(np.array_equal(amax[slot], other[slot]) if amax[slot] is not None else other[slot] is None for slot in amax)
    ours, wanted = (read_safetensors(tmp_path / str(kept)) for kept in (0, 1 << 40))
    assert ours.keys() == wanted.keys() and all(ours[tensor].tobytes() == wanted[tensor].tobytes() for tensor in ours)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("changed", [False, True])
def test_what_is_undone_stays_where_it_lies(golden, monkeypatch, changed):
    """A second calibration that fails, before or behind new maxima: nothing is copied for it, and all is as it was, in the same memory."""
    case = golden["llama"]
    monkeypatch.setattr(parking, "KEPT", 0)
    monkeypatch.setattr(parking, "CHUNK", 1 << 16)
    model = modelq.load(case.source, compute="float32")
    mtq.quantize(model, mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, lambda model: model(case.calib[:1]))
    lent = {name: quantizer for name, quantizer in model.quantizers.items() if getattr(quantizer, "is_lent", False)}
    before = {name: (quantizer.amax, quantizer.global_amax, quantizer.home) for name, quantizer in lent.items()}
    logits, kept = np.asarray(model(case.calib[:1]).logits), []

    def keeping(quantizer, original=parking.kept_values):
        kept.append(original(quantizer))
        return kept[-1]

    def fails(*_):
        for quantizer in list(lent.values())[:3] if changed else ():
            quantizer.amax = quantizer.amax * 2
        raise KeyboardInterrupt
    monkeypatch.setattr(modelq.calibration, "kept_values", keeping)
    monkeypatch.setattr(modelq.calibration, "warn_unseen", fails)      # the last that there is
    with pytest.raises(KeyboardInterrupt):
        mtq.calibrate(model, "mse", lambda model: model(case.calib[1:2]))
    copies = [one for values in kept for one in values if one.home is not None]
    assert len(copies) == len(lent) == 14
    for one in copies:
        assert np.shares_memory(one.found.amax, np.asarray(one.home))
    for name, (amax, whole, home) in before.items():
        assert model.quantizers[name].home is home
        assert np.array_equal(model.quantizers[name].amax, amax) and np.array_equal(model.quantizers[name].global_amax, whole)
    np.testing.assert_array_equal(np.asarray(model(case.calib[:1]).logits), logits)


def test_where_an_amax_lies_is_said():
    quantizer, home = static_quantizer(np.ones((24, 64), np.float32)), bytearray(8 * 96)
    assert quantizer.home is None
    quantizer.lend(home)
    assert quantizer.home is home
    quantizer.amax = None
    assert quantizer.home is None


def test_a_full_disk_is_an_error(golden, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(parking, "KEPT", 0)
    monkeypatch.setattr(parking.os, "posix_fallocate", full)
    model = modelq.load(golden["llama"].source)
    with pytest.raises(OSError, match="No space left"):
        mtq.quantize(model, mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, lambda model: model(golden["llama"].calib[:1]))
