"""auto_quantize on transformers models and any torch module: scores and choices as Model Optimizer's, states that go on, exports."""
import copy
import json
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import golden_data  # noqa: E402
import modelq  # noqa: E402
import modelq.quantization as mtq  # noqa: E402
from modelq.export import export_hf_checkpoint  # noqa: E402
from modelq.torch_models import scores as scoring  # noqa: E402
from modelq.torch_models.auto_quantize import TorchSubject  # noqa: E402
from test_torch_models import load, logits, quantizers  # noqa: E402

FORMATS = [mtq.INT4_AWQ_CFG, mtq.FP8_DEFAULT_CFG]
AUTO = golden_data.cases(configs=["AUTO_6.0"], names=["llama", "qwen3", "qwen3moe"], needs=["auto_state.json"])
QKV = "model.layers.0.self_attn.q_proj.quant_recipe"


def search(model, golden_model, bits=6.0, formats=FORMATS, calib=8, score=8, **options):
    data = [{"input_ids": row[None], "labels": row[None]} for row in torch.from_numpy(golden_model.calib)]
    loss = {} if options.get("method") == "kl_div" or "forward_backward_step" in options else {"loss_func": lambda output, batch: output.loss}
    return mtq.auto_quantize(model, {"effective_bits": bits}, formats, data, options.pop("forward_step", lambda model, batch: model(**batch)),
                             num_calib_steps=calib, num_score_steps=score, **{**loss, **options})


def scores_of(state):
    return {key: group["scores"] for key, group in state["candidate_stats"].items()}


@pytest.mark.parametrize("case", AUTO)
def test_scores_and_choice_are_the_reference_s(case):
    """In float32 to the last digits. In bfloat16 what quantization changes is itself a last digit here and there."""
    model, state = search(load(case.model, case.dtype), case.model, compat="modelopt")
    theirs = json.loads((case.folder / "auto_state.json").read_text())
    assert list(state["candidate_stats"]) == list(theirs["candidate_stats"])
    for key, group in theirs["candidate_stats"].items():
        ours = state["candidate_stats"][key]
        np.testing.assert_allclose(ours["scores"], group["scores"], rtol=1e-5 if case.dtype == "float32" else 0.12)
        for word in ("formats", "costs", "module_names", "quantizer_attrs", "cost_weight", "uncompressed_cost"):
            assert ours[word] == group[word], word
    assert state["best"]["recipe"] == theirs["best"]["recipe"] and state["best"]["constraints"] == theirs["best"]["constraints"]
    assert state["best"]["is_satisfied"] and state["method"] == "gradient"
    tied = model.config.tie_word_embeddings     # there the reference scales the embedding together with lm_head
    if case.dtype == "float32" and not tied:
        np.testing.assert_allclose(logits(model, case.model), case.fake_logits, atol=1e-4)
    assert all(quantizer.amax is not None for quantizer in quantizers(model).values() if quantizer.is_enabled)


@pytest.mark.parametrize("case", golden_data.cases("bfloat16", ["AUTO_6.0"], ["llama"], needs=["hf_quant_config.json"]))
def test_the_export_says_what_the_reference_s_says(case, tmp_path):
    model, _ = search(load(case.model), case.model, compat="modelopt")
    export_hf_checkpoint(model, export_dir=tmp_path)
    for file in ("hf_quant_config.json", "config.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (tmp_path, case.folder))
        key = "quantization" if file.startswith("hf") else "quantization_config"
        assert {**ours[key], "producer": 0} == {**theirs[key], "producer": 0}
    ours, theirs = golden_data.read_safetensors(tmp_path), case.exported
    assert set(ours) == set(theirs) and all((ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype) for name in theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs if "layers.0." in name)      # FP8; AWQ to a last digit


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("formats", [FORMATS, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], [mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.INT8_WEIGHT_ONLY_CFG]],
                         ids=["awq-fp8", "nvfp4-fp8", "int4-int8"])
def test_reopened_it_computes_as_the_searched_model(golden, formats, dialect, tmp_path):
    """What linears share in an export they share when they are scored. Integers: multiplied by a reciprocal here, divided there."""
    model, state = search(load(golden["llama"], "float32"), golden["llama"], formats=formats, disabled_layers="*lm_head*")
    assert len(set(state["best"]["recipe"].values())) == 3      # both formats, and none for lm_head
    assert state["best"]["recipe"]["lm_head.quant_recipe"] == "NONE(effective-bits: 16.0)"
    export_hf_checkpoint(model, export_dir=tmp_path, dialect=dialect)
    opened = np.asarray(modelq.load(tmp_path, compute="float32")(golden["llama"].calib[:1]))
    searched, plain = logits(model, golden["llama"]), logits(load(golden["llama"], "float32"), golden["llama"])
    off = np.linalg.norm(opened - searched) / np.linalg.norm(searched - plain)
    assert off < (0.05 if formats[0] is mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG else 1e-4)


# States --------------------------------------------------------------------------------------------------------------------------

def test_another_budget_takes_the_same_scores(golden, tmp_path, monkeypatch):
    folder = tmp_path / "search"
    _, first = search(load(golden["llama"]), golden["llama"], checkpoint=folder)
    monkeypatch.setattr(TorchSubject, "calibrate", None)
    monkeypatch.setattr(TorchSubject, "scores", None)
    model, second = search(load(golden["llama"]), golden["llama"], bits=10, checkpoint=folder)
    assert scores_of(first) == scores_of(second) and second["best"]["score"] < first["best"]["score"]
    assert 6 < second["best"]["constraints"]["effective_bits"] <= 10
    assert json.loads((folder / "search.json").read_text())["state"] == json.loads(json.dumps(second))
    monkeypatch.undo()
    fresh, state = search(load(golden["llama"]), golden["llama"], bits=10)
    assert state == second
    np.testing.assert_array_equal(logits(model, golden["llama"]), logits(fresh, golden["llama"]))


def test_an_interrupted_search_goes_on(golden, tmp_path):
    """After a calibration, and in the middle of the scores: the same numbers in the end, and the model as it was until then."""
    expected = search(load(golden["llama"]), golden["llama"])[1]
    model = load(golden["llama"])
    plain, calls = logits(model, golden["llama"]), [0]

    def failing(after):
        def forward_step(model, batch):
            calls[0] += 1
            if calls[0] > after:
                raise KeyboardInterrupt
            return model(**batch)
        return forward_step
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for after, files in ((5, 1), (8, 2), (5, 2)):
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            search(model, golden["llama"], checkpoint=tmp_path, forward_step=failing(after))
        assert len(list(tmp_path.glob("*.safetensors"))) == files
        assert not quantizers(model) and "forward" not in vars(model.model.layers[0]) and not model.training
        assert parameters == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert all(not module._forward_hooks for module in model.modules())
        np.testing.assert_array_equal(logits(model, golden["llama"]), plain)
    assert json.loads((tmp_path / "search.json").read_text())["batches"] == 5
    calls[0] = 0
    _, state = search(model, golden["llama"], checkpoint=tmp_path, forward_step=failing(3))
    assert calls[0] == 3 and state == expected


def test_states_of_other_searches_are_refused(golden, tmp_path):
    search(load(golden["llama"]), golden["llama"], checkpoint=tmp_path)
    for word, options in (("quantization_formats", {"formats": [mtq.FP8_DEFAULT_CFG]}), ("disabled_layers", {"disabled_layers": "*lm_head*"}),
                          ("calibration data", {"calib": 4}), ("method", {"method": "kl_div"})):
        with pytest.raises(ValueError, match=f"state of another search.*{word}"):
            search(load(golden["llama"]), golden["llama"], bits=9, checkpoint=tmp_path, **options)
    other = load(golden["llama"])
    torch.nn.init.ones_(other.lm_head.weight)
    with pytest.raises(ValueError, match="state of another search.*weights"):
        search(other, golden["llama"], checkpoint=tmp_path)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(ValueError, match="not the state of a search"):
        search(load(golden["llama"]), golden["llama"], checkpoint=tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        search(load(golden["llama"]), golden["llama"], checkpoint=tmp_path / "search.json")


def test_files_of_a_search_that_was_removed_are_not_taken(golden, tmp_path):
    search(load(golden["llama"]), golden["llama"], calib=4, checkpoint=tmp_path)
    (tmp_path / "search.json").unlink()
    model, state = search(load(golden["llama"]), golden["llama"], checkpoint=tmp_path)
    assert state == search(load(golden["llama"]), golden["llama"])[1]
    (tmp_path / "FP8_DEFAULT_CFG.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="FP8_DEFAULT_CFG.safetensors: damaged"):
        search(load(golden["llama"]), golden["llama"], checkpoint=tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_the_config_of_a_state_quantizes_alike(golden, name):
    """Formats calibrated by maxima: the same model. Another budget: the choice of a search for it."""
    options = {"formats": [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], "kv_cache_cfg": mtq.FP8_KV_CFG, "compat": "modelopt"}
    model, state = search(load(golden[name]), golden[name], **options)
    config = mtq.get_auto_quantize_config(json.loads(json.dumps(state)))

    def loop(model):
        for row in golden[name].calib:
            model(torch.from_numpy(row[None]))
    again = mtq.quantize(load(golden[name]), config, loop)
    np.testing.assert_array_equal(logits(again, golden[name]), logits(model, golden[name]))
    assert sum(quantizer.is_enabled for key, quantizer in quantizers(model).items() if "k_bmm" in key) == 2
    other = search(load(golden[name]), golden[name], bits=9, **options)[1]
    assert mtq.get_auto_quantize_config(state, {"effective_bits": 9}) == mtq.get_auto_quantize_config(other)
    with pytest.raises(ValueError, match="4.2 effective bits cannot be met"):
        mtq.get_auto_quantize_config(state, {"effective_bits": 4.2})
    with pytest.warns(UserWarning, match="INT4_AWQ_CFG with an algorithm of its own"):
        mtq.get_auto_quantize_config(search(load(golden["llama"]), golden["llama"])[1])


# Scores --------------------------------------------------------------------------------------------------------------------------

class Net(torch.nn.Module):
    """Not of transformers: a first layer on plain numbers, one that works in place, none after the other in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = torch.nn.Linear(32, 64), torch.nn.ReLU(inplace=True), torch.nn.Linear(64, 8, bias=False)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize("own_backward", [False, True])
def test_the_score_is_the_sum_of_squares_of_gradient_times_difference(own_backward):
    """By hand, in float64, over two batches; the loss is any function."""
    torch.manual_seed(0)
    net, data = Net(), [torch.randn(16, 32), torch.randn(4, 32)]
    plain = copy.deepcopy(net)

    def loss(output, batch):
        return output.pow(2).sum() + output.exp().mean()
    steps = {"forward_backward_step": lambda model, batch: loss(model(batch), batch).backward()} if own_backward else {"loss_func": loss}
    net, state = mtq.auto_quantize(net, {"effective_bits": 9}, [mtq.FP8_DEFAULT_CFG, None], data,
                                   lambda model, batch: model(batch), num_score_steps=2, **steps)
    quantized = mtq.quantize(copy.deepcopy(plain), mtq.FP8_DEFAULT_CFG, lambda model: [model(batch) for batch in data])
    for name in ("first", "second"):
        expected = 0.0
        for batch in data:
            x = batch if name == "first" else torch.relu(plain.first(batch)).detach()
            y = getattr(plain, name)(x).detach().requires_grad_()
            loss(plain.second(torch.relu(y)) if name == "first" else y, batch).backward()
            expected += (y.grad.double() * (getattr(quantized, name)(x) - y).detach().double()).square().sum().item()
        assert state["candidate_stats"][f"{name}.quant_recipe"]["scores"] == [pytest.approx(expected, rel=1e-5), 0.0]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_one_layer_s_differences_are_in_memory(golden, monkeypatch):
    """Layers are computed again on the way back, and what is compared there goes with the layer."""
    made, most, before = [], [0], scoring._Taps._differences

    class Held(dict):
        """A dictionary that a weak reference can point at."""

    def counted(self, *arguments):
        found = Held(before(self, *arguments))
        made.append(weakref.ref(found))
        most[0] = max(most[0], sum(reference() is not None for reference in made))
        return found
    monkeypatch.setattr(scoring._Taps, "_differences", counted)
    expected = scores_of(search(load(golden["llama"], "float32"), golden["llama"], score=2)[1])
    assert len(made) == 2 * 15 and most[0] <= 8      # seven linears of a layer, and lm_head
    monkeypatch.setattr(scoring, "decoder_layers", lambda model: [])
    assert scores_of(search(load(golden["llama"], "float32"), golden["llama"], score=2)[1]) == expected


def test_divergences(golden):
    """Two batches; one group and format by hand."""
    model, state = search(load(golden["llama"], "float32"), golden["llama"], formats=[mtq.FP8_DEFAULT_CFG], score=2, method="kl_div",
                          bits=12.0, disabled_layers=["*lm_head*"])
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *[
        {"quantizer_name": f"model.layers.0.self_attn.{one}_proj.{side}_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
        for one in "qkv" for side in ("weight", "input")]], "algorithm": "max"}
    plain = load(golden["llama"], "float32")
    one = mtq.quantize(load(golden["llama"], "float32"), config, lambda model: model(torch.from_numpy(golden["llama"].calib)))
    expected = 0.0
    for row in torch.from_numpy(golden["llama"].calib[:2]):
        with torch.no_grad():
            p, q = (torch.log_softmax(other(row[None]).logits.double(), -1) for other in (plain, one))
        expected += float((p.exp() * (p - q)).sum())
    assert state["candidate_stats"][QKV]["scores"] == [pytest.approx(expected, rel=1e-4), 0.0]
    assert state["best"]["constraints"]["effective_bits"] <= 12 and set(state["best"]["recipe"].values()) > {"NONE(effective-bits: 16.0)"}
    with pytest.warns(UserWarning, match="takes no loss"):
        search(load(golden["llama"]), golden["llama"], score=1, method="kl_div", loss_func=lambda output, batch: 1 / 0)


# Bad input -----------------------------------------------------------------------------------------------------------------------

def test_a_loss_that_is_nan_names_the_batch(golden):
    model = load(golden["llama"])
    plain = logits(model, golden["llama"])
    calls = [0]

    def nan_at_third(output, batch):
        calls[0] += 1
        return output.loss * float("nan" if calls[0] == 3 else 1)
    with pytest.raises(ValueError, match="batch 2 .of 8.*the loss is nan"):
        search(model, golden["llama"], loss_func=nan_at_third)
    for words, options in (("no gradient reaches the layers", {"loss_func": lambda output, batch: output.loss.detach()}),
                           ("must return one number", {"loss_func": lambda output, batch: output.logits}),
                           ("got float", {"loss_func": lambda output, batch: 1.0}),
                           ("took no backward pass", {"forward_backward_step": lambda model, batch: None}),
                           ("are not finite", {"forward_backward_step": lambda model, batch: (model(**batch).loss * float("inf")).backward()})):
        with pytest.raises(ValueError, match=words):
            search(model, golden["llama"], score=1, **options)
    assert not quantizers(model)
    np.testing.assert_array_equal(logits(model, golden["llama"]), plain)
