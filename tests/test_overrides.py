"""Configs as users change them: block sizes, axes, rules by layer, mixtures, files; and what is refused before any calibration."""
import copy
import json

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
import reference
from golden_data import read_safetensors
from modelq.config import load_config
from modelq.export import check_exportable, export_hf_checkpoint

F32 = np.float32
OFF = {"quantizer_name": "*", "enable": False}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def llama(golden):
    return golden["llama"]


def with_weights(preset, **changes):
    """The preset with some attributes of its weights changed, as the notebooks do it."""
    config = copy.deepcopy(getattr(mtq, preset))
    rule = mtq.find_quant_cfg_entry_by_path(config["quant_cfg"], "*weight_quantizer")
    rule["cfg"] = {**rule["cfg"], **changes}
    return config


def all_the_way(llama, config, out):
    """(model, exported tensors, what hf_quant_config.json says), after the export reopened computes the same numbers."""
    model = mtq.quantize(modelq.load(llama.source, compute="bfloat16"), config, lambda model: [model(row[None]) for row in llama.calib])
    export_hf_checkpoint(model, out)
    before, after = (np.asarray(m(llama.calib[:2]).logits) for m in (model, modelq.load(out, compute="bfloat16")))
    assert np.array_equal(before, after)
    return model, read_safetensors(out), json.loads((out / "hf_quant_config.json").read_text())["quantization"]


# Overrides -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [16, 32, 64])
def test_another_block_size_of_int4(llama, tmp_path, size):
    config = with_weights("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", block_sizes={-1: size, "type": "static"})
    _, tensors, said = all_the_way(llama, config, tmp_path / "out")
    assert said["group_size"] == size
    for role, part in reference.int4(read_safetensors(llama.source)[f"{UP}.weight"], size).items():
        assert tensors[f"{UP}.{role}"].tobytes() == part.tobytes()


def test_another_block_size_of_nvfp4(llama, tmp_path):
    config = with_weights("W4A16_NVFP4_CFG", block_sizes={-1: 32, "type": "dynamic", "scale_bits": (4, 3)})
    _, tensors, said = all_the_way(llama, config, tmp_path / "out")
    assert said["group_size"] == 32 and tensors[f"{UP}.weight_scale"].shape == (256, 4)


def test_another_axis(llama, tmp_path):
    """FP8 by row of the weight is a format only beside inputs by token."""
    config = with_weights("FP8_DEFAULT_CFG", axis=0)
    with pytest.raises(ValueError, match="cannot say fp8_channel weights with fp8 inputs"):
        check_exportable(llama.source, config)
    mtq.find_quant_cfg_entry_by_path(config["quant_cfg"], "*input_quantizer")["cfg"] = {"num_bits": "E4M3", "type": "dynamic",
                                                                                       "block_sizes": {-1: None}}
    _, tensors, said = all_the_way(llama, config, tmp_path / "out")
    assert said["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN" and tensors[f"{UP}.weight_scale"].shape == (256,)


def test_layers_by_wildcard(llama, tmp_path):
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": "*layers.0.*", "enable": False}, {"quantizer_name": "*[ou]_proj.*", "enable": False},
                            {"quantizer_name": "*layers.1.mlp.up_proj.[wi]*", "enable": True}]
    model, tensors, said = all_the_way(llama, config, tmp_path / "out")
    on = {name for name, quantizer in model.quantizers.items() if quantizer.enabled and name.endswith("weight_quantizer")}
    assert on == {f"model.layers.1.{module}.weight_quantizer" for module in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert said["exclude_modules"] == ["lm_head", "model.embed_tokens", "model.layers.0*", "model.layers.1.self_attn.o_proj"]


def test_outputs_that_no_checkpoint_holds_are_said(llama, tmp_path):
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": "*up_proj.output_quantizer", "cfg": {"num_bits": (4, 3)}})
    model = mtq.quantize(modelq.load(llama.source), config, lambda model: model(llama.calib[:1]))
    with pytest.warns(UserWarning, match="up_proj.output_quantizer and 1 more: a checkpoint has no place for the quantization of outputs"):
        export_hf_checkpoint(model, tmp_path / "out")


def test_formats_mixed_by_rule(llama, tmp_path):
    """FP8 in attention with its cache, NVFP4 in one MLP and INT4 in the other: every part keeps its own words and its own bytes."""
    nvfp4, fp8 = mtq.NVFP4_DEFAULT_CFG["quant_cfg"][1]["cfg"], {"num_bits": (4, 3)}
    int4 = {"num_bits": 4, "block_sizes": {-1: 128}}
    rules = [(f"*self_attn*_proj.{side}_quantizer", fp8) for side in ("weight", "input")]
    rules += [(f"*layers.0.mlp*{side}_quantizer", nvfp4) for side in ("weight", "input")] + [("*layers.1.mlp*weight_quantizer", int4)]
    config = {"quant_cfg": [OFF] + [{"quantizer_name": name, "cfg": cfg} for name, cfg in rules], "algorithm": "max"}
    config = mtq.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    _, tensors, said = all_the_way(llama, config, tmp_path / "out")
    assert said["quant_algo"] == "MIXED_PRECISION" and said["kv_cache_quant_algo"] == "FP8" and "exclude_modules" not in said
    words = {module: entry["quant_algo"] for module, entry in said["quantized_layers"].items()}
    assert list(words)[:7] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"] + [f"model.layers.0.mlp.{p}_proj" for p in (
        "gate", "up", "down")]
    assert words[UP] == "NVFP4" and words["model.layers.1.mlp.up_proj"] == "W4A16_AWQ" and words["model.layers.1.self_attn.q_proj"] == "FP8"
    weight = read_safetensors(llama.source)["model.layers.1.mlp.up_proj.weight"]
    assert tensors["model.layers.1.mlp.up_proj.weight"].tobytes() == reference.int4(weight)["weight"].tobytes()


# Files -----------------------------------------------------------------------------------------------------------------------

YAML = """
quant_cfg:
  - {quantizer_name: "*", enable: false}
  - quantizer_name: "*weight_quantizer"
    cfg: {num_bits: [2, 1], block_sizes: {-1: 16, type: dynamic, scale_bits: [4, 3]}}
  - quantizer_name: "*[kv]_bmm_quantizer"
    cfg: {num_bits: E4M3}
  - {quantizer_name: "*lm_head*", enable: false}
  - {parent_class: nn.Embedding, quantizer_name: "*", enable: false}
algorithm: max
"""
JSON = {"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {
    "num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}},
    {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": "E4M3"}}, {"quantizer_name": "*lm_head*", "enable": False},
    {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False}], "algorithm": "max"}


def test_configs_from_files(llama, tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    (tmp_path / "config.json").write_text(json.dumps(JSON))
    expected = mtq.update_quant_cfg_with_kv_cache_quant(mtq.W4A16_NVFP4_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    wanted = {name: t.tobytes() for name, t in all_the_way(llama, expected, tmp_path / "preset")[1].items()}
    for file in ("config.yaml", "config.json"):
        _, tensors, _ = all_the_way(llama, load_config(tmp_path / file), tmp_path / file.replace(".", "-"))
        assert {name: t.tobytes() for name, t in tensors.items()} == wanted


# Refused before calibration --------------------------------------------------------------------------------------------------

def refused(source, config, words, **more):
    with pytest.raises(ValueError, match=words):
        check_exportable(source, config, **more)


def test_a_block_that_does_not_divide_a_layer(smollm2):
    """576 columns: the reference fails so after its calibration."""
    refused(smollm2, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
            r"model.layers.0.self_attn.q_proj.weight_quantizer: 576 columns with block 128: use block_size 64 or 192, or leave it in high precision")
    assert check_exportable(smollm2, with_weights("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", block_sizes={-1: 64})) == "modelopt"


@pytest.mark.parametrize("config, words", [
    ({"quant_cfg": [OFF]}, "quantizes nothing"),
    (mtq.MXFP6_DEFAULT_CFG, "q_proj: the modelopt dialect cannot say mxfp6 weights with mxfp6 inputs; it can say fp8 weights with fp8"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3)}}]}, "cannot say fp8 weights with unquantized inputs"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 5, "axis": 0}}]}, "num_bits 5 .* is no known scheme"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*up_proj.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}},
                    {"quantizer_name": "*gate_proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}]},
     "gate_proj: int8, model.layers.0.mlp.up_proj: int4: they read one input and engines fuse them"),
    ({"quant_cfg": mtq.FP8_DEFAULT_CFG["quant_cfg"] + [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}}]},
     "no checkpoint can say a cache"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}]}]},
     "int4 then fp8 with unquantized inputs is no format of the modelopt dialect"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}},
                    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": (4, 3)}}]}, "int4 with fp8 inputs is no format.*W4A8_AWQ_BETA_CFG"),
])
def test_what_no_checkpoint_can_say(llama, config, words):
    refused(llama.source, config, words)


def test_checking_reads_no_weight_and_changes_nothing(llama):
    model = modelq.load(llama.source, compute="bfloat16")
    model.checkpoint.read = None
    assert check_exportable(model, mtq.W4A8_AWQ_BETA_CFG) == "modelopt"
    assert not model.quantized and model.quantizers == {}


@pytest.mark.parametrize("preset, dialect, words", [
    ("W4A8_NVFP4_FP8_CFG", "compressed-tensors", "the compressed-tensors dialect cannot say nvfp4_w4a8 weights with fp8 inputs"),
    ("FP8_DEFAULT_CFG", "gptq", "the gptq dialect cannot say fp8 weights"), ("FP8_DEFAULT_CFG", "ggml", "dialect 'ggml'")])
def test_the_wanted_dialect_is_asked(llama, preset, dialect, words):
    refused(llama.source, getattr(mtq, preset), words, dialect=dialect)


def test_every_preset_with_a_word_is_exportable(llama):
    """AWQ and SmoothQuant too, whose scales are not known yet."""
    for name in ("INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "NVFP4_AWQ_LITE_CFG", "W4A8_AWQ_BETA_CFG", "MXFP4_DEFAULT_CFG"):
        assert check_exportable(llama.source, getattr(mtq, name)) == "modelopt"


def test_pairs_of_rows(golden, tmp_path):
    """INT4 packs two rows in a byte: an odd vocabulary cannot be packed, and is refused in time."""
    import shutil
    from safetensors.numpy import save_file

    folder = tmp_path / "odd"
    shutil.copytree(golden["llama"].source, folder)
    tensors = read_safetensors(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:255]
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), "vocab_size": 255}))
    config = {"quant_cfg": [OFF, {"quantizer_name": "lm_head.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}}]}
    refused(folder, config, "lm_head: 255 rows: int4 packs rows in pairs")


def test_the_command_line_asks_before_it_calibrates(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from modelq import cli, quantization

    monkeypatch.setattr(quantization, "quantize", None)     # never reached
    assert cli.main(["quantize", str(tiny_checkpoint), "--format", "MXFP6_DEFAULT_CFG", "--out", str(tmp_path / "out")]) == 2
    assert "cannot say mxfp6 weights" in capsys.readouterr().err
    assert cli.main(["quantize", str(tiny_checkpoint), "--format", "W4A8_NVFP4_FP8_CFG", "--dialect", "compressed-tensors", "--out",
                     str(tmp_path / "out")]) == 2
    assert "compressed-tensors dialect cannot say nvfp4_w4a8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
