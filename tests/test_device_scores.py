"""AutoQuantize's scores on a device (csrc/backend/device_score*.c): those of the CPU, of experts too, with nothing copied to the CPU for them
and, while a layer's chunks come and go, every candidate's weights sent once. The device is the emulated library's, as in test_device.py."""
import ctypes

import numpy as np
import pytest

import family_models
import golden_data
import modelq
import modelq.quantization as mtq
from cuda_library import library_to_test
from modelq.gradients import backward
from test_backward import Scorer, quantized_model

ROOMY = 64 << 20
RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 200, (6, 24))


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    return library_to_test()


@pytest.fixture
def shim(emulated):
    library = ctypes.CDLL(str(emulated))
    library.mq_shim_trace.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def candidates():
    """{name: models in two formats}, calibrated once."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = [quantized_model(preset, golden_data.Model(name).source, "float32", IDS[:1])
                           for preset in ("NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG")]
        return found[name]
    return of


def scored(name, formats, memory=None, compute="float32", ids=IDS):
    """The scores of all linears and experts, and what runtime.device says."""
    model = modelq.load(golden_data.Model(name).source, compute=compute, **({} if memory is None else {"device": "cuda", "device_memory": memory}))
    scorer = Scorer(model, formats)
    backward(model, [ids[:4], ids[4:]], visitor=scorer)
    return scorer.scores, model.runtime.device


def check(found, expected, tolerance=5e-3):
    """Of inputs that lie between two codes some are rounded to the other one, as two forwards differ in their last bits."""
    assert found.keys() == expected.keys() and found
    for module, values in expected.items():
        np.testing.assert_allclose(found[module], values, rtol=tolerance, err_msg=module)
        assert (values > 0).all(), module


@pytest.mark.parametrize("streams", ["at once", "late", "random"])
def test_streams_that_are_late(candidates, monkeypatch, streams):
    """In a device so small that rows of layers and of experts come in pieces, beside weights of candidates that stay for all of them and
    others that come again with each."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    here, _ = scored("qwen3moe", candidates("qwen3moe"))
    there, device = scored("qwen3moe", candidates("qwen3moe"), 2_800_000)
    assert device["peak"] <= 2_800_000 and device["copied"] == 0
    check(there, here)


@pytest.mark.parametrize("compute, memory, copied", [("float32", 2_400_000, True), ("bfloat16", ROOMY, False)])
def test_room_and_dtypes(candidates, compute, memory, copied):
    """Where there is no room for what experts change of all rows, it is the CPU that is shown a copy."""
    here, _ = scored("qwen3moe", candidates("qwen3moe"), compute=compute)
    there, device = scored("qwen3moe", candidates("qwen3moe"), memory, compute)
    assert (device["copied"] > 0) == copied
    check(there, here, 5e-3 if compute == "float32" else 0.1)


@pytest.mark.filterwarnings("ignore:.*a checkpoint of this family has a layer's experts in one tensor")
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "qwen2_moe", "llama4"])
def test_families(family, tmp_path):
    """Biases of experts and an activation that is clamped; a factor of what is added to the hidden states; an expert that all rows have;
    inputs that shares multiply."""
    folder, found = family_models.save(family, tmp_path / "model"), []
    for place in ({}, {"device": "cuda", "device_memory": ROOMY}):
        model = modelq.load(folder, compute="float32", **place)
        _, state = mtq.auto_quantize(model, {"effective_bits": 8.5}, [mtq.INT8_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG],
                                     [{"input_ids": ids, "labels": ids} for ids in (IDS[:2] % 48, IDS[2:4, :9] % 48)],
                                     lambda model, batch: model(**batch), lambda output, batch: output.loss, method="gradient")
        found.append({f"{key} {recipe}": score for key, stats in state["candidate_stats"].items()
                      for recipe, score in zip(stats["formats"], stats["scores"])})
    assert model.runtime.device["copied"] == 0 and any("experts" in key for key in found[0])
    assert found[0].keys() == found[1].keys()
    for key, score in found[0].items():
        assert found[1][key] == pytest.approx(score, rel=1e-2), key


def test_a_candidate_that_is_not_finite(candidates):
    """... is said, as on the CPU, and the model goes on."""
    class Broken(Scorer):
        def weights_of(self, module):
            weights = super().weights_of(module)
            return weights if module["expert"] != 1 else [weights[0], np.full_like(weights[1], np.nan)]
    model = modelq.load(golden_data.Model("qwen3moe").source, compute="float32", device="cuda", device_memory=ROOMY)
    scorer = Broken(model, candidates("qwen3moe"))
    with pytest.raises(ValueError, match="candidate.* contains NaN"):
        backward(model, [IDS[:2]], visitor=scorer)
    for name in [name for layer in scorer.at.values() for name in layer[0]]:
        model.runtime.set_observer(name, None)
    again, here = Scorer(model, candidates("qwen3moe")), Scorer(modelq.load(golden_data.Model("qwen3moe").source, compute="float32"),
                                                                       candidates("qwen3moe"))
    for one in (again, here):
        backward(one.model, [IDS[:2]], visitor=one)
    check(again.scores, here.scores)


class Layers(Scorer):
    """Of layers alone: what is sent meanwhile, on each stream."""

    def __init__(self, shim, *args):
        super().__init__(*args)
        self.shim, self.sent = shim, []

    def enter(self, part):
        if part.layer >= 0:
            super().enter(part)
            if part.expert is None:
                self.shim.mq_shim_trace(1)

    def leave(self, part):
        if part.layer < 0:
            return
        super().leave(part)
        if part.expert is None:
            calls = [line.split() for line in self.shim.mq_shim_trace(0).decode().splitlines()]
            self.sent.append([(int(stream), int(nbytes)) for what, stream, nbytes in calls if what == "send"])


def test_candidates_are_sent_once(candidates, shim):
    """However many chunks a layer's rows come in."""
    shim.mq_shim_trace(1)
    model = modelq.load(golden_data.Model("llama").source, compute="float32", device="cuda", device_memory=4_500_000)
    _, copies, rows = (int(line.split()[1]) for line in shim.mq_shim_trace(0).decode().splitlines() if line.startswith("stream"))
    there, here = (Layers(shim, one, candidates("llama")) for one in (model, modelq.load(golden_data.Model("llama").source, compute="float32")))
    for scorer in (there, here):
        backward(scorer.model, [np.concatenate([IDS, IDS])], visitor=scorer)
    linears = sum(module["kind"] == "linear" for module in model.modules_of(0))
    assert len(there.sent) == 2
    for sent in there.sent:
        assert sum(stream == rows for stream, _ in sent) == 6 * 3               # indices, hidden states and gradients of six chunks
        assert sum(stream == copies and nbytes >= 4096 for stream, nbytes in sent) == linears * (1 + 2)     # the layer's, and candidates'
    check(there.scores, here.scores)
