"""Rotation folded into weights: the model computes what it did, quantized or exported it is an ordinary model."""
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import golden_data
import modelq
import modelq.quantization as mtq
from modelq.export import export_hf_checkpoint
from modelq.rotation import RotatedCheckpoint, Rotation, mixing
from modelq.summary import summary_lines

MODELS = golden_data.models()
FP8 = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3)}}
OFF = {"quantizer_name": "*", "enable": False}


def as_float32(source, folder):
    """The checkpoint with float32 weights, so that nothing is rounded; norms that are not all about one."""
    rng, tensors = np.random.default_rng(0), {}
    with modelq.load(source).checkpoint as checkpoint:
        for name in checkpoint.tensors:
            tensors[name] = checkpoint.read(name).astype(np.float32)
            if name.endswith("norm.weight"):
                tensors[name] *= np.exp(rng.standard_normal(tensors[name].shape)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def rotate(model, **options):
    model.take(RotatedCheckpoint(model, **options), model.runtime.compute)
    return model


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2 ** 31))
def test_every_rotation_is_orthogonal_and_spreads_a_channel(n, seed):
    matrix = Rotation(n, seed).rows(np.eye(n, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-5)
    assert np.abs(matrix).max() <= 1.4143 * n ** -0.5       # Hartley's entries are up to sqrt(2 / n)


def test_rotations_are_hadamard_matrices_for_powers_of_two_and_differ_by_seed():
    for n in (2, 64, 1024, 4096):
        x = np.eye(n, dtype=np.float32)[:8]
        np.testing.assert_allclose(np.abs(Rotation(n, 0).rows(x)), n ** -0.5, rtol=1e-5)
    assert not np.array_equal(Rotation(64, 0).rows(np.eye(64, dtype=np.float32)), Rotation(64, 1).rows(np.eye(64, dtype=np.float32)))
    np.testing.assert_allclose(mixing(12) @ mixing(12), np.eye(12), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"values": False}, {"seed": 3}])
@pytest.mark.parametrize("golden_model", MODELS)
def test_the_model_computes_what_it_did(golden_model, options, tmp_path):
    folder, ids = as_float32(golden_model.source, tmp_path), golden_model.calib[:2]
    expected = modelq.load(folder, compute="float32")(ids).logits
    turned = rotate(modelq.load(folder, compute="float32"), **options)
    np.testing.assert_allclose(turned(ids).logits, expected, atol=3e-5 * np.abs(expected).max())
    for row in turned.modules:
        if row["kind"] == "linear" and row["layer"] == 0:
            weight = f"{row['name']}.weight" if row["weight"] is None else row["weight"]
            changed = not np.array_equal(turned.checkpoint.read(weight), turned.checkpoint.original.read(weight))
            assert changed == (options.get("residual", True) or row["name"].endswith(("v_proj", "o_proj")))


def test_biases_turn_too(tmp_path):
    """A family with biases before and behind: Llama with attention_bias and mlp_bias."""
    source = golden_data.Model("llama").source
    with modelq.load(source).checkpoint as checkpoint:
        tensors = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.tensors}
    rng = np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name.replace(".weight", ".bias")] = rng.standard_normal(len(tensors[name])).astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32", "attention_bias": True, "mlp_bias": True}))
    ids = golden_data.Model("llama").calib[:1]
    expected = modelq.load(tmp_path, compute="float32")(ids).logits
    found = rotate(modelq.load(tmp_path, compute="float32"))(ids).logits
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("golden_model", MODELS)
def test_an_export_is_an_ordinary_model(golden_model, tmp_path):
    """It has a head of its own where that was the embedding, no word of rotation, and computes what the quantized model does."""
    model = modelq.load(golden_model.source, compute="bfloat16")
    mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": ["rotate", "max"]}, lambda model: model(golden_model.calib))
    export_hf_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "rotat" not in json.dumps(config)
    opened = modelq.load(tmp_path, compute="bfloat16")
    assert np.array_equal(opened.checkpoint.read("model.norm.weight"), np.ones_like(opened.checkpoint.read("model.norm.weight")))
    np.testing.assert_array_equal(opened(golden_model.calib[:1]).logits, model(golden_model.calib[:1]).logits)


def test_outlier_channels_of_weights_and_values_go(tmp_path):
    """What it is for: with one channel a hundred times the others, INT8 per tensor is off; rotated, it is not."""
    folder, ids = as_float32(golden_data.Model("llama").source, tmp_path), golden_data.Model("llama").calib
    with modelq.load(folder).checkpoint as checkpoint:
        tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][5] *= 300
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[name][:, 5] /= 100
    save_file(tensors, folder / "model.safetensors")
    expected, errors = modelq.load(folder, compute="float32")(ids[:1]).logits, []
    for algorithm in ("max", ["rotate", "max"]):
        model = modelq.load(folder, compute="float32")
        mtq.quantize(model, {**mtq.INT8_DEFAULT_CFG, "algorithm": algorithm}, lambda model: model(ids))
        errors.append(np.linalg.norm(model(ids[:1]).logits - expected))
    assert errors[1] < 0.5 * errors[0]


def test_quantizing_again_starts_from_the_original_and_a_failure_changes_nothing(golden):
    llama = golden["qwen3"]        # tied: rotation gives it another set of modules
    model, ids = modelq.load(llama.source, compute="bfloat16"), llama.calib
    plain, modules = model(ids[:1]).logits, len(model.slots)

    def fails(model):
        raise RuntimeError("no data today")
    with pytest.raises(RuntimeError, match="no data today"):
        mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": ["rotate", "max"]}, fails)
    np.testing.assert_array_equal(model(ids[:1]).logits, plain)
    assert not model.quantized and len(model.slots) == modules and not isinstance(model.checkpoint, RotatedCheckpoint)
    mtq.quantize(model, {"quant_cfg": [OFF, FP8], "algorithm": "rotate"})
    turned = model.quantizers["model.layers.0.mlp.up_proj.weight_quantizer"].amax
    mtq.quantize(model, {"quant_cfg": [OFF, FP8], "algorithm": "max"})
    assert turned != model.quantizers["model.layers.0.mlp.up_proj.weight_quantizer"].amax
    assert not isinstance(model.checkpoint, RotatedCheckpoint) and len(model.slots) == modules
    fresh = mtq.quantize(modelq.load(llama.source, compute="bfloat16"), {"quant_cfg": [OFF, FP8], "algorithm": "max"})
    np.testing.assert_array_equal(model(ids[:1]).logits, fresh(ids[:1]).logits)


@pytest.mark.parametrize("algorithm", ["awq_lite", "smoothquant", {"method": "gptq", "act_order": True}])
def test_other_steps_follow(golden, algorithm):
    preset = {"awq_lite": mtq.INT4_AWQ_CFG, "smoothquant": mtq.INT8_SMOOTHQUANT_CFG}.get(str(algorithm), mtq.INT4_GPTQ_CFG)
    model, ids = modelq.load(golden["llama"].source, compute="bfloat16"), golden["llama"].calib
    plain = model(ids[:1]).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # so few tokens leave Gram matrices singular
        mtq.quantize(model, {**preset, "algorithm": ["rotate", algorithm]}, lambda model: model(ids))
    assert np.linalg.norm(model(ids[:1]).logits - plain) < 0.5 * np.linalg.norm(plain)
    assert "  rotated: the residual stream and values (seed 0)" in summary_lines(model)


@pytest.mark.parametrize("algorithm, words", [
    (["max", "rotate"], "before the others"), (["rotate", "rotate"], "before the others"),
    ({"method": "rotate", "seed": -1}, "seed must be a number at least 0"), ({"method": "rotate", "size": 2}, "unknown setting 'size'"),
    ({"method": "rotate", "residual": False, "values": False}, "nothing is left to rotate")])
def test_what_cannot_be(golden, algorithm, words):
    model = modelq.load(golden["llama"].source)
    with pytest.raises(ValueError, match=words):
        mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": algorithm}, lambda model: model(golden["llama"].calib))
    mtq.quantize(model, {"quant_cfg": [OFF, FP8], "algorithm": "max"})
    with pytest.raises(ValueError, match="only come first, in quantize"):
        mtq.calibrate(model, "rotate")
