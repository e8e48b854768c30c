"""Speed of quantizing a bfloat16 matrix, as a share of copying the same bytes.

    python tests/bench/kernels.py [--mb 128] [--repeat 7] [--all]

A row is one call over the whole matrix, through the thread pool; the time is the fastest of the repeats. "of copy" compares with
np.copyto of the input on as many threads, measured in the same minute. --all lists every scheme, and dequantize.
"""
import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

import modelq._core as core


def fastest(function, repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def copier(source: np.ndarray, threads: int):
    """A function that copies source to memory that is already mapped, on threads threads."""
    target = np.zeros_like(source)
    parts = [slice(i * len(source) // threads, (i + 1) * len(source) // threads) for i in range(threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))


def cases(weight: np.ndarray, every: bool):
    """(label, function) pairs. Results go into memory that is already mapped, as the copy's do."""
    amax, values = core.amax(weight), np.zeros_like(weight)
    yield "amax", lambda: core.amax(weight)
    for name, row in core.schemes().items():
        if not every and name not in ("fp8", "nvfp4"):
            continue
        known = amax if row["second_divisor"] or name == "fp8" else None
        parts = core.quantize(weight, name, amax=known)
        yield f"{name}: quantize", lambda: core.quantize(weight, name, amax=known, out=parts)
        yield f"{name}: fake-quantize", lambda: core.fake_quantize(weight, name, amax=known, out=values)
        if every:
            yield f"{name}: dequantize", lambda: core.dequantize(parts, name, dtype="bfloat16", out=values)
    fp8 = core.Quantizer((4, 3))
    nvfp4 = core.Quantizer((2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
    fp8.amax = nvfp4.amax = amax
    yield "fp8 activations: fake-quantize", lambda: fp8(weight, out=values)
    yield "nvfp4 activations: fake-quantize", lambda: nvfp4(weight, out=values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=128, help="size of the matrix (default 128)")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--all", action="store_true", help="every scheme, and dequantize")
    options = parser.parse_args()
    cols, rows = 4096, options.mb * 128
    weight = np.random.default_rng(0).standard_normal((rows, cols), np.float32).astype(ml_dtypes.bfloat16)
    info = core.cpu_info()
    copy = copier(weight, info["threads"])
    reference = fastest(copy, options.repeat)
    print(f"[{rows}, {cols}] bfloat16, {options.mb} MB, isa {info['isa']}, {info['threads']} threads; fastest of {options.repeat}")
    print(f"{'':34}{'ms':>9}{'MB/s':>9}{'of copy':>9}")
    print(f"{'copy':34}{reference * 1e3:9.1f}{weight.nbytes / 1e6 / reference:9.0f}{1:9.0%}")
    for label, function in cases(weight, options.all):
        seconds = fastest(function, options.repeat)
        reference = min(reference, fastest(copy, 2))
        print(f"{label:34}{seconds * 1e3:9.1f}{weight.nbytes / 1e6 / seconds:9.0f}{reference / seconds:9.0%}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
