"""quant_method fp8 with activation_scheme static, in both spellings (vLLM's, transformers'): opened as the quantized model that it is, with the
numbers and bytes of Model Optimizer's dialect. (Its logits by compressed-tensors: torch_models/test_static_fp8_sources.py.)"""
import json
import shutil
import warnings

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import read_safetensors, write_safetensors
from modelq.checkpoint import open_checkpoint
from modelq.export import convert_checkpoint, export_hf_checkpoint
from test_convert import same_folder

F32, BF16 = np.float32, ml_dtypes.bfloat16
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
SPELLINGS = {"vllm": {}, "transformers": {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}}


@pytest.fixture(scope="module", params=["llama", "qwen3moe"])
def export(request, golden, tmp_path_factory):
    """(the golden model, its FP8 export in Model Optimizer's dialect)."""
    case = golden[request.param]
    model = mtq.quantize(modelq.load(case.source, compute="float32"), mtq.FP8_DEFAULT_CFG, lambda model: model(case.calib[:2]))
    return case, export_hf_checkpoint(model, export_dir=tmp_path_factory.mktemp("export") / "modelopt")


def respelled(export, folder, spelling="vllm", change=lambda tensors: tensors, shape=(1,), **config):
    """The same numbers in the way of one of SPELLINGS."""
    shutil.copytree(export, folder)
    (folder / "hf_quant_config.json").unlink()
    said, tensors = json.loads((folder / "config.json").read_text()), {}
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": STATIC | config}))
    for name, array in read_safetensors(export).items():
        module, _, role = name.rpartition(".")
        tensors[f"{module}.{SPELLINGS[spelling].get(role, role)}"] = array.reshape(shape) if role.endswith("scale") else array
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_safetensors(folder / "model.safetensors", change(tensors))
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_computes_what_the_quantized_model_does(export, spelling, tmp_path):
    case, modelopt = export
    folder = respelled(modelopt, tmp_path / "static", spelling, shape=(1,) if spelling == "vllm" else ())
    logits, wanted = (np.asarray(modelq.load(path, compute="float32")(case.calib[:2]).logits) for path in (folder, modelopt))
    np.testing.assert_array_equal(logits, wanted)
    model = modelq.load(folder, compute="float32")
    with model.simulating(weights=True, activations=False):
        assert np.abs(np.asarray(model(case.calib[:2]).logits) - wanted).max() > 1e-4
    linear = next(name for name in model.checkpoint.layers if name.endswith("o_proj"))
    stored = read_safetensors(modelopt)
    assert model.quantizers[f"{linear}.input_quantizer"].amax == pytest.approx(448 * stored[f"{linear}.input_scale"].item(), rel=1e-6)
    assert model.quantizers[f"{linear}.input_quantizer"].enabled


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_conversion_keeps_every_byte(export, spelling, tmp_path):
    _, modelopt = export
    folder = respelled(modelopt, tmp_path / "static", spelling)
    back = convert_checkpoint(folder, tmp_path / "modelopt", dialect="modelopt")
    same_folder(back, modelopt)
    direct = convert_checkpoint(modelopt, tmp_path / "direct", dialect="compressed-tensors")
    same_folder(convert_checkpoint(folder, tmp_path / "ct", dialect="compressed-tensors"), direct)
    same_folder(convert_checkpoint(folder, tmp_path / "vllm", engine="vllm"), convert_checkpoint(modelopt, tmp_path / "v", engine="vllm"))


def test_scales_in_bfloat16_and_a_cache_that_is_not_simulated(export, tmp_path):
    """As Mistral's are, and AutoFP8's old word for a cache's scale."""
    case, modelopt = export

    def change(tensors):
        tensors = {name: array.astype(BF16) if name.endswith(("weight_scale_inv", "activation_scale")) else array
                   for name, array in tensors.items()}
        return tensors | {"model.layers.0.self_attn.kv_scale": np.ones(1, F32), "model.layers.1.self_attn.k_scale": np.ones(1, F32)}
    folder = respelled(modelopt, tmp_path / "static", "transformers", change, weight_block_size=None, dequantize=False)
    with pytest.warns(UserWarning, match="the KV cache's 2 scales are not simulated"):
        model = modelq.load(folder, compute="float32")
    assert not [name for name in model.checkpoint.tensors if name.endswith("_scale")]
    stored = read_safetensors(folder)
    for linear in model.checkpoint.layers:
        scale = stored[f"{linear}.weight_scale_inv"].astype(F32)
        weight = (stored[f"{linear}.weight"].astype(F32) * scale).astype(BF16)
        assert model.checkpoint.read(f"{linear}.weight").tobytes() == weight.tobytes()
        assert model.checkpoint.input_amax(linear) == 448 * stored[f"{linear}.activation_scale"].astype(F32).item()
    assert np.isfinite(np.asarray(model(case.calib[:1]).logits)).all()


def test_it_is_quantized_anew_as_what_it_stands_for(export, tmp_path):
    case, modelopt = export
    folder = respelled(modelopt, tmp_path / "static")
    written = []
    for name, path in (("a", folder), ("b", modelopt)):
        with pytest.warns(UserWarning, match="stored quantized .*: what they stand for is quantized anew"):
            model = mtq.quantize(modelq.load(path), mtq.NVFP4_DEFAULT_CFG, lambda model: model(case.calib[:1]))
        written.append(export_hf_checkpoint(model, export_dir=tmp_path / name))
    same_folder(*written)


def without(suffix):
    return lambda tensors: {name: array for name, array in tensors.items() if name != f"{first(tensors)}.{suffix}"}


def first(tensors):
    return next(name for name in sorted(tensors) if name.endswith("q_proj.weight")).removesuffix(".weight")


def by_rows(tensors):
    name = f"{first(tensors)}.weight"
    scales = np.full((len(tensors[name]), 1), tensors[f"{first(tensors)}.weight_scale"].item(), F32)
    return tensors | {f"{first(tensors)}.weight_scale": scales}


@pytest.mark.parametrize("change, config", [
    (without("input_scale"), {}), (by_rows, {}), (lambda tensors: tensors, {"activation_scheme": "dynamic"})])
def test_others_are_sources_and_that_is_said(export, change, config, tmp_path):
    """One linear without its input's scale, or with a scale for each row; or inputs that are not static at all."""
    case, modelopt = export
    folder = respelled(modelopt, tmp_path / "static", change=change, **config)
    with pytest.warns(UserWarning, match="how inputs are quantized is not simulated: weights are read, and inputs stay as they are"):
        model = modelq.load(folder, compute="float32")
    assert model.checkpoint.is_source and not model.stored_layers
    exact = modelq.load(modelopt, compute="float32")
    with exact.simulating(weights=True, activations=False):
        np.testing.assert_array_equal(np.asarray(model(case.calib[:1]).logits), np.asarray(exact(case.calib[:1]).logits))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not a quantized checkpoint of an export's layout: quantize it"):
        convert_checkpoint(folder, tmp_path / "out", dialect="modelopt")


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_named(export, wrong, tmp_path):
    _, modelopt = export
    folder = respelled(modelopt, tmp_path / "static", change=lambda tensors: tensors | {f"{first(tensors)}.input_scale": np.full(1, wrong, F32)})
    with pytest.raises(ValueError, match=rf"q_proj.input_scale' is {wrong}, not a positive number"):
        modelq.load(folder)


def test_an_unsaid_folder_has_no_warning_without_scales_of_inputs(export, tmp_path):
    _, modelopt = export
    folder = respelled(modelopt, tmp_path / "plain", activation_scheme="dynamic", change=lambda tensors: {
        name: array for name, array in tensors.items() if not name.endswith("input_scale")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(folder).is_source
