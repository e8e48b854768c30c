"""Conversions between dialects: the bytes of a direct export, and refusals where something would be lost."""
import json

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import cases, read_safetensors
from modelq.checkpoint import open_checkpoint
from modelq.cli import main
from modelq.export import convert_checkpoint, export_hf_checkpoint
from test_dialects import FORMATS, exported, llama, quantized, said  # noqa: F401  (fixtures)

BETWEEN = [("modelopt", "compressed-tensors", name) for name in ("fp8", "fp8-channel", "fp8-block", "int8", "int8-weight", "int4", "nvfp4",
                                                                 "nvfp4-weight", "mxfp4", "mxfp4-weight", "mxfp8", "mixed")]
BETWEEN += [("modelopt", "autoawq", "int4"), ("modelopt", "gptq", "int4"), ("modelopt", "fp8", "fp8-block"), ("modelopt", "fp8", "mxfp8"),
            ("compressed-tensors", "fp8", "fp8-block"), ("compressed-tensors", "autoawq", "int4"), ("autoawq", "gptq", "int4")]


def same_folder(ours, expected):
    a, b = read_safetensors(ours), read_safetensors(expected)
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name
    assert json.loads((ours / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert {path.name for path in ours.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.mark.parametrize("source, target, name", BETWEEN)
def test_a_conversion_is_what_a_direct_export_is(source, target, name, exported, tmp_path):  # noqa: F811
    folder = convert_checkpoint(exported(source, name), tmp_path / "out", dialect=target)
    assert folder == tmp_path / "out"
    same_folder(folder, exported(target, name))


@pytest.mark.parametrize("source, target, name", [between for between in BETWEEN if between[1] not in ("autoawq", "gptq")])
def test_and_back(source, target, name, exported, tmp_path):  # noqa: F811
    """Reciprocal scales too come back as the bytes that they were."""
    back = convert_checkpoint(exported(target, name), tmp_path / "back", dialect=source)
    same_folder(back, exported(source, name))


def test_scales_of_awq_come_back_as_the_layout_held_them(exported, tmp_path):  # noqa: F811
    back = read_safetensors(convert_checkpoint(exported("autoawq", "int4"), tmp_path / "back", dialect="modelopt"))
    before = read_safetensors(exported("modelopt", "int4"))
    for name, tensor in before.items():
        expected = tensor.astype(np.float16).astype(np.float32) if name.endswith("weight_scale") else tensor
        assert back[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("source, target, name, words", [
    ("compressed-tensors", "modelopt", "int8-token", "q_proj: the modelopt dialect cannot say int8 weights with int8_token inputs"),
    ("modelopt", "gptq", "nvfp4", "q_proj: the gptq dialect cannot say nvfp4 weights with nvfp4 inputs; it can say int4 weights"),
    ("modelopt", "autoawq", "mixed", "the autoawq dialect cannot say"),
    ("modelopt", "ggml", "int4", "unknown dialect 'ggml'; known are modelopt, compressed-tensors"),
])
def test_what_would_be_lost_is_refused_by_name(source, target, name, words, exported, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(exported(source, name), tmp_path / "out", dialect=target)
    assert not list(tmp_path.iterdir())


def test_an_unquantized_folder_is_refused(llama, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="source: not a quantized checkpoint"):
        convert_checkpoint(llama.source, tmp_path / "out", dialect="modelopt")


# The reference's own exports ---------------------------------------------------------------------------------------------------

REFERENCE = [case for case in cases(dtype="bfloat16", needs=["model.safetensors", "config.json"])]


@pytest.mark.parametrize("case", REFERENCE)
def test_golden_exports_open_and_convert_where_nothing_is_lost(case, tmp_path):
    """Every export of the reference opens; compressed-tensors holds the same weights, unless there is smoothing or a cache it cannot say."""
    with open_checkpoint(case.folder) as before:
        layers = dict(before.layers)
        lossy = any(layer.form.smoothed or layer.form.fp8_stage for layer in layers.values())
        cache = before.cache is not None and (before.cache.scheme != "fp8" or bool(before.cache.biases))
        if lossy or cache:
            with pytest.raises(ValueError, match="no place for|KV cache"):
                convert_checkpoint(case.folder, tmp_path / "out", dialect="compressed-tensors")
            return
        convert_checkpoint(case.folder, tmp_path / "out", dialect="compressed-tensors")
        with open_checkpoint(tmp_path / "out") as after:
            assert set(after.layers) == set(layers) and set(after.tensors) == set(before.tensors)
            for name in after.tensors:
                assert after.read(name).tobytes() == before.read(name).tobytes(), name
            for module in layers:
                assert after.input_amax(module) == before.input_amax(module)
    convert_checkpoint(tmp_path / "out", tmp_path / "back", dialect="modelopt")
    back = read_safetensors(tmp_path / "back")
    assert set(back) == set(case.exported)
    for name, tensor in case.exported.items():
        assert back[name].tobytes() == tensor.tobytes(), name
    assert said(tmp_path / "back") | {"producer": 0} == said(case.folder) | {"producer": 0}


@pytest.mark.parametrize("case", [case for case in REFERENCE if case.values[0].config in ("INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG")])
def test_smoothed_golden_exports_compute(case):
    """pre_quant_scale sits on the input quantizers again: without it the logits would be far off."""
    model = modelq.load(case.folder, compute="bfloat16")
    name = next(f"{module}.input_quantizer" for module, layer in model.stored_layers.items() if layer.form.smoothed)
    stored = case.exported[f"{name.removesuffix('.input_quantizer')}.pre_quant_scale"].astype(np.float32)
    assert np.array_equal(model.quantizers[name].pre_quant_scale, stored)
    logits, plain = np.asarray(model(case.model.calib[:1]).logits), case.model.logits
    assert np.abs(logits - plain).mean() < 0.6 * np.abs(plain).mean()
    for quantizer in model.quantizers.values():
        quantizer.pre_quant_scale = None
    model.connect()
    assert np.abs(np.asarray(model(case.model.calib[:1]).logits) - plain).mean() > 1.4 * np.abs(logits - plain).mean()


# DeepSeek's kind of source -----------------------------------------------------------------------------------------------------

def test_a_native_fp8_source_is_dequantized_on_read_and_quantized_again(exported, llama, tmp_path):  # noqa: F811
    source = exported("fp8", "fp8-block")
    model = modelq.load(source, compute="bfloat16")
    mtq.quantize(model, FORMATS["nvfp4"], lambda model: model(llama.calib[:2]))
    assert any(quantizer.enabled for quantizer in model.quantizers.values())
    export_hf_checkpoint(model, tmp_path / "out")
    assert said(tmp_path / "out")["quant_algo"] == "NVFP4"
    module = "model.layers.0.mlp.down_proj"
    with open_checkpoint(source) as fp8, open_checkpoint(tmp_path / "out") as nvfp4:
        was, now = (checkpoint.read(f"{module}.weight").astype(np.float32) for checkpoint in (fp8, nvfp4))
        assert fp8.read(f"{module}.weight").dtype == ml_dtypes.bfloat16
    assert np.abs(now - was).mean() < 0.15 * np.abs(was).mean()


# The command -------------------------------------------------------------------------------------------------------------------

def test_command(exported, tmp_path, capsys):  # noqa: F811
    source = exported("modelopt", "int4")
    assert main(["convert", str(source), "--dialect", "gptq", "--out", str(tmp_path / "gptq")]) == 0
    same_folder(tmp_path / "gptq", exported("gptq", "int4"))
    assert main(["convert", str(source), "--engine", "vllm", "--out", str(tmp_path / "vllm"), "--json"]) == 0
    assert said(tmp_path / "vllm")["quant_method"] == "compressed-tensors"
    capsys.readouterr()
    for arguments, words in ((["--out", str(tmp_path / "x")], "a Hugging Face folder already"),
                             (["--engine", "llama.cpp", "--out", str(tmp_path / "x")], "invalid choice: 'llama.cpp'"),
                             (["--dialect", "gptq", "--out", str(tmp_path / "gptq")], "overwrite")):
        assert main(["convert", str(source), *arguments]) == 2
        assert words in capsys.readouterr().err
