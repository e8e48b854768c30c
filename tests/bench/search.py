"""What AWQ's search costs, by the number of calibration tokens, and whether bfloat16 products rank its candidates as float32 ones do.

    python tests/bench/search.py [--samples 16 64 256] [--markdown]

SmolLM2-135M-Instruct in bfloat16 (made by end_to_end.py), INT4_AWQ_CFG in blocks of 64, N x L tokens of the standard library's help texts,
from the start again where they end. "search" is the time between the last token of a part of a layer and the first of the next one: Gram
matrices are there, and for every linear eleven smoothed weights are quantized and their losses computed. "the rest" is what tokens need:
the forward, and the sums X^T X and |x| over them.
"""
from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
from end_to_end import BLOCK, config_of, prepare, print_rows  # noqa: E402

import modelq  # noqa: E402
import modelq.quantization as mtq  # noqa: E402
from modelq.calibration import smooth  # noqa: E402


def quantize(folder: Path, tokens: np.ndarray) -> tuple[float, float, dict[str, np.ndarray]]:
    """(seconds, those of the search, losses by module and alpha)."""
    spent, search = [], smooth.AwqLite.search

    def timed(self, part, inputs):
        started = time.perf_counter()
        search(self, part, inputs)
        spent.append(time.perf_counter() - started)

    smooth.AwqLite.search = timed
    try:
        model = modelq.load(folder)
        started = time.perf_counter()
        mtq.quantize(model, config_of(mtq, "INT4_AWQ_CFG"), lambda model: [model(tokens[at:at + 8]) for at in range(0, len(tokens), 8)])
        return time.perf_counter() - started, sum(spent), model.search_losses
    finally:
        smooth.AwqLite.search = search


def ranking(folder: Path, tokens: np.ndarray) -> list[tuple[str, ...]]:
    """The choices by losses of bfloat16 products, judged by those of float32 products, from the same statistics."""
    found = {}
    for compute in ("bfloat16", "float32"):
        chosen, smooth.gram_compute = smooth.gram_compute, lambda model: compute
        try:
            found[compute] = quantize(folder, tokens)[2]
        finally:
            smooth.gram_compute = chosen
    fast, exact = found["bfloat16"], found["float32"]
    picks = {name: (exact[name][np.argmin(fast[name])], exact[name].min()) for name in exact}
    apart = [abs(fast[name] / exact[name] - 1).max() for name in exact]
    same = sum(int(np.argmin(fast[name]) == np.argmin(exact[name])) for name in exact)
    worst = max(taken / least - 1 for taken, least in picks.values())
    return [("linears", "same alpha", "losses apart, at most", "loss given away, at most"),
            (str(len(exact)), str(same), f"{max(apart):.1e}", f"{worst:.1e}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-bench-{os.getuid()}")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    prepare(options.work, 1, 100_000)
    text = np.load(options.work / "tokens.npy").ravel()
    tokens = {samples: np.resize(text, (samples, options.seq_len)) for samples in options.samples}
    rows = [("samples", "tokens", "seconds", "of them search", "the rest", "peak MB so far")]
    for samples in options.samples:
        seconds, search, _ = quantize(options.work / "model", tokens[samples])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append((str(samples), str(tokens[samples].size), f"{seconds:.1f}", f"{search:.2f}", f"{seconds - search:.1f}", f"{peak:.0f}"))
    print(f"INT4_AWQ_CFG, blocks of {BLOCK}")
    print_rows(rows, options.markdown)
    print()
    print_rows(ranking(options.work / "model", tokens[options.samples[0]]), options.markdown)


if __name__ == "__main__":
    main()
