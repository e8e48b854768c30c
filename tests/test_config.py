"""Configs: the presets equal Model Optimizer's, both spellings mean the same, every mistake is named."""
import copy
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq.quantization as mtq
from modelq import presets, rules
from modelq.algorithms import METHODS, normalize_algorithm
from modelq.config import (QuantizeConfig, QuantizerAttributeConfig, find_quant_cfg_entry_by_path, load_config, need_calibration,
                           normalize_quant_cfg_list)

FIXTURE = json.loads((Path(__file__).parent / "data" / "modelopt_presets.json").read_text())


def decode(value):
    """JSON of the fixture as the Python that the reference holds: {"tuple": [...]} and integer keys."""
    if isinstance(value, dict):
        if set(value) == {"tuple"}:
            return tuple(decode(v) for v in value["tuple"])
        return {int(k) if k.lstrip("-").isdigit() else k: decode(v) for k, v in value.items()}
    return [decode(v) for v in value] if isinstance(value, list) else value


ENTRIES = decode(FIXTURE["entries"])
REFERENCE = {name: {**decode({k: v for k, v in preset.items() if k not in ("quant_cfg", "need_calibration")}),
                    "quant_cfg": [ENTRIES[i] for i in preset["quant_cfg"]]} for name, preset in FIXTURE["presets"].items()}


# Presets -------------------------------------------------------------------------------------------------------------------

def test_there_are_the_39_names():
    assert mtq.config.choices - presets.OWN == set(REFERENCE) and len(REFERENCE) == 39


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_preset_equals_the_reference(name):
    assert getattr(mtq, name) == REFERENCE[name]
    assert getattr(mtq.config, name) is getattr(mtq, name)


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_preset_parses_and_keeps_its_meaning(name):
    config = getattr(mtq, name)
    before = copy.deepcopy(config)
    parsed = QuantizeConfig.parse(config)
    assert QuantizeConfig.parse(parsed.to_dict()).quant_cfg == parsed.quant_cfg
    assert config == before


def test_presets_share_no_dictionaries():
    seen = {}
    for name in presets.choices:
        for rule in getattr(presets, name)["quant_cfg"]:
            assert seen.setdefault(id(rule), name) == name
            for part in (rule.get("cfg"), (rule.get("cfg") or {}).get("block_sizes") if isinstance(rule.get("cfg"), dict) else None):
                assert part is None or seen.setdefault(id(part), name) == name


@pytest.mark.parametrize("name", sorted(name for name in REFERENCE if FIXTURE["presets"][name]["need_calibration"] is not None))
def test_need_calibration_as_in_the_reference(name):
    assert need_calibration(getattr(mtq, name)) is FIXTURE["presets"][name]["need_calibration"]


# Spellings -----------------------------------------------------------------------------------------------------------------

LIST_SPELLING = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}, "enable": False},
    {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False},
    {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}]},
]
FLAT_SPELLING = {
    "default": {"enable": False},
    "*weight_quantizer": {"num_bits": (4, 3), "axis": None},
    "*input_quantizer": {"num_bits": (4, 3), "axis": None, "enable": False},
    "nn.Embedding": {"*": {"enable": False}},
    "*[kv]_bmm_quantizer": [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}],
}


def test_the_three_spellings_mean_the_same():
    expected = normalize_quant_cfg_list(LIST_SPELLING)
    with pytest.warns(DeprecationWarning, match="older spelling"):
        assert normalize_quant_cfg_list(FLAT_SPELLING) == expected
    with pytest.warns(DeprecationWarning, match="older spelling"):
        assert normalize_quant_cfg_list([{key: value} for key, value in FLAT_SPELLING.items()]) == expected
    mixed = LIST_SPELLING[:1] + [{key: value} for key, value in list(FLAT_SPELLING.items())[1:]]
    with pytest.warns(DeprecationWarning):
        assert normalize_quant_cfg_list(mixed) == expected


def test_the_list_spelling_draws_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(normalize_quant_cfg_list(LIST_SPELLING)) == 5
        assert normalize_quant_cfg_list(normalize_quant_cfg_list(LIST_SPELLING)) == normalize_quant_cfg_list(LIST_SPELLING)


def test_spellings_of_bits_axes_and_keys():
    parsed = QuantizerAttributeConfig.parse({"num_bits": "E2M1", "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}})
    assert parsed.num_bits == (2, 1)
    assert parsed.block_sizes == {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    assert QuantizerAttributeConfig.parse({"num_bits": [4, 3], "axis": [0, 1]}).axis == (0, 1)


def test_config_files(tmp_path):
    text = """
quantize:
  algorithm: {method: max}
  quant_cfg:
    - {quantizer_name: "*", enable: false}
    - quantizer_name: "*weight_quantizer"
      cfg: {num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: [4, 3]}, effective_bits: 4.5}
"""
    (tmp_path / "a.yaml").write_text(text)
    config = load_config(tmp_path / "a.yaml")
    expected = mtq.NVFP4_DEFAULT_CFG["quant_cfg"][:2]
    assert normalize_quant_cfg_list(config["quant_cfg"]) == normalize_quant_cfg_list(expected)
    (tmp_path / "b.json").write_text(json.dumps(mtq.NVFP4_DEFAULT_CFG))
    assert QuantizeConfig.parse(load_config(tmp_path / "b.json")) == QuantizeConfig.parse(mtq.NVFP4_DEFAULT_CFG)
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match="c.json: not a readable config"):
        load_config(tmp_path / "c.json")
    (tmp_path / "d.yaml").write_text("quant_cfg: [{quantizer_name: '*', cfg: {num_bitz: 4}}]")
    with pytest.raises(ValueError, match=r"d.yaml: quant_cfg rule '\*': unknown quantizer attribute 'num_bitz'"):
        load_config(tmp_path / "d.yaml")


# Mistakes ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("entry, words", [
    ({"cfg": {"num_bits": 8}, "enable": True}, "Invalid quant_cfg entry|quantizer_name"),
    ({"quantizer_name": "", "enable": False}, "needs a quantizer_name"),
    ({"quantizer_name": "*"}, "must specify cfg, enable, or both"),
    ({"quantizer_name": "*", "cfg": {}}, "cfg is empty"),
    ({"quantizer_name": "*", "cfg": []}, "cfg is empty"),
    ({"quantizer_name": "*", "cfg": [{}]}, "cfg is empty"),
    ({"quantizer_name": "*", "cfg": {"enable": True}}, "enable': True} alone"),
    ({"quantizer_name": "*", "cfg": [{"num_bits": 4}, {"enable": True}]}, "stage 1.*alone"),
    ({"quantizer_name": "*", "enable": "yes"}, "enable must be True or False"),
    ({"quantizer_name": "*", "enable": False, "foo": 1}, "unknown key 'foo'"),
    ({"quantizer_name": "*", "cfg": 8}, "expected a dictionary"),
    ({"quantizer_name": "*", "enable": False, "parent_class": 3}, "parent_class must be a string"),
    (3, "Invalid quant_cfg entry"),
    ({}, "Invalid quant_cfg entry"),
    ({"a": {}, "b": {}}, "Invalid quant_cfg entry"),
    ({"nn.Linear": 3}, "expected a dictionary of patterns"),
])
def test_bad_rules(entry, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ValueError, match=words):
            normalize_quant_cfg_list([entry])


@pytest.mark.parametrize("attributes, words", [
    ({"num_bits": 0}, "num_bits must be"), ({"num_bits": None}, "num_bits must be"), ({"num_bits": "fp8"}, "num_bits must be"),
    ({"num_bits": (4, 4)}, "no known float format"), ({"num_bits": (0, 3)}, "no known float format"),
    ({"num_bits": (5, 2)}, "dynamic blocks"), ({"num_bits": (3, 2), "block_sizes": {-1: 32, "type": "static"}}, "dynamic blocks"),
    ({"num_bitz": 4}, "unknown quantizer attribute 'num_bitz'"),
    ({"axis": 0, "block_sizes": {-1: 16}}, "axis must be None"), ({"axis": "0"}, "axis must be"),
    ({"block_sizes": {-1: 16, -2: 16, "type": "dynamic"}}, "exactly one axis"), ({"block_sizes": {"type": "dynamic"}}, "exactly one axis"),
    ({"block_sizes": {-1: 0}}, "positive integer"), ({"block_sizes": {"size": 16}}, "unknown key 'size'"),
    ({"block_sizes": {-1: 16, "type": "lazy"}}, "type must be"), ({"block_sizes": 16}, "block_sizes must be"),
    ({"type": "lazy"}, "type must be"), ({"effective_bits": 17}, "effective_bits"), ({"effective_bits": 0}, "effective_bits"),
    ({"learn_amax": True}, "learn_amax"), ({"calibrator": "mean"}, "calibrator"), ({"trt_high_precision_dtype": "x"}, "Float"),
    ({"bias": {"type": "static"}}, "at least one axis"), ({"bias": {-1: None, "type": "x"}}, "bias: type"),
    ({"bias": {-1: None, "method": "median"}}, "bias: method"), ({"rotate": {"x": 1}}, "rotate"),
    ({"rotate": {"block_size": 0}}, "block_size"), ({"constant_amax": 0.0}, "constant_amax"),
    ({"constant_amax": 1.0, "use_constant_amax": True}, "exclude each other"), ({"unsigned": 1}, "unsigned must be"),
])
def test_bad_attributes(attributes, words):
    with pytest.raises(ValueError, match=words) as caught:
        normalize_quant_cfg_list([{"quantizer_name": "*my_pattern", "cfg": attributes}])
    assert "*my_pattern" in str(caught.value)


@pytest.mark.parametrize("config, words", [
    (None, "a config is a dictionary"), ("FP8", "a config is a dictionary"), ({"quant_cfg": None}, "must be a list"),
    ({"quant_cfg": "x"}, "must be a list"), ({"quant_cfg": [], "algo": "max"}, "unknown key 'algo'"),
    ({"quant_cfg": [], "effective_bits": 20}, "effective_bits"), ({"quant_cfg": [], "algorithm": "maxx"}, "known are max, mse"),
])
def test_bad_configs(config, words):
    with pytest.raises(ValueError, match=words):
        QuantizeConfig.parse(config)


def test_empty_cfg_with_enable_false_only_switches():
    for cfg in ({}, [], [{}]):
        (rule,) = normalize_quant_cfg_list([{"quantizer_name": "*", "cfg": cfg, "enable": False}])
        assert rule.cfg is None and rule.enable is False


def test_find_entry_takes_the_last_exact_name():
    entries = copy.deepcopy(mtq.INT4_AWQ_CFG["quant_cfg"]) + [{"quantizer_name": "*lm_head*", "enable": True}]
    assert find_quant_cfg_entry_by_path(entries, "*lm_head*") is entries[-1]
    assert find_quant_cfg_entry_by_path(entries, "*weight_quantizer")["cfg"]["block_sizes"] == {-1: 128, "type": "static"}
    with pytest.raises(KeyError, match="weight_quant"):
        find_quant_cfg_entry_by_path(entries, "*weight_quant")


# Algorithms ----------------------------------------------------------------------------------------------------------------

def test_algorithm_spellings():
    assert normalize_algorithm(None) == [] == normalize_algorithm({"method": None})
    assert normalize_algorithm("max") == normalize_algorithm({"method": "max"}) == normalize_algorithm(["max"])
    assert [step["method"] for step in normalize_algorithm(["max", {"method": "awq_lite", "alpha_step": 0.2}])] == ["max", "awq_lite"]
    assert normalize_algorithm({"method": "awq_lite", "alpha_step": 0.2})[0]["alpha_step"] == 0.2
    assert normalize_algorithm("gptq")[0]["layerwise"]["get_qdq_activations_from_prev_layer"] is True


@pytest.mark.parametrize("algorithm, words", [
    ("nope", "known are max, mse, local_hessian, smoothquant, awq_lite"), ({"method": "max", "alpha": 1}, "unknown setting 'alpha'"),
    ([["max"]], "another list"), (3, "algorithm must be"), ({"method": "smoothquant", "alpha": 1.5}, "alpha must be"),
    ({"method": "max", "layerwise": {"checkpoint_dir": "x"}}, "checkpoint_dir needs"),
    ({"method": "gptq", "layerwise": {"calib_mutates_weights": False}}, "changes weights"),
    ({"method": "max", "shared_states": {"x": {}}}, "shared_states"),
    ({"method": "max", "shared_states": {"weight_global_amax": {"patterns": ["("]}}}, "invalid pattern"),
    ({"method": "max", "moe_calib_experts_ratio": 0}, "moe_calib_experts_ratio"),
])
def test_bad_algorithms(algorithm, words):
    with pytest.raises(ValueError, match=words):
        normalize_algorithm(algorithm)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_parses_bare(method):
    assert normalize_algorithm(method)[0]["method"] == method


# Rules: what wins ----------------------------------------------------------------------------------------------------------

def toy_settings():
    slots = [rules.Slot(f"model.layers.{i}.{m}.{role}_quantizer", f"model.layers.{i}.{m}", role, "nn.Linear", (64, 64), i)
             for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj") for role in ("weight", "input", "output")]
    slots += [rules.Slot("lm_head.weight_quantizer", "lm_head", "weight", "nn.Linear", (99, 64)),
              rules.Slot("model.embed_tokens.weight_quantizer", "model.embed_tokens", "weight", "nn.Embedding", (99, 64)),
              rules.Slot("model.embed_tokens.input_quantizer", "model.embed_tokens", "input", "nn.Embedding", (99, 64))]
    return {slot.name: rules.default_setting(slot) for slot in slots}


def apply(*entries):
    return rules.apply_rules(toy_settings(), normalize_quant_cfg_list(list(entries)))


def test_defaults_before_any_rule():
    settings_, _ = apply()
    by_role = {name.rsplit(".", 1)[1]: s.enable for name, s in settings_.items() if "q_proj" in name}
    assert by_role == {"weight_quantizer": True, "input_quantizer": True, "output_quantizer": False}
    assert settings_["lm_head.weight_quantizer"].attributes == QuantizerAttributeConfig(num_bits=8, axis=0)
    assert settings_["model.embed_tokens.input_quantizer"].enable is False


def test_fp8_default_touches_what_it_should():
    settings_, idle = rules.apply_rules(toy_settings(), normalize_quant_cfg_list(mtq.FP8_DEFAULT_CFG["quant_cfg"]))
    enabled = {name for name, s in settings_.items() if s.enable}
    assert enabled == {n for n in settings_ if "layers" in n and "output" not in n}
    assert all(settings_[n].attributes.num_bits == (4, 3) for n in enabled)
    assert all(rules.expected_to_be_idle(rule) for rule in idle)
    assert settings_["lm_head.weight_quantizer"].rule.quantizer_name == "*lm_head*"


def test_cfg_replaces_everything_and_enable_only_switches():
    name = "model.layers.0.mlp.up_proj.weight_quantizer"
    first = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}, "unsigned": True}}
    settings_, _ = apply(first, {"quantizer_name": "*up_proj*", "cfg": {"num_bits": (4, 3)}})
    assert settings_[name].attributes == QuantizerAttributeConfig(num_bits=(4, 3))
    settings_, _ = apply(first, {"quantizer_name": "*", "enable": False}, {"quantizer_name": "*up_proj.weight*", "enable": True})
    assert settings_[name].enable and settings_[name].attributes.block_sizes == {-1: 128}
    assert not settings_["model.layers.0.self_attn.q_proj.weight_quantizer"].enable
    settings_, _ = apply({**first, "enable": False})
    assert not settings_[name].enable and settings_[name].attributes.num_bits == 4


def test_order_decides():
    off, on = {"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4}}
    assert any(s.enable for s in apply(off, on)[0].values())
    assert not any(s.enable for s in apply(on, off)[0].values())


def test_parent_class_filters_and_must_be_known():
    settings_, _ = apply({"quantizer_name": "*", "enable": False}, {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": True})
    assert {n for n, s in settings_.items() if s.enable} == {"model.embed_tokens.weight_quantizer"}
    with pytest.raises(ValueError, match="unknown parent_class 'nn.Linaer'"):
        apply({"quantizer_name": "*", "parent_class": "nn.Linaer", "enable": True})


def test_token_ids_are_never_quantized():
    settings_, _ = apply({"quantizer_name": "*", "cfg": {"num_bits": 8}})
    assert not settings_["model.embed_tokens.input_quantizer"].enable


def test_idle_rules_are_reported():
    _, idle = apply({"quantizer_name": "*q_porj*", "enable": False}, {"quantizer_name": "*q_proj*", "enable": False})
    assert [rule.quantizer_name for rule in idle] == ["*q_porj*"] and not rules.expected_to_be_idle(idle[0])


@pytest.mark.parametrize("pattern, name, expected", [
    ("*weight_quantizer", "a.b.weight_quantizer", True), ("weight_quantizer", "a.weight_quantizer", False),
    ("*Weight_quantizer", "a.weight_quantizer", False), ("mtp.*", "model.mtp.x", False), ("mtp.*", "mtp.x", True),
    ("*[kv]_bmm_quantizer", "l.k_bmm_quantizer", True), ("*[kv]_bmm_quantizer", "l.q_bmm_quantizer", False),
    ("*layers.?.mlp*", "model.layers.3.mlp.x", True), ("*layers.?.mlp*", "model.layers.13.mlp.x", False),
    ("*weight_quantizer", "e.gate_up_proj_weight_quantizers.3", True), ("*input_quantizer", "e.weight_quantizers.3", False),
])
def test_pattern_matching(pattern, name, expected):
    assert rules.matches(pattern, name) is expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([
    {"quantizer_name": "*", "enable": False}, {"quantizer_name": "*q_proj*", "enable": True},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}},
    {"quantizer_name": "*layers.1*", "cfg": {"num_bits": (4, 3)}}, {"quantizer_name": "*layers.1*", "cfg": {"num_bits": 6}, "enable": False},
]), max_size=6))
def test_rules_one_after_the_other_equal_the_whole_list(entries):
    step = toy_settings()
    for entry in entries:
        step, _ = rules.apply_rules(step, normalize_quant_cfg_list([entry]))
    assert step == apply(*entries)[0]


def test_adding_a_kv_config(capsys):
    merged = mtq.update_quant_cfg_with_kv_cache_quant(mtq.MXFP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    assert merged["algorithm"] == "max" and merged["quant_cfg"] == mtq.MXFP8_DEFAULT_CFG["quant_cfg"] + mtq.FP8_KV_CFG["quant_cfg"]
    assert mtq.MXFP8_DEFAULT_CFG["algorithm"] is None
    assert "Updated quant_cfg" in capsys.readouterr().out
    only_kv = mtq.update_quant_cfg_with_kv_cache_quant({"quant_cfg": None}, mtq.NVFP4_KV_CFG["quant_cfg"])
    assert only_kv["quant_cfg"] == [{"quantizer_name": "*", "enable": False}] + mtq.NVFP4_KV_CFG["quant_cfg"]
