"""Waits between streams that tests/test_device_order.py has no need of: of heads in slices, of many chunks that are not alike, of candidates
for scores. Models are as small as may be, since scripts/wait_mutants.py runs these once for each wait."""
import json

import numpy as np
import pytest

import modelq
from cuda_library import library_to_test, same_on_all_streams
from golden_data import write_safetensors
from modelq import _core, cuda
from modelq.gradients import backward

RNG = np.random.default_rng(0)
HIDDEN, INNER, VOCABULARY, FEW = 16, 32, 3001, 61
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
          "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": FEW, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 128, "tie_word_embeddings": False, "torch_dtype": "float32"}
TIGHT, FEW_ROWS, SLICES, ENOUGH = 1_650_000, 1_500_000, 1_540_000, 6_000_000
pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


def tensors(layers, vocabulary):
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
              "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    names = {f"model.layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}
    return {name: (RNG.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in names.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("micro")
    write_safetensors(made / "model.safetensors", tensors(3, FEW))
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def bare_runtime(memory):
    """What is before and behind the layers."""
    runtime = _core.Runtime("llama", {**CONFIG, "num_hidden_layers": 0, "vocab_size": VOCABULARY}, "float32")
    runtime.use_device(cuda.library(), 0, memory, cuda.cublas_path(cuda.library()))
    return runtime


def test_a_head_in_slices(monkeypatch):
    """Losses, for which nothing is waited until the end, and logits."""
    given = tensors(0, VOCABULARY)
    head = {name: given[name] for name in ("model.norm.weight", "lm_head.weight")}
    ids = RNG.integers(0, VOCABULARY, (2, 30))

    def work():
        run = bare_runtime(SLICES).start([ids])
        run.embed(given)
        return [*run.loss(head), run.logits(0, head)]
    same_on_all_streams(monkeypatch, work)


def test_a_head_in_slices_on_the_way_back(monkeypatch):
    given = tensors(0, VOCABULARY)
    head = {name: given[name] for name in ("model.norm.weight", "lm_head.weight")}
    ids = RNG.integers(0, VOCABULARY, (2, 30))

    def work():
        found = {name: np.zeros_like(tensor) for name, tensor in given.items()}
        run = bare_runtime(2_400_000).start([ids])
        run.embed(given)
        back = run.backward({})
        back.head(head)
        plain = back.gradient(0)
        run = bare_runtime(2_400_000).start([ids])
        run.embed(given)
        back = run.backward(found)
        losses, _ = back.head(head)
        return [losses, plain, back.gradient(0), *found.values()]
    same_on_all_streams(monkeypatch, work)


def ragged():
    """Batches whose sequences are not alike, with padding."""
    batches = []
    for length in (7, 13, 5, 11, 9, 6, 12, 8):
        mask = np.ones((3, length), np.int64)
        mask[1, length // 2:] = 0
        batches.append({"input_ids": RNG.integers(0, FEW, (3, length)), "attention_mask": mask})
    return batches


def test_many_chunks_that_are_not_alike(folder, monkeypatch):
    batches = ragged()
    same_on_all_streams(monkeypatch, lambda: [modelq.load(folder, compute="float32", device="cuda", device_memory=FEW_ROWS).loss(batches)])


def test_many_chunks_on_the_way_back(folder, monkeypatch):
    batches, wanted = ragged(), ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]

    def work():
        model, looks = modelq.load(folder, compute="float32", device="cuda", device_memory=TIGHT), []
        found = backward(model, batches, wanted, look=lambda layer, back: looks.append(back.gradient(1)))
        return [found.losses, *found.weights.values(), *looks]
    same_on_all_streams(monkeypatch, work)


def test_scores_of_candidates(folder, monkeypatch):
    """Whose weights come one after the other, to one place."""
    names = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"]
    weights = {name: [RNG.standard_normal((INNER if "up" in name else HIDDEN, HIDDEN)).astype(np.float32) for _ in range(5)] for name in names}
    batches = ragged()[:2]

    def work():
        model = modelq.load(folder, compute="float32", device="cuda", device_memory=ENOUGH)
        scores = {name: _core.OutputScore(weights[name]) for name in names}
        backward(model, batches, observers=scores)
        return [np.asarray(score.scores) for score in scores.values()]
    same_on_all_streams(monkeypatch, work)


def test_candidates_of_a_head(monkeypatch):
    given = tensors(0, VOCABULARY)
    head = {name: given[name] for name in ("model.norm.weight", "lm_head.weight")}
    candidates = [given["lm_head.weight"] * factor for factor in (0.5, 2, 3)]

    def work():
        runtime, score = bare_runtime(ENOUGH), _core.OutputScore(candidates)
        run = runtime.start([RNG.integers(0, VOCABULARY, (2, 40)) * 0 + np.arange(40)])
        run.embed(given)
        back = run.backward({})
        runtime.set_observer("lm_head", score)
        back.head(head)
        return [np.asarray(score.scores)]
    same_on_all_streams(monkeypatch, work)
