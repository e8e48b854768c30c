"""Statistics on a device: what calibrators find there of what passes is what they find of a copy of it on the CPU, bit for bit where it is
counted and to rounding where it is added; and nothing is copied for them. The GPU is the emulated library's, as in test_device.py."""
import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from cuda_library import library_to_test
from golden_data import read_safetensors
from modelq import _core, calib, cuda
from modelq.calibration.gptq import Gptq
from modelq.export import export_hf_checkpoint

ENOUGH = "64MiB"
RNG = np.random.default_rng(3)
# More than a unit of the CPU's (512 rows), batches of several lengths, padding on both sides, and a batch that counts nowhere.
IDS = [RNG.integers(0, 200, (30, 20)), RNG.integers(0, 200, (2, 12)), RNG.integers(0, 200, (3, 33)), RNG.integers(0, 200, (1, 20))]
MASKS = [np.r_[[[0] * 20] * 3, [[1] * 20] * 24, [[0] * 5 + [1] * 15] * 3], np.array([[1] * 12, [1] * 7 + [0] * 5]), np.ones((3, 33), int),
         np.zeros((1, 20), int)]
BATCHES = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASKS)]
CALIBRATORS = {"histogram": lambda: calib.HistogramCalibrator(), "few bins": lambda: calib.HistogramCalibrator(num_bins=16),
               "mean": lambda: calib.MeanCalibrator(), "mean of calls": lambda: calib.MeanCalibrator("modelopt"),
               "maxima": lambda: calib.MaxCalibrator(axis=-1), "gram": lambda: calib.GramCalibrator(),
               "blocks": lambda: calib.GramCalibrator(16)}


class Affine(calib._Calibrator):
    pass


for kind in ("affine", "affine_max_min"):
    CALIBRATORS[kind] = lambda kind=kind: Affine(kind)


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


def seen(source, make, compute, host, memory=ENOUGH, batches=BATCHES):
    model = modelq.load(source, compute=compute, device="cuda", device_memory=memory)
    if host:
        library = cuda.library()
        model.runtime.use_device(library, memory=model.placement.memory, cublas=cuda.cublas_path(library), host_statistics=True)
    found = {name: make() for name in places_of(model)}
    assert len(found) >= 8
    calib.observe(model, batches, found)
    return found, model.runtime.device["copied"]


def compare(found, expected, what, dtype):
    assert found.count == expected.count > 0
    if what == "maxima" or isinstance(found, calib.HistogramCalibrator):
        assert found.save() == expected.save()
    elif isinstance(found, calib.GramCalibrator):
        one, other = found.compute_gram(), expected.compute_gram()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    elif isinstance(found, calib.MeanCalibrator):       # sums are float64: it is the last rounding that may differ
        np.testing.assert_allclose(found.compute_mean(), expected.compute_mean(), rtol=2.0**-23, atol=0)
    else:
        step = 2.0**-7 if dtype == "bfloat16" else 2.0**-22
        np.testing.assert_allclose(found.statistics.compute_bias(), expected.statistics.compute_bias(), rtol=step, atol=1e-7)
        np.testing.assert_allclose(found.statistics.compute_amax(), expected.statistics.compute_amax(), rtol=step)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", CALIBRATORS)
def test_calibrators(source, what, compute):
    make = CALIBRATORS[what]
    (there, copied), (here, looked_at) = seen(source, make, compute, False), seen(source, make, compute, True)
    assert copied == 0 and (looked_at > 0 or what == "maxima")
    for name in here:
        compare(there[name], here[name], what, compute)


def test_chunks_smaller_than_what_the_cpu_looks_at_in_one_call(golden):
    """A histogram's bins are as wide as the first 512 rows' values let them be, however many pieces these come in; and more batches pass than
    sums of single calls are kept on the device."""
    few = [{"input_ids": ids} for ids in RNG.integers(0, 200, (20, 10, 10))]
    for what in ("few bins", "mean of calls", "affine"):
        (small, copied), (large, _) = (seen(golden["llama"].source, CALIBRATORS[what], "float32", False, memory, few)
                                       for memory in (2_600_000, ENOUGH))
        assert copied == 0
        for name in large:
            compare(small[name], large[name], what, "float32")


def test_little_room_on_the_device(golden):
    """Then it is the CPU that looks at a copy, with the same result."""
    (small, copied), (large, _) = (seen(golden["llama"].source, CALIBRATORS["histogram"], "float32", False, memory)
                                   for memory in (2_600_000, ENOUGH))
    assert copied > 0
    for name in large:
        compare(small[name], large[name], "histogram", "float32")


# ---- whole calibrations ----

def config_of(preset, algorithm=None, *rules):
    config = getattr(mtq, preset)
    return {"quant_cfg": [*config["quant_cfg"], *rules], "algorithm": algorithm or config["algorithm"]}


CALIBRATIONS = {
    "entropy": config_of("INT8_DEFAULT_CFG", "entropy"),
    "percentile": config_of("FP8_DEFAULT_CFG", {"method": "percentile", "percentile": 99.5, "num_bins": 512, "skip_zeros": True}),
    "mse of histograms": config_of("FP8_DEFAULT_CFG", {"method": "histogram", "range_method": "mse"}),
    "one histogram": config_of("INT8_DEFAULT_CFG", None, {"quantizer_name": "*down_proj*input_quantizer", "cfg": {
        "num_bits": 8, "axis": None, "calibrator": "histogram"}}),
    "smoothquant": config_of("INT8_SMOOTHQUANT_CFG"),
    "awq_lite": config_of("INT4_AWQ_CFG"), "awq_full": config_of("NVFP4_AWQ_FULL_CFG"), "awq_clip": config_of("NVFP4_AWQ_CLIP_CFG"),
    "svdquant": config_of("NVFP4_SVDQUANT_DEFAULT_CFG"),
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


@pytest.mark.filterwarnings("ignore:smoothquant, awq or", "ignore:smoothquant", "ignore:svdquant", "ignore:awq", "ignore:gptq",
                            "ignore:local_hessian", "ignore:experts that saw no token")
@pytest.mark.parametrize("what", CALIBRATIONS)
def test_calibrations(source, what):
    """Maxima, biases and smoothing are the CPU's, so searches chose what they choose there: an exponent of AWQ beside it would be tenths
    away. A histogram's range may be a bin away, of 2048 or 512, as a value at an edge may be."""
    here, there = (calibrated(source, CALIBRATIONS[what], device) for device in (False, True))
    found, expected = numbers_of(there), numbers_of(here)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        bins = what in ("entropy", "percentile", "mse of histograms", "one histogram") and "input_quantizer" in name
        np.testing.assert_allclose(found[name], value, rtol=1e-2 if bins else 1e-5, atol=1e-6 if name.endswith("bias") else 0, err_msg=name)
    for name, losses in here.search_losses.items():
        np.testing.assert_allclose(there.search_losses[name], losses, rtol=2e-3, atol=1e-6, err_msg=name)
        if np.ndim(losses):
            assert np.argmin(there.search_losses[name]) == np.argmin(losses), name
    assert there.loss(IDS[1:]) == pytest.approx(here.loss(IDS[1:]), rel=1e-3)


def test_awq_that_weighs_calls(golden):
    one, other = (numbers_of(calibrated(golden["llama"].source, mtq.INT4_AWQ_CFG, device, "modelopt")) for device in (False, True))
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)
