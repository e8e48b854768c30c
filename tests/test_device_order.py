"""Copies and kernels of the device runtime are ordered by what is said between streams alone, never by chance: with streams that do nothing
before they must, or any of it at any time, everything is as with streams that do all at once. scripts/wait_mutants.py takes each wait away
and has these tests notice it; so they look at all that waits are for, quickly."""
import numpy as np
import pytest

import modelq
import modelq._core as core
import modelq.quantization as mtq
from cuda_arrays import CudaArray, device
from cuda_library import library_to_test, same_on_all_streams
from modelq import cuda

RNG = np.random.default_rng(0)
IDS = [RNG.integers(0, 200, (5, 14)) for _ in range(2)]
MASK = np.array([[1] * 14] * 2 + [[1] * 9 + [0] * 5] * 3)
SMALL, ENOUGH = 2_700_000, "64MiB"
pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


def passes(model):
    model(IDS[0], attention_mask=MASK)
    model(IDS[1])


def amax_of(model):
    return {name: np.asarray(quantizer.amax) for name, quantizer in model.quantizers.items() if getattr(quantizer, "amax", None) is not None}


@pytest.mark.filterwarnings("ignore:gptq. the Gram matrix")
@pytest.mark.parametrize("name, memory, config", [
    ("llama", SMALL, mtq.FP8_DEFAULT_CFG), ("qwen3moe", SMALL, mtq.FP8_DEFAULT_CFG), ("llama", ENOUGH, mtq.INT4_GPTQ_CFG),
    ("llama", ENOUGH, {**mtq.INT8_DEFAULT_CFG, "algorithm": "percentile"}), ("qwen3moe", ENOUGH, mtq.NVFP4_DEFAULT_CFG)], ids=["maxima", "experts", "grams", "histograms", "ahead"])
def test_calibration_and_evaluation(golden, monkeypatch, name, memory, config):
    def work():
        model = modelq.load(golden[name].source, compute="float32", device="cuda", device_memory=memory)
        before = model.loss(IDS)
        mtq.quantize(model, config, passes)
        return {**amax_of(model), "before": before, "loss": model.loss(IDS), "logits": np.asarray(model(IDS[0], attention_mask=MASK).logits)}
    same_on_all_streams(monkeypatch, work)


def test_weights_that_are_not_finite(golden, monkeypatch):
    """The last weight's maximum has come when it is looked at."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model = modelq.load(golden["llama"].source, compute="float32", device="cuda", device_memory=ENOUGH)
    read, name = model.checkpoint.read, "model.layers.1.mlp.down_proj.weight"

    def broken(wanted):
        tensor = np.array(read(wanted))
        if wanted == name:
            tensor[-1, -1] = np.nan
        return tensor
    monkeypatch.setattr(model.checkpoint, "read", broken)
    with pytest.raises(ValueError, match=f"{name} contains NaN"):
        model.loss(IDS)


STATIC = {"num_bits": 8, "axis": 0}
# what is found of each call's rows, in the workspace: INT8 by blocks, and NVFP4 whose tensor's scale is its own
FOUND = [{"num_bits": 8, "block_sizes": {-1: 16}, "type": "dynamic"},
         {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}]


def quantized_on(streams, quantizer, inputs):
    """Outputs of calls on one stream after the other; those of the first stream are waited for last."""
    arrays = [(CudaArray(values, current=stream), CudaArray(values * 0, current=stream)) for values, stream in zip(inputs, streams)]
    for (given, out), stream in zip(arrays, streams):
        core.cuda_quantize(cuda.library(), quantizer, given, out, stream)
    for stream in reversed(streams):
        device().call("stream_wait", device().place(stream))
    return {str(i): out.host for i, (_, out) in enumerate(arrays)}


@pytest.mark.parametrize("config", FOUND, ids=["int8", "nvfp4"])
def test_a_quantizers_workspace_on_two_streams(monkeypatch, config):
    """It is one, which is used by one stream behind the other. Of so many calls some are cut in two by streams that do any of their work at
    any time."""
    inputs = [np.random.default_rng(seed).standard_normal((8, 32)).astype(np.float32) * (seed % 7 + 1) for seed in range(60)]
    same_on_all_streams(monkeypatch, lambda: quantized_on([device().stream() for _ in range(2)] * 30, core.Quantizer(**config), inputs))


def test_a_quantizers_values_on_two_streams(monkeypatch):
    """What one stream has sent is there when another reads it, and again when it has changed."""
    inputs = [np.random.default_rng(seed).standard_normal((8, 32)).astype(np.float32) for seed in range(2)]

    def work():
        found, quantizer, streams = {}, core.Quantizer(**STATIC), [device().stream() for _ in range(2)]
        for factor in (1, 2):
            quantizer.amax = np.linspace(0.5, 1.5, 8, dtype=np.float32)[:, None] * factor
            quantizer.pre_quant_scale = np.linspace(1, 2, 32, dtype=np.float32) * factor
            found |= {f"{factor} {name}": value for name, value in quantized_on(streams, quantizer, inputs).items()}
        return found
    same_on_all_streams(monkeypatch, work)


def test_branches_of_low_rank(golden, monkeypatch):
    model = modelq.load(golden["llama"].source, compute="float32", device="cuda", device_memory=ENOUGH)
    mtq.quantize(model, mtq.NVFP4_SVDQUANT_DEFAULT_CFG, passes)
    same_on_all_streams(monkeypatch, lambda: {"loss": model.loss(IDS), "again": model.loss(IDS[:1])})
