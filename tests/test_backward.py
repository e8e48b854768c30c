"""Gradients: of every operation against differences, of whole models against transformers' and against differences; what is observed on the
way; order, errors, threads and memory."""
import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import golden_data
import modelq
import modelq._core as core
import modelq.quantization as mtq
from modelq import streaming
from modelq.gradients import backward

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in (DATA / "gradients").glob("*.npz") if path.stem != "smollm2")
SCORES = json.loads((DATA / "gradients" / "scores.json").read_text())
RELATIVE = 1e-5     # of a gradient's norm: two float32 computations that add in different orders; 2e-6 was measured


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


class Recorded:
    """data/gradients/<name>.npz."""

    def __init__(self, name):
        self.arrays = dict(np.load(DATA / "gradients" / f"{name}.npz"))
        self.names = self.arrays["names"].tolist()

    def error(self, name, gradient):
        """Distance to transformers' gradient, relative to its norm, as far as the norm and four products with +-1 show it. The root of a
        mean square of such products is what a norm is on the average."""
        index = self.names.index(name)
        flat, norm = gradient.astype(np.float64).ravel(), self.arrays["norms"][index]
        signs = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, (4, flat.size), np.int8) * 2 - 1
        apart = np.sqrt(np.mean((signs @ flat - self.arrays["signs"][index]) ** 2))
        return max(apart, abs(np.linalg.norm(flat) - norm)) / norm


class Golden(Recorded):
    """... and its model."""

    def __init__(self, name):
        super().__init__(name)
        self.folder = DATA / "families" / name[7:] if name.startswith("family_") else golden_data.Model(name).source
        self.batches = [{"input_ids": self.arrays[f"ids_{i}"], "attention_mask": self.arrays[f"mask_{i}"], "labels": self.arrays[f"labels_{i}"]}
                        for i in range(2)]

    def load(self, compute="float32", **place):
        return modelq.load(self.folder, compute=compute, **place)


@pytest.fixture(params=NAMES)
def case(request):
    return Golden(request.param)


def gradients_of(case, compute="float32", place=None, **options):
    """{name as in the golden file: gradient} of every weight, of every layer's input, of every linear's output; and the losses. place:
    device and memory of it."""
    model = case.load(compute, **(place or {}))
    weights = [module[kind] for module in model.modules for kind in ("weight", "bias") if module[kind] is not None]
    rows = [batch["input_ids"].size for batch in case.batches]
    linears = {module["name"]: module["shape"][0] for module in model.modules if module["kind"] == "linear" and module["expert"] is None}
    observers = {name: core.OutputGradient(sum(rows), width) for name, width in linears.items()}
    found = {}

    def look(layer, back):
        found.update({f"input {layer} {batch}": back.gradient(batch) for batch in range(2)})
    gradients = backward(model, case.batches, dict.fromkeys(weights), observers, look=look, **options)
    for name, observer in observers.items():
        found |= {f"output {name} {batch}": part for batch, part in enumerate(np.split(observer.array, np.cumsum(rows)[:-1]))}
    return found | gradients.weights, gradients


# Against transformers --------------------------------------------------------------------------------------------------------

def test_gradients_equal_transformers(case):
    found, gradients = gradients_of(case)
    np.testing.assert_allclose(gradients.losses, case.arrays["losses"], rtol=1e-5)
    assert set(case.names) <= set(found)
    errors = {name: case.error(name, found[name]) for name in case.names}
    assert max(errors.values()) < RELATIVE, sorted(errors.items(), key=lambda item: -item[1])[:5]
    for name, wanted in case.arrays.items():
        if name.startswith("full "):
            got = found[name[5:]]
            assert np.linalg.norm(got - wanted) < RELATIVE * np.linalg.norm(wanted), name


def test_gradients_in_bfloat16_are_near(case):
    """Activations and products rounded to 2^-9, a dozen of them one after the other."""
    found, gradients = gradients_of(case, "bfloat16")
    np.testing.assert_allclose(gradients.losses, case.arrays["losses"], rtol=0.01)
    errors = {name: case.error(name, found[name]) for name in case.names if name.startswith("input")}
    assert max(errors.values()) < 0.1, errors


@pytest.mark.slow
def test_gradients_of_a_real_model(smollm2):
    """Thirty layers, a tied head of 49,152 tokens: against float64. transformers in float32 is 3e-4 off (2e-5 with a float64 loss): sums over
    tokens, as gradients of weights are, cancel in part."""
    case, model, found = Recorded("smollm2"), modelq.load(smollm2, compute="float32"), {}

    def look(layer, back):
        found.update({f"input {layer} {batch}": back.gradient(batch) for batch in range(2)})
    gradients = backward(model, list(case.arrays["ids"][:, None]), [name for name in case.names if "input " not in name], look=look)
    np.testing.assert_allclose(gradients.losses, case.arrays["losses"], rtol=2e-6)
    errors = {name: case.error(name, (found | gradients.weights)[name]) for name in case.names}
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]


# Against differences ---------------------------------------------------------------------------------------------------------

class Moved:
    """A checkpoint some of whose tensors are others."""

    def __init__(self, checkpoint, tensors):
        self._checkpoint, self._tensors = checkpoint, tensors

    def __getattr__(self, name):
        return getattr(self._checkpoint, name)

    def read(self, name):
        return self._tensors[name] if name in self._tensors else self._checkpoint.read(name)


def sum_of_losses(model, batches):
    """What backward differentiates, from a forward: sums in float64 of float32 losses."""
    return sum(model.loss([batch]) for batch in batches)


KINDS = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm", "lm_head", "mlp.gate."]


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe", "family_llama3", "family_llama_bias", "family_mistral"])
def test_losses_change_as_gradients_say(name):
    """Along the gradient of all tensors of a kind, and along a random direction with it: differences of fourth order. A loss of float32
    logits is exact to 1e-7 or so, and changes by 6e-4 between the outer points. Larger steps send tokens to other experts."""
    case = Golden(name)
    model = case.load()
    names = [module[kind] for module in model.modules for kind in ("weight", "bias") if module[kind] is not None]
    gradients = backward(model, case.batches, dict.fromkeys(names)).weights
    original, rng = model.checkpoint, np.random.default_rng(0)
    for kind in KINDS:
        along = {tensor: gradients[tensor] for tensor in dict.fromkeys(names) if kind in tensor}
        size = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in along.values()))
        if not along:
            continue
        noise = {tensor: rng.standard_normal(g.shape).astype(np.float32) for tensor, g in along.items()}
        scale = size / np.sqrt(sum((n ** 2).sum() for n in noise.values()))
        direction = {tensor: ((g + scale * noise[tensor]) / (1.5 * size)).astype(np.float32) for tensor, g in along.items()}
        expected = sum((along[tensor].astype(np.float64) * direction[tensor]).sum() for tensor in along)
        step, total = 3e-4 / expected, 0.0
        for shift, weight in ((2, -1), (1, 8), (-1, -8), (-2, 1)):
            model.checkpoint = Moved(original, {tensor: original.read(tensor).astype(np.float32) + np.float32(shift * step) * d
                                                for tensor, d in direction.items()})
            total += weight * sum_of_losses(model, case.batches)
        model.checkpoint = original
        assert total / (12 * step) == pytest.approx(expected, rel=2e-3), kind


def test_cuts_of_rows_do_not_show():
    """Sequences longer than what the MLP and the experts take at a time, and more rows than the head does: against one batch each, whose
    losses are means over a quarter of the labels."""
    ids = np.random.default_rng(2).integers(0, 256, (4, 600))
    model = Golden("qwen3moe").load()
    names = ["model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight", "lm_head.weight"]
    seen = []
    whole = backward(model, [ids], names, look=lambda layer, back: seen.append(back.gradient(0)))
    apart = backward(model, list(ids[:, None]), names, look=lambda layer, back: seen.append(
        np.concatenate([back.gradient(batch) for batch in range(4)]) / 4))
    assert whole.losses[0] == pytest.approx(apart.losses.mean(), rel=1e-6)
    for one, four in zip(seen[:3], seen[3:]):
        assert np.linalg.norm(one - four) <= RELATIVE * np.linalg.norm(one)
    for name in names:
        assert np.linalg.norm(whole.weights[name] - apart.weights[name] / 4) <= RELATIVE * np.linalg.norm(whole.weights[name]), name


def test_a_vocabulary_of_many_slices():
    """No layers, a head of three slices: everything against NumPy in float64."""
    rng = np.random.default_rng(0)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2, "vocab_size": 9001}
    runtime = core.Runtime("llama", config, "float32")
    embedding, norm, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((9001, 16), 16, (9001, 16)))
    other = (head + 0.01 * rng.standard_normal(head.shape)).astype(np.float32)
    ids = rng.integers(0, 9001, (3, 250))
    run = runtime.start([ids])
    run.embed({"model.embed_tokens.weight": embedding})
    kept, score = core.OutputGradient(750, 9001), core.OutputScore([other, head])
    results = []
    for observer in (kept, score):
        found = {f"{name}.weight": np.zeros(shape, np.float32)
                 for name, shape in (("model.embed_tokens", (9001, 16)), ("model.norm", 16), ("lm_head", (9001, 16)))}
        back = run.backward(found)
        runtime.set_observer("lm_head", observer)
        losses, counts = back.head({"model.norm.weight": norm, "lm_head.weight": head})
        back.embed()
        results.append([losses, counts, back.gradient(0), *found.values()])
    assert all(np.array_equal(*both) for both in zip(*results))
    x = embedding[ids].astype(np.float64).reshape(-1, 16)
    scale = 1 / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
    normed = x * scale * norm
    logits = normed @ head.T.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    targets = np.concatenate([ids[:, 1:], np.full((3, 1), -1)], 1).ravel()
    rows = np.flatnonzero(targets >= 0)
    d_logits = np.zeros_like(p)
    d_logits[rows] = p[rows] / len(rows)
    d_logits[rows, targets[rows]] -= 1 / len(rows)
    d_normed = d_logits @ head.astype(np.float64)
    d_x = scale * (norm * d_normed - x * scale ** 2 * (norm * d_normed * x).mean(-1, keepdims=True))
    d_embedding = np.zeros((9001, 16))
    np.add.at(d_embedding, ids.ravel(), d_x)
    wanted = [-np.log(p[rows, targets[rows]]).mean(), len(rows), d_x.reshape(3, 250, 16), d_embedding, (d_normed * x * scale).sum(0),
              d_logits.T @ normed]
    for found, exact in zip(results[0], wanted):
        assert np.linalg.norm(found - exact) <= RELATIVE * np.linalg.norm(exact)
    assert np.linalg.norm(kept.array - d_logits) <= RELATIVE * np.linalg.norm(d_logits)
    exact = ((d_logits * (normed @ (other.astype(np.float64) - head).T)) ** 2).sum()
    assert score.scores[0] == pytest.approx(exact, rel=1e-4) and score.scores[1] == 0


# Observers -------------------------------------------------------------------------------------------------------------------

def quantized_model(preset, folder, compute, rows):
    """With lm_head quantized too, as AutoQuantize has it."""
    config = copy.deepcopy(getattr(mtq, preset))
    config["quant_cfg"] = [rule for rule in config["quant_cfg"] if "lm_head" not in rule["quantizer_name"]]
    model = modelq.load(folder, compute=compute)
    return mtq.quantize(model, config, lambda model: [model(row[None]) for row in rows], compat="modelopt")


def fp8_model(*args):
    return quantized_model("FP8_DEFAULT_CFG", *args)


class Scorer:
    """A visitor that scores the candidates which other models are: what AutoQuantize will do."""

    def __init__(self, model, candidates):
        self.model, self.candidates = model, candidates
        self.at, self.scores = {}, {}

    def weights_of(self, module):
        return [streaming.read(candidate, [module["weight"]], [module])[module["weight"]] for candidate in self.candidates]

    def quantizers_of(self, name):
        return [candidate.quantizers.get(f"{name}input_quantizer") for candidate in self.candidates]

    def enter(self, part):
        if part.expert is not None:
            experts = self.at[part.layer][-1]
            prefix = f"model.layers.{part.layer}.mlp.experts."
            both = [self.quantizers_of(prefix + kind) for kind in ("gate_up_proj_", "down_proj_")]
            experts.load(part.expert, list(zip(*map(self.weights_of, part.modules), *both)))
            return
        put = {}
        for module in part.modules:
            if module["kind"] == "linear":
                bias = None if module["bias"] is None else part.tensors[module["bias"]]
                put[module["name"]] = core.OutputScore(self.weights_of(module), self.quantizers_of(module["name"] + "."), bias)
            elif module["kind"] == "experts":
                put[module["name"]] = core.ExpertsScore(len(self.candidates), self.model.runtime.compute)
        for name, observer in put.items():
            self.model.runtime.set_observer(name, observer)
        self.at[part.layer] = [put, *put.values()]
        if any(isinstance(observer, core.ExpertsScore) for observer in put.values()):
            self.at[part.layer].sort(key=lambda observer: isinstance(observer, core.ExpertsScore))

    def leave(self, part):
        if part.expert is None:
            for name, observer in self.at.pop(part.layer)[0].items():
                self.scores[name] = self.scores.get(name, 0) + observer.scores
                self.model.runtime.set_observer(name, None)


def score(name, compute, candidates, rows, place=None, **options):
    model = modelq.load(golden_data.Model(name).source, compute=compute, **(place or {}))
    scorer = Scorer(model, candidates(golden_data.Model(name).source, compute, rows))
    backward(model, [{"input_ids": row[None], "labels": row[None]} for row in rows], visitor=scorer, **options)
    return scorer.scores


@pytest.mark.parametrize("preset, compute, tolerance", [("INT4_AWQ_CFG", "float32", 1e-5), ("FP8_DEFAULT_CFG", "float32", 1e-3),
                                                        ("FP8_DEFAULT_CFG", "bfloat16", 0.2)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe"])
def test_scores_equal_model_optimizers(name, preset, compute, tolerance):
    """AutoQuantize's gradient scores. In float32 what is left of FP8's are ties that the other forward rounds the other way; two bfloat16
    forwards differ by more, and send some tokens to other experts (the reference's own scores in both differ by 11%). AWQ is calibrated
    on a quarter of the batches."""
    calib = golden_data.Model(name).calib
    found = score(name, compute, lambda *args: [quantized_model(preset, *args[:2], calib[:2] if "AWQ" in preset else calib)], calib)
    wanted = SCORES[name][compute][preset]
    assert sorted(module for group in wanted for module in group.split()) == sorted(found)
    for group, value in wanted.items():
        assert sum(found[module][0] for module in group.split()) == pytest.approx(value, rel=tolerance), group


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_candidates_that_change_nothing_score_nothing(name):
    """... whose weights are the model's own; next to one that does, which must not show in them."""
    rows = golden_data.Model(name).calib[:2]
    found = score(name, "float32", lambda folder, *args: [modelq.load(folder, compute="float32"), fp8_model(folder, *args),
                                                          modelq.load(folder, compute="float32")], rows)
    for module, (nothing, changed, again) in found.items():
        assert nothing == again == 0 < changed, module


@pytest.mark.parametrize("name", ["qwen3", "qwen3moe"])
def test_rounds_and_files_change_nothing(name, monkeypatch):
    """Several rounds through the model add up to one; hidden states in a file are hidden states."""
    rows = golden_data.Model(name).calib[:4]
    whole = score(name, "float32", lambda *args: [fp8_model(*args)], rows)
    in_file = score(name, "float32", lambda *args: [fp8_model(*args)], rows, keep_bytes=0)
    assert all(np.array_equal(whole[module], in_file[module]) for module in whole)
    monkeypatch.setattr("modelq.model.HIDDEN_BYTES", 4 * 128 * 64)
    rounds = score(name, "float32", lambda *args: [fp8_model(*args)], rows)
    for module, value in whole.items():
        np.testing.assert_allclose(rounds[module], value, rtol=1e-6)


def test_the_gradient_by_the_experts_is_the_one_behind_the_layer():
    case = Golden("qwen3moe")
    model, found = case.load(), {}
    rows = sum(batch["input_ids"].size for batch in case.batches)
    observer = core.OutputGradient(rows, model.runtime.config["hidden_size"])

    def look(layer, back):
        found[layer] = np.concatenate([back.gradient(batch).reshape(-1, observer.array.shape[1]) for batch in range(2)])
    backward(model, case.batches, observers={"model.layers.0.mlp.experts": observer}, look=look)
    assert np.array_equal(found[1], observer.array) and found[1].any()


# What is no gradient's business ---------------------------------------------------------------------------------------------

def codes_are_refused(source, place):
    """A compressed model's gradients are those of its numbers; given the codes, every step of the way back says whose and what to do."""
    model = mtq.compress(mtq.quantize(modelq.load(source, compute="float32", **place), weights_alone(mtq.NVFP4_DEFAULT_CFG)))
    batches = [np.arange(24).reshape(2, 12)]
    expected = mtq.fold_weight(mtq.quantize(modelq.load(source, compute="float32", **place), weights_alone(mtq.NVFP4_DEFAULT_CFG)))
    assert backward(model, batches).losses == pytest.approx(backward(expected, batches).losses, rel=1e-5)
    for name in (model.runtime.layer_tensors(1)[1], "lm_head.weight"):
        with pytest.raises(TypeError, match=rf"tensor {name} is given as codes and scales.*numbers \(_core.dequantize"):
            with_codes_of(model, batches, name)


def weights_alone(config):
    return {**config, "quant_cfg": [*config["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}], "algorithm": "max"}


def with_codes_of(model, batches, name):
    """Backward, but with one weight by its parts."""
    class Codes:
        def enter(self, part):
            if name in part.tensors:
                part.tensors[name] = core.quantize(part.tensors[name], "nvfp4"), "nvfp4", "float32", None

        def leave(self, part):
            pass
    backward(model, batches, visitor=Codes())


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_codes_are_refused(name, golden):
    codes_are_refused(golden[name].source, {})


# The same bits, whatever ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "family_qwen3_moe"])
def test_bits_do_not_depend_on_threads(name, compute):
    case, whole = Golden(name), None
    for threads in (1, 2, 3):
        core.set_threads(threads)
        found, gradients = gradients_of(case, compute)
        bits = {name: gradient.tobytes() for name, gradient in found.items()} | {"losses": gradients.losses.tobytes()}
        assert whole is None or bits == whole
        whole = bits


def test_batches_do_not_see_each_other():
    """Gradients by hidden states of one batch are the same alone; those of weights add up."""
    case = Golden("qwen3")
    kept = []
    for batches in (case.batches, case.batches[:1], case.batches[1:]):
        inputs = []
        gradients = backward(case.load(), batches, ["model.layers.0.self_attn.q_proj.weight"],
                             look=lambda layer, back: inputs.append([back.gradient(i) for i in range(len(batches))]))
        kept.append((inputs, gradients))
    for layer in range(3):
        assert np.array_equal(kept[0][0][layer][0], kept[1][0][layer][0]) and np.array_equal(kept[0][0][layer][1], kept[2][0][layer][0])
    np.testing.assert_allclose(kept[0][1].losses, [kept[1][1].losses[0], kept[2][1].losses[0]], rtol=1e-12)
    both = [gradients.weights["model.layers.0.self_attn.q_proj.weight"] for _, gradients in kept]
    np.testing.assert_allclose(both[0], both[1] + both[2], atol=1e-6 * np.abs(both[0]).max())


def test_labels_are_what_counts():
    """Without labels: every token but padding, as in Model.loss. A batch without any has no loss, and no gradient."""
    case = Golden("llama")
    model, batch = case.load(), {key: value for key, value in case.batches[1].items() if key != "labels"}
    gradients = backward(model, [batch])
    assert gradients.losses[0] == pytest.approx(model.loss([batch]), rel=1e-6)
    assert gradients.counts[0] == (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).sum()
    nothing = {"input_ids": case.batches[0]["input_ids"], "labels": np.full_like(case.batches[0]["input_ids"], -100)}
    seen = []
    gradients = backward(model, [nothing, case.batches[1]], look=lambda layer, back: seen.append((back.gradient(0), back.gradient(1))))
    assert np.isnan(gradients.losses[0]) and gradients.losses[1] == pytest.approx(case.arrays["losses"][1], rel=1e-5)
    assert all(not first.any() and second.any() for first, second in seen) and gradients.counts[0] == 0


def test_padding_has_no_gradient():
    case = Golden("qwen3moe")
    mask = case.batches[1]["attention_mask"]
    seen = []
    backward(case.load(), case.batches[1:], look=lambda layer, back: seen.append(back.gradient(0)))
    assert all(not gradient[mask == 0].any() and gradient[mask == 1].any() for gradient in seen)
