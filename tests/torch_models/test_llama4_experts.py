"""Llama 4's experts in a transformers model: quantized like other stacks, though their container is given every token for every expert."""
import numpy as np
import pytest
import torch

import modelq.quantization as mtq
from micro_models import build, inputs

EXPERTS = {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                         {"quantizer_name": "*experts*weight_quantizer*", "cfg": {"num_bits": (4, 3)}, "enable": True},
                         {"quantizer_name": "*experts*input_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True}], "algorithm": "max"}


def fp8(x, amax):
    """By torch's own cast."""
    scale = amax.float() / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.fixture
def quantized():
    model, ids = build("llama4"), torch.from_numpy(inputs()[0])
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("feed_forward.experts"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone()))
    mtq.quantize(model, EXPERTS, lambda model: model(ids))
    return model, ids, seen


def test_it_computes_with_quantized_weights_and_inputs(quantized):
    """The original's products, written down: each expert's weights by its own maximum, inputs by that of all tokens that were some expert's."""
    model, ids, seen = quantized
    assert sorted(seen) == ["model.layers.1.feed_forward.experts", "model.layers.3.feed_forward.experts"]
    for name, x in seen.items():
        module = model.get_submodule(name)
        given = x.view(module.num_experts, -1, x.shape[-1])
        assert not given.any(-1).all() and given.any(-1).any()
        both, down = (torch.stack([fp8(expert, expert.abs().max()) for expert in getattr(module, matrix).detach()])
                      for matrix in ("gate_up_proj", "down_proj"))
        np.testing.assert_allclose(module.gate_up_proj_input_quantizer.amax, given.abs().max(), rtol=1e-6)
        gate, up = torch.bmm(fp8(given, given.abs().max()), both).chunk(2, -1)
        inner = up * module.act_fn(gate)
        wanted = torch.bmm(fp8(inner, torch.as_tensor(module.down_proj_input_quantizer.amax)), down).view(x.shape)
        with torch.no_grad():
            found = module(x)
        assert (found - wanted).norm() < 1e-3 * wanted.norm()
        plain = type(module).original_class.forward(module, x)
        assert (plain - wanted).norm() > 0.01 * wanted.norm()
        assert not found.view(given.shape)[~given.any(-1)].any()


def test_nothing_is_changed_while_they_are_off_and_gradients_pass(quantized):
    model, ids, _ = quantized
    plain = build("llama4")
    loss = model(ids, labels=ids).loss
    loss.backward()
    for layer in (1, 3):
        experts = model.model.layers[layer].feed_forward.experts
        assert all(torch.isfinite(stack.grad).all() and stack.grad.abs().sum() > 0 for stack in (experts.gate_up_proj, experts.down_proj))
    mtq.disable_quantizer(model, "*")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_experts_that_saw_no_token_are_named():
    model = build("llama4")
    with pytest.warns(UserWarning, match="experts that saw no token .model.layers.1.feed_forward.experts: . of 4"):
        mtq.quantize(model, EXPERTS, lambda model: model(torch.from_numpy(inputs()[0][:1, :1])))
