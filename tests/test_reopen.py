"""Reading quantized exports: golden folders of the reference and our own, and what is refused."""
import json
import shutil

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import cases, read_safetensors, write_safetensors
from modelq import _core
from modelq.checkpoint import dialects, open_checkpoint
from modelq.export import export_hf_checkpoint

CONFIGS = ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"]
GOLDEN = cases(dtype="bfloat16", configs=CONFIGS, names=["llama", "qwen3"], needs=["model.safetensors", "config.json"])
LINEAR = "model.layers.0.mlp.up_proj"


def dequantized(tensors, module):
    """What the stored parts stand for, in float32, by ml_dtypes and NumPy alone."""
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"].astype(np.float32)
    if weight.dtype != np.uint8:
        return weight.astype(np.float32) * scale
    codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(weight.shape[0], -1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values * np.repeat(scale * tensors[f"{module}.weight_scale_2"], 16, axis=1)


@pytest.mark.parametrize("case", GOLDEN)
def test_packed_weights_read_as_what_they_stand_for(case):
    with open_checkpoint(case.folder) as checkpoint, open_checkpoint(case.model.source) as source:
        assert set(checkpoint.tensors) == set(source.tensors)
        assert len(checkpoint.layers) == 14
        for name, info in source.tensors.items():
            ours = checkpoint.read(name)
            assert (ours.dtype.name, ours.shape) == ("bfloat16", info.shape)
            assert (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape) == ("bfloat16", info.shape)
            module = name.removesuffix(".weight")
            if module in checkpoint.layers:
                expected = dequantized(case.exported, module).astype(ml_dtypes.bfloat16)
            else:
                expected = source.read(name)
            assert ours.tobytes() == expected.tobytes(), name
        checkpoint.release([f"{LINEAR}.weight", "model.norm.weight"])
        checkpoint.release()


@pytest.mark.parametrize("case", cases(dtype="bfloat16", configs=CONFIGS, names=["llama", "qwen3"], needs=["model.safetensors", "amax.safetensors"]))
def test_input_scales_read_as_the_calibrated_maxima(case):
    with open_checkpoint(case.folder) as checkpoint:
        for module in checkpoint.layers:
            assert checkpoint.input_amax(module) == float(case.amax[f"{module}.input_quantizer.amax"])


def test_config_of_a_reopened_export_is_the_models(tmp_path):
    case = GOLDEN[0].values[0]
    with open_checkpoint(case.folder) as checkpoint, open_checkpoint(case.model.source) as source:
        assert checkpoint.config == source.config
        assert checkpoint.quantization["quant_algo"] == "FP8"


# Running ---------------------------------------------------------------------------------------------------------------------

def quantized(case):
    model = modelq.load(case.model.source, compute="bfloat16")
    return mtq.quantize(model, getattr(mtq, case.config), lambda model: [model(row[None]) for row in case.model.calib])


@pytest.mark.parametrize("case", GOLDEN)
def test_a_reopened_export_computes_what_the_quantized_model_computed(case, tmp_path):
    """Not only close: the weights it dequantizes are the very numbers of the simulation, in siblings' shared scales too."""
    model = quantized(case)
    export_hf_checkpoint(model, tmp_path / "out")
    before, after = (np.asarray(m(case.model.calib[:2]).logits) for m in (model, modelq.load(tmp_path / "out", compute="bfloat16")))
    assert np.abs(before).max() > 1
    assert np.array_equal(before, after)


@pytest.mark.parametrize("case", cases(dtype="bfloat16", configs=["FP8_DEFAULT_CFG"], needs=["model.safetensors", "fake_logits.npy"]))
def test_the_references_export_computes_what_the_reference_simulated(case):
    """In FP8, where the reference can simulate on a CPU: no further off than twice what its own two simulations (of the bfloat16 and
    of the float32 model) are from each other. Random weights make that loose, but a scale missed or misplaced is far outside."""
    logits = np.asarray(modelq.load(case.folder, compute="bfloat16")(case.model.calib[:1]).logits)
    other = np.load(case.model.folder / "float32" / case.config / "fake_logits.npy")
    assert np.abs(logits - case.fake_logits).mean() < 2 * np.abs(other - case.fake_logits).mean()


def test_a_reopened_export_is_not_exported_again(tmp_path):
    model = modelq.load(of("NVFP4_DEFAULT_CFG").folder)
    with pytest.raises(ValueError, match="opened from a quantized export.*copy that folder"):
        export_hf_checkpoint(model, tmp_path / "out")


# Damaged exports -------------------------------------------------------------------------------------------------------------

def write_folder(folder, case, tensors, edit_config=None, nested=False):
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((case.folder / "config.json").read_text())
    if nested:
        del config["quantization_config"]
        shutil.copy(case.folder / "hf_quant_config.json", folder)
    if edit_config:
        edit_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of(config, model="llama"):
    return next(param.values[0] for param in GOLDEN if param.values[0].config == config and param.values[0].model.name == model)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_nested_file_alone_is_enough(tmp_path, config):
    case = of(config)
    with open_checkpoint(write_folder(tmp_path / "m", case, case.exported, nested=True)) as checkpoint:
        assert checkpoint.read(f"{LINEAR}.weight").tobytes() == dequantized(case.exported, LINEAR).astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("config, missing", [("FP8_DEFAULT_CFG", "weight_scale"), ("FP8_DEFAULT_CFG", "input_scale"),
                                             ("NVFP4_DEFAULT_CFG", "weight_scale"), ("NVFP4_DEFAULT_CFG", "weight_scale_2"),
                                             ("NVFP4_DEFAULT_CFG", "input_scale")])
def test_a_missing_scale_is_named(tmp_path, config, missing):
    case = of(config)
    tensors = {name: tensor for name, tensor in case.exported.items() if name != f"{LINEAR}.{missing}"}
    with pytest.raises(ValueError, match=rf"tensor '{LINEAR}.{missing}' is missing.*export the model again"):
        open_checkpoint(write_folder(tmp_path / "m", case, tensors))


@pytest.mark.parametrize("config, part, spoil", [
    ("FP8_DEFAULT_CFG", "weight_scale", lambda t: np.ones(3, np.float32)),
    ("FP8_DEFAULT_CFG", "weight_scale", lambda t: t.astype(ml_dtypes.bfloat16)),
    ("NVFP4_DEFAULT_CFG", "weight_scale", lambda t: t[:, :-1]),
    ("NVFP4_DEFAULT_CFG", "weight_scale", lambda t: t.view(np.uint8)),
    ("NVFP4_DEFAULT_CFG", "weight_scale_2", lambda t: np.ones((2, 2), np.float32)),
    ("NVFP4_DEFAULT_CFG", "weight", lambda t: t.view(ml_dtypes.float8_e4m3fn)),
])
def test_a_wrong_part_is_named(tmp_path, config, part, spoil):
    case = of(config)
    tensors = case.exported | {f"{LINEAR}.{part}": np.ascontiguousarray(spoil(case.exported[f"{LINEAR}.{part}"]))}
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor '{LINEAR}.{part}' is .*needs .*export the model again"):
        open_checkpoint(write_folder(tmp_path / "m", case, tensors))


def unknown_algorithm(config):
    config["quantization_config"]["quant_algo"] = "FP3_MAGIC"


def other_method(config):
    config["quantization_config"]["quant_method"] = "bitsandbytes"


def mixed_without_layers(config):
    config["quantization_config"]["quant_algo"] = "MIXED_PRECISION"


def layers_of_another_type(config):
    config["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": ["model.layers.0"]}


def algorithm_of_another_type(config):
    config["quantization_config"]["quant_algo"] = ["FP8"]


def no_size(config):
    config["quantization_config"]["group_size"] = "16"


def no_object(config):
    config["quantization_config"] = "fp8"


@pytest.mark.parametrize("edit, words", [
    (unknown_algorithm, r"'FP3_MAGIC', which modelq does not read; it reads FP8, .*NVFP4"),
    (other_method, r"config.json: the weights are quantized by 'bitsandbytes'.*reads: modelopt, compressed-tensors, awq"),
    (mixed_without_layers, "MIXED_PRECISION without quantized_layers"),
    (layers_of_another_type, "config.json: quantized_layers must map"),
    (algorithm_of_another_type, "config.json: quant_algo must be a name"),
    (no_size, "config.json: group_size must be a positive integer, found '16'"),
    (no_object, "config.json: the weights are quantized by 'fp8'"),
])
def test_configs_that_are_not_understood_are_refused(tmp_path, edit, words):
    case = of("FP8_DEFAULT_CFG")
    with pytest.raises(ValueError, match=words):
        open_checkpoint(write_folder(tmp_path / "m", case, case.exported, edit))


def test_a_config_that_promises_more_than_there_is(tmp_path):
    case = of("FP8_DEFAULT_CFG")
    with pytest.raises(ValueError, match="the config says FP8, but no layer is stored quantized"):
        open_checkpoint(write_folder(tmp_path / "m", case, read_safetensors(case.model.source)))


def test_a_scale_that_cannot_be(tmp_path):
    case = of("FP8_DEFAULT_CFG")
    tensors = case.exported | {f"{LINEAR}.input_scale": np.float32(np.nan).reshape(())}
    with open_checkpoint(write_folder(tmp_path / "m", case, tensors)) as checkpoint:
        with pytest.raises(ValueError, match=f"model.safetensors: tensor '{LINEAR}.input_scale' is nan"):
            checkpoint.input_amax(LINEAR)


def test_smoothing_is_read_and_other_additions_are_refused(tmp_path):
    case = of("NVFP4_DEFAULT_CFG")
    tensors = case.exported | {f"{LINEAR}.pre_quant_scale": np.full(128, 0.5, ml_dtypes.bfloat16)}
    with open_checkpoint(write_folder(tmp_path / "m", case, tensors)) as checkpoint:
        assert checkpoint.pre_quant_scale(LINEAR).tolist() == [0.5] * 128
    tensors = case.exported | {f"{LINEAR}.svdquant_lora_a": np.ones((4, 128), ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match=f"{LINEAR} is NVFP4 and has svdquant_lora_a"):
        open_checkpoint(write_folder(tmp_path / "n", case, tensors))


def test_scales_of_a_quantized_cache_are_not_mistaken_for_weights(tmp_path):
    case = of("FP8_DEFAULT_CFG")
    tensors = case.exported | {"model.layers.0.self_attn.k_proj.k_scale": np.float32(0.1).reshape(())}
    with pytest.warns(UserWarning, match="KV cache's 1 scales are not simulated"):
        checkpoint = open_checkpoint(write_folder(tmp_path / "m", case, tensors))
    assert "model.layers.0.self_attn.k_proj.k_scale" not in checkpoint.tensors


@pytest.mark.parametrize("case", cases(dtype="bfloat16", names=["llama", "qwen3"], needs=["model.safetensors", "hf_quant_config.json"]))
def test_layouts_are_those_of_golden_exports(case):
    """What the plan of an export expects each scheme to give, and what _core.quantize gives, against every golden checkpoint."""
    said = json.loads((case.folder / "hf_quant_config.json").read_text())["quantization"]
    checked = 0
    for name, weight in read_safetensors(case.model.source).items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in case.exported:
            continue
        pair = dialects.pairs("modelopt")[said.get("quantized_layers", {module: said})[module]["quant_algo"]]
        for role, (dtype, shape) in dialects.layout(pair.weight, weight.shape).items():
            for found in (case.exported[f"{module}.{role}"], _core.quantize(weight, pair.weight)[role]):
                assert (found.dtype.name, found.shape) == (dtype, shape), (module, role)
        stored = f"{module}.input_scale" in case.exported
        assert stored == (pair.input is not None and not dialects.is_dynamic_input(pair))
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scales_of_smoothed_linears_have_the_dtype_of_the_export(golden, tmp_path, dtype):
    """Whatever the weights were read as: GGUF files give float32."""
    llama = golden["llama"]
    model = modelq.load(llama.source, compute="bfloat16")
    mtq.quantize(model, mtq.INT4_AWQ_CFG, lambda model: model(llama.calib))
    export_hf_checkpoint(model, tmp_path, dtype=dtype)
    scales = {name: tensor for name, tensor in read_safetensors(tmp_path).items() if name.endswith("pre_quant_scale")}
    assert scales and {scale.dtype.name for scale in scales.values()} == {dtype}
    simulated, reopened = model(llama.calib[:1]).logits, modelq.load(tmp_path, compute="bfloat16")(llama.calib[:1]).logits
    assert np.abs(reopened - simulated).max() <= (0 if dtype == "bfloat16" else 0.02) * np.abs(simulated).max()
