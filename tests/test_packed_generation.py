"""Models whose weights stay codes compute and say what the same models do with numbers, and are as small as that promises."""
import json

import ml_dtypes
import numpy as np
import pytest
from golden_data import write_safetensors
from test_dialects import EXPORTS, FORMATS, exported, llama, quantized  # noqa: F401  (fixtures)

import modelq
import modelq._core as core
import modelq.quantization as mtq
from modelq import streaming

LAYER = "model.layers.0."


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


def generated(model, llama):  # noqa: F811
    return model.generate(llama.calib[:2, :12], max_new_tokens=12, eos_token_id=[])


def said(model, llama):  # noqa: F811
    """What it generates, a forward's logits, and the bytes of its weights in memory."""
    return generated(model, llama), np.asarray(model(llama.calib[:2]).logits), model.decoding().nbytes


def as_numbers(model):
    """The model with its weights as numbers: what a forward computes with is what its quantizers make of them."""
    return mtq.fold_weight(model)


def nbytes_of_linears(model):
    return sum(2 * row["shape"][0] * row["shape"][1] for row in model.modules if row["kind"] == "linear" and row["layer"] >= 0)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_say_what_numbers_say(name, llama):  # noqa: F811
    made = [mtq.quantize(modelq.load(llama.source, compute="bfloat16"), FORMATS[name], lambda model: model(llama.calib[:2])) for _ in range(3)]
    expected = generated(as_numbers(made[0]), llama)
    assert np.array_equal(generated(made[1], llama), expected)
    assert np.array_equal(generated(mtq.compress(made[2]), llama), expected)
    saved = made[0].decoding().nbytes - made[1].decoding().nbytes
    assert made[1].decoding().nbytes == made[2].decoding().nbytes
    # Tables of scales' numbers, 8 KB a linear, weigh on a model this small; linears as numbers would save nothing.
    least = 0.3 if "8" in name else 0.45
    assert saved > least * nbytes_of_linears(made[0]) - 14 * 8500


@pytest.mark.parametrize("dialect, name", EXPORTS)
def test_reopened_exports_multiply_codes(dialect, name, llama, exported, monkeypatch):  # noqa: F811
    model = modelq.load(exported(dialect, name), compute="bfloat16")
    found, logits, nbytes = said(model, llama)
    with monkeypatch.context() as patch:        # read as numbers, as the checkpoint gives them
        patch.setattr(streaming, "stored", lambda *_: None)
        model.forget_decoding()
        expected, expected_logits, plain = said(model, llama)
    assert np.array_equal(found, expected) and np.array_equal(logits, expected_logits)
    assert plain - nbytes > 0.3 * nbytes_of_linears(model) - 14 * 8500


def test_float32_compute(llama, exported, monkeypatch):  # noqa: F811
    """Numbers of the model's dtype, as float32."""
    model = modelq.load(exported("modelopt", "nvfp4"), compute="float32")
    found, _, nbytes = said(model, llama)
    monkeypatch.setattr(streaming, "stored", lambda *_: None)
    model.forget_decoding()
    expected, _, plain = said(model, llama)
    assert np.array_equal(found, expected) and plain - nbytes > nbytes_of_linears(model)


def test_a_block_that_no_kernel_knows_is_read_as_numbers(llama):  # noqa: F811
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 24}}},
                            {"quantizer_name": "*lm_head*", "enable": False}], "algorithm": "max"}
    model, folded = (mtq.quantize(modelq.load(llama.source, compute="bfloat16"), config, lambda model: None) for _ in range(2))
    assert np.array_equal(generated(model, llama), generated(as_numbers(folded), llama))
    assert model.decoding().nbytes == folded.decoding().nbytes


def test_a_quantized_head_is_codes_too(llama):  # noqa: F811
    config = {"quant_cfg": [*mtq.NVFP4_DEFAULT_CFG["quant_cfg"],
                            {"quantizer_name": "*lm_head.weight_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True}], "algorithm": "max"}
    made = [mtq.quantize(modelq.load(llama.source, compute="bfloat16"), config, lambda model: model(llama.calib[:2])) for _ in range(2)]
    head = next(row for row in made[0].modules if row["name"] == "lm_head")
    plain = mtq.quantize(modelq.load(llama.source, compute="bfloat16"), mtq.NVFP4_DEFAULT_CFG, lambda model: model(llama.calib[:2]))
    assert plain.decoding().nbytes - made[0].decoding().nbytes > 0.9 * head["shape"][0] * head["shape"][1]
    assert np.array_equal(generated(made[0], llama), generated(as_numbers(made[1]), llama))


def test_what_needs_numbers_still_has_them(llama, exported):  # noqa: F811
    """Gradients, calibration and folding of a model whose weights are codes elsewhere."""
    model = modelq.load(exported("modelopt", "nvfp4"), compute="bfloat16")
    generated(model, llama)
    weight = model.checkpoint.read(LAYER + "self_attn.q_proj.weight")
    assert weight.dtype.itemsize == 2 and np.isfinite(weight.astype(np.float32)).all()
    assert model.loss([llama.calib[:2]]) > 0


def tensors_of(model, layer):
    return streaming.read_stored(model, model.runtime.layer_tensors(layer), model.modules_of(layer))


def test_parts_are_checked(llama, exported):  # noqa: F811
    model = modelq.load(exported("modelopt", "nvfp4"), compute="bfloat16")
    tensors = tensors_of(model, 0)
    name = LAYER + "self_attn.q_proj.weight"
    parts, scheme, dtype, size = tensors[name]
    bad = {role: np.array(part) for role, part in parts.items()}
    bad["weight_scale_2"] = np.float32(np.nan)
    for value, error, words in [((bad, scheme, dtype, size), ValueError, "contains NaN"),
                                ((parts, "fp5", dtype, size), ValueError, "unknown scheme"),
                                ((parts, scheme, "int8", size), ValueError, "dtype: expected float32"),
                                ((parts, scheme), TypeError, "4"),
                                (({"weight": parts["weight"]}, scheme, dtype, size), ValueError, "'weight_scale' is missing"),
                                (({**parts, "weight": parts["weight"][:, :8]}, scheme, dtype, size), ValueError, "expected")]:
        with pytest.raises(error, match=words):
            model.runtime.load_layer(0, {**tensors, name: value})
    norm = LAYER + "input_layernorm.weight"
    with pytest.raises((TypeError, ValueError), match=norm):
        model.runtime.load_layer(0, {**tensors, norm: tensors[name]})
    model.runtime.load_layer(0, tensors)
    model.runtime.drop_layer(0)


def test_gpt_oss_experts_stay_mxfp4(tmp_path, monkeypatch):
    """As they are published: stacks of codes that no calibration touched."""
    rng, wide, layers = np.random.default_rng(0), 256, 2
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": wide, "intermediate_size": wide,
              "vocab_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
              "rope_theta": 1e4,
              "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True, "tie_word_embeddings": False,
              "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}

    def normal(*shape):
        return (rng.standard_normal(shape) * 0.05).astype(ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(96, wide), "lm_head.weight": normal(96, wide), "model.norm.weight": normal(wide) + 1}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (("q", 64, wide), ("k", 32, wide), ("v", 32, wide), ("o", wide, 64)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, columns)
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows)
        tensors |= {f"{prefix}self_attn.sinks": normal(4), f"{prefix}mlp.router.weight": normal(4, wide)}
        tensors[f"{prefix}mlp.router.bias"] = normal(4)
        tensors |= {f"{prefix}{name}_layernorm.weight": normal(wide) + 1 for name in ("input", "post_attention")}
        for name, rows in (("gate_up_proj", 2 * wide), ("down_proj", wide)):
            stack = f"{prefix}mlp.experts.{name}"
            tensors[f"{stack}_blocks"] = rng.integers(0, 256, (4, rows, wide // 32, 16)).astype(np.uint8)
            tensors[f"{stack}_scales"] = rng.integers(119, 123, (4, rows, wide // 32)).astype(np.uint8)
            tensors[f"{stack}_bias"] = normal(4, rows)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    model, ids = modelq.load(tmp_path, compute="bfloat16"), rng.integers(0, 96, (2, 10))

    def answers():
        model.forget_decoding()
        return model.generate(ids, max_new_tokens=8), np.asarray(model(ids).logits), model.decoding().nbytes
    found, logits, nbytes = answers()
    monkeypatch.setattr(streaming, "stored", lambda *_: None)
    expected, expected_logits, plain = answers()
    assert np.array_equal(found, expected) and np.array_equal(logits, expected_logits) and np.ptp(logits) > 1
    assert plain - nbytes > 0.5 * 2 * layers * 4 * 3 * wide * wide
