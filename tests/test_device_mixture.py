"""What a layer's experts add up to, on a device (csrc/backend/device_mixture.c): the same bits as where the host gathers and adds, for want
of room, with one copy of all hidden states and one of the sums in the place of rows of each expert. The device is the emulated library's."""
import ctypes

import numpy as np
import pytest

import family_models
import modelq
from cuda_library import library_to_test
from modelq import streaming
from modelq.inputs import make_batch

RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 48, (9, 24))
MASK = np.arange(24) >= np.arange(9)[:, None]


@pytest.fixture(autouse=True)
def shim(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    library = ctypes.CDLL(str(library_to_test()))
    library.mq_shim_trace.restype = ctypes.c_char_p
    return library


def states(folder, shim, memory, compute):
    """The hidden states behind each layer, and how many bytes of activations came back to the host meanwhile."""
    model, found = modelq.load(folder, compute=compute, device="cuda", device_memory=memory), []
    run = streaming.start(model, [make_batch(model.vocab_size, {"input_ids": IDS, "attention_mask": MASK})])
    shim.mq_shim_trace(1)
    for layer in range(model.num_layers):
        streaming.run_layer(model, run, layer)
        found.append(run.state().view(np.uint8).copy())
    calls = [line.split() for line in shim.mq_shim_trace(0).decode().splitlines()]
    fetched = sum(int(nbytes) for what, _, nbytes in calls if what == "fetch")
    return found, fetched / found[0].nbytes / model.num_layers


def in_little(folder, shim, compute):
    """The same in about the smallest device that does."""
    for memory in range(1_400_000, 2_000_000, 20_000):
        try:
            return states(folder, shim, memory, compute)
        except MemoryError:
            pass
    raise AssertionError("no memory was enough")


@pytest.mark.parametrize("family, compute, streams", [("qwen2_moe", "bfloat16", "late"), ("gpt_oss", "float32", "random"),
                                                      ("llama4", "float32", "late"), ("deepseek_v3", "bfloat16", "at once")])
def test_sums_are_the_hosts(tmp_path, shim, monkeypatch, family, compute, streams):
    """With shares behind or before an expert, and an expert that all rows have."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    folder = family_models.save(family, tmp_path / "model")
    there, few = states(folder, shim, 64 << 20, compute)
    here, many = in_little(folder, shim, compute)
    assert few + 0.2 < many and all(np.array_equal(one, other) for one, other in zip(there, here))
