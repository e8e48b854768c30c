"""While a device computes a layer, the weights of the next come. What was sent is taken for a layer's weights only where these are the same
memory, whole and sent without error; and there is an order between the streams that keeps any of it from being read too early or
overwritten too early. The device is the emulated library's (cuda/shim): streams may be late, and calls are noted in the order of asking."""
import ctypes

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from cuda_library import library_to_test
from modelq import _core, ahead, changed, cuda, gradients, streaming
from modelq.inputs import make_batch
from test_device import FAMILIES, amax_of, emulated  # noqa: F401 (a fixture)

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.emulated
IDS = [RNG.integers(0, 60, (6, 20)) for _ in range(3)]
ROOMY, TIGHT = "64MiB", 2_300_000       # the second has no room for a second layer, and its chunks are of few rows


def load(source, memory=ROOMY, compute="float32"):
    return modelq.load(source, compute=compute, device="cuda", device_memory=memory)


@pytest.fixture
def shim(emulated):     # noqa: F811
    library = ctypes.CDLL(str(emulated))
    library.mq_shim_trace.restype = ctypes.c_char_p
    yield library
    library.mq_shim_trace(0)


def noted(shim):
    """(what, stream, bytes) of each call, in the order of asking."""
    return [(what, int(stream), int(nbytes)) for what, stream, nbytes in map(str.split, shim.mq_shim_trace(0).decode().splitlines())]


def traced(shim, source, memory=ROOMY):
    """A model, and its device's streams: of products, weights and rows."""
    shim.mq_shim_trace(1)
    model = load(source, memory)
    return model, [stream for what, stream, _ in noted(shim) if what == "stream"]


def source_of(golden, name):
    return golden[name].source if name in golden else FAMILIES / "qwen3_moe"


def run_of(model, ids=IDS):
    return streaming.start(model, [make_batch(model.vocab_size, batch) for batch in ids])


def states(model, ids=IDS, before=lambda layer: None, following=lambda layer: layer + 1):
    """Hidden states behind the last layer; before each one something may happen."""
    run = run_of(model, ids)
    for layer in range(model.num_layers):
        before(layer)
        streaming.run_layer(model, run, layer, following=following(layer) if following(layer) < model.num_layers else None)
    return run.state()


def alone(model, ids=IDS):
    """The same without anything sent ahead."""
    return states(model, ids, following=lambda layer: model.num_layers)


def layer_nbytes(model, layer, expert=None):
    """Of the linears, as the checkpoint has them, which is as they are sent."""
    return sum(model.checkpoint.tensors[row["weight"]].nbytes for row in model.modules_of(layer, expert) if row["kind"] == "linear")


# ---- that it happens ----

@pytest.mark.parametrize("streams", ["late", "random"])
def test_the_next_layers_weights_are_sent_before_anybody_waits_for_this_one(llama, shim, monkeypatch, streams):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    model, (compute, copies, _rows) = traced(shim, llama)
    run = run_of(model)
    shim.mq_shim_trace(1)
    streaming.run_layer(model, run, 0, following=1)
    calls = noted(shim)
    begun = next(i for i, call in enumerate(calls) if call[:2] == ("work", compute))
    waited = next(i for i, call in enumerate(calls) if i > begun and call[0] == "wait")
    sent = sum(nbytes for what, stream, nbytes in calls[begun:waited] if (what, stream) == ("send", copies))
    assert sent == layer_nbytes(model, 1) > 0
    # and the products of this layer that are under way are not waited for by that stream
    assert ("after", copies) not in [call[:2] for call in calls[begun:waited]]

    shim.mq_shim_trace(1)
    streaming.run_layer(model, run, 1)      # only norms are left to be sent
    assert sum(nbytes for what, stream, nbytes in noted(shim) if (what, stream) == ("send", copies)) < layer_nbytes(model, 1) / 20


# Weights that the host makes at every reading: smoothed, quantized twice, or of a model loaded as float32.
MADE = {"awq": (mtq.INT4_AWQ_CFG, "bfloat16"), "smoothquant": (mtq.INT8_SMOOTHQUANT_CFG, "bfloat16"),
        "w4a8": (mtq.W4A8_AWQ_BETA_CFG, "bfloat16"), "float32": (mtq.NVFP4_DEFAULT_CFG, "float32")}


def quantized(source, name, compressed=False):
    config, compute = MADE[name]
    model = load(source, compute=compute)
    mtq.quantize(model, config, lambda model: model(IDS[0]))
    return mtq.compress(model) if compressed else model


def sent_on(calls, stream):
    """Bytes of weights that were sent; norms are smaller."""
    return sum(nbytes for what, on, nbytes in calls if (what, on) == ("send", stream) and nbytes > 2048)


def sent_ahead(shim, model, streams, compute, copies):
    """What is sent of layer 1 while layer 0 is computed, and in its turn; its hidden states."""
    run = run_of(model)
    calls = []
    for layer, following in enumerate(streams):
        shim.mq_shim_trace(1)
        streaming.run_layer(model, run, layer, following=following)
        calls.append(noted(shim))
    begun = next(i for i, call in enumerate(calls[0]) if call[:2] == ("work", compute))
    waited = next(i for i, call in enumerate(calls[0]) if i > begun and call[0] == "wait")
    return sent_on(calls[0][begun:waited], copies), sent_on(calls[1], copies), run.state()


@pytest.mark.parametrize("name, compressed", [*((name, False) for name in MADE), ("w4a8", True)])
def test_weights_that_are_made_come_ahead_too(llama, shim, monkeypatch, name, compressed):
    shim.mq_shim_trace(1)
    model = quantized(llama, name, compressed)
    compute, copies = [stream for what, stream, _ in noted(shim) if what == "stream"][:2]
    linears, taken, take = {row["weight"] for row in model.modules_of(1) if row["kind"] == "linear"}, [], streaming.take_made
    monkeypatch.setattr(streaming, "take_made", lambda *given: taken.append(take(*given)) or taken[-1])
    none, expected, state = sent_ahead(shim, model, (None, None), compute, copies)
    assert none == 0 < expected
    for streams in ("at once", "late", "random"):
        monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
        ahead, later, found = sent_ahead(shim, model, (1, None), compute, copies)
        assert (ahead, later) == (expected, 0) and found.tobytes() == state.tobytes()
        assert linears <= taken[-1].keys() and model.made_ahead is None     # they are not made again, nor held any longer


def test_experts_come_ahead_too(golden, shim, monkeypatch):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model, (compute, copies, _rows) = traced(shim, source_of(golden, "qwen3moe"))
    run = run_of(model)
    shim.mq_shim_trace(1)
    streaming.run_layer(model, run, 0, following=1)
    sent = sum(nbytes for what, stream, nbytes in noted(shim) if (what, stream) == ("send", copies))
    experts = model.runtime.experts(0)
    # each weight once: those of layer 0, of its experts and of layer 1, beside norms
    expected = layer_nbytes(model, 0) + sum(layer_nbytes(model, 0, expert) for expert in range(experts)) + layer_nbytes(model, 1)
    assert experts > 1 and expected <= sent < expected * 1.1


def test_rows_go_back_while_the_host_goes_on(llama, shim, monkeypatch):
    """In chunks, of pinned memory: the host waits for the rows once, at the end."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model, (compute, _copies, rows) = traced(shim, llama, TIGHT)
    run = run_of(model)
    shim.mq_shim_trace(1)
    streaming.run_layer(model, run, 0)
    calls = noted(shim)
    fetched = [i for i, call in enumerate(calls) if call[:2] == ("fetch", rows)]
    assert len(fetched) > 2
    assert [i for i, call in enumerate(calls) if call[0] == "wait" and i < fetched[-1]] == []


def plain(calls, compute, rows):
    """Copies from or to memory that is not pinned, of activations, once the first rows are on their way: the host waits at each. (Ropes
    come before, and weights' maxima, which are few, when all is done.)"""
    begun = next(i for i, call in enumerate(calls) if call[:2] == ("send", rows))
    return [call for call in calls[begun:] if call[0] == "plain" and call[1] in (compute, rows) and call[2] > 64]


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_no_copy_of_activations_waits(golden, shim, monkeypatch, name):
    """Rows, routes, experts' rows and gradients are pinned; boundaries are not (docs/cuda.md)."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model, (compute, _copies, rows) = traced(shim, source_of(golden, name), TIGHT)
    run = run_of(model)
    shim.mq_shim_trace(1)
    streaming.run_layer(model, run, 0)
    calls = noted(shim)
    assert plain(calls, compute, rows) == []
    if name == "llama":
        return
    # while a chunk of an expert's rows is computed, the next is sent: the host waits for the one before
    asked = [what for what, stream, _ in calls if stream == compute and what in ("send", "fetch", "event")]
    assert any(asked[i:i + 5] == ["fetch", "send", "send", "fetch", "event"] for i in range(len(asked)))


def test_gradients_of_experts_do_not_wait(golden, shim, monkeypatch):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model, (compute, _copies, rows) = traced(shim, source_of(golden, "qwen3moe"))
    run = run_of(model)
    boundary = run.state()
    for layer in range(model.num_layers):
        boundary = run.state() if layer == model.num_layers - 1 else boundary
        streaming.run_layer(model, run, layer)
    back = run.backward({})
    back.head(streaming.head_tensors(model), [batch for batch in IDS])
    shim.mq_shim_trace(1)
    gradients._layer(model, back, model.num_layers - 1, boundary, None)
    calls = noted(shim)
    ropes = {nbytes for what, stream, nbytes in calls[:calls.index(("work", compute, 0))] if (what, stream) == ("plain", compute)}
    assert {nbytes for _, _, nbytes in plain(calls, compute, rows)} == {boundary.nbytes} | ropes    # these as the way back begins


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_the_way_back_has_the_layer_before(golden, shim, monkeypatch, name):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    model, (_compute, copies, _rows) = traced(shim, source_of(golden, name))
    wanted = [row["weight"] for row in model.modules if row["kind"] == "linear" and row["layer"] == 0][:3]
    begun, begin = [], ahead._begin
    monkeypatch.setattr(ahead, "_begin", lambda model, *part: begun.append(part[:2]) or begin(model, *part))
    shim.mq_shim_trace(1)
    found = gradients.backward(model, IDS, wanted)
    sent = sum(nbytes for what, stream, nbytes in noted(shim) if (what, stream) == ("send", copies))
    assert begun[-1] == ((0, None) if name == "llama" else (0, model.runtime.experts(0) - 1))
    # no weight is sent more often than it is used: forward and backward, and the head's twice
    parts = [(row["layer"], row["expert"]) for row in model.modules if row["kind"] == "linear" and row["layer"] >= 0]
    assert sent < 2.2 * sum(layer_nbytes(model, *part) for part in set(parts)) + 5 * layer_nbytes(model, -1)
    monkeypatch.setattr(gradients, "ahead_of", lambda *given: None)
    other = gradients.backward(model, IDS, wanted)
    assert np.array_equal(found.losses, other.losses)
    for name in wanted:
        np.testing.assert_array_equal(found.weights[name], other.weights[name])


# ---- that it changes nothing ----

@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
@pytest.mark.parametrize("memory", [ROOMY, TIGHT])
def test_results_are_those_without(golden, monkeypatch, name, memory):
    found = []
    for streams, is_ahead in (("at once", False), ("at once", True), ("late", True), ("random", True)):
        monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
        with monkeypatch.context() as patch:
            if not is_ahead:
                patch.setattr(streaming, "ahead_of", lambda *given: None)
            model = load(source_of(golden, name), memory)
            mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: [model(batch) for batch in IDS])
            found.append((amax_of(model), model.loss(IDS), np.asarray(model(IDS[0]).logits)))
        assert model.runtime.device["peak"] <= model.runtime.device["memory"]
    one, loss, logits = found[0]
    for other, other_loss, other_logits in found[1:]:
        assert one.keys() == other.keys() and loss == other_loss and np.array_equal(logits, other_logits)
        for key, value in one.items():
            np.testing.assert_array_equal(other[key], value, err_msg=key)


def test_whatever_the_memory_is(llama, monkeypatch):
    """From the least on that a layer and a sequence fit in: the budget holds, and what had room before has room now."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    rooms, expected = [], load(llama).loss(IDS[:1])
    for memory in range(2_250_000, 4_400_000, 210_000):
        model = load(llama, memory)
        begin = model.runtime.begin_ahead
        monkeypatch.setattr(ahead, "_begin", lambda model, layer, expert, parts: rooms.append(begin(layer, expert, mapped(model, layer))))
        found = model.loss(IDS[:1])
        assert model.runtime.device["peak"] <= memory
        assert found == pytest.approx(expected, rel=1e-8)
    assert rooms == sorted(rooms) and set(rooms) == {True, False}


def test_memory_for_what_comes_ahead_is_the_first_to_go(llama, golden):
    """A longer sequence takes the place of a second layer, and one that is too long is told what it would have been without."""
    memory = 3_600_000
    fresh, used = load(llama, memory), load(llama, memory)
    used.loss(IDS)
    long = [RNG.integers(0, 60, (1, 1500))]
    said = []
    for model in (fresh, used):
        with pytest.raises(MemoryError, match="out of device memory: a sequence of 1500 tokens needs") as error:
            model.loss(long)
        said.append(int(str(error.value).split("sequences of ")[1].split(" tokens")[0]))
    assert said[0] == said[1]
    assert used.loss([RNG.integers(0, 60, (1, said[0]))]) > 0 and used.runtime.device["peak"] <= memory


@pytest.mark.parametrize("preset", ["INT4_GPTQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG"])
def test_searches_that_change_weights(llama, monkeypatch, preset):
    found = []
    for is_ahead in (False, True):
        with monkeypatch.context() as patch:
            patch.setenv("MODELQ_SHIM_STREAMS", "late")
            if not is_ahead:
                patch.setattr(streaming, "ahead_of", lambda *given: None)
            model = load(llama)
            mtq.quantize(model, getattr(mtq, preset), lambda model: [model(batch) for batch in IDS])
            found.append((amax_of(model), model.loss(IDS)))
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        np.testing.assert_array_equal(found[1][0][name], value, err_msg=name)


# ---- weights that change in between ----

@pytest.fixture
def models(llama):
    """The same twice: one sees its weights change while they are ahead, the other has nothing ahead."""
    return load(llama), load(llama)


def test_a_simulation_that_is_switched(models):
    for model in models:
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(IDS[0]))
    plain, quantized = [], []
    for model, following in zip(models, (1, 9)):
        for weights, found in ((False, plain), (True, quantized)):
            run = run_of(model)
            with model.simulating(weights=not weights, activations=False):
                streaming.run_layer(model, run, 0, following=following if following < 9 else None)
            with model.simulating(weights=weights, activations=False):
                streaming.run_layer(model, run, 1)
            found.append(run.state())
    assert np.array_equal(*plain) and np.array_equal(*quantized) and not np.array_equal(plain[0], quantized[0])


def test_a_weight_that_is_replaced(models):
    one, other = models
    name = "model.layers.1.mlp.up_proj.weight"
    before = alone(other)

    def replace(model):
        weight = np.asarray(model.checkpoint.read(name)).astype(np.float32)
        model.checkpoint = changed.ChangedCheckpoint(model.checkpoint)
        model.checkpoint.put(name, changed.Rounded(_core.quantize(weight, "int4"), "int4", None, "float32"))
    found = states(one, before=lambda layer: replace(one) if layer == 1 else None)
    replace(other)
    assert np.array_equal(found, alone(other)) and not np.array_equal(found, before)


@pytest.mark.parametrize("config", [mtq.FP8_DEFAULT_CFG, mtq.NVFP4_DEFAULT_CFG, mtq.INT8_WEIGHT_ONLY_CFG], ids=["fp8", "nvfp4", "int8"])
@pytest.mark.parametrize("compressed", [False, True])
def test_quantizers_that_change(llama, shim, config, compressed):
    """Weights that are simulated or packed come ahead, and are not taken for those of another amax."""
    found = {}
    for is_changed in (False, True):
        for is_ahead in (False, True):
            model = load(llama, compute="bfloat16")
            mtq.quantize(model, config, lambda model: model(IDS[0]))
            model.disconnect()
            if compressed:
                mtq.compress(model)
            run = run_of(model)
            streaming.run_layer(model, run, 0, following=1 if is_ahead else None)
            if is_changed and not compressed:
                quantizer = model.quantizers["model.layers.1.mlp.up_proj.weight_quantizer"]
                quantizer.amax = np.asarray(quantizer.amax) / 2
            elif is_changed:
                model.packed["model.layers.1.mlp.up_proj"] = model.packed["model.layers.0.mlp.up_proj"]
            shim.mq_shim_trace(1)
            streaming.run_layer(model, run, 1)
            sent = sum(nbytes for what, _, nbytes in noted(shim) if what == "send" and nbytes > 2048)
            found[is_changed, is_ahead] = run.state(), sent
    for is_changed in (False, True):
        assert found[is_changed, False][0].tobytes() == found[is_changed, True][0].tobytes()
    assert found[False, True][0].tobytes() != found[True, True][0].tobytes()
    assert found[False, True][1] < found[True, True][1] == found[True, False][1]      # rows, and no weight


def siblings_scale(model):
    """Linears that read one input take the mean of their scales."""
    for what, factor in (("input", 1.5), ("weight", 1 / 1.5)):
        quantizer = model.quantizers[f"model.layers.1.mlp.up_proj.{what}_quantizer"]
        quantizer.pre_quant_scale = np.asarray(quantizer.pre_quant_scale) * factor


def own_range(model):
    quantizer = model.quantizers["model.layers.1.mlp.up_proj.weight_quantizer"]
    quantizer.amax = np.asarray(quantizer.amax) / 2


def switched_off(model):
    model.quantizers["model.layers.1.mlp.up_proj.weight_quantizer"].enabled = False


@pytest.mark.parametrize("name, change", [("awq", siblings_scale), ("awq", switched_off), ("float32", own_range), ("w4a8", siblings_scale)])
def test_what_made_weights_are_made_of_changes(llama, name, change):
    model = quantized(llama, name)
    model.disconnect()      # it is the weights that matter
    before = alone(model)
    run = run_of(model)
    streaming.run_layer(model, run, 0, following=1)
    assert "model.layers.1.mlp.gate_proj.weight" in model.made_ahead.tensors
    change(model)
    streaming.run_layer(model, run, 1)
    assert np.array_equal(run.state(), alone(model)) and not np.array_equal(run.state(), before)


def test_weights_that_cannot_be_made_yet(llama, monkeypatch):
    """An error in making them is one if it still is there in their turn."""
    model = quantized(llama, "float32")
    expected, read = alone(model), streaming.read

    def fails(model, names, modules):
        names = list(names)
        if names == ["model.layers.1.mlp.up_proj.weight"]:
            raise ValueError("not yet")
        return read(model, names, modules)
    monkeypatch.setattr(streaming, "read", fails)
    assert np.array_equal(states(model), expected)


class Doubling:
    """A visitor that puts others in the place of weights."""
    def enter(self, part):
        for name, tensor in part.tensors.items():
            if "up_proj" in name and part.layer == 1:
                part.tensors[name] = tensor * 2

    def leave(self, part):
        pass


def test_a_visitor_that_changes_weights(models):
    found = []
    for model, following in zip(models, (1, None)):
        run = run_of(model)
        streaming.run_layer(model, run, 0, Doubling(), following)
        streaming.run_layer(model, run, 1, Doubling())
        found.append(run.state())
    assert np.array_equal(*found) and not np.array_equal(found[0], alone(models[0]))


def test_decoded_weights_are_read_once_and_nobody_writes_to_them(models, monkeypatch):
    """A format that is decoded at every reading: what was read ahead is what is read next, once."""
    one, other = models
    read, names = one.checkpoint.read, []

    def decoded(name):
        names.append(name)
        return np.array(read(name))
    monkeypatch.setattr(one.checkpoint, "read", decoded)
    found = states(one)
    assert np.array_equal(found, alone(other))
    weights = [row["weight"] for row in one.modules if row["kind"] == "linear" and row["layer"] == 1]
    assert [names.count(name) for name in weights] == [1] * len(weights) and not one.read_ahead


def test_two_models_in_turns(golden, llama):
    one, other = load(llama), load(golden["qwen3"].source)
    runs = [run_of(model) for model in (one, other)]
    for layer in range(one.num_layers):
        for model, run in zip((one, other), runs):
            streaming.run_layer(model, run, layer, following=layer + 1 if layer + 1 < model.num_layers else None)
    for model, run in zip((one, other), runs):
        assert np.array_equal(run.state(), alone(model))


def test_another_layer_than_the_one_that_was_said(models):
    """And one run between the layers of another."""
    one, other = models
    run, second = run_of(one), run_of(one, IDS[:1])
    streaming.run_layer(one, run, 0, following=1)
    streaming.run_layer(one, second, 0, following=1)
    streaming.run_layer(one, second, 1, following=0)
    streaming.run_layer(one, run, 1)
    assert np.array_equal(run.state(), alone(other)) and np.array_equal(second.state(), alone(other, IDS[:1]))


# ---- the runtime's calls ----

def mapped(model, layer):
    return {row["weight"]: model.checkpoint.read(row["weight"]) for row in model.modules_of(layer) if row["kind"] == "linear"}


def tensors_of(model, layer):
    return {name: np.array(model.checkpoint.read(name)) for name in model.runtime.layer_tensors(layer)}


def linears(model, layer, tensors):
    return {row["weight"]: tensors[row["weight"]] for row in model.modules_of(layer) if row["kind"] == "linear"}


def through(model, tensors):
    """Layer 1 by these tensors, behind a layer 0 as it is."""
    run = run_of(model)
    streaming.run_layer(model, run, 0)
    model.runtime.load_layer(1, tensors)
    run.layer(1)
    model.runtime.drop_layer(1)
    return run.state()


@pytest.mark.parametrize("sent", [0, 1, 3, 99])
def test_a_part_of_a_layer_is_no_layer(models, monkeypatch, sent):
    """However much of it was sent, what is loaded is all of it."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    one, other = models
    run, tensors = run_of(one), tensors_of(one, 1)
    streaming.run_layer(one, run, 0)
    assert one.runtime.begin_ahead(1, None, linears(one, 1, tensors)) is True
    for _ in range(sent):
        if not one.runtime.go_ahead():
            break
    one.runtime.load_layer(1, tensors)
    run.layer(1)
    assert np.array_equal(run.state(), alone(other))


def test_only_the_same_memory_is_taken(models, shim, monkeypatch):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    one, other = models
    first, second = tensors_of(one, 1), tensors_of(one, 1)
    for name, tensor in second.items():
        if "down_proj" in name:
            tensor *= 2
    expected = [through(other, tensors) for tensors in (first, second)]
    for given, found in zip((first, second), expected):
        one.runtime.begin_ahead(1, None, linears(one, 1, first))
        while one.runtime.go_ahead():
            pass
        shim.mq_shim_trace(1)
        one.runtime.load_layer(1, given)
        nbytes = sum(nbytes for what, _, nbytes in noted(shim) if what == "send")
        assert (nbytes < layer_nbytes(one, 1) / 20) == (given is first)
        one.runtime.drop_layer(1)
        one.runtime.begin_ahead(1, None, linears(one, 1, first))
        while one.runtime.go_ahead():
            pass
        assert np.array_equal(through(one, given), found)


def test_freed_memory_that_is_used_again_is_not_taken_for_the_same(models):
    """The arrays are held as long as what was made of them may be taken."""
    one, other = models
    tensors = tensors_of(one, 1)
    sent = {name: tensor.copy() for name, tensor in linears(one, 1, tensors).items()}
    places = {tensor.ctypes.data for tensor in sent.values()}
    one.runtime.begin_ahead(1, None, sent)
    while one.runtime.go_ahead():
        pass
    del sent
    again = [np.ones_like(tensor) for tensor in linears(one, 1, tensors).values()]
    assert not places & {array.ctypes.data for array in again}
    one.runtime.forget_ahead()
    assert np.array_equal(through(one, tensors), through(other, tensors))


def test_what_begin_ahead_refuses(models, llama):
    model = models[0]
    tensors = linears(model, 1, tensors_of(model, 1))
    with pytest.raises(ValueError, match="model.layers.1.mlp.*is not a tensor of layer 0"):
        model.runtime.begin_ahead(0, None, {name: tensor for name, tensor in tensors.items() if "mlp" in name})
    for layer in (-1, 2):
        with pytest.raises(IndexError, match=f"layer {layer} of a model of 2 layers"):
            model.runtime.begin_ahead(layer, None, tensors)
    with pytest.raises(IndexError, match="expert 0 of layer 0, which has 0"):
        model.runtime.begin_ahead(0, 0, tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    assert model.runtime.begin_ahead(1, None, {name: tensors[name][:3]})
    with pytest.raises(ValueError, match=f"tensor {name} is .*, expected"):
        model.runtime.go_ahead()
    assert model.runtime.go_ahead() is False        # it was forgotten
    assert modelq.load(llama).runtime.begin_ahead(1, None, tensors) is False        # there is no device


# ---- errors ----

def test_an_error_while_it_waits(models):
    """What the callable raises is what the run raises, and the next one is right."""
    one, other = models
    for error in (KeyboardInterrupt, MemoryError("no more")):
        run = run_of(one)
        tensors = tensors_of(one, 0)
        one.runtime.load_layer(0, tensors)

        def fails():
            one.runtime.begin_ahead(1, None, linears(one, 1, tensors_of(one, 1)))
            raise error
        with pytest.raises(error if isinstance(error, type) else type(error)):
            run.layer(0, fails)
        with pytest.raises(RuntimeError, match="embed comes first"):
            run.layer(0)
        one.runtime.drop_layer(0)
    with pytest.raises(TypeError, match="ahead: expected a callable or None, got int"):
        run_of(one).layer(0, 5)
    assert np.array_equal(states(one), alone(other))


def test_weights_ahead_that_are_not_finite(llama, monkeypatch):
    model = load(llama)
    read, name = model.checkpoint.read, "model.layers.1.mlp.up_proj.weight"
    with monkeypatch.context() as patch:
        patch.setattr(model.checkpoint, "read", lambda wanted: read(wanted).astype(np.float32) * (np.nan if wanted == name else 1))
        with pytest.raises(ValueError, match=f"{name} contains NaN"):
            model.loss(IDS)
    assert model.loss(IDS) == load(llama).loss(IDS)


def test_a_fault_in_any_call(llama, shim, monkeypatch):
    """An error on the way of weights ahead is an error, not a layer of rubbish."""
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    shim.mq_shim_fail_at.argtypes, shim.mq_shim_fail_at.restype = [ctypes.c_uint64, ctypes.c_int], ctypes.c_uint64
    model = load(llama)
    expected = model.loss(IDS)
    shim.mq_shim_fail_at(10**9, 0)
    model.loss(IDS)
    calls = shim.mq_shim_fail_at(0, 0)
    for n in range(1, calls + 1, 37):
        shim.mq_shim_fail_at(n, 0)
        try:
            assert model.loss(IDS) == expected, n
        except (MemoryError, RuntimeError):
            pass
        shim.mq_shim_fail_at(0, 0)
        assert model.loss(IDS) == expected, n


@pytest.mark.parametrize("pinned", ["0", "100000000"])
def test_memory_of_the_host_that_may_not_be_pinned(llama, monkeypatch, pinned):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", "late")
    expected = load(llama, TIGHT).loss(IDS)
    monkeypatch.setenv("MODELQ_SHIM_PINNED", pinned)
    assert load(llama, TIGHT).loss(IDS) == expected


def test_nothing_stays_behind(llama, shim):
    import gc
    shim.mq_shim_live.restype = ctypes.c_size_t
    gc.collect()
    before = shim.mq_shim_live(), cuda.library().device(0)["free_nbytes"]
    model = load(llama)
    runs = [run_of(model, IDS[:n]) for n in (1, 2, 3, 3, 2, 1) * 2]     # more than may be pinned at once
    for run in runs:
        streaming.run_layer(model, run, 0, following=1)
    expected = alone(model, IDS[:1])
    del run, runs[1:]
    streaming.run_layer(model, runs[0], 1, following=0)             # weights are ahead that nobody wants
    assert np.array_equal(runs[0].state(), expected)
    model.runtime.use_device(None)
    del runs, model
    gc.collect()
    assert (shim.mq_shim_live(), cuda.library().device(0)["free_nbytes"]) == before


@pytest.fixture
def llama(golden):
    return golden["llama"].source
