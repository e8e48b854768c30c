"""GFLOP/s of the matrix product and of attention, per micro-kernel and thread count, beside NumPy's OpenBLAS and torch.

    MODELQ_TESTING=1 python setup.py build_ext --inplace
    python tests/bench/gemm.py [--threads 1,2] [--kernels amx,avx512] [--shapes 512x1536x576] [--seconds 0.3]

Columns are kernels, rows are M x N x K (A [M, K] times W [N, K] transposed, weights packed before the clock starts); bf16
columns take and give bfloat16. Every cell is the fastest repetition within --seconds. The packing table is GB/s of weights
read, attention counts the multiplications of the causal half only. OpenBLAS gets one process for each number of threads,
as it reads OPENBLAS_NUM_THREADS once.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import numpy as np

SHAPES = [(512, 192, 576), (512, 576, 576), (512, 1536, 576), (512, 576, 1536), (512, 4096, 4096), (2048, 2048, 2048),
          (1, 1536, 576), (8, 4096, 4096)]
ATTENTION = [(512, 9, 3, 64), (2048, 9, 3, 64), (512, 32, 8, 128)]     # tokens, heads, key heads, size
KERNELS = [(False, "c"), (False, "avx2"), (False, "avx512"), (True, "avx512_bf16"), (True, "amx")]


def fastest(call, seconds: float) -> float:
    """The shortest of as many runs of call() as fit."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def available(testing, wanted: set[str]):
    for bf16, name in KERNELS:
        try:
            testing.force_kernel(bf16, name)
        except ValueError:
            continue
        if not wanted or name in wanted:
            yield bf16, name
        testing.force_kernel(bf16, None)


def aligned(array):
    """The same on a cache line, as modelq's own memory is: tiles whose rows straddle two lines load half as fast."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def operands(shape, dtype):
    rng = np.random.default_rng(0)
    m, n, k = shape
    return tuple(aligned(rng.standard_normal(size, np.float32).astype(dtype)) for size in ((m, k), (n, k)))


def bench_kernel(testing, case, shape, seconds: float) -> tuple[float, float]:
    """GFLOP/s of the product, GB/s of packing."""
    import ml_dtypes

    bf16, name = case
    m, n, k = shape
    testing.force_kernel(bf16, name)
    dtype = ml_dtypes.bfloat16 if bf16 else np.float32
    (a, w), c = operands(shape, dtype), aligned(np.zeros((m, n), dtype))
    pack, run = testing.gemm(bf16, a, w, c)
    repeat = max(3, min(1000, int(seconds / (pack + run))))
    pack, run = testing.gemm(bf16, a, w, c, repeat=repeat)
    testing.force_kernel(bf16, None)
    return 2e-9 * m * n * k / run, 1e-9 * w.nbytes / pack


def bench_attention(testing, case, shape, seconds: float) -> float:
    import ml_dtypes

    bf16, name = case
    tokens, heads, kv, size = shape
    testing.force_kernel(bf16, name)
    dtype = ml_dtypes.bfloat16 if bf16 else np.float32
    q, k, v, out = (aligned(np.ones((tokens, count, size), dtype)) for count in (heads, kv, kv, heads))
    repeat = max(3, min(1000, int(seconds / testing.attention(q, k, v, out, 0.1))))
    run = testing.attention(q, k, v, out, 0.1, repeat=repeat)
    testing.force_kernel(bf16, None)
    return 2e-9 * tokens * tokens * heads * size / run


def bench_others(threads: int, shape, seconds: float) -> dict[str, float]:
    """NumPy and, if it is there, torch, in this process."""
    m, n, k = shape
    a, w = operands(shape, np.float32)
    out = np.empty((m, n), np.float32)
    times = {"numpy f32": fastest(lambda: np.matmul(a, w.T, out=out), seconds)}
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None:
        torch.set_num_threads(threads)
        for name, dtype in (("torch f32", torch.float32), ("torch bf16", torch.bfloat16)):
            left, right = torch.from_numpy(a).to(dtype), torch.from_numpy(w).to(dtype)
            times[name] = fastest(lambda: torch.nn.functional.linear(left, right), seconds)
    return {name: 2e-9 * m * n * k / best for name, best in times.items()}


def others(threads: int, python: str, arguments: list[str]) -> dict[str, dict[str, float]]:
    """{shape: {library: GFLOP/s}} from a process of its own."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [python, __file__, "--others", "--threads", str(threads), *arguments]
    lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    rows: dict[str, dict[str, float]] = {}
    for line in lines:
        shape, library, value = line.split("\t")
        rows.setdefault(shape, {})[library] = float(value)
    return rows


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\n{title}\n{'':16}" + "".join(f"{name:>18}" for name in columns))
    for label, row in rows.items():
        print(f"{label:16}" + "".join(f"{row[name]:18.1f}" if name in row else " " * 18 for name in columns), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, len(os.sched_getaffinity(0))}))))
    parser.add_argument("--kernels", default="")
    parser.add_argument("--shapes", default=",".join("x".join(map(str, shape)) for shape in SHAPES))
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--python", default=sys.executable, help="the interpreter for NumPy and torch, if torch is in another environment")
    parser.add_argument("--others", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")]
    if args.others:
        for shape in shapes:
            for library, value in bench_others(int(args.threads), shape, args.seconds).items():
                print("x".join(map(str, shape)), library, value, sep="\t")
        return
    from modelq import _testing as testing

    cases = list(available(testing, set(filter(None, args.kernels.split(",")))))
    for threads in map(int, args.threads.split(",")):
        testing.pool_threads(threads)
        rest = others(threads, args.python, ["--shapes", args.shapes, "--seconds", str(args.seconds)])
        products, packing = {}, {}
        for shape in shapes:
            label = "x".join(map(str, shape))
            results = {f"{'bf16' if case[0] else 'f32'} {case[1]}": bench_kernel(testing, case, shape, args.seconds) for case in cases}
            products[label] = {name: run for name, (run, _) in results.items()} | rest[label]
            packing[label] = {name: pack for name, (_, pack) in results.items()}
        attention = {f"{t}x{h}/{g}x{d}": {name: bench_attention(testing, (bf16, name), (t, h, g, d), args.seconds) for bf16, name in cases}
                     for t, h, g, d in ATTENTION}
        plural = "" if threads == 1 else "s"
        table(f"product, GFLOP/s, {threads} thread{plural}", products)
        table(f"packing, GB/s, {threads} thread{plural}", packing)
        table(f"causal attention (tokens x heads/key heads x size), GFLOP/s, {threads} thread{plural}", attention)


if __name__ == "__main__":
    main()
