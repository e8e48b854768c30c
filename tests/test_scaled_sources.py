"""Checkpoints whose weights are codes, zero points and scales in other people's layouts, as sources: AutoGPTQ's and AutoAWQ's (by what these
wrote and took it for, tests/data/integers.npz), FP8 with a scale for the tensor or for rows. (compressed-tensors' own, and FP8 by
transformers: torch_models/test_low_precision_sources.py.)"""
import json
import shutil
import warnings
from pathlib import Path

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import read_safetensors, write_safetensors
from modelq.checkpoint import open_checkpoint
from modelq.checkpoint.codes import unpack
from modelq.export import convert_checkpoint, export_hf_checkpoint

F32, BF16, F16, E4M3 = np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn
random = np.random.default_rng(3)
INTEGERS = np.load(Path(__file__).parent / "data" / "integers.npz")
CASES = sorted({name.partition(".")[0] for name in INTEGERS.files})


def stored(case):
    """(tensors, the weight that they stand for, quantization_config)"""
    tensors = {name.partition(".")[2]: INTEGERS[name] for name in INTEGERS.files if name.startswith(case + ".")}
    weight = tensors.pop("weight")
    method = "awq" if case == "awq" else "gptq"
    config = {"quant_method": method, "bits": 4 if case == "awq" else int(case[4]), "group_size": 16}
    return tensors, weight, config | ({"zero_point": True, "version": "gemm"} if method == "awq" else {
        "sym": False, "desc_act": case.endswith("order"), "checkpoint_format": "gptq"})


def folder_of(folder, tensors, quantization, dtype="float16"):
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    config = {"model_type": "strange", "architectures": ["Strange"], "dtype": dtype, "vocab_size": 96}
    (folder / "config.json").write_text(json.dumps(config if quantization is None else {**config, "quantization_config": quantization}))
    return folder


def linear(tensors, module="layers.0.up_proj"):
    return {f"{module}.{role}": np.ascontiguousarray(array).reshape(array.shape) for role, array in tensors.items()}


def check(folder, weight, module="layers.0.up_proj"):
    """Every row, and some of them alone; nothing else of the linear is shown."""
    with open_checkpoint(folder) as checkpoint:
        assert "quantization_config" not in checkpoint.config and checkpoint.is_source
        assert not [name for name in checkpoint.tensors if name.startswith(module) and name != f"{module}.weight"]
        info = checkpoint.tensors[f"{module}.weight"]
        assert info.shape == weight.shape and info.nbytes == weight.nbytes
        read = checkpoint.read(info.name)
        assert read.dtype == weight.dtype and read.tobytes() == np.ascontiguousarray(weight).tobytes()
        assert checkpoint.is_made_by_rows(info.name)
        for start, stop in ((0, 1), (3, 21), (len(weight) - 2, len(weight) + 9)):
            assert checkpoint.read_rows(info.name, start, stop).tobytes() == np.ascontiguousarray(weight[start:stop]).tobytes()
        checkpoint.release([info.name])


# Integers -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_what_others_write(case, tmp_path):
    tensors, weight, config = stored(case)
    check(folder_of(tmp_path / "m", linear(tensors), config), weight)


@pytest.mark.parametrize("case", [case for case in CASES if case != "awq"])
def test_gptqs_second_format_stores_zero_points_as_they_are(case, tmp_path):
    tensors, weight, config = stored(case)
    zeros = unpack(tensors["qzeros"], config["bits"], weight.shape[0]) + 1
    bits = np.unpackbits(zeros[..., None], axis=2, bitorder="little")[:, :, :config["bits"]].reshape(len(zeros), -1)
    tensors["qzeros"] = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    check(folder_of(tmp_path / "m", linear(tensors), {**config, "checkpoint_format": "gptq_v2"}), weight)


def test_layers_of_other_bits(tmp_path):
    """GPTQModel's `dynamic`: the shapes tell."""
    four, eight = stored("gptq4"), stored("gptq8")
    folder = folder_of(tmp_path / "m", linear(four[0]) | linear(eight[0], "layers.0.down_proj"), four[2])
    with open_checkpoint(folder) as checkpoint:
        assert np.array_equal(checkpoint.read("layers.0.up_proj.weight"), four[1])
        assert np.array_equal(checkpoint.read("layers.0.down_proj.weight"), eight[1])


def edited(case, edit):
    tensors, _, config = stored(case)
    edit(tensors, config)
    return linear(tensors), config


@pytest.mark.parametrize("case, edit, words", [
    ("awq", lambda t, c: t.pop("qzeros"), r"layers.0.up_proj.qzeros' is missing"),
    ("awq", lambda t, c: t.update(scales=t["scales"][:3]), r"do not belong together|has the shape"),
    ("awq", lambda t, c: c.update(version="gemv"), "awq with version 'gemv' is not read"),
    ("awq", lambda t, c: c.update(bits=3), "awq with bits 3 is not read"),
    ("gptq4", lambda t, c: t.update(g_idx=t["g_idx"] + 1), "must say for each of 64 columns one of 4 groups"),
    ("gptq4", lambda t, c: t.update(scales=t["scales"].reshape(-1)), "scales' has the shape"),
    ("gptq4", lambda t, c: t.update(qzeros=t["qzeros"][:, :2]), "do not belong together with codes of 4 bits"),
    ("gptq4", lambda t, c: t.update(g_idx=t["g_idx"][:20]), "codes of 12 bits are not read"),
    ("gptq4", lambda t, c: c.update(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not read"),
    ("gptq4", lambda t, c: t.update(qzeros=np.full_like(t["qzeros"], -1)), "qzeros' holds 15, a zero point of 0 minus 1.*gptq_v2"),
])
def test_what_is_not_read_is_named(case, edit, words, tmp_path):
    folder = folder_of(tmp_path / "m", *edited(case, edit))
    with pytest.raises(ValueError, match=words), open_checkpoint(folder) as checkpoint:
        checkpoint.read("layers.0.up_proj.weight")


def test_a_model_in_awq_is_quantized_as_its_dequantized_weights_are(golden, tmp_path):
    """Asymmetric, in the runtime: logits, and NVFP4's bytes."""
    llama = golden["llama"]
    tensors, plain = {}, {}
    for name, array in read_safetensors(llama.source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = plain[name] = array
            continue
        rows, columns = array.shape
        code, zero = random.integers(0, 16, (columns, rows)), random.integers(0, 16, (columns // 32, rows))
        scale = (random.random((columns // 32, rows)) * 0.02 + 0.01).astype(F16)
        plain[name] = ((code - np.repeat(zero, 32, 0)) * np.repeat(scale.astype(F32), 32, 0)).T.astype(BF16)
        for role, array in (("qweight", awq_words(code)), ("qzeros", awq_words(zero)), ("scales", scale)):
            tensors[name.replace("weight", role)] = array
    for folder, content in (("awq", tensors), ("plain", plain)):
        shutil.copytree(llama.source, tmp_path / folder)
        write_safetensors(tmp_path / folder / "model.safetensors", {name: np.ascontiguousarray(array) for name, array in content.items()})
    config = json.loads((llama.source / "config.json").read_text())
    (tmp_path / "awq" / "config.json").write_text(json.dumps({**config, "quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}}))
    logits = []
    for folder in ("awq", "plain"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = modelq.load(tmp_path / folder, compute="bfloat16")
            logits.append(np.asarray(model(llama.calib[:1]).logits))
            mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(llama.calib[:1]))
            export_hf_checkpoint(model, tmp_path / f"{folder}-out")
    assert np.array_equal(*logits)
    ours, wanted = (read_safetensors(tmp_path / f"{folder}-out") for folder in ("awq", "plain"))
    assert ours.keys() == wanted.keys() and all(ours[name].tobytes() == wanted[name].tobytes() for name in ours)
    assert json.loads((tmp_path / "awq-out" / "config.json").read_text()) == json.loads((tmp_path / "plain-out" / "config.json").read_text())
    with pytest.raises(ValueError, match="not a quantized checkpoint of an export's layout|not a quantized checkpoint"):
        convert_checkpoint(tmp_path / "awq", tmp_path / "ct", dialect="compressed-tensors")


def awq_words(codes):
    words = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint32)
    return (words << (4 * np.arange(8, dtype=np.uint32))).sum(2, dtype=np.uint32).view(np.int32)


def test_inspect_counts_what_is_stored(tmp_path, capsys):
    from modelq.cli import main

    tensors, weight, config = stored("gptq4_order")
    assert main(["inspect", str(folder_of(tmp_path / "m", linear(tensors), config)), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["tensors"]
    assert row["format"] == "gptq, 4 bits" and row["shape"] == [32, 64] and row["bytes"] == sum(array.nbytes for array in tensors.values())


# FP8 ------------------------------------------------------------------------------------------------------------------------------------

STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
SCALES = [        # config, the scale's name, shape and dtype
    ({**STATIC, "activation_scheme": "dynamic"}, "weight_scale", (1,), F32), ({**STATIC, "activation_scheme": "dynamic"}, "weight_scale", (), BF16),
    ({**STATIC, "activation_scheme": "dynamic", "weight_block_size": None}, "weight_scale_inv", (), BF16), (None, "weight_scale", (), F32), (None, "weight_scale", (200, 1), F32),
    (None, "weight_scale_inv", (200,), F32), ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "weight_scale", (200, 1), F32),
    ({**STATIC, "activation_scheme": "dynamic", "weight_block_size": [64, 32]}, "weight_scale_inv", (4, 10), F32)]


@pytest.mark.parametrize("config, name, shape, dtype", SCALES)
def test_fp8(config, name, shape, dtype, tmp_path):
    """By NumPy: number times scale in float32, rounded once. (With static scales of inputs: test_static_fp8.py.)"""
    weight = random.normal(size=(200, 300)).astype(E4M3)
    scale = np.asarray(random.random(shape) + 0.01, F32).astype(dtype)
    extra = {"input_scale_ub": np.full(1, 1200, F32)}
    tensors = linear({"weight": weight, name: np.asarray(scale), **extra}) | {"layers.0.self_attn.k_scale": np.ones((), F32)}
    spread = scale.astype(F32).reshape(-1, 1) if len(shape) < 2 or shape[1] == 1 else \
        np.repeat(np.repeat(scale, 64, 0), 32, 1)[:200, :300].astype(F32)
    folder = folder_of(tmp_path / "m", tensors, config, "bfloat16")
    check(folder, (weight.astype(F32) * spread).astype(BF16))
    with open_checkpoint(folder) as checkpoint:
        assert "layers.0.self_attn.k_scale" not in checkpoint.tensors


@pytest.mark.parametrize("tensors, words", [
    ({"weight": np.ones((8, 4), E4M3), "weight_scale": np.ones((2, 2), F32)}, "neither one scale nor one for each of 8 rows"),
    ({"weight": np.ones((8, 4), E4M3), "other": np.ones(2, F32)}, "has no weight_scale or weight_scale_inv beside it"),
    ({"weight": np.ones((2, 8, 4), E4M3), "weight_scale": np.ones((), F32)}, r"has the shape \[2, 8, 4\], a linear's weight has two axes"),
    ({"weight": np.ones((8, 4), BF16)}, "the config says FP8, but no weight is stored so"),
])
def test_fp8_that_is_not_read_is_named(tensors, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder_of(tmp_path / "m", linear(tensors), STATIC | {"weight_block_size": None}))
