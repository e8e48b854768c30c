"""Checkpoints that are in low precision already, as sources: what is quantized is what they dequantize to. (transformers' and
compressed-tensors' own dequantizers are asked in torch_models/test_low_precision_sources.py.)"""
import copy
import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import read_safetensors, write_safetensors
from modelq.checkpoint import open_checkpoint
from modelq.export import check_exportable, convert_checkpoint, export_hf_checkpoint
from modelq.summary import summary_lines

F32, BF16, E4M3 = np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
random = np.random.default_rng(11)
# what is stored: dialect, preset
STORED = [("modelopt", "FP8_DEFAULT_CFG"), ("modelopt", "NVFP4_DEFAULT_CFG"), ("modelopt", "INT8_DEFAULT_CFG"), ("modelopt", "MXFP8_DEFAULT_CFG"),
          ("modelopt", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"), ("modelopt", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
          ("compressed-tensors", "FP8_DEFAULT_CFG"), ("compressed-tensors", "NVFP4_DEFAULT_CFG"),
          ("compressed-tensors", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), ("compressed-tensors", "INT8_WEIGHT_ONLY_CFG"),
          ("autoawq", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), ("gptq", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), ("fp8", "MXFP8_DEFAULT_CFG")]


def quantize(model, preset, calib):
    config = copy.deepcopy(getattr(mtq, preset))
    return mtq.quantize(model, config, lambda model: [model(row[None]) for row in calib[:2]])


@pytest.fixture(scope="module")
def llama(golden):
    return golden["llama"]


# What is stored becomes something else -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dialect, preset", STORED)
def test_an_export_is_quantized_anew_from_what_it_stands_for(llama, tmp_path, dialect, preset):
    """As a folder of the dequantized weights is."""
    export_hf_checkpoint(quantize(modelq.load(llama.source), preset, llama.calib), tmp_path / "stored", dialect=dialect)
    stored = modelq.load(tmp_path / "stored", compute="bfloat16")
    with open_checkpoint(tmp_path / "stored") as checkpoint:
        plain = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}
    shutil.copytree(llama.source, tmp_path / "plain")
    write_safetensors(tmp_path / "plain" / "model.safetensors", plain)
    before = np.asarray(stored(llama.calib[:1]).logits)
    for wanted in ("NVFP4_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG"):
        assert check_exportable(stored, getattr(mtq, wanted)) == "modelopt"
    assert np.array_equal(before, stored(llama.calib[:1]).logits)
    with pytest.warns(UserWarning, match="stored quantized .*rounded once more"):
        quantize(stored, "NVFP4_DEFAULT_CFG", llama.calib)
    assert not stored.stored_layers and not np.array_equal(before, stored(llama.calib[:1]).logits)
    own = quantize(modelq.load(tmp_path / "plain", compute="bfloat16"), "NVFP4_DEFAULT_CFG", llama.calib)
    for model, out in ((stored, "out"), (own, "own")):
        export_hf_checkpoint(model, tmp_path / out)
    ours, wanted = (read_safetensors(tmp_path / out) for out in ("out", "own"))
    assert ours.keys() == wanted.keys() and all(ours[name].tobytes() == wanted[name].tobytes() for name in ours)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((tmp_path / "own" / "config.json").read_text())


def test_what_fails_leaves_the_opened_export_as_it_was(llama, tmp_path):
    export_hf_checkpoint(quantize(modelq.load(llama.source), "FP8_DEFAULT_CFG", llama.calib), tmp_path / "stored")
    model = modelq.load(tmp_path / "stored", compute="bfloat16")
    before, layers = np.asarray(model(llama.calib[:1]).logits), set(model.stored_layers)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no calibration data"):
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: None)
    assert set(model.stored_layers) == layers and np.array_equal(before, model(llama.calib[:1]).logits)


def test_smoothed_weights_are_not_the_originals(llama, tmp_path):
    export_hf_checkpoint(quantize(modelq.load(llama.source), "INT8_SMOOTHQUANT_CFG", llama.calib), tmp_path / "stored")
    model = modelq.load(tmp_path / "stored")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="with a pre_quant_scale, .*quantize the original checkpoint"):
        mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG)
    with pytest.raises(ValueError, match="pre_quant_scale"):
        check_exportable(model, mtq.INT8_WEIGHT_ONLY_CFG)
    assert model.stored_layers


@pytest.mark.parametrize("dialect, preset", STORED)
def test_rows_are_dequantized_by_themselves(llama, tmp_path, dialect, preset):
    export_hf_checkpoint(quantize(modelq.load(llama.source), preset, llama.calib), tmp_path / "stored", dialect=dialect)
    with open_checkpoint(tmp_path / "stored") as checkpoint:
        for module in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"):
            whole = checkpoint.read(f"{module}.weight")
            assert checkpoint.is_made_by_rows(f"{module}.weight") and not checkpoint.is_made_by_rows("model.norm.weight")
            for start, stop in ((0, 1), (3, 10), (120, 140), (0, len(whole)), (len(whole) - 3, len(whole) + 7)):
                assert np.array_equal(checkpoint.read_rows(f"{module}.weight", start, stop), whole[start:stop]), (start, stop)
        assert np.array_equal(checkpoint.read_rows("model.embed_tokens.weight", 2, 9), checkpoint.read("model.embed_tokens.weight")[2:9])


@pytest.mark.parametrize("dtype", [F32, BF16, ml_dtypes.float8_e8m0fnu])
def test_deepseeks_blocks_with_scales_of_any_dtype(tmp_path, dtype):
    """By NumPy: element times scale, in float32, rounded once. Rows and columns that do not fill a block."""
    weight = random.normal(size=(200, 300)).astype(E4M3)
    scale = np.exp2(random.integers(-8, 2, (2, 3))).astype(dtype)
    write_folder(tmp_path / "m", {"model.layers.0.x.weight": weight, "model.layers.0.x.weight_scale_inv": scale}, fp8_config())
    spread = np.repeat(np.repeat(scale.astype(F32), 128, 0), 128, 1)[:200, :300]
    with open_checkpoint(tmp_path / "m") as checkpoint:
        read = checkpoint.read("model.layers.0.x.weight")
    assert read.tobytes() == (weight.astype(F32) * spread).astype(BF16).tobytes()


def write_folder(folder, tensors, config):
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_config():
    return {"model_type": "strange", "architectures": ["Strange"], "dtype": "bfloat16", "vocab_size": 96, "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}}


def test_memory_of_reading_is_the_tensor_that_is_read(tmp_path):
    """Never the whole in float32: 128 MB, of 64 MB in bfloat16 out of 32 MB."""
    write_folder(tmp_path / "m", {"a.weight": np.full((8192, 4096), 1, E4M3), "a.weight_scale_inv": np.full((64, 32), 0.5, F32)}, fp8_config())
    code = ("import sys, ml_dtypes; from modelq.checkpoint import open_checkpoint; from modelq import _core\n"
            "from modelq.measure import peak_memory, reset_peak_memory\n"
            "checkpoint = open_checkpoint(sys.argv[1]); reset_peak_memory(); before = peak_memory()\n"
            "checkpoint.read('a.weight'); print(peak_memory() - before)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 110 << 20


# MXFP4 to NVFP4 ---------------------------------------------------------------------------------------------------------------------

def mxfp4_of(shape, spread):
    """Parts in MXFP4: codes at random, exponents over `spread` powers of two, some blocks empty."""
    codes = random.integers(0, 256, (shape[0], shape[1] // 2)).astype(np.uint8)
    scale = random.integers(120 - spread, 121, (shape[0], shape[1] // 32)).astype(np.uint8)
    scale[0, 0] = 120
    scale[1, :2] = 0
    codes.reshape(shape[0], -1, 16)[1, :2] = 0
    return codes, scale


def values_of(codes, scale):
    """float32, by NumPy."""
    values = FP4[np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)]
    return values * np.repeat(np.exp2(scale.astype(F32) - 127), 32, 1)


def cast_by_the_reference(codes, scale, largest):
    """(codes, FP8 scales, second-level scale) as Model Optimizer's cast makes them (spec/modelopt_spec.md, 2.10)."""
    second = np.float32(2.0 ** (largest - 8))
    values, exponents = values_of(codes, scale), scale.astype(np.int32) - 127
    block = np.where(exponents >= largest - 17, 6 * np.exp2(exponents.astype(F32)), np.abs(values).reshape(len(values), -1, 32).max(2))
    stored = np.clip(np.repeat(block.astype(F32), 2, 1) / (6 * second), 2.0 ** -9, 448).astype(E4M3)
    scaled = values / np.repeat(stored.astype(F32) * second, 16, 1)
    nibbles = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    nibbles = np.where(scaled == 0, 0, nibbles)      # a zero has no sign
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8), stored, second


@pytest.mark.parametrize("spread", [6, 17, 40])
def test_mxfp4_becomes_nvfp4_as_the_reference_casts_it(tmp_path, spread):
    """Byte for byte; without loss where exponents span no more than 17."""
    gate, up, other = (mxfp4_of((64, 128), spread) for _ in range(3))
    gate[1][0, 0] = 119
    tensors, modules = {}, {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.other": other}
    for name, (codes, scale) in modules.items():
        tensors |= {f"model.layers.0.{name}.weight_packed": codes, f"model.layers.0.{name}.weight_scale": scale}
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False, "scale_dtype": "torch.uint8"}
    write_folder(tmp_path / "m", tensors, {**fp8_config(), "quantization_config": {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "format": "mxfp4-pack-quantized"}}}})
    model = modelq.load(tmp_path / "m")
    with pytest.warns(UserWarning, match="stored quantized"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    export_hf_checkpoint(model, tmp_path / "out")
    written = read_safetensors(tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        for name, (codes, scale) in modules.items():
            largest = max(int(part[1].max()) for part in ((gate, up) if name != "mlp.other" else (other,))) - 127
            for role, part in zip(("weight", "weight_scale", "weight_scale_2"), cast_by_the_reference(codes, scale, largest)):
                assert written[f"model.layers.0.{name}.{role}"].tobytes() == np.asarray(part).tobytes(), (name, role)
            if spread <= 17:
                assert np.array_equal(checkpoint.read(f"model.layers.0.{name}.weight").astype(F32), values_of(codes, scale))


def test_a_model_in_mxfp4_computes_the_same_in_nvfp4(tmp_path, golden):
    """Experts too, whose gate and up have one quantizer."""
    moe = golden["qwen3moe"]
    export_hf_checkpoint(mtq.quantize(modelq.load(moe.source), {**mtq.MXFP4_DEFAULT_CFG, "quant_cfg": [
        *mtq.MXFP4_DEFAULT_CFG["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}]}), tmp_path / "mx")
    model = modelq.load(tmp_path / "mx", compute="bfloat16")
    before = np.asarray(model(moe.calib[:1]).logits)
    with pytest.warns(UserWarning, match="stored quantized"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    assert np.array_equal(before, model(moe.calib[:1]).logits)
    export_hf_checkpoint(model, tmp_path / "nv")
    assert np.array_equal(before, modelq.load(tmp_path / "nv", compute="bfloat16")(moe.calib[:1]).logits)
    second = read_safetensors(tmp_path / "nv")["model.layers.0.mlp.experts.0.up_proj.weight_scale_2"]
    assert np.log2(float(second)) % 1 == 0


@pytest.fixture
def in_mxfp4(golden, tmp_path):
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, mtq.MXFP4_DEFAULT_CFG["quant_cfg"][1], {
        "quantizer_name": "*lm_head*", "enable": False}, {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False}], "algorithm": None}
    export_hf_checkpoint(mtq.quantize(modelq.load(golden["llama"].source), config), tmp_path / "mx")
    return tmp_path / "mx"


@pytest.mark.filterwarnings("ignore:.*stored quantized")
def test_kept_blocks_go_the_ways_of_others(in_mxfp4, golden, tmp_path):
    """Simulated in float32 and bfloat16, packed, after an interruption, searched after all; no block's maximum is held."""
    ids = golden["llama"].calib[:1]
    for compute in ("float32", "bfloat16"):
        model = modelq.load(in_mxfp4, compute=compute)
        before = np.asarray(model(ids).logits)
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
        assert model.kept_blocks and all(model.quantizers[f"{name}.weight_quantizer"].amax is None for name in model.kept_blocks)
        assert any("amax=kept" in line for line in summary_lines(model))
        assert np.array_equal(before, model(ids).logits)
        assert np.array_equal(before, mtq.compress(model)(ids).logits)
    for _ in range(2):
        again = mtq.quantize(modelq.load(in_mxfp4), mtq.W4A16_NVFP4_CFG, checkpoint_dir=tmp_path / "progress")
    export_hf_checkpoint(model, tmp_path / "one")
    export_hf_checkpoint(again, tmp_path / "two")
    one, two = (read_safetensors(tmp_path / name) for name in ("one", "two"))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    mtq.calibrate(again, "mse")
    assert not again.kept_blocks and again.quantizers["model.layers.0.mlp.up_proj.weight_quantizer"].amax.ndim
    mtq.quantize(again, mtq.INT8_WEIGHT_ONLY_CFG)
    assert not again.kept_blocks


# gpt-oss ------------------------------------------------------------------------------------------------------------------------------

def gpt_oss(folder, edit=lambda tensors: None):
    """Two layers of stacked experts as gpt-oss has them, and a linear."""
    tensors = {"model.layers.0.self_attn.q_proj.weight": random.normal(size=(64, 64)).astype(BF16),
               "model.layers.0.self_attn.sinks": random.normal(size=4).astype(BF16), "model.embed_tokens.weight": random.normal(size=(96, 64)).astype(BF16)}
    for name, rows in (("gate_up_proj", 96), ("down_proj", 64)):
        tensors[f"model.layers.0.mlp.experts.{name}_blocks"] = random.integers(0, 256, (4, rows, 2, 16)).astype(np.uint8)
        tensors[f"model.layers.0.mlp.experts.{name}_scales"] = random.integers(110, 126, (4, rows, 2)).astype(np.uint8)
        tensors[f"model.layers.0.mlp.experts.{name}_bias"] = random.normal(size=(4, rows)).astype(BF16)
    edit(tensors)
    config = {"model_type": "strange_oss", "architectures": ["StrangeOss"], "vocab_size": 96, "dtype": "bfloat16",
              "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    return write_folder(folder, tensors, config), tensors


def test_stacked_experts_in_mxfp4_read_as_the_model_they_stand_for(tmp_path):
    folder, tensors = gpt_oss(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        assert "quantization_config" not in checkpoint.config
        for name, rows in (("gate_up_proj", 96), ("down_proj", 64)):
            name = f"model.layers.0.mlp.experts.{name}"
            wanted = np.stack([values_of(codes.reshape(rows, 32), scale) for codes, scale in zip(
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"])])
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape, info.nbytes) == ("bfloat16", (4, 64, rows), 4 * 64 * rows * 2)
            assert np.array_equal(checkpoint.read(name).astype(F32), wanted.transpose(0, 2, 1))
            assert np.array_equal(checkpoint.read_rows(name, 1, 3).astype(F32), wanted[1:3].transpose(0, 2, 1))
            assert np.array_equal(checkpoint.read_rows(name, 3, 9).astype(F32), wanted[3:].transpose(0, 2, 1))
            assert np.array_equal(checkpoint.expert(name, 2).astype(F32), wanted[2])
            assert f"{name}_blocks" not in checkpoint.tensors and f"{name}_bias" in checkpoint.tensors
        checkpoint.release(["model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.sinks"])
        checkpoint.release()


def test_other_linears_of_such_a_model_are_quantized_and_its_experts_written_as_they_stand_for(tmp_path):
    folder, tensors = gpt_oss(tmp_path / "m")
    model = modelq.load(folder)
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    export_hf_checkpoint(model, tmp_path / "out")
    written, config = read_safetensors(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model.layers.0.self_attn.q_proj.weight"].dtype == np.uint8
    with open_checkpoint(folder) as checkpoint:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert written[name].tobytes() == np.ascontiguousarray(checkpoint.read(name)).tobytes()
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert any(fnmatch("model.layers.0.mlp.experts.gate_up_proj", pattern) for pattern in config["quantization_config"]["ignore"])
    assert written["model.layers.0.self_attn.sinks"].tobytes() == tensors["model.layers.0.self_attn.sinks"].tobytes()


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "down_proj_scales' is missing"),
    (lambda t: t.update({"model.layers.0.mlp.experts.down_proj_scales": np.zeros((4, 64, 3), np.uint8)}), r"with scales uint8 \[4, 64, 3\]"),
    (lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": np.zeros((4, 64, 2, 8), np.uint8)}), r"\[4, 64, 2, 8\]"),
    (lambda t: [t.pop(name) for name in list(t) if "proj_" in name], "no tensor ends in _blocks"),
])
def test_what_is_wrong_with_such_a_folder_is_named(tmp_path, edit, words):
    folder, _ = gpt_oss(tmp_path / "m", edit)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder)


def test_inspect_counts_stacks_as_they_are_stored(tmp_path):
    gpt_oss(tmp_path / "m")
    done = subprocess.run([sys.executable, "-m", "modelq", "inspect", str(tmp_path / "m"), "--json"], capture_output=True, text=True, cwd=tmp_path)
    rows = {row["name"]: row for row in json.loads(done.stdout)["tensors"]}
    stack = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert (stack["format"], stack["bits_per_weight"], stack["elements"]) == ("mxfp4", 4.25, 4 * 64 * 96)


# What a family's row does not have ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("in_fp8", [False, True])
def test_layers_beyond_the_model_are_copied_and_named(llama, tmp_path, in_fp8):
    """A third layer, as those that predict further tokens are stored: it is in no format of the export, which says so."""
    shutil.copytree(llama.source, tmp_path / "m")
    tensors, config = read_safetensors(llama.source), json.loads((llama.source / "config.json").read_text())
    extra = random.normal(size=(128, 256)).astype(BF16)
    tensors |= {"model.layers.2.eh_proj.weight": extra, "model.layers.2.enorm.weight": np.ones(128, F32),
                "model.layers.2.bias_correction": np.ones(4, F32)}
    if in_fp8:
        tensors |= {"model.layers.2.eh_proj.weight": extra.astype(E4M3), "model.layers.2.eh_proj.weight_scale_inv": np.full((1, 2), 0.5, F32)}
        config = {**config, "quantization_config": fp8_config()["quantization_config"]}
        extra = (extra.astype(E4M3).astype(F32) * F32(0.5)).astype(BF16)
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    model = quantize(modelq.load(tmp_path / "m"), "NVFP4_DEFAULT_CFG", llama.calib)
    assert any("model.layers.*.eh_proj" in line and "not part of the model" in line for line in summary_lines(model))
    export_hf_checkpoint(model, tmp_path / "out")
    written = read_safetensors(tmp_path / "out")
    assert written["model.layers.2.eh_proj.weight"].tobytes() == extra.tobytes()
    for name in ("model.layers.2.enorm.weight", "model.layers.2.bias_correction"):
        assert written[name].dtype == F32 and written[name].tobytes() == tensors[name].tobytes()
    assert "model.layers.2*" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    convert_checkpoint(tmp_path / "out", tmp_path / "ct", dialect="compressed-tensors")
    assert "model.layers.2.eh_proj" in json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["ignore"]
    logits = [np.asarray(modelq.load(tmp_path / name)(llama.calib[:1]).logits) for name in ("ct", "out")]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)      # one has scales and the other their inverses
