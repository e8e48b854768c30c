"""The golden subset is whole, and readable without modelq."""
import golden_data
import pytest


def test_golden_models_are_there(golden):
    assert {"llama", "qwen3"} <= set(golden)


@pytest.mark.parametrize("model", golden_data.models(any_family=True))
def test_source_calib_and_logits(model):
    tensors = golden_data.read_safetensors(model.source)
    assert tensors["model.embed_tokens.weight"].dtype.name == "bfloat16"
    assert model.calib.shape == (8, 64) and model.calib.dtype.name == "int64"
    assert model.logits.shape == (1, 64, tensors["model.embed_tokens.weight"].shape[0])


def test_both_first_configs_have_whole_exports():
    cases = golden_data.cases(dtype="bfloat16", configs=["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"], names=["llama", "qwen3"],
                              needs=["amax.safetensors", "model.safetensors", "config.json", "hf_quant_config.json"])
    assert len(cases) == 4
    for case in cases:
        assert case.values[0].exported and case.values[0].amax
