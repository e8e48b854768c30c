"""save and restore of what quantization made of a native model. (tests/torch_models has torch's.)"""
import json

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq

CONFIGS = {**{name: getattr(mtq, name) for name in (
    "FP8_DEFAULT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "INT8_SMOOTHQUANT_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "INT4_GPTQ_CFG",
    "NVFP4_GPTQ_CFG")}, "rotated": {**mtq.FP8_DEFAULT_CFG, "algorithm": ["rotate", "max"]}}
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")


def load(golden_model):
    return modelq.load(golden_model.source, compute="bfloat16")


def quantized(golden_model, config):
    return mtq.quantize(load(golden_model), config, lambda model: model(golden_model.calib))


@QUIET
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_restored_it_computes_the_same(golden, family, name, tmp_path):
    model, ids = quantized(golden[family], CONFIGS[name]), golden[family].calib[:1]
    assert modelq.save(model, tmp_path / "state") == tmp_path / "state"
    other = modelq.restore(load(golden[family]), tmp_path / "state")
    np.testing.assert_array_equal(other(ids).logits, model(ids).logits)
    assert other.quantized and "pickle" not in (tmp_path / "state" / "quantizers.json").read_text()
    modelq.save(other, tmp_path / "again")
    for file in ("quantizers.json", "quantizers.safetensors"):
        assert (tmp_path / "state" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_quantized_model_takes_another_state(golden, tmp_path):
    first, second = quantized(golden["llama"], CONFIGS["rotated"]), quantized(golden["llama"], mtq.FP8_DEFAULT_CFG)
    modelq.save(second, tmp_path)
    modelq.restore(first, tmp_path)
    np.testing.assert_array_equal(first(golden["llama"].calib[:1]).logits, second(golden["llama"].calib[:1]).logits)


@pytest.mark.parametrize("damage", ["other model", "version", "json", "tensors", "missing"])
def test_what_is_not_restored(golden, damage, tmp_path):
    modelq.save(quantized(golden["llama"], mtq.FP8_DEFAULT_CFG), tmp_path)
    model, words = load(golden["qwen3moe" if damage == "other model" else "llama"]), tmp_path / "quantizers.json"
    if damage == "version":
        words.write_text(json.dumps({"version": 99}))
    elif damage == "json":
        words.write_text("{")
    elif damage == "tensors":
        (tmp_path / "quantizers.safetensors").write_bytes(b"0" * 20)
    elif damage == "missing":
        words.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        modelq.restore(model, tmp_path)
    assert not model.quantized and not model.quantizers
    with pytest.raises(ValueError, match="not quantized yet"):
        modelq.save(model, tmp_path)
