"""auto_quantize on native models, and what is the same for all: formats, groups, bits, budgets, bad input."""
import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
from safetensors.numpy import save_file

import golden_data
import modelq
import modelq.quantization as mtq
from modelq.autoquantize.candidates import settings_of
from modelq.autoquantize.costs import Constraints, Costs, candidate_stats
from modelq.autoquantize.groups import make_groups
from modelq.autoquantize.recipes import NO_QUANT, parse_recipes
from modelq.export import export_hf_checkpoint
from modelq.rules import Slot

PLAIN = [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG]
AUTO = golden_data.cases("float32", ["AUTO_6.0"], needs=["auto_state.json"])


def search(model, golden_model, budget=6.0, formats=PLAIN, count=2, **options):
    options = {"method": "kl_div", "num_calib_steps": count, "num_score_steps": count, **options}
    return mtq.auto_quantize(model, {"effective_bits": budget}, formats, [row[None] for row in golden_model.calib],
                             options.pop("forward_step", lambda model, batch: model(batch)), **options)


def linears(*names, shape=(64, 32)):
    return [Slot(f"{name}.{role}_quantizer", name, role, "nn.Linear", shape) for name in names for role in ("input", "output", "weight")]


def labelled(golden_model, count=8):
    return [{"input_ids": row[None], "labels": row[None]} for row in golden_model.calib[:count]]


def search_by_gradients(model, data, budget=6.0, formats=(mtq.INT4_AWQ_CFG, mtq.FP8_DEFAULT_CFG), **options):
    options = {"forward_step": lambda model, batch: model(**batch), "loss_func": lambda output, batch: output.loss, **options}
    return mtq.auto_quantize(model, {"effective_bits": budget}, list(formats), data, num_calib_steps=8, num_score_steps=8, **options)


# Gradients -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", AUTO)
def test_scores_and_choice_are_the_reference_s(case):
    """Without torch. In float32: AWQ's to the last digits, FP8's but for ties."""
    theirs = json.loads((case.folder / "auto_state.json").read_text())
    model, state = search_by_gradients(modelq.load(case.model.source, compute="float32"), labelled(case.model), compat="modelopt")
    assert list(state["candidate_stats"]) == list(theirs["candidate_stats"])
    for key, group in theirs["candidate_stats"].items():
        np.testing.assert_allclose(state["candidate_stats"][key]["scores"], group["scores"], rtol=0.01, err_msg=key)
    assert state["best"]["recipe"] == theirs["best"]["recipe"] and state["best"]["constraints"] == theirs["best"]["constraints"]
    assert not model.connected or model.quantized


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe"])
def test_gradients_in_bfloat16(golden, name, tmp_path):
    """Where siblings share their scales, which norms would take up: scores are about those of float32; the export opens and computes what
    the model does."""
    model, state = search_by_gradients(modelq.load(golden[name].source), labelled(golden[name], 4), 7.0, [mtq.NVFP4_AWQ_LITE_CFG, mtq.FP8_DEFAULT_CFG],
                                       disabled_layers=["*lm_head*"])
    _, other = search_by_gradients(modelq.load(golden[name].source, compute="float32"), labelled(golden[name], 4), 7.0,
                                   [mtq.NVFP4_AWQ_LITE_CFG, mtq.FP8_DEFAULT_CFG], disabled_layers=["*lm_head*"])
    ours, theirs = (np.array([group["scores"][0] for key, group in one["candidate_stats"].items() if "lm_head" not in key]) for one in (state, other))
    assert (ours > 0).all() and 0.5 < (ours / theirs).min() and (ours / theirs).max() < 2
    fp8 = [group["scores"][1] for key, group in state["candidate_stats"].items() if "lm_head" not in key]
    assert (np.array(fp8) < ours).all()
    expected = model(golden[name].calib[:1]).logits
    export_hf_checkpoint(model, tmp_path / "export")
    np.testing.assert_array_equal(modelq.load(tmp_path / "export")(golden[name].calib[:1]).logits, expected)


def test_in_the_words_of_compressed_tensors(golden, tmp_path):
    model, state = search_by_gradients(modelq.load(golden["qwen3"].source), labelled(golden["qwen3"], 4), 7.0, PLAIN, disabled_layers=["*lm_head*"])
    assert len(set(state["best"]["recipe"].values())) == 3
    export_hf_checkpoint(model, tmp_path / "export", dialect="compressed-tensors")
    said = json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and len(said["config_groups"]) == 2
    np.testing.assert_array_equal(modelq.load(tmp_path / "export")(golden["qwen3"].calib[:1]).logits, model(golden["qwen3"].calib[:1]).logits)


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_what_is_stored_quantized_is_searched_as_what_it_stands_for(golden, preset, tmp_path):
    """An export as a source: every number is that of a search on a plain checkpoint of the dequantized weights."""
    model, ids = modelq.load(golden["llama"].source, compute="bfloat16"), golden["llama"].calib
    mtq.quantize(model, getattr(mtq, preset), lambda model: model(ids))
    export_hf_checkpoint(model, tmp_path / "stored")
    stored = modelq.load(tmp_path / "stored", compute="bfloat16")
    shutil.copytree(golden["llama"].source, tmp_path / "plain")
    save_file({name: np.ascontiguousarray(stored.checkpoint.read(name)) for name in stored.checkpoint.tensors}, tmp_path / "plain/model.safetensors")
    with pytest.warns(UserWarning, match="its weights are stored quantized .*quantized anew, and rounded once more"):
        stored, state = search_by_gradients(stored, labelled(golden["llama"], 4), 7.0, PLAIN)
    plain, expected = search_by_gradients(modelq.load(tmp_path / "plain", compute="bfloat16"), labelled(golden["llama"], 4), 7.0, PLAIN)
    assert state == expected and state["best"]["constraints"]["effective_bits"] <= 7
    np.testing.assert_array_equal(stored(ids[:1]).logits, plain(ids[:1]).logits)
    export_hf_checkpoint(stored, tmp_path / "again")
    np.testing.assert_array_equal(modelq.load(tmp_path / "again", compute="bfloat16")(ids[:1]).logits, stored(ids[:1]).logits)


def test_what_is_not_all_in_stored_weights_is_not_searched(golden, tmp_path):
    model, ids = modelq.load(golden["llama"].source, compute="bfloat16"), golden["llama"].calib
    mtq.quantize(model, mtq.INT4_AWQ_CFG, lambda model: model(ids))
    export_hf_checkpoint(model, tmp_path / "stored")
    stored = modelq.load(tmp_path / "stored", compute="bfloat16")
    before = np.asarray(stored(ids[:1]))
    with pytest.raises(ValueError, match="_proj is stored quantized with a pre_quant_scale.*quantize the original checkpoint"):
        search_by_gradients(stored, labelled(golden["llama"], 2), 7.0, PLAIN)
    np.testing.assert_array_equal(np.asarray(stored(ids[:1])), before)


def test_rounds_and_other_budgets(golden, tmp_path, monkeypatch):
    """Batches that go through the model in several rounds add up to the same; a kept search chooses for another budget without a pass."""
    from modelq.quantization import native_scores

    once = search_by_gradients(modelq.load(golden["llama"].source), labelled(golden["llama"]))[1]
    monkeypatch.setattr(modelq.Model, "tokens_at_once", 128)
    folder, count = tmp_path / "kept", []
    plain = native_scores.backward
    monkeypatch.setattr(native_scores, "backward", lambda *args, **options: (count.append(1), plain(*args, **options))[1])
    model, rounds = search_by_gradients(modelq.load(golden["llama"].source), labelled(golden["llama"]), checkpoint=folder)
    assert len(count) == 4
    for key, group in once["candidate_stats"].items():
        np.testing.assert_allclose(rounds["candidate_stats"][key]["scores"], group["scores"], rtol=1e-4)
    _, lower = search_by_gradients(modelq.load(golden["llama"].source), labelled(golden["llama"]), 5.0, checkpoint=folder)
    assert len(count) == 4 and lower["best"]["constraints"]["effective_bits"] <= 5 < rounds["best"]["constraints"]["effective_bits"]


def test_bad_losses(golden):
    """Another loss than the model's, none, NaN; the model is as it was."""
    model, data = modelq.load(golden["llama"].source), labelled(golden["llama"])
    before, quantizers = np.asarray(model(golden["llama"].calib[:1])), model.quantizers
    silent = [*data[:2], {**data[2], "labels": np.full_like(data[2]["labels"], -100)}]
    twice = {"forward_step": lambda model, batch: [model(**batch), model(**batch)][0]}
    for batches, options, words in (
            (data, {"loss_func": lambda output, batch: 2 * output.loss}, "batch 0 .*loss_func gives .*mean cross-entropy"),
            (data, {"loss_func": lambda output, batch: float("nan")}, "batch 0 .*the loss is nan"),
            (silent, {}, "batch 2 .*the loss is nan"), (data, twice, "batch 0 .*called the model 2 times"),
            (data, {"loss_func": None, "forward_backward_step": lambda model, batch: None}, "forward_backward_step is for torch models")):
        with pytest.raises(ValueError, match=words):
            search_by_gradients(model, batches, **options)
        assert model.quantizers is quantizers and not model.quantized
    np.testing.assert_array_equal(np.asarray(model(golden["llama"].calib[:1])), before)


# Formats and bits ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, effective, stored", [      # of [64, 256] weights; stored: beside the codes, scales and what is above them
    ("NVFP4_DEFAULT_CFG", 4.5, 4.5 + 32 / 16384), ("W4A8_NVFP4_FP8_CFG", 4, 4.25 + 32 / 16384), ("INT4_AWQ_CFG", 4, 4.25),
    ("W4A8_AWQ_BETA_CFG", 4, 4.25 + 32 / 16384), ("FP8_DEFAULT_CFG", 8, 8 + 32 / 16384), ("INT8_DEFAULT_CFG", 8, 8 + 32 / 256),
    ("MXFP4_DEFAULT_CFG", 4, 4.25), ("MXFP6_DEFAULT_CFG", 6, 6.25), ("MXFP8_DEFAULT_CFG", 8, 8.25), ("W4A16_NVFP4_CFG", 4.5, 4.5 + 32 / 16384),
    ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 8, 8 + 2 * 32 / 16384)])
def test_bits_of_a_format(name, effective, stored):
    recipe, = parse_recipes([name])
    assert recipe.bits == Fraction(effective) and str(recipe) == f"{name}(effective-bits: {float(effective)})"
    group, = make_groups(linears("a", shape=(64, 256)), [recipe], None, [])
    assert float(group.stored_bits(recipe)) / 16384 == stored and group.stored_bits(NO_QUANT) == 16 * 16384


def test_formats_in_order_and_by_name():
    recipes = parse_recipes([mtq.FP8_DEFAULT_CFG, None, "NVFP4_DEFAULT_CFG", {**mtq.INT8_DEFAULT_CFG, "effective_bits": 7.5}, "NONE"])
    assert [str(recipe) for recipe in recipes] == ["NVFP4_DEFAULT_CFG(effective-bits: 4.5)", "CUSTOM_3(effective-bits: 7.5)",
                                                   "FP8_DEFAULT_CFG(effective-bits: 8.0)"]
    assert [recipe.name for recipe in parse_recipes(None)] == ["NVFP4_AWQ_LITE_CFG", "FP8_DEFAULT_CFG"]


def test_a_format_sees_each_module_by_itself():
    """No pattern of a path, such as that of lm_head, keeps a module out; outputs stay; experts' quantizers have the names of their list."""
    recipe, = parse_recipes([{"quant_cfg": [{"quantizer_name": "*", "cfg": {"num_bits": 8}}, {"quantizer_name": "*lm_head*", "enable": False},
                                            {"quantizer_name": "input_quantizer", "enable": False}]}])
    slots = linears("lm_head") + [Slot("mlp.experts.down_proj_weight_quantizers.1", "mlp.experts", "weight", "Experts", (8, 8))]
    made = settings_of(make_groups(slots, [recipe], None, []), recipe)
    assert {name: setting.enable for name, setting in made.items()} == {
        "lm_head.input_quantizer": False, "lm_head.output_quantizer": False, "lm_head.weight_quantizer": True,
        "mlp.experts.down_proj_weight_quantizers.1": True}


@pytest.mark.parametrize("formats, words", [
    ([], "quantization_formats is empty"), ([None, "NONE"], "quantization_formats is empty"),
    ([mtq.FP8_DEFAULT_CFG, None, "FP8_DEFAULT_CFG"], r"entries 0 and 2 are the same format \(FP8_DEFAULT_CFG\)"),
    (["FP9_CFG"], r"\[0\]: unknown format 'FP9_CFG': known are .*FP8_DEFAULT_CFG"), ([{"quant_cfg": 3}], r"quantization_formats\[0\]: quant_cfg must"),
    ([mtq.INT4_GPTQ_CFG], "INT4_GPTQ_CFG.*'gptq' cannot be one of several formats"), ([mtq.NVFP4_SVDQUANT_DEFAULT_CFG], "'svdquant' cannot be"),
    ([{**mtq.FP8_DEFAULT_CFG, "algorithm": {"method": "max", "layerwise": {"enable": True}}}], "leave layerwise out")])
def test_formats_that_are_refused(formats, words):
    with pytest.raises(ValueError, match=words):
        parse_recipes(formats)
    with pytest.raises(TypeError, match="must be a list of configs, got dict"):
        parse_recipes(mtq.FP8_DEFAULT_CFG)


# Groups --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names, scored_at", [
    (["l.0.self_attn.q_proj", "l.0.self_attn.k_proj", "l.0.self_attn.v_proj"], None), (["l.0.mlp.gate_proj", "l.0.mlp.up_proj"], None),
    (["l.0.mlp.experts.0.gate_proj", "l.0.mlp.experts.0.down_proj", "l.0.mlp.experts.11.up_proj"], ["l.0.mlp"]),
    (["l.0.mixer.experts.0.up_proj", "l.0.mixer.experts.1.down_proj"], ["l.0.mixer"]),
    (["l.0.mlp.experts.local_experts.0.linear_fc1", "l.0.mlp.experts.local_experts.1.linear_fc2"], None),
    (["l.0.moe.experts.0.w1", "l.0.moe.experts.0.w2", "l.0.moe.experts.1.w3"], ["l.0.moe.experts"]),
    (["l.0.ffn.w1_linear.0", "l.0.ffn.w2_linear.0", "l.0.ffn.w3_linear.3"], ["l.0.ffn"]),
    (["l.0.linear_attn.in_proj_qkv", "l.0.linear_attn.in_proj_z"], None), (["l.0.linear_attn.in_proj_a", "l.0.linear_attn.in_proj_b"], None)])
def test_groups(names, scored_at):
    """Each with a sibling elsewhere that is alone."""
    others = ["l.0.self_attn.o_proj", "l.0.mlp.down_proj", "l.1.self_attn.q_proj", "l.1.mlp.up_proj", "l.1.moe.experts.0.w2", "lm_head"]
    groups = make_groups(linears(*others[:2], *names, *others[2:]), parse_recipes(PLAIN), None, [])
    found = {group.key: group for group in groups}
    assert len(groups) == 1 + len(others) and list(found[f"{names[0]}.quant_recipe"].modules) == names
    assert found[f"{names[0]}.quant_recipe"].scored_at == tuple(scored_at or names)


def test_disabled_layers():
    slots = linears("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.o_proj", "lm_head")
    groups = {group.name: group for group in make_groups(slots, parse_recipes(PLAIN), ["*k_proj", "*router*", "*norm"], ["model.norm"])}
    assert groups["model.layers.0.q_proj"].recipes == (NO_QUANT,) and len(groups["lm_head"].recipes) == 3      # a whole group; others not
    for patterns, words in (("*lm_haed*", "'.lm_haed.' fits no module of this model; did you mean 'lm_head'"),
                            (["*o_proj", "model.layers.7*"], "'model.layers.7.' fits no module"), ([3], "must be a pattern or a list of patterns"),
                            ("*", "leave no layer to choose a format for")):
        with pytest.raises(ValueError, match=words):
            make_groups(slots, parse_recipes(PLAIN), patterns, [])
    with pytest.raises(ValueError, match="no linear layer to choose formats for"):
        make_groups([], parse_recipes(PLAIN), None, [])


# Budgets -------------------------------------------------------------------------------------------------------------------------

def stats_of(names, scores, formats=PLAIN, shape=(64, 32)):
    groups = make_groups(linears(*names, shape=shape), parse_recipes(formats), None, [])
    return {group.key: candidate_stats(group, dict(zip(map(str, group.recipes), scores))) for group in groups}


def test_scores_never_rise_with_bits():
    group = stats_of(["a"], [3.0, 5.0])["a.quant_recipe"]
    assert group["scores"] == [3.0, 3.0, 0.0] and group["bits"] == [4.5, 8.0, 16.0]


@pytest.mark.parametrize("config, cost, weights", [
    ({}, {}, [1, 1, 1]), ({}, {"excluded_module_name_patterns": "lm_*"}, [1, 1, 0]),
    ({"num_experts": 8, "num_experts_per_tok": 2}, None, [1, 0.25, 1]), ({}, {"active_moe_expert_ratio": 0.5}, [1, 0.5, 1]),
    ({"text_config": {"n_routed_experts": 3, "top_k": 1}}, {"excluded_module_name_patterns": ["l*.q_proj"]}, [0, 1 / 3, 1])])
def test_what_counts(config, cost, weights):
    moe = cost is None or "active_moe_expert_ratio" in cost or "text_config" in config
    constraints = Constraints.parse({"effective_bits": 8, "cost_model": "active_moe" if moe else "weight", "cost": cost}, config)
    stats = stats_of(["l.0.q_proj", "l.0.mlp.experts.0.w1", "lm_head"], [2.0, 1.0])
    costs = Costs(stats, constraints)
    assert [float(weight) for weight in costs.weights.values()] == pytest.approx(weights)
    assert float(costs.denominator) == pytest.approx(2048 * sum(weights))
    choice = costs.solve().choice
    assert [item for item, weight in zip(choice, weights) if not weight] == [2] * weights.count(0)      # what costs nothing stays as it is
    assert 6 < costs.mean_bits(choice, "effective") <= 8


@pytest.mark.parametrize("given, words", [
    ({"effective_bits": 0}, "effective_bits must be a number above 0"), ({"effective_bits": "5"}, "effective_bits must"), ({"bits": 5}, "a dictionary of effective_bits"),
    (5, "must be a dictionary"), ({"cost_model": "moe"}, "must be one of weight, active_moe, got 'moe'"), ({"cost": {"ratio": 1}}, "is a dictionary of excluded"),
    ({"cost_model": "active_moe"}, "does not say how many experts"), ({"cost_model": "active_moe", "cost": {"active_moe_expert_ratio": 2}}, "up to 1, got 2"),
    ({"cost": {"excluded_module_name_patterns": [1]}}, "a pattern or a list of patterns")])
def test_constraints_that_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Constraints.parse(given, {})


def test_a_budget_that_cannot_be_met_says_the_range():
    stats = stats_of(["a", "b"], [2.0, 1.0])
    assert Costs(stats, Constraints(4.5)).solve().choice == [0, 0]      # to the last bit
    with pytest.raises(ValueError, match="4.4 effective bits cannot be met: .* from 4.5 to 16 can be"):
        Costs(stats, Constraints(4.4))
    with pytest.raises(ValueError, match="4.5 stored bits cannot be met: .* from 4.5157 to 16"):      # and the scale above the blocks'
        Costs(stats, Constraints(4.5), "stored")
    Costs(stats, Constraints(4.5157), "stored")
    with pytest.raises(ValueError, match="leaves no weight that counts"):
        Costs(stats, Constraints.parse({"cost": {"excluded_module_name_patterns": "*"}}))


def test_stored_bits_are_another_budget():
    """6 bits of INT4 by the reference's count are 6.25 stored; counted so, fewer layers have 8 bits."""
    names, scores = [f"l.{layer}.o_proj" for layer in range(8)], [8.0, 1.0]
    stats = stats_of(names, scores, [mtq.INT4_AWQ_CFG, mtq.FP8_DEFAULT_CFG], (256, 256))
    by = {bits: Costs(stats, Constraints(6.0), bits) for bits in ("effective", "stored")}
    choices = {bits: costs.solve().choice for bits, costs in by.items()}
    assert choices["effective"].count(1) == 4 and choices["stored"].count(1) == 3
    assert by["effective"].mean_bits(choices["effective"], "stored") > 6 >= by["stored"].mean_bits(choices["stored"], "stored")


@pytest.mark.parametrize("case", AUTO)
def test_the_reference_s_scores_give_the_reference_s_choice(case):
    """The same or a better sum, for any budget; on a native model's groups."""
    theirs = json.loads((case.folder / "auto_state.json").read_text())
    model = modelq.load(case.model.source)
    groups = make_groups(model.slots.values(), parse_recipes([mtq.INT4_AWQ_CFG, mtq.FP8_DEFAULT_CFG]), None, [])
    assert [group.key for group in groups] == list(theirs["candidate_stats"])
    stats = {}
    for group in groups:
        said = theirs["candidate_stats"][group.key]
        stats[group.key] = candidate_stats(group, dict(zip(said["formats"], said["scores"])))
        assert list(group.modules) == said["module_names"] and stats[group.key]["scores"] == said["scores"]
        assert stats[group.key]["quantizer_attrs"] == said["quantizer_attrs"]
    costs = Costs(stats, Constraints(6.0))
    assert [list(map(float, row)) for row in costs.costs.values()] == [said["costs"] for said in theirs["candidate_stats"].values()]
    found = costs.solve()
    assert [group["formats"][item] for group, item in zip(stats.values(), found.choice)] == list(theirs["best"]["recipe"].values())
    assert found.score == pytest.approx(theirs["best"]["score"], rel=1e-12)


# Native models -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_reopened_it_computes_as_the_searched_model(golden, name, tmp_path):
    model = modelq.load(golden[name].source, compute="bfloat16")
    model, state = search(model, golden[name], formats=[mtq.INT4_AWQ_CFG, *PLAIN], kv_cache_cfg=mtq.FP8_KV_CFG, disabled_layers="*lm_head*")
    assert len({*state["best"]["recipe"].values()}) >= 3 and state["best"]["constraints"]["effective_bits"] <= 6
    export_hf_checkpoint(model, export_dir=tmp_path)
    said = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION" and said["kv_cache_quant_algo"] == "FP8"
    words = {"FP8_DEFAULT_CFG": "FP8", "NVFP4_DEFAULT_CFG": "NVFP4", "INT4_AWQ_CFG": "W4A16_AWQ", "NONE": None}
    for key, recipe in state["best"]["recipe"].items():
        for module in state["candidate_stats"][key]["module_names"]:
            layers = [layer for layer in said["quantized_layers"] if layer == module or layer.startswith(f"{module}.")]
            assert {said["quantized_layers"][layer]["quant_algo"] for layer in layers} == {words[recipe.partition("(")[0]]} - {None}
    ours, theirs = (np.asarray(one(golden[name].calib[:1])) for one in (model, modelq.load(tmp_path, compute="bfloat16")))
    np.testing.assert_array_equal(ours, theirs)


def test_a_score_by_hand(golden):
    """The divergence of the answers when one group only has a format."""
    state = search(modelq.load(golden["llama"].source, compute="float32"), golden["llama"], disabled_layers="*lm_head*")[1]
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *[
        {"quantizer_name": f"model.layers.1.mlp.{one}_proj.{side}_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
        for one in ("gate", "up") for side in ("weight", "input")]], "algorithm": "max"}
    plain = modelq.load(golden["llama"].source, compute="float32")
    one = mtq.quantize(modelq.load(golden["llama"].source, compute="float32"), config,
                       lambda model: [model(row[None]) for row in golden["llama"].calib[:2]])
    logits = [np.asarray(model(golden["llama"].calib[:2]), np.float64) for model in (plain, one)]
    p, q = (values - np.log(np.exp(values).sum(axis=-1, keepdims=True)) for values in logits)
    group = state["candidate_stats"]["model.layers.1.mlp.gate_proj.quant_recipe"]
    assert group["scores"][1] == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-4)


def test_another_budget_and_the_state_s_config(golden, tmp_path):
    model, state = search(modelq.load(golden["llama"].source, compute="bfloat16"), golden["llama"], checkpoint=tmp_path)

    def only_the_answer(model, batch):
        raise AssertionError("scored again")
    again, second = search(modelq.load(golden["llama"].source, compute="bfloat16"), golden["llama"], budget=9, checkpoint=tmp_path,
                           forward_step=only_the_answer)
    config = mtq.get_auto_quantize_config(json.loads(json.dumps(state)), {"effective_bits": 9})
    direct = mtq.quantize(modelq.load(golden["llama"].source, compute="bfloat16"), config,
                          lambda model: [model(row[None]) for row in golden["llama"].calib[:2]])
    np.testing.assert_array_equal(np.asarray(again(golden["llama"].calib[:1])), np.asarray(direct(golden["llama"].calib[:1])))
    assert second["best"]["score"] < state["best"]["score"]
    with pytest.raises(ValueError, match="must be the state that auto_quantize returned"):
        mtq.get_auto_quantize_config({"best": {}})


def test_if_anything_raises_the_model_is_as_it_was(golden):
    model = modelq.load(golden["llama"].source, compute="bfloat16")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(golden["llama"].calib))
    before, quantizers, calls = np.asarray(model(golden["llama"].calib[:1])), model.quantizers, [0]

    def fails(model, batch):
        calls[0] += 1
        if calls[0] > 7:
            raise KeyboardInterrupt
        return model(batch)
    with pytest.raises(KeyboardInterrupt):
        search(model, golden["llama"], forward_step=fails)
    with pytest.raises(ValueError, match="4.2 effective bits cannot be met"):
        search(model, golden["llama"], budget=4.2)
    odd = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "fake_quant": False}}]}
    with pytest.raises(NotImplementedError, match="q_proj.weight_quantizer .*fake_quant=False is not available"):      # before any work
        search(model, golden["llama"], budget=8, formats=[mtq.FP8_DEFAULT_CFG, odd], forward_step=fails)
    assert model.quantizers is quantizers and calls[0] == 8
    np.testing.assert_array_equal(np.asarray(model(golden["llama"].calib[:1])), before)


@pytest.mark.parametrize("options, words", [
    ({"method": "hessian"}, "method must be one of 'gradient', 'kl_div', got 'hessian'"), ({"bits": "all"}, "bits must be one of"),
    ({"num_score_steps": 0}, "num_score_steps must be a number of batches"), ({"num_calib_steps": True}, "num_calib_steps must"),
    ({"compat": "x"}, "compat must be"), ({"forward_step": None}, "needs forward_step"), ({"method": "gradient"}, "needs loss_func"),
    ({"kv_cache_cfg": {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "enable": False}]}}, "kv_cache_cfg quantizes no keys")])
def test_bad_arguments(golden, options, words):
    with pytest.raises(ValueError, match=words):
        search(modelq.load(golden["llama"].source), golden["llama"], **options)


def test_bad_data_and_models(golden):
    model = modelq.load(golden["llama"].source)
    for data, words in (([], "data_loader gave no batch"), (None, "needs a data_loader")):
        with pytest.raises(ValueError, match=words):
            mtq.auto_quantize(model, None, PLAIN, data, lambda model, batch: model(batch), method="kl_div")
    with pytest.raises(TypeError, match="expected a model from modelq.load"):
        mtq.auto_quantize("model", None, PLAIN, [1], lambda model, batch: model(batch), method="kl_div")


def test_it_says_what_it_chose(golden, capsys):
    _, state = search(modelq.load(golden["llama"].source), golden["llama"], count=1, verbose=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "AutoQuantize cost model: weight" and said[-1].startswith("AutoQuantize effective bits: 5.9")
    assert f"AutoQuantize best recipe for lm_head: {state['best']['recipe']['lm_head.quant_recipe']}" in said
