import torch
from transformers import AutoModelForCausalLM

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
ids = torch.arange(64).reshape(2, 32)
mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(ids))
mto.save(model, STATE)

restored = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
mto.restore(restored, STATE)
with torch.no_grad():
    assert torch.equal(model(ids).logits, restored(ids).logits)
