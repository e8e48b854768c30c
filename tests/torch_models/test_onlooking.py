"""moe_calib_experts_ratio of a torch model and of the native one: the same statistics, and models that compute what they did."""
import numpy as np
import pytest
import torch
import transformers
import modelq
import modelq.quantization as mtq
from modelq.torch_models.routing import onlooking

IDS = np.random.default_rng(0).integers(0, 96, (2, 24))
FAMILIES = {
    "qwen3_moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, dict(num_experts=8, moe_intermediate_size=32, head_dim=16)),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, dict(num_local_experts=8, head_dim=16)),
}


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    torch.manual_seed(0)
    kind, config, more = FAMILIES[request.param]
    model = kind(config(vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        num_experts_per_tok=2, sliding_window=None, **more)).eval()
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m", model


@pytest.mark.parametrize("ratio", [None, 0.5, 1.0])
def test_more_experts_look_on_as_in_the_native_model(saved, ratio):
    folder, model = saved
    native = modelq.load(folder, compute="float32")
    config = {**mtq.FP8_DEFAULT_CFG, "algorithm": {"method": "max", "moe_calib_experts_ratio": ratio}}
    mtq.quantize(native, config, lambda model: model(IDS))
    before = model(torch.from_numpy(IDS)).logits
    with onlooking(model, ratio):
        assert torch.equal(before, model(torch.from_numpy(IDS)).logits)
    assert all("forward" not in vars(module) for module in model.modules())
    mtq.quantize(model, config, lambda model: model(torch.from_numpy(IDS)))
    compared = 0
    for name, module in model.named_modules():
        if name.endswith("_input_quantizer") and "experts" in name and module.is_enabled:
            assert float(module.amax) == pytest.approx(float(native.quantizers[name].amax), rel=1e-4), name
            compared += 1
    assert compared == 4 and native.expert_tokens[0].sum() == IDS.size * {None: 2, 0.5: 4, 1.0: 8}[ratio]
