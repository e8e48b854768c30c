"""Writes generated.json: what transformers' generate makes of the golden models, in float32, greedily. Needs torch and transformers.

    python tests/data/make_generated.py GOLDEN

A prompt of two rows, the second padded on the left; once without an end, once with one of the tokens of the first row's answer as
the end. The margin is the least distance between the likeliest token and the next one: far above what two float32 forwards differ by.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

NEW, LENGTHS = 48, (12, 7)


def generated(folder: Path) -> dict:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    rows = [row[:length].tolist() for row, length in zip(np.load(folder / "calib.npy"), LENGTHS)]
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 3}
    whole = model.generate(ids, attention_mask=mask, eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options)
    best = torch.stack(whole.logits).topk(2).values
    tokens = whole.sequences.tolist()
    end = next(token for token in tokens[0][width + 4:] if token not in tokens[0][width:width + 4])
    ended = model.generate(ids, attention_mask=mask, eos_token_id=end, **options)
    return {"ids": ids.tolist(), "mask": mask.tolist(), "tokens": tokens, "margin": float((best[..., 0] - best[..., 1]).min()),
            "end": end, "ended": ended.tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: generated(Path(sys.argv[1]) / name) for name in ("llama", "qwen3", "qwen3moe")}
    Path(__file__).with_name("generated.json").write_text(json.dumps({"transformers": transformers.__version__, **found}) + "\n")
    print({name: (values["margin"], len(values["ended"][0])) for name, values in found.items()})
