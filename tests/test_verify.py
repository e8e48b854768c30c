"""`modelq verify`: valid exports of every dialect pass, and each rule finds what breaks it, by name, with a remedy."""
import copy
import json

import ml_dtypes
import numpy as np
import pytest
from golden_data import models
from modelq.cli import main
from modelq.verify import ENGINES, dequantized_errors, verify_checkpoint
from modelq.verify.rules import RULES
from verify_folders import CONFIGS, Folder, full, make_folder

MODEL = next(param.values[0] for param in models(["llama"]))
GOLDEN = MODEL.folder / "bfloat16"
UP, GATE, DOWN, Q, K, V, O = (f"model.layers.0.{name}" for name in ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj",
                                                                     "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"))


def base(name: str) -> Folder:
    """A golden export by its configuration's name, or one of verify_folders by its."""
    return make_folder(name, MODEL.source) if name in CONFIGS else Folder.read(golden_folder(name))


def golden_folder(name: str):
    if not (GOLDEN / name / "model.safetensors").exists():
        pytest.skip("only in the whole golden set, see MODELQ_GOLDEN")
    return GOLDEN / name


def errors(findings):
    return [finding for finding in findings if finding.level == "error"]


# Valid exports ---------------------------------------------------------------------------------------------------------------

VALID = {
    "FP8_DEFAULT_CFG": "vllm sglang tensorrt-llm", "FP8_DEFAULT_CFG__FP8_KV_CFG": "vllm sglang tensorrt-llm",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "vllm tensorrt-llm", "INT4_AWQ_CFG": "tensorrt-llm", "W4A8_AWQ_BETA_CFG": "tensorrt-llm",
    "MXFP8_DEFAULT_CFG": "vllm sglang tensorrt-llm", "NVFP4_DEFAULT_CFG": "vllm sglang tensorrt-llm", "AUTO_6.0": "tensorrt-llm",
    "NVFP4_DEFAULT_CFG__FP8_KV_CFG": "vllm sglang tensorrt-llm", "NVFP4_DEFAULT_CFG__NVFP4_KV_CFG": "vllm sglang tensorrt-llm",
    "NVFP4_MLP_ONLY_CFG": "vllm sglang tensorrt-llm", "W4A16_NVFP4_CFG": "vllm sglang tensorrt-llm",
    "fp8 tensor": "vllm sglang transformers", "fp8 channel": "vllm sglang tensorrt-llm transformers", "fp8 block": "transformers",
    "nvfp4": "vllm sglang transformers", "mxfp8": "vllm transformers", "mxfp4": "vllm transformers", "int4": "vllm sglang transformers",
    "int4 zeros": "vllm sglang transformers", "int8": "vllm sglang transformers", "int8 packed": "vllm sglang transformers", "native fp8": "transformers",
    "native mxfp8": "sglang transformers", "awq": "vllm sglang transformers", "gptq": "vllm sglang transformers",
}


@pytest.mark.parametrize(("name", "engine"), [(name, engine) for name, engines in VALID.items() for engine in engines.split()])
def test_valid_exports_pass(name, engine, tmp_path):
    folder = base(name).write(tmp_path / "out") if name in CONFIGS else golden_folder(name)
    assert not errors(verify_checkpoint(folder, engine))


REFUSED = {
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("sglang", "quant_algo"), "INT8_SMOOTHQUANT_CFG": ("tensorrt-llm", "W8A8_SQ_PER_CHANNEL"),
    "INT4_AWQ_CFG": ("vllm", "W4A16_AWQ"), "MXFP4_DEFAULT_CFG": ("vllm", "mxfp4"), "FP8_DEFAULT_CFG": ("transformers", "modelopt"),
    "FP8_DEFAULT_CFG__FP8_AFFINE_KV_CFG": ("vllm", "k_proj.k_bias"), "NVFP4_DEFAULT_CFG__NVFP4_AFFINE_KV_CFG": ("tensorrt-llm",
                                                                                                                "NVFP4_AFFINE"),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": ("tensorrt-llm", "down_proj.pre_quant_scale"), "AUTO_6.0": ("vllm", "W4A16_AWQ"),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": ("sglang", "fp8_pb_wo"), "mxfp4": ("sglang", "mxfp4-pack-quantized"),
    "int8": ("tensorrt-llm", "int-quantized"), "fp8 tensor": ("tensorrt-llm", "float-quantized tensor"), "awq": ("tensorrt-llm", "awq"),
}


@pytest.mark.parametrize(("name", "engine", "word"), [(name, *rest) for name, rest in REFUSED.items()])
def test_what_an_engine_does_not_load_is_said(name, engine, word, tmp_path):
    folder = base(name).write(tmp_path / "out") if name in CONFIGS else golden_folder(name)
    assert any(word in str(finding) for finding in errors(verify_checkpoint(folder, engine)))


# Each rule broken ------------------------------------------------------------------------------------------------------------

def put(name, value):
    """A change: the tensor set to a value, array or function of the old array; None takes it away."""
    def change(folder):
        if value is None:
            del folder.tensors[name]
        else:
            old = folder.tensors.get(name)
            new = value(old) if callable(value) else value
            folder.tensors[name] = new if isinstance(new, np.ndarray) else np.full(old.shape, new, old.dtype)
    return change


def both(*path, value):
    """A change: a key of hf_quant_config.json and of config.json's section, where they have it; `...` takes it away."""
    def change(folder):
        for section in filter(None, (folder.flat, folder.nested and folder.inner)):
            for key in path[:-1]:
                section = section.get(key, {})
            if path[-1] in section or value is not ...:
                if value is ...:
                    section.pop(path[-1])
                else:
                    section[path[-1]] = value
    return change


def flat(*path, value):
    def change(folder):
        nested, folder.nested = folder.nested, None
        both(*path, value=value)(folder)
        folder.nested = nested
    return change


def nested(key, value):
    def change(folder):
        folder.inner.pop(key) if value is ... else folder.inner.__setitem__(key, value)
    return change


def excluded(*patterns):
    def change(folder):
        folder.flat["ignore"] = list(patterns)
        if folder.nested:
            folder.inner["exclude_modules"] = list(patterns)
    return change


def unquantize(module):
    """The layer as it was, in bfloat16; the config is not told."""
    def change(folder):
        for name in [name for name in folder.tensors if name.startswith(module + ".")]:
            del folder.tensors[name]
        folder.tensors[f"{module}.weight"] = Folder.read(MODEL.source).tensors[f"{module}.weight"]
    return change


def mixed(**algorithms):
    """The golden FP8 export said as MIXED_PRECISION, in both files; algorithms: of single projections."""
    def change(folder):
        layers = {name.removesuffix(".weight_scale"): {"quant_algo": "FP8"} for name in folder.tensors if name.endswith(".weight_scale")}
        for module in layers:
            layers[module] = {"quant_algo": algorithms.get(module.rpartition(".")[2], "FP8")}
        folder.flat.update(quant_algo="MIXED_PRECISION", quantized_layers=layers)
        folder.inner.update(quant_algo="MIXED_PRECISION", quantized_layers=copy.deepcopy(layers))
    return change


def then(*changes):
    def change(folder):
        for one in changes:
            one(folder)
    return change


def experts(suffix):
    def change(folder):
        folder.tensors = {name.replace(".mlp.", ".mlp.experts.0."): array for name, array in folder.tensors.items()}
        if suffix:
            put(f"model.layers.0.mlp.experts.0.up_proj.{suffix}", lambda old: old * np.float32(0.5))(folder)
    return change


MO, KV, NV, PER_CHANNEL, AWQ = ("FP8_DEFAULT_CFG", "FP8_DEFAULT_CFG__FP8_KV_CFG", "NVFP4_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG",
                                "INT4_AWQ_CFG")
TRT, SMOOTH = "tensorrt-llm", full(1, 128, dtype=ml_dtypes.bfloat16)
BROKEN = [   # rule, export, engine, what the finding names, the change
    ("method", MO, "vllm", "quantization_config", lambda f: (f.config.pop("quantization_config"), setattr(f, "nested", None))),
    ("method", MO, "vllm", "quant_method", flat("quant_method", value="quanto")),
    ("method", "awq", "vllm", "quant_method", flat("quant_method", value="autoawq")),
    ("algorithm", MO, "vllm", "quant_algo", both("quant_algo", value="W8A8_SQ_PER_CHANNEL")),
    ("algorithm", MO, "vllm", "quant_algo", both("quant_algo", value=...)),
    ("algorithm", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", TRT, "'fp8_pb_wo'", both("quant_algo", value="FP8_PB_WO")),
    ("algorithm", MO, "vllm", "quantized_layers", both("quant_algo", value="MIXED_PRECISION")),
    ("algorithm", MO, "vllm", f"quantized_layers.{O}", then(mixed(), both("quantized_layers", O, "quant_algo", value="W4A8_AWQ"))),
    ("algorithm", "int4", "vllm", "config_groups", flat("config_groups", value={})),
    ("algorithm", "nvfp4", "vllm", "config_groups.group_0", flat("config_groups", "group_0", "weights", "strategy", value="group")),
    ("algorithm", "mxfp8", "transformers", "config_groups.group_0", flat("config_groups", "group_0", "format", value="mxfp8")),
    ("both_files", MO, TRT, "hf_quant_config.json", lambda f: setattr(f, "nested", None)),
    ("both_files", MO, "vllm", "quant_algo", nested("quant_algo", "FP8_PB_WO")),
    ("both_files", MO, "vllm", "exclude_modules", nested("exclude_modules", [])),
    ("both_files", "MXFP8_DEFAULT_CFG", "vllm", "quantization_config", lambda f: f.config.pop("quantization_config")),
    ("nested_keys", MO, TRT, "exclude_modules", nested("exclude_modules", ...)),
    ("nested_keys", MO, "vllm", "exclude_modules", nested("exclude_modules", None)),
    ("nested_keys", NV, TRT, "group_size", nested("group_size", ...)),
    ("nested_keys", NV, TRT, "kv_cache_quant_algo", nested("kv_cache_quant_algo", ...)),
    ("group_size", NV, TRT, "group_size", both("group_size", value=32)),
    ("group_size", AWQ, TRT, "group_size", both("group_size", value=64)),
    ("awq_keys", AWQ, TRT, "has_zero_point", nested("has_zero_point", True)),
    ("awq_keys", AWQ, TRT, "pre_quant_scale", nested("pre_quant_scale", ...)),
    ("mixed", MO, "vllm", DOWN, then(mixed(), both("quantized_layers", DOWN, value=...))),
    ("mixed", MO, TRT, "lm_head", then(mixed(), both("quantized_layers", "lm_head", value={"quant_algo": "FP8"}))),
    ("mixed", MO, "sglang", "w4afp8", mixed()),
    ("mixed", NV, "vllm", "group sizes", then(mixed(), both("quantized_layers", O, value={"quant_algo": "NVFP4", "group_size": 16}),
                                             both("quantized_layers", DOWN, value={"quant_algo": "NVFP4", "group_size": 32}))),
    ("one_format_per_group", MO, "vllm", Q, then(unquantize(Q), excluded("lm_head", Q))),
    ("one_format_per_group", MO, TRT, K, mixed(k_proj="FP8_PER_CHANNEL_PER_TOKEN")),
    ("one_format_per_group", "int8", "vllm", GATE, then(unquantize(GATE), excluded("lm_head", GATE))),
    ("experts", PER_CHANNEL, "vllm", "experts.0", experts(None)),
    ("fused_experts", "int8", "transformers", "experts.0", experts(None)),
    ("fused_experts", "fp8 block", "transformers", "experts.0", experts(None)),
    ("fused_experts", "fp8 tensor", "transformers", "experts.0", then(experts(None), lambda f: f.config.update(model_type="granitemoe"))),
    ("vllm_experts", "int8 static", "vllm", "experts.0", experts(None)),
    ("vllm_experts", MO, "vllm", "experts.0", then(experts(None), lambda f: f.config.update(model_type="gpt_oss"))),
    ("exclusions", MO, "vllm", DOWN, unquantize(DOWN)),
    ("exclusions", MO, "sglang", DOWN, unquantize(DOWN)),
    ("exclusions", MO, TRT, O, then(unquantize(O), excluded("lm_head", "model.layers.0.self_attn.o"))),
    ("exclusions", MO, TRT, Q, then(unquantize(Q), unquantize(K), unquantize(V), excluded("lm_head", Q, K, V))),
    ("exclusions", MO, "vllm", "model.layers.1.mlp.up_proj", excluded("lm_head", "up_proj")),
    ("exclusions", MO, "sglang", O, excluded("lm_head", "o_*")),
    ("exclusions", MO, "vllm", "lm_head", excluded()),
    ("exclusions", "int4", "vllm", "lm_head", excluded("head")),
    ("exclusions", "fp8 channel", "transformers", DOWN, then(unquantize(DOWN), excluded("lm_head", "re:down_proj"))),
    ("exclusions", "native mxfp8", "transformers", "lm_head", flat("modules_to_not_convert", value=[])),
    ("exclusions", "awq", "vllm", "lm_head", flat("modules_to_not_convert", value=["mlp.gate."])),
    ("kv_cache", KV, "vllm", "dynamic", flat("kv_cache_scheme", "dynamic", value=...)),
    ("kv_cache", KV, "vllm", "has no", both("kv_cache_scheme", value="NVFP4_AFFINE")),
    ("kv_cache", KV, TRT, "has no", nested("kv_cache_quant_algo", "INT8")),
    ("kv_cache", KV, "vllm", "kv_cache_quant_algo", nested("kv_cache_quant_algo", None)),
    ("kv_cache", "fp8 tensor", "vllm", "strategy", flat("kv_cache_scheme", value={"num_bits": 8, "type": "float", "dynamic": False,
                                                                                  "symmetric": True})),
    ("parts", MO, "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", None)),
    ("parts", MO, "sglang", f"{DOWN}.input_scale", put(f"{DOWN}.input_scale", None)),
    ("parts", NV, TRT, f"{UP}.weight_scale_2", put(f"{UP}.weight_scale_2", None)),
    ("parts", NV, "vllm", f"{UP}.weight_scale", put(f"{UP}.weight_scale", lambda old: old.view(np.uint8))),
    ("parts", NV, "vllm", f"{UP}.weight_scale_2", put(f"{UP}.weight_scale_2", lambda old: old.astype(np.float64))),
    ("parts", PER_CHANNEL, "vllm", f"{UP}.weight_scale", put(f"{UP}.weight_scale", lambda old: old.reshape(-1, 1))),
    ("parts", MO, "vllm", f"{O}.pre_quant_scale", put(f"{O}.pre_quant_scale", SMOOTH)),
    ("parts", "fp8 channel", "vllm", f"{UP}.weight_scale", put(f"{UP}.weight_scale", lambda old: old.reshape(-1))),
    ("parts", "fp8 tensor", "transformers", f"{UP}.input_scale", put(f"{UP}.input_scale", None)),
    ("parts", "nvfp4", "transformers", f"{UP}.input_global_scale", put(f"{UP}.input_global_scale", None)),
    ("parts", "nvfp4", "vllm", f"{UP}.weight_scale_2", put(f"{UP}.weight_scale_2", full(1, 1))),
    ("parts", "int4", "vllm", f"{UP}.weight_packed", put(f"{UP}.weight_packed", lambda old: old.view(np.uint8))),
    ("parts", "int4", "vllm", f"{UP}.weight_shape", put(f"{UP}.weight_shape", None)),
    ("parts", "int4 zeros", "vllm", f"{UP}.weight_zero_point", put(f"{UP}.weight_zero_point", None)),
    ("true_shapes", "int8 packed", "vllm", f"{UP}.weight", put(f"{UP}.weight_packed", lambda old: old[:, ::2])),
    ("parts", "int8", "sglang", f"{UP}.weight_scale", put(f"{UP}.weight_scale", lambda old: old.reshape(-1))),
    ("parts", "native fp8", "transformers", f"{UP}.weight_scale_inv", put(f"{UP}.weight_scale_inv", lambda old: old.reshape(-1, 1, 1, 1))),
    ("parts", "native mxfp8", "transformers", f"{UP}.weight_scale", lambda f: f.tensors.__setitem__(
        f"{UP}.weight_scale", f.tensors.pop(f"{UP}.weight_scale_inv"))),
    ("parts", "awq", "vllm", f"{UP}.scales", put(f"{UP}.scales", lambda old: old.astype(ml_dtypes.bfloat16))),
    ("parts", "awq", "vllm", f"{UP}.qzeros", put(f"{UP}.qzeros", lambda old: old.T)),
    ("parts", "gptq", "vllm", f"{UP}.qzeros", put(f"{UP}.qzeros", None)),
    ("true_shapes", MO, "vllm", f"{DOWN}.weight", put(f"{DOWN}.weight", lambda old: old[:64])),
    ("true_shapes", NV, "vllm", DOWN, lambda f: [f.tensors.pop(name) for name in list(f.tensors) if name.startswith(DOWN)]),
    ("divisible", "native fp8", "vllm", K, lambda f: None),
    ("divisible", "fp8 block", "sglang", V, lambda f: None),
    ("smoothing", AWQ, TRT, f"{O}.pre_quant_scale", put(f"{O}.pre_quant_scale", None)),
    ("smoothing", AWQ, TRT, f"{UP}.pre_quant_scale", put(f"{UP}.pre_quant_scale", SMOOTH)),
    ("smoothing", AWQ, TRT, f"{O}.pre_quant_scale", put(f"{O}.pre_quant_scale", lambda old: old.astype(np.float32))),
    ("smoothing", AWQ, "vllm", f"{DOWN}.pre_quant_scale", lambda f: None),
    ("kv_tensors", KV, "vllm", "self_attn.k_scale", put(f"{K}.k_scale", None)),
    ("kv_tensors", KV, "vllm", f"{V}.v_scale", put(f"{V}.v_scale", full(0.01, 2))),
    ("kv_tensors", KV, "vllm", f"{K}.k_bias", put(f"{K}.k_bias", SMOOTH)),
    ("kv_tensors", KV, TRT, "self_attn.k_scale", lambda f: f.tensors.__setitem__("model.layers.0.self_attn.k_scale",
                                                                                 f.tensors.pop(f"{K}.k_scale"))),
    ("kv_tensors", KV, TRT, "k_scale, v_scale", lambda f: [f.tensors.pop(name) for name in list(f.tensors) if name.endswith(("k_scale",
                                                                                                                             "v_scale"))]),
    ("values", MO, "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", lambda old: np.float32(1) / old)),
    ("values", MO, "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", np.nan)),
    ("values", MO, "vllm", f"{DOWN}.input_scale", put(f"{DOWN}.input_scale", 0)),
    ("values", MO, "vllm", f"{Q}.input_scale", put(f"{Q}.input_scale", lambda old: np.float32(1) / old)),
    ("values", KV, "vllm", f"{K}.k_scale", put(f"{K}.k_scale", -1)),
    ("values", NV, "vllm", f"{DOWN}.weight_scale_2", put(f"{DOWN}.weight_scale_2", lambda old: np.float32(1) / old)),
    ("values", NV, "sglang", f"{O}.input_scale", put(f"{O}.input_scale", lambda old: np.float32(1) / old)),
    ("values", NV, "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", np.nan)),
    ("values", NV, "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", -1)),
    ("values", NV, "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", 0)),
    ("values", "nvfp4", "vllm", f"{DOWN}.weight_global_scale", put(f"{DOWN}.weight_global_scale", lambda old: 1 / old)),
    ("values", "nvfp4", "vllm", f"{Q}.input_global_scale", put(f"{Q}.input_global_scale", lambda old: 1 / old)),
    ("values", "mxfp8", "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", 255)),
    ("values", "mxfp4", "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", 254 - 100)),
    ("values", "native mxfp8", "sglang", f"{DOWN}.weight_scale_inv", put(f"{DOWN}.weight_scale_inv", lambda old: 254 - old)),
    ("values", "native fp8", "transformers", f"{DOWN}.weight_scale_inv", put(f"{DOWN}.weight_scale_inv", lambda old: 1 / old)),
    ("values", "int4", "vllm", f"{DOWN}.weight_shape", put(f"{DOWN}.weight_shape", np.array([256, 128]))),
    ("values", "int4", "vllm", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", np.inf)),
    ("values", "gptq", "vllm", f"{DOWN}.qzeros", put(f"{DOWN}.qzeros", np.int32(-2004318072))),
    ("values", "gptq", "vllm", f"{DOWN}.g_idx", put(f"{DOWN}.g_idx", lambda old: old[::-1])),
    ("values", AWQ, TRT, f"{O}.pre_quant_scale", put(f"{O}.pre_quant_scale", 0)),
    ("shared", NV, TRT, f"{K}.weight_scale_2", put(f"{K}.weight_scale_2", lambda old: old * np.float32(1.5))),
    ("shared", NV, "vllm", f"{UP}.input_scale", put(f"{UP}.input_scale", lambda old: np.nextafter(old, np.float32(1)))),
    ("shared", "nvfp4", "sglang", f"{V}.weight_global_scale", put(f"{V}.weight_global_scale", lambda old: old * np.float32(2))),
    ("shared", "fp8 tensor", "vllm", "experts.0.up_proj.input_scale", experts("input_scale")),
    ("shared", "W4A8_AWQ_BETA_CFG", TRT, f"{UP}.weight_scale_2", put(f"{UP}.weight_scale_2", lambda old: old * np.float32(1.5))),
]


@pytest.mark.parametrize(("rule", "name", "engine", "where", "change"), BROKEN, ids=[f"{row[0]}-{i}" for i, row in enumerate(BROKEN)])
def test_each_break_is_found_and_named(rule, name, engine, where, change, tmp_path):
    folder = base(name)
    change(folder)
    found = [finding for finding in errors(verify_checkpoint(folder.write(tmp_path / "out"), engine)) if finding.rule == rule]
    assert any(where in str(finding) for finding in found), found
    assert all(finding.remedy and finding.problem for finding in found)


def test_every_rule_is_broken_here():
    assert {rule.name for rule in RULES} == {row[0] for row in BROKEN}


def test_siblings_that_vllm_rounds_again_are_a_note_only():
    findings = verify_checkpoint(GOLDEN / MO, "vllm")
    assert {(finding.rule, finding.level) for finding in findings} == {("shared", "note")}


# Against the source, and from the command line -------------------------------------------------------------------------------

def test_error_of_the_dequantized_weights():
    fp8, nvfp4 = (dequantized_errors(GOLDEN / name, MODEL.source) for name in (MO, NV))
    assert len(fp8) == len(nvfp4) == 14 and f"{DOWN}.weight" in fp8
    assert 0.01 < min(fp8.values()) and max(fp8.values()) < 0.04 < min(nvfp4.values()) and max(nvfp4.values()) < 0.15


def test_command_line(tmp_path, capsys):
    assert main(["verify", str(GOLDEN / MO), "--engine", "vllm"]) == 0
    assert "0 errors, 6 notes" in capsys.readouterr().out
    assert main(["verify", str(GOLDEN / NV), "--engine", "sglang", "--source", str(MODEL.source), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engines"] == {"sglang": {"loads": True, "errors": 0, "findings": []}} and len(report["dequantized_errors"]) == 14
    folder = base(NV)
    put(f"{DOWN}.weight_scale", None)(folder)
    folder.write(tmp_path / "broken")
    assert main(["verify", str(tmp_path / "broken")]) == 1
    assert f"vllm: error: {DOWN}.weight_scale" in capsys.readouterr().out
    assert main(["verify", str(GOLDEN / MO), "--json"]) == 0        # of all engines, one loads it
    loads = {engine: found["loads"] for engine, found in json.loads(capsys.readouterr().out)["engines"].items()}
    assert loads == {"vllm": True, "sglang": True, "tensorrt-llm": True, "transformers": False}
    assert main(["verify", str(tmp_path / "broken"), "--engine", "vllm"]) == 1
    assert f"{DOWN}.weight_scale" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nowhere", "--engine", "vllm"], [".", "--engine", "llama.cpp"], ["."]])
def test_bad_use(arguments, capsys):
    assert main(["verify", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 1


def test_unknown_engine_names_the_known():
    with pytest.raises(ValueError, match=", ".join(ENGINES)):
        verify_checkpoint(GOLDEN / MO, "x")
