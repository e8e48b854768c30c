"""A process that answers from transformers: one JSON order per line on stdin, one answer per line on stdout behind "ANSWER ".

    .venv-engines/bin/python tests/engines/run_transformers.py

Order: {"folder", "prompts": [[ids]], "tokens": N, "rows": [[ids]], "logits": FILE.npy, "dequantize": bool, "dtype"}, or {"make": arguments of
make_model.make}. Answer: {"tokens": [[ids]], "class", and
"unexpected": names of stored tensors that the model did not take, "missing": those it wanted}, or {"error": text}. The logits of the
rows are written to FILE. "dequantize": the weights are decompressed on loading and activations stay as they are; else compressed-tensors'
own modules run, which also fake-quantize activations.
"""
import json
import os
import sys
import traceback

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import numpy as np
import torch
import transformers
from make_model import make

torch.set_num_threads(2)


def quantization(order):
    with open(os.path.join(order["folder"], "config.json")) as file:
        method = json.load(file).get("quantization_config", {}).get("quant_method")
    if order.get("dequantize") and method == "compressed-tensors":
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def answer(order):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        order["folder"], dtype=getattr(torch, order.get("dtype", "bfloat16")), output_loading_info=True,
        attn_implementation="eager", **quantization(order))   # the others leave Gemma 2's soft caps out
    model.eval()
    with torch.no_grad():
        np.save(order["logits"], model(torch.tensor(order["rows"])).logits.float().numpy())
        rows = torch.tensor(order["prompts"])
        for _ in range(order["tokens"]):
            rows = torch.cat([rows, model(rows, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return {"tokens": rows[:, -order["tokens"]:].tolist(), "class": type(model).__name__,
            "unexpected": sorted(map(str, report["unexpected_keys"])), "missing": sorted(map(str, report["missing_keys"]))}


for line in sys.stdin:
    try:
        order = json.loads(line)
        reply = make(**order["make"]) if "make" in order else answer(order)
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    print("ANSWER " + json.dumps(reply), flush=True)
