"""Gradients on a device (csrc/backend/device_backward*.c): transformers', and the CPU's. The device is the emulated library's, as in
test_device.py."""
import ctypes

import numpy as np
import pytest

import family_models
import golden_data
import modelq
import modelq.quantization as mtq
import test_nemotron
from cuda_library import library_to_test
from modelq import _core, cuda
from modelq.gradients import backward
from test_backward import NAMES, RELATIVE, SCORES, Golden, codes_are_refused, gradients_of, quantized_model, score

PLACE = {"device": "cuda", "device_memory": "64MiB"}
SMALL = {"device": "cuda", "device_memory": 3_000_000}      # rows come in several chunks
RNG = np.random.default_rng(0)
IDS = [RNG.integers(0, 200, (2, 12)), RNG.integers(0, 200, (1, 20))]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    return library_to_test()


def apart(found, expected):
    """Distance relative to what is expected."""
    return np.linalg.norm(found.astype(np.float64) - expected) / max(np.linalg.norm(expected), 1e-30)


def check(found, expected, most):
    assert found.keys() == expected.keys() and found
    errors = {name: apart(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < most, sorted(errors.items(), key=lambda item: -item[1])[:5]


# ---- gradients ----

@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_transformers(name):
    """Of weights, of hidden states, of outputs of linears; with padding, windows, biases, experts."""
    case = Golden(name)
    found, gradients = gradients_of(case, place=PLACE)
    np.testing.assert_allclose(gradients.losses, case.arrays["losses"], rtol=1e-5)
    errors = {name: case.error(name, found[name]) for name in case.names}
    assert max(errors.values()) < RELATIVE, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "family_mistral"])
def test_gradients_in_bfloat16_are_the_cpus(name):
    """Forwards that round otherwise here and there, as two computations in bfloat16 do; gradients enter products in bfloat16."""
    case = Golden(name)
    (found, there), (expected, here) = gradients_of(case, "bfloat16", PLACE), gradients_of(case, "bfloat16")
    np.testing.assert_allclose(there.losses, here.losses, rtol=2e-3)
    check({key: found[key] for key in found if key in case.names}, {key: expected[key] for key in expected if key in case.names}, 0.05)


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
@pytest.mark.parametrize("streams", ["at once", "late", "random"])
def test_several_chunks_on_streams_that_are_late(name, streams, monkeypatch):
    """Copies and kernels are ordered by what is said between streams alone: with streams that are as late as may be, in a device so small
    that rows come in pieces, gradients are the CPU's."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    ids, results = [RNG.integers(0, 200, (5, 20)) for _ in range(2)], []
    for place in ({}, SMALL):
        model, looks = modelq.load(golden_data.Model(name).source, compute="float32", **place), {}
        wanted = [module["weight"] for module in model.modules_of(0) if module["weight"]][:4] + ["lm_head.weight", "model.norm.weight"]

        def look(layer, back):
            assert model.runtime.device is None or model.runtime.device["peak"] <= 3_000_000
            looks.update({f"{layer} {i}": back.gradient(i) for i in range(2)})
        results.append(backward(model, ids, wanted, look=look).weights | looks)
    assert model.runtime.device is not None
    check(results[1], results[0], RELATIVE)


def test_a_vocabulary_of_many_slices():
    """Slices of the vocabulary come and go for as many rows as there is room for: here two rounds of rows."""
    rng = np.random.default_rng(0)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2, "vocab_size": 1501}
    tensors = {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in (
        ("model.embed_tokens.weight", (1501, 16)), ("model.norm.weight", 16), ("lm_head.weight", (1501, 16)))}
    ids, results = rng.integers(0, 1501, (2, 250)), []
    for memory in (None, 2_400_000):
        runtime = _core.Runtime("llama", config, "float32")
        if memory is not None:
            runtime.use_device(cuda.library(), 0, memory, cuda.cublas_path(cuda.library()))
        run = runtime.start([ids])
        run.embed({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]})
        found, kept = {name: np.zeros(array.shape, np.float32) for name, array in tensors.items()}, _core.OutputGradient(500, 1501)
        back = run.backward(found)
        runtime.set_observer("lm_head", kept)
        losses, _ = back.head({name: tensors[name] for name in ("model.norm.weight", "lm_head.weight")})
        back.embed()
        results.append(found | {"losses": losses, "input": back.gradient(0), "logits": kept.array})
    assert runtime.device["peak"] <= 2_400_000
    check(results[1], results[0], RELATIVE)


# ---- observers ----

@pytest.mark.slow
@pytest.mark.parametrize("name, preset, compute, tolerance", [("llama", "INT4_AWQ_CFG", "float32", 1e-5),
                                                              ("qwen3moe", "FP8_DEFAULT_CFG", "float32", 1e-3)])
def test_scores_equal_model_optimizers(name, preset, compute, tolerance):
    """As test_backward.py has it for the CPU."""
    calib = golden_data.Model(name).calib
    found = score(name, compute, lambda *args: [quantized_model(preset, *args[:2], calib[:2] if "AWQ" in preset else calib)], calib, PLACE)
    for group, value in SCORES[name][compute][preset].items():
        assert sum(found[module][0] for module in group.split()) == pytest.approx(value, rel=tolerance), group


@pytest.mark.parametrize("name, compute", [("qwen3", "float32"), ("qwen3moe", "float32"), ("llama", "bfloat16")])
def test_scores_in_chunks_are_the_cpus(name, compute):
    """In a device so small that the rows of a layer come in several chunks. Inputs that lie between two codes are rounded to the other one
    now and then, as two forwards differ in their last bits."""
    rows = golden_data.Model(name).calib[:2]
    candidates = [quantized_model(preset, golden_data.Model(name).source, compute, rows) for preset in ("NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG")]
    here, there = (score(name, compute, lambda *args: candidates, rows, place) for place in ({}, SMALL))
    assert here.keys() == there.keys()
    for module, values in here.items():
        np.testing.assert_allclose(there[module], values, rtol=5e-3 if compute == "float32" else 0.05, err_msg=module)


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_search_on_the_device_chooses_what_the_cpus_does(name):
    states = []
    for place in ({}, PLACE):
        model = modelq.load(golden_data.Model(name).source, compute="float32", **place)
        batches = [{"input_ids": ids, "labels": ids} for ids in IDS]
        _, state = mtq.auto_quantize(model, {"effective_bits": 6.0}, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], batches,
                                     lambda model, batch: model(**batch), lambda output, batch: output.loss, method="gradient")
        states.append(state)
    assert str(states[0]["best"]["recipe"]) == str(states[1]["best"]["recipe"])


def test_scores_are_made_on_the_device(emulated):
    """A launch that fails says whose it was: among others, the kernel's that scores are made by."""
    shim = ctypes.CDLL(str(emulated))
    if not shim.mq_cuda_is_emulated():
        pytest.skip("only the shim can make a launch fail")
    model, failed = modelq.load(golden_data.Model("llama").source, compute="float32", **PLACE), set()
    tensors = model.checkpoint.tensors
    head = model.checkpoint.read("lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight")
    for launch in range(70, 120):       # scores of lm_head come before all layers
        shim.mq_shim_fail_launch(launch, 9)
        with pytest.raises((ValueError, RuntimeError)) as error:
            backward(model, [IDS[1]], observers={"lm_head": _core.OutputScore([head])})
        failed.add(str(error.value).split("kernel ")[-1].split(",")[0])
        if "score" in failed:
            break
    assert "score" in failed


# ---- memory and errors ----

def test_a_sequence_that_does_not_fit(tiny_checkpoint):
    """On the way back, for which more is kept than for a forward."""
    model = modelq.load(tiny_checkpoint, compute="float32", **SMALL)
    with pytest.raises(MemoryError, match=r"out of device memory: a sequence of 150 tokens needs .* sequences of (\d+) tokens fit") as error:
        backward(model, [RNG.integers(0, 200, (1, 150))])
    fits = int(str(error.value).split("sequences of ")[1].split(" tokens")[0])
    name, ids = "model.layers.1.mlp.up_proj", [RNG.integers(0, 200, (1, fits))]
    weight = np.zeros_like(model.checkpoint.read(f"{name}.weight"), np.float32)
    here, there = _core.OutputScore([weight]), _core.OutputScore([weight])
    backward(model, ids, observers={name: there})       # for whose candidate there is no room: it is the host's
    backward(modelq.load(tiny_checkpoint, compute="float32"), ids, observers={name: here})
    assert 30 < fits < 150 and there.scores[0] == pytest.approx(here.scores[0], rel=1e-4) and here.scores[0] > 0


def test_a_kernel_that_fails_is_named_and_the_model_goes_on(emulated):
    shim = ctypes.CDLL(str(emulated))
    if not shim.mq_cuda_is_emulated():
        pytest.skip("only the shim can make a launch fail")
    model, names = modelq.load(golden_data.Model("llama").source, compute="float32", **PLACE), ["model.layers.0.mlp.up_proj.weight"]
    expected = backward(model, [IDS[1]], names)
    for launch in (60, 75, 90, 105):
        shim.mq_shim_fail_launch(launch, 9)
        with pytest.raises((ValueError, RuntimeError), match=r"kernel \w+, grid \(\d+, .*cudaErrorInvalid|cublasLtMatmul: .* float32 = a"):
            backward(model, [IDS[1]], names)
        again = backward(model, [IDS[1]], names)
        assert np.array_equal(again.weights[names[0]], expected.weights[names[0]])


# ---- what is no gradient's business ----

@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_codes_are_refused(name, golden):
    codes_are_refused(golden[name].source, PLACE)
