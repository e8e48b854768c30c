"""Backward passes that are used in a wrong order, fail, are stopped, or run out of memory; and how much memory they take."""
import gc
import json
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import golden_data
import modelq
import modelq._core as core
import modelq.quantization as mtq
from cuda_library import SANITIZED
from modelq import streaming
from modelq.gradients import backward
from modelq.inputs import make_batch
from test_oom import every_allocation_fails


@pytest.fixture
def model(golden):
    return modelq.load(golden["llama"].source, compute="float32")


@pytest.fixture
def moe(golden):
    return modelq.load(golden["qwen3moe"].source, compute="float32")


IDS = np.random.default_rng(0).integers(0, 256, (2, 20))


def run_through(model, ids=IDS):
    """(run, the hidden states before each layer)."""
    run, states = streaming.start(model, [make_batch(model.vocab_size, ids)]), []
    for layer in range(model.num_layers):
        states.append(run.state())
        streaming.run_layer(model, run, layer)
    return run, states


def tensors_of(model, layer):
    return streaming.read(model, model.runtime.layer_tensors(layer), model.modules_of(layer))


def test_order(model):
    run = streaming.start(model, [make_batch(model.vocab_size, IDS)])
    with pytest.raises(RuntimeError, match="has not been through all layers"):
        run.backward()
    run, states = run_through(model)
    head, back = streaming.head_tensors(model), run.backward()
    assert back.next_layer == 2 and back.nbytes >= run.state().nbytes
    for wrong, words in ((lambda: back.layer(1, states[1], tensors_of(model, 1)), "the head comes first"),
                         (lambda: back.gradient(0), "the head comes first"), (lambda: back.embed(), "layers come first")):
        with pytest.raises(RuntimeError, match=words):
            wrong()
    losses, counts = back.head(head)
    assert counts.tolist() == [2 * 19] and losses[0] == pytest.approx(model.loss([IDS]), rel=1e-6)
    for wrong, words in ((lambda: back.head(head), "comes first, once"), (lambda: back.embed(), "layers come first"),
                         (lambda: back.layer(0, states[0], tensors_of(model, 0)), "the next layer is 1")):
        with pytest.raises(RuntimeError, match=words):
            wrong()
    with pytest.raises(IndexError):
        back.layer(2, states[1], {})
    back.layer(1, states[1], tensors_of(model, 1))
    back.layer(0, states[0], tensors_of(model, 0))
    back.embed()
    assert back.next_layer == -1 and back.gradient(0).shape == (2, 20, 128)


def test_states_are_checked(model):
    run, states = run_through(model)
    back = run.backward()
    back.head(streaming.head_tensors(model))
    for wrong in (states[1][:3], states[1].astype(np.float64), np.asfortranarray(states[1]), states[1].ravel()):
        with pytest.raises(ValueError, match=r"state: expected \[40, 128\] float32"):
            back.layer(1, wrong, tensors_of(model, 1))
        with pytest.raises(ValueError, match=r"out: expected \[40, 128\] float32"):
            run.state(wrong)
    frozen = states[1].copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        run.state(frozen)
    out = np.empty_like(frozen)
    assert run.state(out) is out and np.array_equal(out, run.state())
    back.layer(1, frozen, tensors_of(model, 1))


def test_a_failure_ends_it(model):
    run, states = run_through(model)
    back = run.backward()
    back.head(streaming.head_tensors(model))
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors_of(model, 1).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(ValueError, match="up_proj.weight contains NaN"):
        back.layer(1, states[1], tensors)
    with pytest.raises(RuntimeError, match="has to start again"):
        back.layer(1, states[1], tensors_of(model, 1))
    again = run.backward()
    again.head(streaming.head_tensors(model))
    again.layer(1, states[1], tensors_of(model, 1))


def test_experts_in_order(moe):
    run, states = run_through(moe)
    back = run.backward()
    back.head(streaming.head_tensors(moe))

    def tensors(expert):
        return streaming.read(moe, moe.runtime.expert_tensors(1, expert), moe.modules_of(1, expert))
    with pytest.raises(RuntimeError, match="not what comes next"):
        back.expert(1, 0, tensors(0))
    tokens = back.layer(1, states[1], tensors_of(moe, 1))
    del states
    gc.collect()        # what is still to be read is kept
    assert tokens[:, 0].sum() == 40 * moe.runtime.config["num_experts_per_tok"]
    used = np.flatnonzero(tokens[:, 0]).tolist()
    with pytest.raises(RuntimeError, match=f"expert {used[0]} comes next"):
        back.expert(1, used[1], tensors(used[1]))
    with pytest.raises(RuntimeError, match="experts of layer 1 come next"):
        back.layer(1, np.zeros((40, 128), np.float32), tensors_of(moe, 1))
    for expert in used:
        with pytest.raises(RuntimeError, match="one after the other"):
            back.gradient(0)
        back.expert(1, expert, tensors(expert))
    assert back.next_layer == 0 and back.gradient(0).any()


def test_what_has_no_gradient_is_refused(golden, model):
    calib = golden["llama"].calib[:1]
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(calib))
    with pytest.raises(ValueError, match="input_quantizer changes activations"):
        backward(model, [calib])
    with model.simulating(weights=True, activations=False):
        quantized = backward(model, [calib]).losses
    with model.simulating(weights=False, activations=False):
        plain = backward(model, [calib]).losses
    assert quantized[0] != plain[0] and quantized[0] == pytest.approx(plain[0], rel=0.02)
    other = modelq.load(golden["llama"].source, compute="float32")
    other.runtime.set_calibrator("model.layers.1.mlp.up_proj.input_quantizer", core.Calibrator())
    with pytest.raises(RuntimeError, match="layer 1 has a calibrator"):
        backward(other, [calib])
    svd = modelq.load(golden["llama"].source, compute="float32")
    mtq.quantize(svd, mtq.NVFP4_SVDQUANT_DEFAULT_CFG, lambda m: m(calib))
    with pytest.raises(ValueError, match="branches of low rank"), svd.simulating(weights=True, activations=False):
        backward(svd, [calib])


def test_wanted_is_checked(model):
    run, _ = run_through(model)
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong in (np.zeros((3, 4), np.float32), np.zeros((256, 128)), np.zeros((256, 256), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match=r"gradient of model.layers.0.mlp.up_proj.weight: expected \[256, 128\] float32"):
            run.backward({name: wrong})
    with pytest.raises(KeyError, match="nothing"):
        run.backward({"nothing": np.zeros(3, np.float32)})
    with pytest.raises(KeyError, match="nothing"):
        backward(model, [IDS], ["nothing"])
    with pytest.raises(ValueError, match="no batches"):
        backward(model, [])


def test_observers_are_checked(golden, moe):
    model = modelq.load(golden["llama"].source, compute="float32")
    weight = model.checkpoint.read("model.layers.0.mlp.up_proj.weight")
    score, runtime = core.OutputScore([weight]), model.runtime
    for name in ("model.layers.0.mlp", "model.layers.0.input_layernorm", "model.embed_tokens", "nothing"):
        with pytest.raises(KeyError, match="no linear, experts or lm_head"):
            runtime.set_observer(name, score)
    with pytest.raises(KeyError):
        moe.runtime.set_observer("model.layers.0.mlp.experts.0.up_proj", score)
    with pytest.raises(TypeError, match="expected an OutputScore"):
        runtime.set_observer("lm_head", core.Calibrator())
    runtime.set_observer("model.layers.0.mlp.up_proj", score)
    with pytest.raises(RuntimeError, match="at another place already"):
        runtime.set_observer("model.layers.0.mlp.gate_proj", score)
    runtime.set_observer("model.layers.0.mlp.up_proj", None)
    runtime.set_observer("model.layers.0.mlp.down_proj", score)
    with pytest.raises(ValueError, match=r"a weight of \[256, 128\] bfloat16 at a linear of \[128, 256\]"):
        backward(model, [IDS])
    del model, runtime
    gc.collect()
    moe.runtime.set_observer("model.layers.1.mlp.experts", score)     # free again with the runtime that it was at
    with pytest.raises(RuntimeError, match="not at a layer's experts"):
        backward(moe, [IDS])
    moe.runtime.set_observer("model.layers.1.mlp.experts", core.ExpertsScore(1))
    with pytest.raises(RuntimeError, match="candidates of expert -1 were loaded"):
        backward(moe, [IDS])
    moe.runtime.set_observer("model.layers.1.mlp.experts", None)
    moe.runtime.set_observer("model.layers.1.self_attn.q_proj", core.ExpertsScore(1))
    with pytest.raises(RuntimeError, match="not at a linear"):
        backward(moe, [IDS])


@pytest.mark.parametrize("make, error, words", [
    (lambda: core.OutputScore([np.zeros(3, np.float32)]), ValueError, r"weights\[0\]: expected a matrix"),
    (lambda: core.OutputScore([np.zeros((3, 2), np.int32)]), ValueError, r"weights\[0\]: expected a matrix"),
    (lambda: core.OutputScore([np.zeros((3, 2), np.float32)], []), ValueError, "0 quantizers for 1 weights"),
    (lambda: core.OutputScore([np.zeros((3, 2), np.float32)], ["x"]), TypeError, "expected a Quantizer"),
    (lambda: core.OutputScore([np.zeros((3, 2), np.float32)], bias=np.zeros(2, np.float32)), ValueError, "bias"),
    (lambda: core.OutputScore(3), TypeError, "sequence"),
    (lambda: core.ExpertsScore(0), ValueError, "0 candidates"),
    (lambda: core.ExpertsScore(1, "float64"), ValueError, "compute"),
    (lambda: core.ExpertsScore(1).load(0, []), ValueError, "0 candidates of 1"),
    (lambda: core.ExpertsScore(1).load(0, [3]), TypeError, "tuples"),
    (lambda: core.ExpertsScore(1).load(0, [(np.zeros((3, 2), np.float32),) * 3 + (None,) * 2]), ValueError, "do not fit each other"),
    (lambda: core.ExpertsScore(1).load(0, [(np.zeros(3, np.float32),) * 3 + (None,) * 2]), ValueError, "gate: expected a matrix"),
    (lambda: core.OutputGradient(0, 3), ValueError, "at least 1"),
])
def test_observers_refuse(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_experts_score_forgets_a_pass_that_was_given_up(moe):
    """Candidates without output at all, of the first expert only: what was seen of it before counts once."""
    name, expert = "model.layers.1.mlp.experts", moe.modules_of(1, 0)
    tensors = streaming.read(moe, [module["weight"] for module in expert], expert)
    gate, up, down = (tensors[module["weight"]] for module in expert)
    nothing = (gate, up, np.zeros_like(down), None, None)

    def own(index):
        modules = moe.modules_of(1, index)
        return (*streaming.read(moe, [module["weight"] for module in modules], modules).values(), None, None)

    def run(passes):
        score = core.ExpertsScore(1)
        moe.runtime.set_observer(name, score)
        for finished in passes:
            run, states = run_through(moe)
            back = run.backward()
            back.head(streaming.head_tensors(moe))
            tokens = back.layer(1, states[1], tensors_of(moe, 1))
            for index in np.flatnonzero(tokens[:, 0]).tolist()[:None if finished else 1]:
                score.load(index, [nothing if index == 0 else own(index)])
                back.expert(1, index, streaming.read(moe, moe.runtime.expert_tensors(1, index), moe.modules_of(1, index)))
        moe.runtime.set_observer(name, None)
        return score.scores[0]
    once = run([True])
    assert once > 0 and run([False, True]) == once and run([True, True]) == 2 * once


def test_interrupt(model):
    """Ctrl-C in a layer on the way back: KeyboardInterrupt, and the same pass can be made anew."""
    ids = np.tile(IDS, (40 if SANITIZED else 500, 10))      # a layer that takes longer than the timer
    run, states = run_through(model, ids)
    back = run.backward()
    back.head(streaming.head_tensors(model))
    tensors, main = tensors_of(model, 1), threading.main_thread().ident
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        started = time.perf_counter()
        back.layer(1, states[1], tensors)
        time.sleep(max(0.0, 2 - (time.perf_counter() - started)))      # it came too late: still a KeyboardInterrupt
    timer.join()
    if back.next_layer == 0:
        pytest.skip("the layer was done before the signal came")
    with pytest.raises(RuntimeError, match="has to start again"):
        back.layer(1, states[1], tensors)


@pytest.mark.parametrize("name, step", [("qwen3", 1), ("qwen3moe", 1)])
def test_out_of_memory(golden, no_allocation_faults, name, step):
    model = modelq.load(golden[name].source, compute="float32")
    ids = golden[name].calib[:1, :16]
    norms = ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"]

    def operation():
        score = core.OutputScore([model.checkpoint.read("model.layers.1.self_attn.v_proj.weight")])
        gradients = backward(model, [ids], norms, {"model.layers.1.self_attn.v_proj": score}, keep_bytes=0)
        return {**gradients.weights, "loss": gradients.losses, "score": score.scores}
    every_allocation_fails(operation, at_least=20, step=step)


def test_experts_score_out_of_memory(golden, no_allocation_faults):
    weights = [np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in enumerate([(6, 4), (6, 4), (4, 6)])]

    def operation():
        score = core.ExpertsScore(2)
        score.load(0, [(*weights, None, None)] * 2)
        return score.scores
    every_allocation_fails(operation, at_least=4)


@pytest.mark.measures
def test_memory_does_not_grow_with_layers(run_python, tmp_path):
    """3 and 12 layers of 16 MiB of hidden states each: what is held are those at one boundary and their gradients (32 MiB), those that
    keep_bytes allows (32 MiB), scratch of 512 rows, and pages of the file that the kernel has not taken back while they are in use."""
    code = textwrap.dedent("""
        import json, sys
        from pathlib import Path
        sys.path[:0] = json.loads(sys.argv[3])
        from backward import write_model
        import numpy as np
        import modelq
        from modelq.gradients import backward
        from modelq.measure import peak_memory, reset_peak_memory

        layers, folder = int(sys.argv[1]), Path(sys.argv[2])
        folder.mkdir()
        write_model(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 64,
                             "num_hidden_layers": layers, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2,
                             "vocab_size": 256, "tie_word_embeddings": True, "hidden_act": "silu", "max_position_embeddings": 256})
        model = modelq.load(folder, compute="float32")
        batches = [np.random.default_rng(i).integers(0, 256, (1, 256)) for i in range(16)]
        backward(model, batches[:1])
        reset_peak_memory()
        before = peak_memory()
        backward(model, batches, keep_bytes=32 << 20)
        print((peak_memory() - before) / 2 ** 20)
    """)
    paths = json.dumps([str(Path(__file__).parent / "bench"), *sys.path])
    few, many = (float(run_python(code, args=[str(layers), str(tmp_path / str(layers)), paths])) for layers in (3, 12))
    assert few < 32 + 32 + 48, f"{few} MiB"
    assert many < few + 24, f"{many} MiB for 12 layers, {few} MiB for 3: hidden states of 9 layers are 144 MiB"
    assert golden_data.models()
