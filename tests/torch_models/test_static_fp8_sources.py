"""Static FP8 checkpoints (native spellings, and compressed-tensors' own) by transformers' model with compressed-tensors' arithmetic: every linear's
weight dequantized, its input quantized, by that library's functions."""
import json

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from safetensors.torch import load_file, save_file

import modelq
from micro_models import build, inputs, save
from modelq.export import convert_checkpoint

ARGS = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
LOGITS = 2e-4
SPELLINGS = {"vllm": ("weight_scale", "input_scale"), "transformers": ("weight_scale_inv", "activation_scale")}


def quantized(model):
    """{linear: (codes, weight scale, input scale)} by compressed-tensors' observers' rule (amax / 448), of what `inputs` gives each linear; model
    afterwards computes with them."""
    found, seen = {}, {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    hooks = [module.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0].abs().max()))
             for name, module in linears.items()]
    with torch.no_grad():
        model(torch.from_numpy(inputs()[0]))
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        scale, given = module.weight.detach().abs().max() / 448, seen[name] / 448
        codes = (module.weight.detach() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[name] = codes, scale.reshape(1), given.reshape(1)
        module.weight.data = dequantize(codes, scale=scale.reshape(1), zero_point=None, args=ARGS)
        module.register_forward_pre_hook(lambda _, inputs, given=given: (
            fake_quantize(inputs[0], scale=given.reshape(1), zero_point=torch.zeros(1), args=ARGS), *inputs[1:]))
    return found


@pytest.mark.parametrize("name", ["llama yarn", "phi3", "gemma3"])
def test_logits(name, tmp_path):
    theirs = build(name)
    folder = save(theirs, tmp_path / "static")
    found = quantized(theirs)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(inputs()[0])).logits.numpy()
        plain = build(name)(torch.from_numpy(inputs()[0])).logits.numpy()
    assert np.abs(wanted - plain).max() > 50 * LOGITS
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for spelling, (weight_scale, input_scale) in SPELLINGS.items():
        stored = dict(tensors)
        for linear, (codes, scale, given) in found.items():
            stored |= {f"{linear}.weight": codes, f"{linear}.{weight_scale}": scale, f"{linear}.{input_scale}": given}
        save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}))
        converted = [convert_checkpoint(folder, tmp_path / f"{spelling}-{dialect}", dialect=dialect)
                     for dialect in ("modelopt", "compressed-tensors")]
        for opened in (folder, *converted):
            logits = modelq.load(opened, compute="float32")(inputs()[0]).logits
            assert np.linalg.norm(logits - wanted) < 0.02 * np.linalg.norm(wanted - plain), opened
