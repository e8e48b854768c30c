"""Seconds and rates of Gram matrices X^T X beside NumPy's float32 product and the GEMM's own rate.

    MODELQ_TESTING=1 python setup.py build_ext --inplace
    python tests/bench/gram.py [--threads 1,2] [--tokens 16384] [--widths 576,1536] [--seconds 1]

Rates count the whole product, 2 tokens C^2, as NumPy computes it (OpenBLAS may use syrk for x.T @ x: half the work there too); the
GEMM is the same shape, [C, tokens] times [tokens, C], packing left out. "useful" divides H's rate by the GEMM's: 2 would be half the work at
the GEMM's full speed. H's time is that of a calibrator: packing, the product, and the sums in float64. Every cell is the fastest
repetition within --seconds.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys

import numpy as np
from gemm import aligned, fastest


def gram(x, seconds: float, option: int = 0) -> float:
    from modelq import _core as core

    def run() -> None:
        calibrator = core.Calibrator("gram", None, option)
        calibrator.collect(x)
        calibrator.merge(core.Calibrator("gram", None, option))     # nothing may be left aside
    return fastest(run, seconds)


def product(x, bf16: bool, seconds: float) -> float:
    from modelq import _testing as testing

    padded = np.zeros((x.shape[1], x.shape[0] + 32), x.dtype)       # rows a power of two apart would slow the GEMM down
    padded[:, :x.shape[0]] = x.T
    left, out = aligned(padded), aligned(np.zeros((x.shape[1],) * 2, np.float32))
    pack, run = testing.gemm(bf16, left, left, out)
    return testing.gemm(bf16, left, left, out, repeat=max(3, int(seconds / (pack + run))))[1]


def rows(tokens: int, widths: list[int], seconds: float) -> None:
    import ml_dtypes

    print(f"{'tokens x C':>14}{'H bf16':>10}{'H f32':>10}{'blocks 16':>11}{'blocks 128':>11}{'numpy f32':>11}   s |"
          f"{'H bf16':>9}{'GEMM':>9}{'useful':>8}{'H f32':>9}{'GEMM':>9}{'useful':>8}{'numpy':>9}   GFLOP/s")
    for width in widths:
        x = np.random.default_rng(0).standard_normal((tokens, width), np.float32)
        half = aligned(x.astype(ml_dtypes.bfloat16))
        times = [gram(half, seconds), gram(x, seconds), gram(half, seconds, 16), gram(half, seconds, 128), fastest(lambda: x.T @ x, seconds)]
        work = 2e-9 * tokens * width * width
        rates = [work / product(half, True, seconds), work / product(x, False, seconds)]
        print(f"{f'{tokens} x {width}':>14}{times[0]:10.4f}{times[1]:10.4f}{times[2]:11.4f}{times[3]:11.4f}{times[4]:11.4f}     |"
              f"{work / times[0]:9.0f}{rates[0]:9.0f}{work / times[0] / rates[0]:8.2f}{work / times[1]:9.0f}{rates[1]:9.0f}"
              f"{work / times[1] / rates[1]:8.2f}{work / times[4]:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, len(os.sched_getaffinity(0))}))))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--widths", default="576,1536")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return rows(args.tokens, [int(width) for width in args.widths.split(",")], args.seconds)
    for threads in args.threads.split(","):       # a process each: OpenBLAS and modelq read these once
        print(f"{threads} thread{'' if threads == '1' else 's'}", flush=True)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "MODELQ_NUM_THREADS": threads}
        command = [sys.executable, __file__, "--one", "--tokens", str(args.tokens), "--widths", args.widths, "--seconds", str(args.seconds)]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
