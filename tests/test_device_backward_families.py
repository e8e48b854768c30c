"""Gradients of every family on a device (emulated, as in test_device.py): the CPU's, which tests/torch_models compares with torch's."""
import numpy as np
import pytest

import family_models
import modelq
import modelq.quantization as mtq
import test_nemotron
from cuda_library import library_to_test
from modelq import _core
from modelq.gradients import backward
from test_backward import RELATIVE
from test_device_backward import PLACE, apart, check

FAMILIES = ["olmo2", "phi3 longrope", "granitemoe", "gemma2", "gemma3", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v2 lite", "deepseek_v3",
            "llama4", "llama4 without norms", "llama dynamic", "nemotron"]
RNG = np.random.default_rng(2)
IDS = RNG.integers(0, 48, (2, 3, 20))
MASKS = np.stack([np.arange(20) >= np.array([[0], [3], [6]]), np.arange(20) < np.array([[20], [11], [5]])])     # padded on either side
ROWS = IDS.size
PADDED = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASKS)]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


def saved(name, folder):
    if name == "nemotron":      # layers that lack a half, or have a linear there
        return test_nemotron.save(folder, test_nemotron.BLOCKS, test_nemotron.weights(test_nemotron.BLOCKS))
    return family_models.save(name, folder)


def gradients_of(model, batches=PADDED):
    """{what: its gradient} of weights, of hidden states, of what linears put out."""
    looks, observers = {}, {module["name"]: _core.OutputGradient(ROWS, module["shape"][0]) for module in model.modules
                            if module["kind"] == "linear" and module["expert"] is None}
    wanted = [module[kind] for module in model.modules for kind in ("weight", "bias") if module[kind] is not None]
    place = model.runtime.device is not None

    def look(layer, back):
        assert (model.runtime.device is not None) == place
        looks.update({f"{layer} {i}": back.gradient(i) for i in range(len(batches))})
    found = backward(model, batches, dict.fromkeys(wanted), observers, look=look)
    return found.weights | looks | {name: observer.array for name, observer in observers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name, tmp_path):
    """Random weights make more of what two computations differ in than trained ones: 1.1e-5 was measured (Gemma 3)."""
    source = saved(name, tmp_path / "source")
    here, there = (gradients_of(modelq.load(source, compute="float32", **place)) for place in ({}, PLACE))
    check(there, here, 3 * RELATIVE)
    assert all(here[name].any() for name in here if "sinks" in name)


def small(source):
    """A device that has room for the longest of these sequences and little more, so that rows come in chunks."""
    for memory in range(1_600_000, 4_000_000, 100_000):
        place = {"device": "cuda", "device_memory": memory}
        try:
            gradients_of(modelq.load(source, compute="float32", **place))
        except MemoryError:
            continue
        with pytest.raises(MemoryError, match="a sequence of .* needs"):        # all rows do not fit together
            gradients_of(modelq.load(source, compute="float32", **place), [np.ones((1, ROWS), np.int64)])
        return place
    raise AssertionError("no memory is enough")


@pytest.mark.parametrize("name", ["llama4", "deepseek_v3", "gpt_oss"])
def test_chunks_on_streams_that_are_late(name, tmp_path, monkeypatch):
    source = saved(name, tmp_path / "source")
    place, expected, bits = small(source), gradients_of(modelq.load(source, compute="float32")), []
    for streams in ("late", "random"):
        monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
        found = gradients_of(modelq.load(source, compute="float32", **place))
        check(found, expected, 3 * RELATIVE)
        bits.append({name: array.tobytes() for name, array in found.items()})
    assert bits[0] == bits[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama4", "deepseek_v3", "gpt_oss"])
def test_bfloat16(name, tmp_path):
    """Against the CPU's in float32: no further from it than the CPU's own in bfloat16 are, and a little."""
    source = saved(name, tmp_path / "source")
    exact = gradients_of(modelq.load(source, compute="float32"))
    here, there = (gradients_of(modelq.load(source, compute="bfloat16", **place)) for place in ({}, PLACE))
    mean = {kind: np.mean([apart(found[name], exact[name]) for name in exact if exact[name].any()]) for kind, found in (("here", here), ("there", there))}
    assert mean["there"] < 1.3 * mean["here"], mean


@pytest.mark.parametrize("name", ["llama4", "deepseek_v3", "gpt_oss"])
def test_a_search_chooses_what_the_cpus_does(name, tmp_path, monkeypatch):
    whole_blocks = {"kv_lora_rank": 32, "q_lora_rank": 16, "moe_intermediate_size": 32} if name == "deepseek_v3" else {}
    monkeypatch.setitem(family_models.CONFIGS, name, family_models.CONFIGS[name] | whole_blocks)
    source, states = saved(name, tmp_path / "source"), []
    for place in ({}, PLACE):
        model = modelq.load(source, compute="float32", **place)
        batches = [{"input_ids": ids, "labels": ids} for ids in IDS]
        _, state = mtq.auto_quantize(model, {"effective_bits": 6.5}, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], batches,
                                     lambda model, batch: model(**batch), lambda output, batch: output.loss, method="gradient")
        states.append(state)
    assert str(states[0]["best"]["recipe"]) == str(states[1]["best"]["recipe"])
    here, there = ({name: group["scores"] for name, group in state["candidate_stats"].items()} for state in states)
    assert here.keys() == there.keys()
    for group, scores in here.items():
        np.testing.assert_allclose(there[group], scores, rtol=5e-3, err_msg=group)
