import copy

import torch
from transformers import AutoModelForCausalLM

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
ids = torch.arange(64).reshape(2, 32)

config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
mtq.quantize(model, config, lambda model: model(ids))
for name, module in model.named_modules():
    if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer")):
        assert module.is_enabled and module.amax is not None, name

# The cache by itself, afterwards: calibrate its quantizers only.
entries = [{"quantizer_name": "*", "enable": False}, *mtq.FP8_KV_CFG["quant_cfg"]]
with mtq.set_quantizer_by_cfg_context(model, entries):
    mtq.calibrate(model, algorithm="max", forward_loop=lambda model: model(ids))
export_hf_checkpoint(model, export_dir=EXPORT)
