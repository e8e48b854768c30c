"""Whatever a device's runtime refuses, its first call, then its second, and so on, ends in an error that says what failed, leaves nothing
behind on the device or the host, and leaves the model usable with the same numbers; so does every allocation of ours on the way. The device
is the emulated library's, which can be told which call fails (mq_shim_fail_at). MODELQ_EVERY_FAULT=1 tries every one, else a sample."""
import ctypes
import gc
import os
import re

import numpy as np
import pytest

import modelq
import modelq._core as core
import modelq.quantization as mtq
from cuda_arrays import CudaArray
from cuda_library import library_to_test
from modelq.cuda import CudaUnavailable
from modelq.gradients import backward
from modelq.nn import TensorQuantizer
from test_backward import Scorer
from test_oom import every_allocation_fails

pytestmark = [pytest.mark.emulated, pytest.mark.filterwarnings("ignore:gptq. the Gram matrix")]
IDS = np.random.default_rng(0).integers(0, 200, (2, 6))
EVERY = os.environ.get("MODELQ_EVERY_FAULT") == "1"
SAID = (r"out of device memory: .* for |cuda[A-Z]\w+( of \d+ bytes from .*)?: |cublasLt\w+.*: |CUDA kernel \w+, grid .*: |"
        r"(pinned|host) memory")


# Histograms, and sums and bounds of channels by the batch.
STATISTICS = {"percentile": {**mtq.INT8_DEFAULT_CFG, "algorithm": "percentile"},
              "affine": {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *mtq.FP8_AFFINE_KV_CFG["quant_cfg"]]}}


# ... and those of what reaches lm_head.
HEAD = [{"quantizer_name": f"lm_head.{side}_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True} for side in ("weight", "input")]
STATISTICS["lm_head"] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *HEAD], "algorithm": "percentile"}


def config_of(preset):
    return STATISTICS.get(preset) or getattr(mtq, preset)


class Shim:
    """The hooks of cuda/shim/cuda_shim.h."""
    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        self.c.mq_shim_fail_at.restype, self.c.mq_shim_fail_at.argtypes = ctypes.c_uint64, [ctypes.c_uint64, ctypes.c_int]
        self.c.mq_shim_live.restype = ctypes.c_size_t

    def fail_at(self, n, persistent=False):
        return self.c.mq_shim_fail_at(n, persistent)

    def live(self):
        """Of the device, of cuBLASLt, and ours."""
        gc.collect()
        return self.c.mq_shim_live(), self.c.mq_shim_lt_live(), core._alloc_live()


@pytest.fixture
def shim(monkeypatch, no_allocation_faults):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    shim = Shim(library_to_test())
    yield shim
    shim.fail_at(0)


def every_call_fails(shim, operation, again, step):
    """operation() under a fault of each call, alone and with all behind it; again(result, n) looks at what it left: the operation's result,
    or None where it gave an error. The sample takes every step-th."""
    operation()         # what is made once is made
    for persistent in (False, True):
        n = 1 + persistent
        while True:
            shim.fail_at(n, persistent)
            try:
                result = operation()
            except (MemoryError, RuntimeError, CudaUnavailable) as error:
                result = None
                assert re.search(SAID, str(error)), f"call {n}: {error!r}"
            seen = shim.fail_at(0)
            again(result, n)
            if seen < n:
                break
            n += 1 if EVERY else step
        assert result is not None and n > (100 if EVERY else 4 * step)
    return n


def loaded(source, **options):
    return modelq.load(source, compute="float32", device="cuda", device_memory=options.pop("memory", "64MiB"), **options)


def amax_of(model):
    return {name: np.asarray(quantizer.amax) for name, quantizer in model.quantizers.items() if getattr(quantizer, "amax", None) is not None}


@pytest.mark.parametrize("name, preset, streams, step", [
    ("llama", "FP8_DEFAULT_CFG", "late", 23), ("llama", "INT4_GPTQ_CFG", "at once", 47), ("llama", "NVFP4_SVDQUANT_DEFAULT_CFG", "late", 181),
    ("qwen3moe", "FP8_DEFAULT_CFG", "late", 89), ("llama", "percentile", "late", 97), ("llama", "affine", "at once", 97),
    ("llama", "lm_head", "late", 31)])
def test_load_calibrate_evaluate_and_drop(shim, golden, monkeypatch, name, preset, streams, step):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    before, expected = shim.live(), None

    def operation():
        model = loaded(golden[name].source)
        try:
            mtq.quantize(model, config_of(preset), lambda model: model(IDS))
        except (MemoryError, RuntimeError):
            assert not model.quantized and not model.quantizers
            raise
        return amax_of(model), model.loss([IDS])

    def again(result, n):
        assert shim.live() == before, f"call {n} failed, and something was left behind"
        if result is None:
            return
        for quantizer, value in expected[0].items():        # sums on the host, where a device had no room for them, are in another order
            np.testing.assert_allclose(result[0][quantizer], value, rtol=1e-6, err_msg=f"{quantizer}, call {n}")
        assert result[1] == pytest.approx(expected[1], rel=1e-5)
    expected = operation()
    every_call_fails(shim, operation, again, step)
    amax, loss = operation()
    assert loss == expected[1] and all(np.array_equal(amax[name], expected[0][name]) for name in expected[0])


@pytest.mark.parametrize("memory", ["64MiB", 2_700_000])
def test_a_model_goes_on(shim, golden, memory):
    """The same model after each fault, and with the same numbers; in a small device all comes in pieces."""
    model = loaded(golden["llama"].source, memory=memory)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(IDS))
    expected, live = model.loss([IDS]), shim.live()

    def again(result, n):
        assert result in (None, expected), f"call {n}"
        assert model.loss([IDS]) == expected, f"after call {n}"
        assert shim.live() == live, f"after call {n}"
    assert every_call_fails(shim, lambda: model.loss([IDS]), again, step=23) > 100


@pytest.mark.parametrize("persistent", [False, True])
def test_memory_that_is_freed_is_not_pinned(shim, golden, monkeypatch, persistent):
    """The last calls of a run are about memory that its owner then frees: it is unpinned, and nothing is on its way to it, whichever fails.
    (The emulated runtime ends the process where a copy runs behind that.)"""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model = loaded(golden["llama"].source)
    model.loss([IDS])
    expected, live = model.loss([IDS]), shim.live()[0]
    shim.fail_at(1 << 40)
    model.loss([IDS])
    calls = shim.fail_at(0)
    for n in range(calls - 12, calls + 1):
        shim.fail_at(n, persistent)
        try:
            assert model.loss([IDS]) == expected
        except (MemoryError, RuntimeError) as error:
            assert re.search(SAID, str(error)), f"call {n}: {error!r}"
        shim.fail_at(0)
        assert shim.live()[0] <= live, f"call {n} of {calls} failed, and memory stayed pinned"
    assert model.loss([IDS]) == expected and shim.live()[0] == live


def test_a_calibration_that_failed_left_nothing(shim, golden):
    """Statistics that were under way on the device are not those of the next calibration."""
    def calibrated(model):
        mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, lambda model: [model(IDS), model(IDS[:1] + 1)])
        return amax_of(model)
    model, expected = loaded(golden["llama"].source), calibrated(loaded(golden["llama"].source))
    for n in (60, 100, 150):
        shim.fail_at(n)
        with pytest.raises((MemoryError, RuntimeError), match=SAID):
            calibrated(model)
        shim.fail_at(0)
        assert not model.quantized
    found = calibrated(model)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


class Observed(Scorer):
    """... whose observers are taken away whatever happened."""

    def leave_none(self):
        for name in [name for observers in self.at.values() for name in observers[0]]:
            self.model.runtime.set_observer(name, None)


@pytest.mark.parametrize("memory, streams", [("64MiB", "late"), pytest.param(2_800_000, "at once", marks=pytest.mark.slow)])
def test_scores(shim, golden, monkeypatch, memory, streams):
    """Of linears and experts, on the same model after each fault: what had been added up is in no score of the next time."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    source = golden["qwen3moe"].source
    model, candidates = loaded(source, memory=memory), [modelq.load(source, compute="float32") for _ in range(2)]
    mtq.quantize(candidates[0], mtq.INT8_DEFAULT_CFG, lambda model: model(IDS))

    def operation():
        scorer = Observed(model, candidates)
        try:
            backward(model, [{"input_ids": np.concatenate([IDS] * 6)}], visitor=scorer)
        finally:
            scorer.leave_none()
        return scorer.scores
    expected = operation()
    live = shim.live()

    def again(result, n):
        if result is not None:      # some of it may have been the CPU's
            for module, (score, nothing) in expected.items():
                np.testing.assert_allclose(result[module], [score, 0], rtol=5e-3, atol=1e-9 * score, err_msg=f"{module}, call {n}")
    assert {module: nothing for module, (_, nothing) in expected.items() if nothing} == {}
    assert all(score > 0 for module, (score, _) in expected.items() if "mlp.experts" in module or "_proj" in module)
    every_call_fails(shim, operation, again, 379)
    found = operation()
    assert all(np.array_equal(found[module], scores) for module, scores in expected.items()) and shim.live() == live


def test_late_errors_are_said_when_somebody_waits(shim, golden, monkeypatch):
    """A kernel that fails when its stream gets to it: whoever waits for the stream gets the error, and the rows are not taken for right."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model = loaded(golden["llama"].source)
    expected = model.loss([IDS])
    for launch in (1, 7, 20, 40):
        shim.c.mq_shim_fail_launch(launch, 719)
        with pytest.raises(RuntimeError, match="cudaStreamSynchronize: .*cudaErrorLaunchFailure"):
            model.loss([IDS])
        assert model.loss([IDS]) == expected


# ---- allocations on the host ----

@pytest.mark.parametrize("name, preset, step", [("llama", "FP8_DEFAULT_CFG", 7), ("llama", "INT4_GPTQ_CFG", 23), ("qwen3moe", "FP8_DEFAULT_CFG", 31),
                                                ("llama", "percentile", 31), ("llama", "affine", 31)])
def test_every_allocation_of_a_calibration(shim, golden, name, preset, step):
    before = shim.live()[:2]

    def operation():
        model = loaded(golden[name].source)
        try:
            mtq.quantize(model, config_of(preset), lambda model: model(IDS))
        except MemoryError:
            assert not model.quantized and not model.quantizers
            raise
        return {**amax_of(model), "loss": model.loss([IDS])}
    every_allocation_fails(operation, at_least=40, step=1 if EVERY else step, does_without=True)       # what is made ahead of its turn
    assert shim.live()[:2] == before


def test_every_allocation_of_an_evaluation(shim, golden):
    model = loaded(golden["llama"].source)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(IDS))
    expected, live = model.loss([IDS]), shim.live()
    for persistent in (False, True):
        n = 1
        while True:
            core._alloc_fail_at(n, persistent)
            try:
                found = model.loss([IDS])
            except MemoryError:
                found = None
            seen = core._alloc_fail_at(0)
            assert found in (None, expected) and model.loss([IDS]) == expected and shim.live() == live, f"after allocation {n}"
            if seen < n:
                break
            n += 1 if EVERY else 3
        assert found is not None and n > 10


# ---- arrays ----

@pytest.mark.parametrize("config", [{"num_bits": 8, "axis": -1}, {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic",
                                                                                                    "scale_bits": (4, 3)}}])
def test_quantizers_of_arrays(shim, config):
    x, live = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32), None

    def operation():
        quantizer = TensorQuantizer(config, if_quant=False, if_calib=True)
        quantizer.pre_quant_scale = np.linspace(0.5, 2, 64, dtype=np.float32)
        quantizer(CudaArray(x))
        quantizer.disable_calib()
        quantizer.enable_quant()
        quantizer.load_calib_amax()
        return quantizer(CudaArray(x)).host.tobytes(), quantizer.gradient(CudaArray(x), CudaArray(x)).host.tobytes()
    expected, live = operation(), shim.live()

    def again(result, n):
        assert result in (None, expected)
        assert shim.live() == live, f"call {n} failed, and something was left behind"
    every_call_fails(shim, operation, again, step=3)
