"""Weights as they should not be, and as they may be: damaged, all zero, tiny, huge, of other dtypes, quantized before, tied, missing."""
import json
import shutil
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import modelq
import modelq.quantization as mtq
import reference
from golden_data import read_safetensors
from modelq.export import check_exportable, export_hf_checkpoint

F32, BF16, FP8 = np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
LINEAR = "model.layers.1.mlp.down_proj"
PRESETS = ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG",
           "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG", "W4A8_NVFP4_FP8_CFG", "MXFP8_DEFAULT_CFG",
           "MXFP4_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG"]
Source = namedtuple("Source", "folder tensors calib")


@pytest.fixture
def source(golden, tmp_path):
    """A copy of golden llama whose tensors may be changed: save(source)."""
    folder = tmp_path / "source"
    shutil.copytree(golden["llama"].source, folder)
    return Source(folder, read_safetensors(folder), golden["llama"].calib)


def save(source, dtype=None):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in source.tensors.items()}, source.folder / "model.safetensors")
    if dtype:
        config = json.loads((source.folder / "config.json").read_text())
        (source.folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return modelq.load(source.folder, compute="bfloat16")


def quantize(model, name, calib):
    return mtq.quantize(model, getattr(mtq, name), lambda model: [model(row[None]) for row in calib])


def changed(source, name, change):
    tensor = source.tensors[name].copy()
    change(tensor)
    source.tensors[name] = tensor


def goes_all_the_way(model, source, out):
    """The export, reopened, computes what the model computes, and it is finite."""
    export_hf_checkpoint(model, out)
    before, after = (np.asarray(m(source.calib[:1]).logits) for m in (model, modelq.load(out, compute="bfloat16")))
    assert np.isfinite(before).all() and np.array_equal(before, after)
    return read_safetensors(out)


# Not a number ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preset", PRESETS)
def test_nan_and_infinity_are_named(source, tmp_path, preset, bad):
    def spoil(tensor):
        tensor[3, 17] = bad
    changed(source, f"{LINEAR}.weight", spoil)
    model = save(source)
    with pytest.raises(ValueError, match=f"{LINEAR}.weight.*(NaN|infinity)"):    # formats without calibration find it when they round
        quantize(model, preset, source.calib)
        export_hf_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_damage_outside_the_linears_is_named_too(source, name):
    def spoil(tensor):
        tensor[:] = np.nan
    changed(source, name, spoil)
    with pytest.raises(ValueError, match="NaN"):
        np.asarray(quantize(save(source), "FP8_DEFAULT_CFG", source.calib)(source.calib[:1]).logits)


# Zero, tiny, huge ------------------------------------------------------------------------------------------------------------

def zero(tensor):
    tensor[:] = 0


def zero_block(tensor):
    tensor[:, :128] = 0
    tensor[5] = 0


def denormal(tensor):
    tensor[:] = np.asarray(1e-40 * np.sign(tensor.astype(F32)), BF16)     # below bfloat16's smallest normal number


def denormal_block(tensor):
    tensor[:4, :128] = np.asarray(3e-39, BF16)


def huge(tensor):
    tensor[0, 0] = 3e38


@pytest.mark.filterwarnings("ignore:.*amax is zero")
@pytest.mark.parametrize("change", [zero, zero_block, denormal, denormal_block])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_scale_is_zero_and_no_weight_is_lost(source, tmp_path, preset, change):
    changed(source, f"{LINEAR}.weight", change)
    model = quantize(save(source), preset, source.calib)
    tensors = goes_all_the_way(model, source, tmp_path / "out")
    scale = tensors[f"{LINEAR}.weight_scale"]
    if scale.dtype != np.uint8:
        assert np.isfinite(scale.astype(F32)).all() and (scale.astype(F32) > 0).all()
    weight, read = source.tensors[f"{LINEAR}.weight"].astype(F32), modelq.load(tmp_path / "out").checkpoint.read(f"{LINEAR}.weight")
    assert not np.any(read.astype(F32)[weight == 0])
    assert np.abs(read.astype(F32) - weight).max() <= np.abs(weight).max() * 0.2 + 1e-37


def test_a_zero_weight_is_said(source):
    changed(source, f"{LINEAR}.weight", zero)
    with pytest.warns(UserWarning, match=f"{LINEAR}.weight_quantizer: amax is zero"):
        quantize(save(source), "FP8_DEFAULT_CFG", source.calib)


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "W4A16_NVFP4_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_huge_weights_overflow_nothing(source, tmp_path, preset):
    changed(source, f"{LINEAR}.weight", huge)
    config = {"quant_cfg": getattr(mtq, preset)["quant_cfg"] + [{"quantizer_name": "*input_quantizer", "enable": False}], "algorithm": "max"}
    model = mtq.quantize(save(source), config)
    if preset == "FP8_DEFAULT_CFG":
        return      # no checkpoint says FP8 weights alone
    if preset == "INT8_DEFAULT_CFG":
        assert model.quantizers[f"{LINEAR}.weight_quantizer"].amax.max() == F32(np.asarray(3e38, BF16))
    export_hf_checkpoint(model, tmp_path / "out")
    scale = read_safetensors(tmp_path / "out")[f"{LINEAR}.weight_scale"].astype(F32)
    assert np.isfinite(scale).all() and (scale > 0).all()


# Other dtypes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("preset, scheme", [("FP8_DEFAULT_CFG", "fp8"), ("W4A16_NVFP4_CFG", "nvfp4"), ("INT8_DEFAULT_CFG", "int8"),
                                            ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4"), ("MXFP8_DEFAULT_CFG", "mxfp8")])
def test_weights_of_other_dtypes_are_rounded_once(source, tmp_path, dtype, preset, scheme):
    """From their own values, not from what they would be in bfloat16."""
    random = np.random.default_rng(4)
    for name, tensor in source.tensors.items():
        noise = 1 + random.standard_normal(tensor.shape) * 2**-9 if tensor.ndim == 2 else 1
        source.tensors[name] = (tensor.astype(F32) * noise).astype(dtype)
    model = quantize(save(source, dtype), preset, source.calib)
    tensors = goes_all_the_way(model, source, tmp_path / "out")
    expected = reference.SCHEMES[scheme](source.tensors[f"{LINEAR}.weight"])
    for role, part in expected.items():
        assert tensors[f"{LINEAR}.{role}"].tobytes() == np.asarray(part).tobytes(), role
    assert tensors["model.embed_tokens.weight"].dtype == dtype
    rounded = reference.SCHEMES[scheme](source.tensors[f"{LINEAR}.weight"].astype(BF16))
    assert any(tensors[f"{LINEAR}.{role}"].tobytes() != np.asarray(part).tobytes() for role, part in rounded.items())


def test_the_exports_dtype_is_for_what_stays(source, tmp_path):
    model = quantize(save(source), "FP8_DEFAULT_CFG", source.calib)
    export_hf_checkpoint(model, tmp_path / "out", dtype="float16")
    tensors = read_safetensors(tmp_path / "out")
    assert tensors["model.norm.weight"].dtype == np.float16 and tensors[f"{LINEAR}.weight"].dtype == FP8


# Quantized before ------------------------------------------------------------------------------------------------------------

def in_fp8_blocks(source):
    """As DeepSeek publishes: every linear of the layers as float8 in blocks of 128 x 128, with what to multiply them by."""
    meant = {}
    for name in [name for name in source.tensors if "_proj" in name]:
        weight = source.tensors[name].astype(F32)
        rows, cols = (-(-n // 128) for n in weight.shape)
        scale = np.ones((rows, cols), F32)
        for i in range(rows):
            for j in range(cols):
                scale[i, j] = np.abs(weight[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]).max() / 448
        spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:weight.shape[0], :weight.shape[1]]
        source.tensors[name] = (weight / spread).astype(FP8)
        source.tensors[name.replace(".weight", ".weight_scale_inv")] = scale
        meant[name] = (source.tensors[name].astype(F32) * spread).astype(BF16)
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (source.folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("preset, scheme", [("NVFP4_DEFAULT_CFG", "nvfp4"), ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4"), ("FP8_DEFAULT_CFG", "fp8")])
def test_a_model_published_in_fp8_blocks_is_quantized_from_what_they_stand_for(source, tmp_path, preset, scheme):
    meant = in_fp8_blocks(source)
    model = save(source)
    assert check_exportable(model, getattr(mtq, preset)) == "modelopt" and model.checkpoint.layers
    quantize(model, preset, source.calib)
    tensors = goes_all_the_way(model, source, tmp_path / "out")
    assert not any(name.endswith("_inv") for name in tensors)
    expected = reference.SCHEMES[scheme](meant[f"{LINEAR}.weight"])
    for role, part in expected.items():
        assert tensors[f"{LINEAR}.{role}"].tobytes() == np.asarray(part).tobytes(), role
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"


def test_a_failed_quantization_leaves_a_published_model_as_it_was(source):
    in_fp8_blocks(source)
    model = save(source)
    before = np.asarray(model(source.calib[:1]).logits)
    with pytest.raises(ValueError, match="no calibration data"):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: None)
    assert not model.quantized and np.array_equal(before, model(source.calib[:1]).logits)


# Tied, missing ---------------------------------------------------------------------------------------------------------------

def test_a_tied_model_keeps_one_matrix_unless_the_head_is_quantized(golden, tmp_path):
    qwen = golden["qwen3"]
    loop = lambda model: model(qwen.calib[:1])    # noqa: E731
    for head, tied in ((False, True), (True, False)):
        rules = [{"quantizer_name": f"lm_head.{side}_quantizer", "cfg": {"num_bits": (4, 3)}} for side in ("weight", "input")] if head else []
        config = {"quant_cfg": mtq.FP8_DEFAULT_CFG["quant_cfg"] + rules, "algorithm": "max"}
        model = mtq.quantize(modelq.load(qwen.source, compute="bfloat16"), config, loop)
        out = export_hf_checkpoint(model, tmp_path / f"head-{head}")
        tensors, source = read_safetensors(out), read_safetensors(qwen.source)
        assert tensors["model.embed_tokens.weight"].tobytes() == source["model.embed_tokens.weight"].tobytes()
        assert ("lm_head.weight" in tensors) == head and json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
        assert np.array_equal(model(qwen.calib[:1]).logits, modelq.load(out, compute="bfloat16")(qwen.calib[:1]).logits)


@pytest.mark.parametrize("name", [f"{LINEAR}.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(source, name):
    del source.tensors[name]
    with pytest.raises(ValueError, match=f"no tensor '{name}'.*is a file missing"):
        save(source)


def test_a_missing_layer_is_named(source):
    for name in [name for name in source.tensors if ".layers.1." in name]:
        del source.tensors[name]
    with pytest.raises(ValueError, match="no tensor 'model.layers.1"):
        save(source)
