"""config.json to the runtime's numbers: against transformers' config classes, and what is refused."""
from __future__ import annotations

import json

import pytest

import modelq._core as core
from modelq.checkpoint import config as module
from modelq.checkpoint.config import runtime_config

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config(family: str = "llama", **changes) -> dict:
    values = {"model_type": family, "architectures": [ARCHITECTURES[family]], **SIZES, "num_key_value_heads": 2, **changes}
    return {key: value for key, value in values.items() if value is not ...}


def test_golden_configs(golden):
    for name in ("llama", "qwen3"):
        family, flat = runtime_config(json.loads((golden[name].source / "config.json").read_text()))
        assert family == name and flat["head_dim"] == 32 and flat["rope_type"] == "default" and flat["rope_theta"] > 0
        assert set(flat) <= {"layer_windows", *next(row for row in core.archs() if row["family"] == name)["config_keys"]}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "plain": {},
    "no kv heads": {"num_key_value_heads": ...},
    "kv heads null": {"num_key_value_heads": None},
    "head size": {"head_dim": 24},
    "head size null": {"head_dim": None},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "epsilon": {"rms_norm_eps": 1e-5},
    "theta of transformers 4": {"rope_theta": 5e5, "rope_scaling": None},
    "theta of transformers 5": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "theta in both": {"rope_theta": 1e3, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "linear, old word": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3 of transformers 4": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}},
    "llama3 of transformers 5": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 512}},
    "llama3 without the original length": {"rope_scaling": dict(LLAMA3), "max_position_embeddings": 4096},
    "window": {"sliding_window": 16},
    "window null": {"sliding_window": None},
    "window used": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
    "window used everywhere": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
    "layer types": {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_transformers_reads_it(model_type, variant):
    transformers = pytest.importorskip("transformers")
    values = config(model_type, **VARIANTS[variant])
    try:
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(values)))
    except Exception:
        assert variant in ("kv heads null", "head size null")  # newer versions take no null there; older ones do
        return
    family, flat = runtime_config(values)
    assert family == {"mistral": "llama"}.get(model_type, model_type)
    for key in SIZES:
        assert flat[key] == getattr(theirs, key)
    assert flat["num_key_value_heads"] == theirs.num_key_value_heads
    assert flat["head_dim"] == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert flat["tie_word_embeddings"] == theirs.tie_word_embeddings and flat["rms_norm_eps"] == theirs.rms_norm_eps
    keys = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}.get(model_type, ())
    assert [flat[key] for key in ("attention_bias", "mlp_bias")] == [key in keys and getattr(theirs, key) for key in ("attention_bias", "mlp_bias")]
    for key, value in theirs.rope_parameters.items():
        if key != "type":
            assert flat[key if key in ("rope_type", "rope_theta") else f"rope_{key}"] == value
    types = theirs.layer_types if model_type.startswith("qwen") else [{"mistral": "sliding_attention", "llama": ""}[model_type]] * 4
    windows = [(theirs.sliding_window or 0) if kind == "sliding_attention" else 0 for kind in types]
    assert flat.get("layer_windows", [flat["sliding_window"]] * 4) == windows


def test_without_model_type_the_architecture_decides():
    assert runtime_config(config("mistral", model_type=...))[0] == "llama"
    assert runtime_config(config("mistral", model_type=...))[1]["sliding_window"] == 4096
    assert runtime_config(config("qwen3", architectures=...))[0] == "qwen3"


REFUSED = {
    "unknown model": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "'gpt2'.*supported are llama, mistral .*Qwen3ForCausalLM"),
    "unknown head": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*not supported"),
    "another family's name": ({"architectures": ["Qwen3ForCausalLM"]}, "not supported"),
    "nothing": ({"model_type": ..., "architectures": ...}, "model_type None"),
    "architectures no list": ({"architectures": 3}, "not supported"),
    "missing size": ({"hidden_size": ...}, "hidden_size is missing"),
    "size a text": ({"hidden_size": "64"}, "hidden_size is '64', expected an integer > 0"),
    "size a float": ({"hidden_size": 64.0}, "expected an integer > 0"),
    "size a bool": ({"vocab_size": True}, "vocab_size is True"),
    "size negative": ({"num_hidden_layers": -1}, "expected an integer > 0"),
    "heads do not divide": ({"num_attention_heads": 5}, "64 is not a multiple of num_attention_heads 5"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported are silu"),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number > 0"),
    "epsilon not a number": ({"rms_norm_eps": float("nan")}, "expected a number > 0"),
    "tied a number": ({"tie_word_embeddings": 1}, "expected true or false"),
    "rope ntk": ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_scaling.rope_type 'ntk' is not supported.*llama3"),
    "rope dynamic": ({"rope_parameters": {"type": "dynamic"}, "max_position_embeddings": 32}, "rope_parameters.factor is missing"),
    "rope dynamic without end": ({"rope_parameters": {"type": "dynamic", "factor": 4.0}}, "max_position_embeddings is missing"),
    "rope a list": ({"rope_parameters": ["default"]}, "one set of values for all layers"),
    "rope by layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set of values for all layers"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "rope factor negative": ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor is -2"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    "partial rotary inside": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    "layer types": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"] * 4}, "layer_types"),
    "layer types of another length": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "layer_types": []}, "for each of 4"),
    "unknown key": ({"query_scale": 3}, "query_scale is 3, which is not known in a model of the family llama"),
    "unknown key of rope": ({"rope_scaling": {"type": "linear", "factor": 2.0, "base": 3}}, "rope_scaling.base is 3, which is not known"),
    "window layers": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_window_layers": "x"}, "max_window_layers is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        runtime_config(config(**changes))


def test_supported_is_the_cores_table():
    assert all(name in module.supported() for row in core.archs() for name in (*row["model_types"], *row["architectures"]))
