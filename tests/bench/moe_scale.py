"""A model with DeepSeek-R1's layers and experts (made up, narrowed: make_moe.py), quantized from folder to folder: how long, in how much memory.

    python tests/bench/moe_scale.py [--family deepseek_v3|qwen3_moe] [--dtype bfloat16|fp8] [--gib 11] [--jobs NAMES] [--work DIR] [--keep]

Each job runs in a process of its own; "peak MB" is its VmHWM, pages of mapped files included, and the process ends with an error if that is
over 4 GiB. "weights-only" jobs do not run the model. Needs one and a half times the checkpoint's size in free disk space.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
LIMIT_MB = 4 * 1024 ** 3 / 1e6
# name -> (preset, whether the model is opened for its weights alone, moe_calib_experts_ratio)
JOBS = {
    "nvfp4": ("NVFP4_DEFAULT_CFG", False, None), "nvfp4 ratio": ("NVFP4_DEFAULT_CFG", False, 0.25),
    "nvfp4 searched": ("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", False, None), "fp8": ("FP8_DEFAULT_CFG", False, None),
    "nvfp4 weights-only": ("W4A16_NVFP4_CFG", True, None), "int4 weights-only": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", True, None),
    "fp8 blocks weights-only": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", True, None),
}


def job(source: str, name: str, out: str) -> None:
    import modelq
    import modelq.quantization as mtq
    from make_moe import VOCABULARY
    from modelq.export import export_hf_checkpoint
    from weight_only import status

    preset, weights_only, ratio = JOBS[name]
    config = {**getattr(mtq, preset)}
    if ratio is not None:
        config["algorithm"] = {"method": "max", "moe_calib_experts_ratio": ratio}
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (4, 128))
    start = time.perf_counter()
    model = modelq.load(source, weights_only=weights_only)
    opened = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mtq.quantize(model, config, lambda model: [model(row[None]) for row in ids])
    quantized, before = time.perf_counter(), status("VmHWM")
    export_hf_checkpoint(model, out, max_shard_size="2GB")
    unseen = sum(len(experts) for experts in model.unseen_experts.values())
    print(json.dumps({"open": opened - start, "quantize": quantized - opened, "export": time.perf_counter() - quantized,
                      "quantize_mb": before, "peak_mb": status("VmHWM"), "unseen": unseen}))


def main() -> None:
    from make_moe import make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["deepseek_v3", "qwen3_moe"], default="deepseek_v3")
    parser.add_argument("--dtype", choices=["bfloat16", "fp8"], default="bfloat16")
    parser.add_argument("--gib", type=float, default=11.0)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=["nvfp4", "nvfp4 weights-only"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-moe-{os.getuid()}")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return job(*options.child)
    source, out = options.work / f"{options.family}-{options.dtype}-{options.gib:g}-{options.layers}-{options.experts}", options.work / "out"
    options.work.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    try:
        if not source.exists():
            make(source, options.family, options.gib, options.dtype, options.layers, options.experts)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{options.family}, {options.dtype}: {options.layers} layers, {options.experts} experts, {size / 2**30:.2f} GiB in "
              f"{len(list(source.glob('*.safetensors')))} shards", flush=True)
        print(f"{'job':24} {'open s':>7} {'quantize s':>10} {'export s':>9} {'MB then':>8} {'peak MB':>8} {'unseen':>7} {'out GiB':>8}")
        for name in options.jobs:
            shutil.rmtree(out, ignore_errors=True)
            done = subprocess.run([sys.executable, __file__, "--child", str(source), name, str(out)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            written = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**30
            print(f"{name:24} {found['open']:7.1f} {found['quantize']:10.1f} {found['export']:9.1f} {found['quantize_mb']:8.0f} "
                  f"{found['peak_mb']:8.0f} {found['unseen']:7} {written:8.2f}", flush=True)
            worst = max(worst, found["peak_mb"])
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)
    if worst > LIMIT_MB:
        raise SystemExit(f"{worst:.0f} MB: over {LIMIT_MB:.0f} MB")


if __name__ == "__main__":
    main()
