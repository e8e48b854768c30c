"""Statistics on a device: what calibrators find there of what passes is what they find of a copy of it on the CPU, bit for bit where it is
counted and to rounding where it is added; and nothing is copied for them. The GPU is the emulated library's, as in test_device.py."""
import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from cuda_library import library_to_test
from modelq import calib, cuda, streaming
from modelq.inputs import make_batch

ENOUGH = "64MiB"
SMALL = 2_400_000
RNG = np.random.default_rng(3)
# More than a unit of the CPU's (512 rows), batches of several lengths, padding on both sides, and a batch that counts nowhere.
IDS = [RNG.integers(0, 200, (30, 20)), RNG.integers(0, 200, (2, 12)), RNG.integers(0, 200, (3, 33)), RNG.integers(0, 200, (1, 20))]
MASKS = [np.r_[[[0] * 20] * 3, [[1] * 20] * 24, [[0] * 5 + [1] * 15] * 3], np.array([[1] * 12, [1] * 7 + [0] * 5]), np.ones((3, 33), int),
         np.zeros((1, 20), int)]
BATCHES = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASKS)]


class Affine(calib._Calibrator):
    """What a KV cache's bias is found by, which has no name of its own outside."""


CALIBRATORS = {"histogram": calib.HistogramCalibrator, "few bins": lambda: calib.HistogramCalibrator(num_bins=16),
               "mean": calib.MeanCalibrator, "gram": calib.GramCalibrator, "mean of calls": lambda: calib.MeanCalibrator("modelopt"),
               "affine": lambda: Affine("affine"), "affine_max_min": lambda: Affine("affine_max_min"), "blocks": lambda: calib.GramCalibrator(16)}
TOGETHER = [["histogram", "few bins", "mean", "gram"], ["mean of calls", "affine", "affine_max_min", "blocks"]]     # what looks at batches apart


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


@pytest.fixture(params=["llama", "qwen3moe"])
def source(request, golden):
    if request.param not in golden:
        pytest.skip("not in this folder")
    return golden[request.param].source


def places_of(model):
    """One of each kind: read by siblings, behind attention and gates, outputs, q, k and v, and of all experts."""
    wanted = ("layers.1.self_attn.q_proj.input", "layers.0.self_attn.o_proj.input", "layers.0.mlp.gate_proj.input", "gate_up_proj_input",
              "down_proj.input", "down_proj_input",
              "layers.1.self_attn.v_proj.output", "layers.0.self_attn.q_bmm", "layers.1.self_attn.k_bmm", "layers.0.self_attn.v_bmm")
    return [name for name in model.slots if any(part in name for part in wanted)]


def seen(source, kinds, compute, host, memory=ENOUGH, batches=BATCHES):
    """({(place, kind): calibrator}, how many tensors were copied) of all batches."""
    model = modelq.load(source, compute=compute, device="cuda", device_memory=memory)
    if host:
        library = cuda.library()
        model.runtime.use_device(library, memory=model.placement.memory, cublas=cuda.cublas_path(library), host_statistics=True)
    places = places_of(model)
    assert len(places) >= 8
    found = {(place, kind): CALIBRATORS[kind]() for place in places for kind in kinds}
    for place in places:
        model.runtime.set_calibrator(place, [found[place, kind].statistics for kind in kinds])
    streaming.forward(model, [make_batch(model.vocab_size, batch) for batch in batches], "look")
    return found, model.runtime.device["copied"]


def compare(found, expected, dtype):
    assert found.keys() == expected.keys() and found
    for (place, kind), one in found.items():
        other, said = expected[place, kind], f"{place}: {kind}"
        assert one.count == other.count > 0, said
        if isinstance(one, calib.HistogramCalibrator):
            assert one.save() == other.save(), said
        elif isinstance(one, calib.GramCalibrator):
            gram = other.compute_gram()
            np.testing.assert_allclose(one.compute_gram(), gram, rtol=0, atol=1e-5 * np.abs(gram).max(), err_msg=said)
        elif isinstance(one, calib.MeanCalibrator):       # sums are float64: it is the last rounding that may differ
            np.testing.assert_allclose(one.compute_mean(), other.compute_mean(), rtol=2.0**-23, atol=0, err_msg=said)
        else:
            step = 2.0**-7 if dtype == "bfloat16" else 2.0**-22
            np.testing.assert_allclose(one.statistics.compute_bias(), other.statistics.compute_bias(), rtol=step, atol=1e-7, err_msg=said)
            np.testing.assert_allclose(one.statistics.compute_amax(), other.statistics.compute_amax(), rtol=step, err_msg=said)


@pytest.mark.parametrize("kinds", TOGETHER)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_calibrators(source, kinds, compute):
    (there, copied), (here, looked_at) = (seen(source, kinds, compute, host) for host in (False, True))
    assert copied == 0 < looked_at
    compare(there, here, compute)


def before_head(source, kinds, compute, memory=None, host=False):
    """Calibrators of what reaches lm_head, by all batches together and then by one alone; and how many tensors were copied."""
    model = modelq.load(source, compute=compute, **({"device": "cuda", "device_memory": memory} if memory is not None else {}))
    if host:
        library = cuda.library()
        model.runtime.use_device(library, memory=model.placement.memory, cublas=cuda.cublas_path(library), host_statistics=True)
    found = {("lm_head", kind): CALIBRATORS[kind]() for kind in kinds}
    model.runtime.set_calibrator("lm_head.input_quantizer", [found["lm_head", kind].statistics for kind in kinds])
    for batches in (BATCHES, BATCHES[2:3]):
        run = streaming.forward(model, [make_batch(model.vocab_size, batch) for batch in batches], "look")
        run.finish(streaming.head_tensors(model))
    return found, 0 if memory is None else model.runtime.device["copied"]


@pytest.mark.parametrize("kinds", TOGETHER)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("streams", ["at once", "late"])
def test_calibrators_before_lm_head(golden, monkeypatch, kinds, compute, streams):
    """... and in a device where its rows come in pieces that are none of the CPU's. Bit for bit where the device's hidden states are seen by
    the CPU; from the CPU's own forward they differ as two forwards do."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    source = golden["llama"].source
    here, looked_at = before_head(source, kinds, compute, ENOUGH, host=True)
    assert looked_at > 0
    there, copied = before_head(source, kinds, compute, ENOUGH)
    assert copied == 0
    compare(there, here, compute)
    small, copied = before_head(source, [kind for kind in kinds if kind != "histogram"], compute, SMALL)
    assert copied == 0
    compare(small, {key: one for key, one in here.items() if key in small}, compute)


def test_chunks_smaller_than_what_the_cpu_looks_at_in_one_call(golden):
    """A histogram's bins are as wide as the first 512 rows' values let them be, however many pieces these come in; and more batches pass than
    sums of single calls are kept on the device."""
    few = [{"input_ids": ids} for ids in RNG.integers(0, 200, (18, 4, 10))]
    for kinds in (["few bins"], ["mean of calls", "affine"]):
        (small, copied), (large, _) = (seen(golden["llama"].source, kinds, "float32", False, memory, few) for memory in (2_600_000, ENOUGH))
        assert copied == 0
        compare(small, large, "float32")


def test_little_room_on_the_device(golden):
    """Then it is the CPU that looks at a copy, with the same result."""
    (small, copied), (large, _) = (seen(golden["llama"].source, ["histogram"], "float32", False, memory) for memory in (2_600_000, ENOUGH))
    assert copied > 0
    compare(small, large, "float32")


# ---- whole calibrations ----

def config_of(preset, algorithm=None, *rules):
    config = getattr(mtq, preset)
    return {"quant_cfg": [*config["quant_cfg"], *rules], "algorithm": algorithm or config["algorithm"]}


HEAD = [{"quantizer_name": f"lm_head.{side}_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True} for side in ("weight", "input")]
CALIBRATIONS = {
    "lm_head": config_of("FP8_DEFAULT_CFG", None, *HEAD),
    "gptq of lm_head": {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *HEAD], "algorithm": "gptq"},
    "entropy": config_of("INT8_DEFAULT_CFG", "entropy"),
    "percentile": config_of("FP8_DEFAULT_CFG", {"method": "percentile", "percentile": 99.5, "num_bins": 512, "skip_zeros": True}),
    "mse of histograms": config_of("FP8_DEFAULT_CFG", {"method": "histogram", "range_method": "mse"}),
    "one histogram": config_of("INT8_DEFAULT_CFG", None, {"quantizer_name": "*down_proj*input_quantizer", "cfg": {
        "num_bits": 8, "axis": None, "calibrator": "histogram"}}),
    "smoothquant": config_of("INT8_SMOOTHQUANT_CFG"),
    "awq_lite": config_of("INT4_AWQ_CFG"), "awq_full": config_of("NVFP4_AWQ_FULL_CFG"), "awq_clip": config_of("NVFP4_AWQ_CLIP_CFG"),
    "local_hessian": config_of("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"), "mse": config_of("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
    "gptq": config_of("INT4_GPTQ_CFG"),
    "affine": config_of("FP8_DEFAULT_CFG", None, *mtq.FP8_AFFINE_KV_CFG["quant_cfg"]),
    "rotate": config_of("NVFP4_DEFAULT_CFG", ["rotate", "max"]),
}


def calibrated(source, config, device, compat=None, compute="float32"):
    model = modelq.load(source, compute=compute, **({"device": "cuda", "device_memory": ENOUGH} if device else {}))
    mtq.quantize(model, config, lambda model: [model(**batch) for batch in BATCHES[:3]], compat=compat)
    if device:
        assert model.runtime.device["copied"] == 0          # nothing was looked at on the CPU
    return model


def numbers_of(model):
    found = {}
    for name, quantizer in model.quantizers.items():
        for kind in ("amax", "bias", "pre_quant_scale"):
            if (value := getattr(quantizer, kind, None)) is not None:
                found[f"{name}.{kind}"] = np.asarray(value, np.float32)
    return found


@pytest.mark.filterwarnings("ignore:gptq", "ignore:experts that saw no token")
@pytest.mark.parametrize("name, what", [*(("llama", what) for what in CALIBRATIONS), ("qwen3moe", "entropy"), ("qwen3moe", "awq_clip"),
                                        ("qwen3moe", "gptq"), ("qwen3moe", "affine")])
def test_calibrations(golden, name, what):
    """Maxima, biases and smoothing are the CPU's, so searches chose what they choose there: an exponent of AWQ beside it would be tenths
    away. A histogram's range may be a bin away, of 2048 or 512, as a value at an edge may be; and of two scales that lose the same to six
    digits, a block may get the other."""
    if name not in golden:
        pytest.skip("not in this folder")
    here, there = (calibrated(golden[name].source, CALIBRATIONS[what], device) for device in (False, True))
    found, expected = numbers_of(there), numbers_of(here)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        bins = what in ("entropy", "percentile", "mse of histograms", "one histogram") and "input_quantizer" in name
        near = np.isclose(found[name], value, rtol=1e-2 if bins else 1e-5, atol=1e-6 if name.endswith("bias") else 0)
        assert near.mean() >= (0.995 if what in ("local_hessian", "mse", "awq_clip", "awq_full") and "weight" in name else 1), name
    for name, losses in here.search_losses.items():
        np.testing.assert_allclose(there.search_losses[name], losses, rtol=2e-3, atol=1e-6, err_msg=name)
        if np.ndim(losses):
            assert np.argmin(there.search_losses[name]) == np.argmin(losses), name
    assert there.loss(IDS[1:]) == pytest.approx(here.loss(IDS[1:]), rel=1e-3)


def test_awq_that_weighs_calls(golden):
    one, other = (numbers_of(calibrated(golden["llama"].source, mtq.INT4_AWQ_CFG, device, "modelopt")) for device in (False, True))
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)
