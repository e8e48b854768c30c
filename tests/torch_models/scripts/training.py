import torch
from transformers import AutoModelForCausalLM

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
ids = torch.arange(128).reshape(4, 32)
mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(ids))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
export_hf_checkpoint(model.eval(), export_dir=EXPORT)
