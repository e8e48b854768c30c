"""`modelq.load` and calling the model: what it accepts, when it computes, what it answers."""
import gc
import re

import numpy as np
import pytest

import golden_data
import modelq
from modelq import inputs, streaming
from modelq.inputs import make_batch

LOGITS_TOLERANCE = 2e-4  # absolute, float32 mode against transformers


class ViaDLPack:
    """A foreign array: all it offers is the protocol, as a PyTorch tensor would."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnAnotherDevice(ViaDLPack):
    def __dlpack__(self, **kwargs):
        raise BufferError("data is on CUDA")


# Inputs ------------------------------------------------------------------------------------------------------------------

IDS = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("value", [
    IDS, IDS.astype(np.int32), IDS.astype(np.uint8), IDS.tolist(), tuple(map(tuple, IDS.tolist())), ViaDLPack(IDS.astype(np.int64)),
    ViaDLPack(IDS.astype(np.int32)), np.asfortranarray(IDS), IDS.repeat(2, axis=1)[:, ::2], np.broadcast_to(IDS[0], (1, 3))[:, :],
], ids=lambda v: type(v).__name__)
def test_token_ids_come_in_many_ways(value):
    batch = make_batch(256, value)
    expected = np.asarray(value.array if isinstance(value, ViaDLPack) else value)
    assert batch.ids.dtype == np.int64 and batch.ids.flags.c_contiguous and np.array_equal(batch.ids, expected)


def test_a_batch_is_a_copy_and_one_row_is_a_batch_of_one():
    ids = IDS.copy()
    batch = make_batch(256, ids)
    ids[:] = 0
    assert batch.ids[0, 0] == 1
    assert make_batch(256, [7, 8]).ids.shape == (1, 2)


def test_dictionaries_and_masks():
    batch = make_batch(256, {"input_ids": IDS, "attention_mask": [[0, 1, 1], [True, True, True]], "labels": [[-100, 2, 3]] * 2,
                             "use_cache": False})
    assert batch.mask.dtype == np.uint8 and batch.mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 2, 3]] * 2


@pytest.mark.parametrize("arguments, error, words", [
    (dict(input_ids=[[1, 256]]), ValueError, r"token id 256 is out of the vocabulary \(0 to 255\)"),
    (dict(input_ids=[[1, -1]]), ValueError, "token id -1 is out of the vocabulary"),
    (dict(input_ids=[[1.0, 2.0]]), TypeError, "expected integers, got float64"),
    (dict(input_ids="text"), TypeError, "tokenize the text first"),
    (dict(input_ids=None), TypeError, "expected token ids"),
    (dict(input_ids=object()), TypeError, "expected integers, got object"),
    (dict(input_ids=[[1, 2], [3]]), ValueError, "different lengths"),
    (dict(input_ids=np.zeros((1, 2, 3), int)), ValueError, r"expected shape \[batch, tokens\]"),
    (dict(input_ids=[]), ValueError, "no tokens"),
    (dict(input_ids=np.zeros((0, 4), int)), ValueError, "no tokens"),
    (dict(input_ids=IDS, attention_mask=[[1, 1]]), ValueError, "attention_mask: shape"),
    (dict(input_ids=IDS, labels=IDS + 255), ValueError, "labels: token id"),
    (dict(input_ids=OnAnotherDevice(IDS)), TypeError, "move it to the CPU"),
    (dict(input_ids={"input_ids": IDS, "pixel_values": 3}), TypeError, "pixel_values"),
])
def test_bad_inputs_say_what_is_wrong(arguments, error, words):
    with pytest.raises(error, match=words):
        make_batch(256, **arguments)


# Calls -------------------------------------------------------------------------------------------------------------------

def next_token_loss(logits, labels):
    """Mean cross-entropy in float64; labels below 0 do not count."""
    rows, targets = logits[:, :-1].astype(np.float64), labels[:, 1:]
    peak = rows.max(-1, keepdims=True)
    log_p = rows - peak - np.log(np.exp(rows - peak).sum(-1, keepdims=True))
    keep = targets >= 0
    return -np.take_along_axis(log_p, np.where(keep, targets, 0)[..., None], -1)[..., 0][keep].mean()


@pytest.fixture
def model(golden):
    return modelq.load(golden["llama"].source, compute="float32")


@pytest.fixture
def layers_run(monkeypatch):
    """Every layer that is run, in order."""
    seen, original = [], streaming.run_layer

    def run_layer(model, run, layer, *how, **more):
        seen.append(layer)
        return original(model, run, layer, *how, **more)
    monkeypatch.setattr(streaming, "run_layer", run_layer)
    return seen


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_equal_the_reference(golden, name):
    model = modelq.load(golden[name].source, compute="float32")
    logits = model(golden[name].calib[:1]).logits
    assert logits.dtype == np.float32 and logits.shape == golden[name].logits.shape
    assert np.abs(logits - golden[name].logits).max() <= LOGITS_TOLERANCE


def test_nothing_is_computed_before_it_is_touched(model, golden, layers_run):
    outputs = [model(row[None]) for row in golden["llama"].calib[:3]]
    del outputs[1]
    gc.collect()
    assert layers_run == []
    first = outputs[0].logits
    assert layers_run == [0, 1]            # both waiting calls in one pass
    second = outputs[1].logits
    assert layers_run == [0, 1] and outputs[0].logits is first
    assert np.array_equal(second, model(golden["llama"].calib[2:3]).logits)


def test_the_ways_to_the_logits(model, golden):
    calib = golden["llama"].calib[:2]
    output = model(input_ids=calib, labels=calib, use_cache=False)
    assert np.array_equal(np.asarray(output), output.logits) and output["logits"] is output.logits
    assert output.loss == pytest.approx(next_token_loss(output.logits, calib), rel=1e-5)
    assert model(calib).loss is None
    with pytest.raises(TypeError, match="unknown argument 'inputs_embeds'"):
        model(calib, inputs_embeds=3)
    assert model.eval() is model and model.train() is model and model.training is False


def test_losses_of_labels(model, golden):
    calib, labels = golden["llama"].calib[:3], golden["llama"].calib[:3].copy()
    labels[0, :50], labels[2, 7:] = -100, -100
    with_labels, without, nothing = model(calib, labels=labels), model(calib), model(calib[:1], labels=np.full((1, 64), -100))
    assert with_labels.loss == pytest.approx(next_token_loss(with_labels.logits, labels), rel=1e-5)
    assert without.loss is None and np.isnan(nothing.loss)
    assert with_labels["loss"] == with_labels[0] == with_labels.loss


def test_padding_changes_nothing(model, golden):
    row = golden["llama"].calib[:1]
    short = model(row[:, :40]).logits
    padded = model(np.concatenate([row[:, :40], np.zeros((1, 24), np.int64)], axis=1), attention_mask=[[1] * 40 + [0] * 24]).logits
    assert np.abs(padded[:, :40] - short).max() < LOGITS_TOLERANCE


def test_loss_and_perplexity(model, golden):
    calib = golden["llama"].calib
    expected = np.mean([next_token_loss(model(row[None]).logits, row[None]) for row in calib])
    assert model.loss([row[None] for row in calib]) == pytest.approx(expected, rel=1e-5)
    assert model.loss([{"input_ids": calib[:5]}, calib[5:]]) == pytest.approx(expected, rel=1e-5)
    assert model.perplexity(calib.ravel(), window=64) == pytest.approx(np.exp(expected), rel=1e-5)
    whole = np.concatenate([calib.ravel(), calib[0, :10]])     # a rest shorter than the window is left out
    assert model.perplexity(whole, window=64) == pytest.approx(np.exp(expected), rel=1e-5)
    assert model.perplexity(calib[0, :20], window=64) == pytest.approx(np.exp(model.loss([calib[0, :20]])), rel=1e-6)
    with pytest.raises(ValueError, match="no tokens to predict|at least 2"):
        model.perplexity([3])
    with pytest.raises(ValueError, match="out of the vocabulary"):
        model.perplexity([3, 4, 9999])


def test_loss_goes_in_rounds_where_memory_asks_for_it(model, golden, monkeypatch, layers_run):
    expected = model.loss([row[None] for row in golden["llama"].calib])
    del layers_run[:]
    monkeypatch.setattr("modelq.model.HIDDEN_BYTES", 4 * 128 * 64 * 3)   # three rows of 64 tokens
    assert model.loss([row[None] for row in golden["llama"].calib]) == pytest.approx(expected, rel=1e-6)
    assert layers_run == [0, 1] * 3


def test_bfloat16_is_near_float32(golden):
    calib = golden["llama"].calib
    exact = modelq.load(golden["llama"].source, compute="float32").loss([calib])
    assert modelq.load(golden["llama"].source, compute="bfloat16").loss([calib]) == pytest.approx(exact, rel=5e-3)


def test_load_refuses(golden, tmp_path):
    with pytest.raises(ValueError, match="compute must be"):
        modelq.load(golden["llama"].source, compute="float8")
    with pytest.raises(FileNotFoundError):
        modelq.load(tmp_path / "nothing")


def test_slots_follow_the_modules(model):
    names = list(model.slots)
    q = [n for n in names if n.startswith("model.layers.0.self_attn.")]
    assert q[:3] == [f"model.layers.0.self_attn.q_proj.{role}_quantizer" for role in ("input", "output", "weight")]
    assert q[-3:] == [f"model.layers.0.self_attn.{letter}_bmm_quantizer" for letter in "qkv"]
    assert names[:3] == [f"model.embed_tokens.{role}_quantizer" for role in ("weight", "input", "output")]
    assert len(names) == 2 * (7 * 3 + 3) + 2 * 3
    assert "model.embed_tokens.weight_quantizer" in names and "lm_head.input_quantizer" in names


def test_progress_is_quiet_without_a_terminal(capsys, monkeypatch):
    from modelq import progress
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    assert list(progress.progress(range(3), "x")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_progress_says_what_and_how_long_on_a_terminal(monkeypatch):
    import io
    import sys

    from modelq import progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.progress(range(3), "calibrate")) == [0, 1, 2]
    assert re.search(r"calibrate: .*\d/3 \[[\d:]+<.*layer/s\]", sys.stderr.getvalue())
    monkeypatch.setattr(progress, "DELAY_SECONDS", 60)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.progress(range(3), "calibrate")) == [0, 1, 2] and "calibrate" not in sys.stderr.getvalue()


def test_a_checkpoint_that_does_not_fit_its_config(golden, tmp_path):
    import json
    import shutil
    shutil.copytree(golden["llama"].source, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for change, words in ((dict(num_hidden_layers=3), r"no tensor 'model\.layers\.2\.[\w.]+'"),
                          (dict(intermediate_size=512), r"tensor '[\w.]+' has shape .* asks for \[512, 128\]")):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=words):
            modelq.load(tmp_path / "m")


def test_ignored_arguments_are_known():
    assert "use_cache" in inputs.IGNORED_ARGUMENTS
    assert golden_data.models()
