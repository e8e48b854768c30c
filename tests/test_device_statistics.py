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
