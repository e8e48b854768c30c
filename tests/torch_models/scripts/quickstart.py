import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.utils.dataset_utils import create_forward_loop, get_dataset_dataloader

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token

dataloader = get_dataset_dataloader(dataset_name=DATA, tokenizer=tokenizer, batch_size=2, num_samples=4, max_sample_length=32)
forward_loop = create_forward_loop(dataloader=dataloader)

prompt = tokenizer("Hello world", return_tensors="pt")
before = model.generate(**prompt, max_new_tokens=8, do_sample=False)

model = mtq.quantize(model, getattr(mtq, FORMAT), forward_loop)
mtq.print_quant_summary(model)

after = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print("before:", tokenizer.decode(before[0]), "after:", tokenizer.decode(after[0]))

with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=EXPORT)
tokenizer.save_pretrained(EXPORT)
