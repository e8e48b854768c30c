"""How much of a model is left in another, against NumPy on the logits of both."""
from pathlib import Path

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from modelq.fidelity import fidelity, log_softmax


@pytest.fixture(scope="module")
def pair(golden):
    """The micro llama, and itself with INT4 weights and FP8 keys and values."""
    before, after = (modelq.load(golden["llama"].source, compute="float32") for _ in range(2))
    config = {**mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, "quant_cfg": [*mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}
    mtq.quantize(after, config, lambda model: model(golden["llama"].calib))
    return before, after


def test_against_the_logits(pair, golden):
    ids = golden["llama"].calib.ravel()[:3 * 40 + 7]        # the rest is no window
    found = fidelity(*pair, ids, window=40)
    logits = [np.asarray(model(ids[:120].reshape(3, 40)).logits).astype(np.float64)[:, :-1] for model in pair]
    left, right = (one - np.log(np.exp(one - one.max(-1, keepdims=True)).sum(-1, keepdims=True)) - one.max(-1, keepdims=True) for one in logits)
    divergence = (np.exp(left) * (left - right)).sum(-1)
    targets = ids[:120].reshape(3, 40)[:, 1:, None]
    assert (found.positions, found.window) == (117, 40) and divergence.mean() > 1e-4
    assert found.divergence == pytest.approx(divergence.mean(), rel=1e-4) and found.largest_divergence == pytest.approx(divergence.max(), rel=1e-3)
    assert found.agreement == (left.argmax(-1) == right.argmax(-1)).mean() < 1
    for value, side in ((found.perplexity_before, left), (found.perplexity_after, right)):
        assert value == pytest.approx(np.exp(-np.take_along_axis(side, targets, -1).mean()), rel=1e-5)
    assert found.perplexity_before == pytest.approx(pair[0].perplexity(ids, 40), rel=1e-5)
    assert found.ratio == found.perplexity_before / found.perplexity_after


def test_hidden_states(pair, golden):
    """Nothing is lost before the first quantized layer; behind each layer, what a run of both says."""
    from modelq import streaming
    from modelq.inputs import make_batch

    ids = golden["llama"].calib.ravel()[:64]
    found = fidelity(*pair, ids, window=64).hidden
    assert len(found) == pair[0].num_layers + 1 and found[0] == 0
    states = []
    for model in pair:
        run = streaming.start(model, [make_batch(256, ids[None])])
        states.append([])
        for layer in range(model.num_layers):
            streaming.run_layer(model, run, layer)
            states[-1].append(run.hidden(0)[0].astype(np.float64))
    for error, left, right in zip(found[1:], *states):
        assert error == pytest.approx(np.median(np.linalg.norm(right - left, axis=-1) / np.linalg.norm(left, axis=-1)), rel=1e-4)
        assert error > 0.01


def test_nothing_is_lost_in_a_copy(golden):
    first, second = (modelq.load(golden["qwen3moe"].source, compute="float32") for _ in range(2))
    found = fidelity(first, second, golden["qwen3moe"].calib.ravel()[:96], window=32)
    assert found.divergence == found.largest_divergence == 0 and found.agreement == found.ratio == 1 and set(found.hidden) == {0}


def test_many_windows_are_done_in_groups(pair, golden, monkeypatch):
    ids = golden["llama"].calib.ravel()[:160]
    whole = fidelity(*pair, ids, window=20)
    monkeypatch.setattr(modelq.Model, "tokens_at_once", 45)
    parts = vars(fidelity(*pair, ids, window=20))
    assert parts.pop("hidden") == pytest.approx(whole.hidden, rel=1e-5)
    assert parts == pytest.approx({name: value for name, value in vars(whole).items() if name != "hidden"}, rel=1e-5)


def test_the_first_model_is_run_once_for_several(pair, golden, monkeypatch):
    """The same numbers, but for single layers, from states that were kept."""
    from modelq import streaming

    ids, kept, ran = golden["llama"].calib.ravel()[:160], [], []
    whole = {name: value for name, value in vars(fidelity(*pair, ids, window=20)).items() if name != "hidden"}
    monkeypatch.setattr(modelq.Model, "tokens_at_once", 45)
    run_layer = streaming.run_layer
    monkeypatch.setattr(streaming, "run_layer", lambda model, *rest, **more: ran.append(model) or run_layer(model, *rest, **more))
    for _ in range(2):
        found = vars(fidelity(*pair, ids, 20, kept))
        assert found.pop("hidden") == [] and found == pytest.approx(whole, rel=1e-5) and len(kept) == 4
    assert ran.count(pair[0]) * 2 == ran.count(pair[1]) == 2 * 4 * 2        # twice, four groups, two layers


def test_bad_use(pair, golden):
    with pytest.raises(ValueError, match="a second time"):
        fidelity(pair[0], pair[0], [1, 2, 3])
    with pytest.raises(ValueError, match="not one model"):
        fidelity(pair[0], modelq.load(Path(__file__).parent / "data" / "families" / "qwen2"), [1, 2, 3])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        fidelity(*pair, [1])


def test_log_softmax_of_large_logits():
    found = log_softmax(np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32))
    assert found == pytest.approx(np.array([[-0.3132617, -1.3132617, -20000.3132617], [-np.log(3)] * 3]), rel=1e-6)
