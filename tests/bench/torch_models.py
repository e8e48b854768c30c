"""What calibration costs beside the forward that it watches, on a transformers model in float32: modelq against nvidia-modelopt.

    python tests/bench/torch_models.py --python /path/to/env/bin/python --reference-python /path/to/env/bin/python

--python: an environment with torch, transformers and modelq; --reference-python: one with nvidia-modelopt. For each side and config, in a
process of its own: the plain forward over the data, then quantize() over the same data, then the forward of the quantized model,
again and again; the medians count. "calibration adds": what quantize() takes beyond the plain forward next to it, as a share of that.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")


def child(side: str, work: str, config: str, batch: int, rounds: int, clock: str) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    if side == "modelq":
        import modelq.quantization as mtq
    else:
        import modelopt.torch.quantization as mtq
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ids = torch.from_numpy(np.load(f"{work}/tokens.npy"))

    @torch.no_grad()
    def forward_loop(model) -> None:
        for start in range(0, len(ids), batch):
            model(ids[start:start + batch])

    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]

    def seconds(work, *arguments) -> float:
        started = now()
        work(*arguments)
        return now() - started

    plain, quantize, quantized = [], [], []
    for _ in range(rounds):
        model = AutoModelForCausalLM.from_pretrained(f"{work}/model", dtype=torch.float32).eval()
        seconds(model, ids[:batch])
        plain.append(seconds(forward_loop, model))
        quantize.append(seconds(mtq.quantize, model, getattr(mtq, config), forward_loop))
        try:
            quantized.append(seconds(forward_loop, model))
        except Exception:       # the reference needs CUDA for most formats of four bits
            quantized.append(float("nan"))
    adds = statistics.median(after / before - 1 for after, before in zip(quantize, plain))
    print(json.dumps({"plain": statistics.median(plain), "quantize": statistics.median(quantize), "adds": adds,
                      "quantized": statistics.median(quantized)}))


def run(side: str, python: str, options: argparse.Namespace, config: str) -> dict:
    count = str(options.threads)
    environment = {**os.environ, "MODELQ_NUM_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1",
                   "TQDM_DISABLE": "1"}
    command = [python, __file__, "--child", side, str(options.work), config, str(options.batch), str(options.rounds), options.clock]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} {config} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch, transformers and modelq")
    parser.add_argument("--reference-python", help="interpreter with torch and nvidia-modelopt")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-bench-{os.getuid()}")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, where the machine has other work too")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.path.remove(str(Path(__file__).resolve().parent))       # transformers would take kernels.py for a package that it uses
        side, work, config, batch, rounds, clock = options.child
        return child(side, work, config, int(batch), int(rounds), clock)
    from end_to_end import prepare, print_rows

    prepare(options.work, options.samples, options.seq_len)
    rows = [("config", "side", "plain forward", "quantize()", "calibration adds", "forward afterwards")]
    for config in options.configs:
        for side, python in (("modelq", options.python), ("nvidia-modelopt", options.reference_python)):
            if python:
                found = run(side, python, options, config)
                after = "needs CUDA" if found["quantized"] != found["quantized"] else f"{found['quantized']:.2f} s"
                rows.append((config, side, f"{found['plain']:.2f} s", f"{found['quantize']:.2f} s", f"{found['adds']:.1%}", after))
    print(f"SmolLM2-135M, float32, {options.samples} x {options.seq_len} tokens, batches of {options.batch}, {options.threads} threads, {options.clock} time")
    print_rows(rows, options.markdown)


if __name__ == "__main__":
    main()
