import torch
from transformers import AutoModelForCausalLM

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
ids = torch.arange(64).reshape(2, 32)

CUSTOM_CFG = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}},
        {"quantizer_name": "*self_attn*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
        {"quantizer_name": "*self_attn*input_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
        {"quantizer_name": "*layers.0.*", "enable": False},
        {"quantizer_name": "*lm_head*", "enable": False},
    ],
    "algorithm": "max",
}
mtq.quantize(model, CUSTOM_CFG, lambda model: model(ids))

mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
assert mlp.up_proj.weight_quantizer.num_bits == 4 and mlp.up_proj.weight_quantizer.block_sizes[-1] == 32
assert attention.q_proj.input_quantizer.is_enabled and not mlp.up_proj.input_quantizer.is_enabled
assert not model.model.layers[0].mlp.up_proj.weight_quantizer.is_enabled and not model.lm_head.weight_quantizer.is_enabled

mtq.disable_quantizer(model, "*self_attn*")
mtq.enable_quantizer(model, lambda name: "q_proj" in name and "output" not in name and "layers.1" in name)
mtq.set_quantizer_attributes_partial(model, "*mlp.up_proj.weight_quantizer", {"block_sizes": {-1: 64}})
assert mlp.up_proj.weight_quantizer.block_sizes[-1] == 64

# A user's own code between quantizers.
for name, module in model.named_modules():
    if hasattr(module, "input_quantizer") and module.input_quantizer.is_enabled:
        module.input_quantizer.amax = module.input_quantizer.amax * 0.9
mtq.set_quantizer_by_cfg(model, CUSTOM_CFG["quant_cfg"])
mtq.calibrate(model, "max", lambda model: model(ids))
