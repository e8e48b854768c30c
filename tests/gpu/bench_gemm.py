"""Products through modelq's wrapper beside cuBLASLt called directly on operands that are quantized already: the wrapper is to reach 90%.

    MODELQ_CUDA_LIBRARY=$(python scripts/cuda_build.py library build/cuda/gpu) python tests/gpu/bench_gemm.py [--tokens 16,512,4096]
    python tests/gpu/bench_gemm.py --emulated     the same calls on the CPU, tiny: shows that the script works

What a linear's row is timed with is what a model pays: inputs are bfloat16, and are quantized at every call (maximum, codes, scales).
"direct" is the fastest of cuBLASLt's first eight algorithms.
"""
from __future__ import annotations

import argparse
import ctypes as C
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

SHAPES = {"4096 x 4096": (4096, 4096), "14336 x 4096": (14336, 4096), "4096 x 14336": (4096, 14336), "28672 x 8192": (28672, 8192)}
# scheme, inputs, element, modes of the scales of weight and input; None: bfloat16
KINDS = {
    "bf16": None,
    "fp8 tensor": ("fp8", dict(inputs="tensor"), "CUDA_R_8F_E4M3", "SCALAR_32F", "SCALAR_32F"),
    "fp8 channel, token": ("fp8_channel", dict(inputs="token"), "CUDA_R_8F_E4M3", "OUTER_VEC_32F", "OUTER_VEC_32F"),
    "fp8 block": ("fp8_block", dict(inputs="group"), "CUDA_R_8F_E4M3", "BLK128x128_32F", "VEC128_32F"),
    "int8 channel, token": ("int8", dict(inputs="token", kind="int"), "CUDA_R_8I", None, None),
    "mxfp8": ("mxfp8", dict(inputs="scheme", input_scheme="mxfp8"), "CUDA_R_8F_E4M3", "VEC32_UE8M0", "VEC32_UE8M0"),
    "nvfp4": ("nvfp4", dict(inputs="scheme", input_scheme="nvfp4"), "CUDA_R_4F_E2M1", "VEC16_UE4M3", "VEC16_UE4M3"),
}


class Clock:
    """Seconds of a call on the device, the median of several runs of several calls; of the host where there is no device."""
    def __init__(self, emulated: bool) -> None:
        self.emulated = emulated
        if not emulated:
            self.c = C.CDLL(os.environ.get("MODELQ_CUDART", "libcudart.so"))
            self.events = [C.c_void_p(), C.c_void_p()]
            for event in self.events:
                self.check(self.c.cudaEventCreate(C.byref(event)))

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"the CUDA runtime gave status {status}")

    def __call__(self, work, calls: int = 10, runs: int = 7) -> float:
        if self.emulated:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        for _ in range(3):
            work()
        found = []
        for _ in range(runs):
            self.check(self.c.cudaEventRecord(self.events[0], None))
            for _ in range(calls):
                work()
            self.check(self.c.cudaEventRecord(self.events[1], None))
            self.check(self.c.cudaEventSynchronize(self.events[1]))
            milliseconds = C.c_float()
            self.check(self.c.cudaEventElapsedTime(C.byref(milliseconds), *self.events))
            found.append(milliseconds.value / 1000 / calls)
        return sorted(found)[runs // 2]


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        import numpy as np
        from cublaslt import WORKSPACE, CuBlasLt
        from cuda_gemm import Gemm
        from cuda_library import Library, library_to_test

        if options.emulated:
            os.environ.pop("MODELQ_CUDA_LIBRARY", None)
        elif "MODELQ_CUDA_LIBRARY" not in os.environ:
            raise SystemExit("MODELQ_CUDA_LIBRARY is not set: see the head of this script")
        self.np = np
        self.library = Library(library_to_test())
        settings = dict(capability=options.capability, workspace_nbytes=4 << 20) if options.emulated else \
            dict(capability=0, workspace_nbytes=0, path=options.cublaslt)
        self.gemm = Gemm(self.library, fast_fp8=options.fast, **settings)
        self.clock, self.kept = Clock(options.emulated), []
        self.direct = CuBlasLt(self.library.c if options.emulated else C.CDLL(options.cublaslt))
        self.workspace = -(-self.empty(WORKSPACE + 256) // 256) * 256

    def empty(self, nbytes: int) -> int:
        self.kept.append(self.library.memory.alloc(nbytes))
        return self.kept[-1]

    def place(self, array) -> int:
        array = self.np.ascontiguousarray(array)
        where = self.empty(array.nbytes)
        self.library.memory.copy(where, array.ctypes.data, array.nbytes)
        return where

    def drop(self) -> None:
        for where in self.kept[1:]:      # the first is the workspace
            self.library.memory.free(where)
        del self.kept[1:]

    def once(self, name: str, *arguments) -> None:
        from cuda_library import Error
        err = Error()
        if getattr(self.library.c, f"mq_cuda_{name}")(self.gemm.place, *arguments, None, C.byref(err)):
            raise RuntimeError(err.text.decode())

    def bf16(self, tokens: int, rows: int, cols: int):
        """Seconds through the wrapper and directly, and the way."""
        from cuda_gemm import GemmJob
        from cuda_library import Matrix

        x, weight = self.normal(tokens, cols), self.normal(rows, cols)
        x_place, weight_place, out = self.place(x), self.place(weight), self.empty(tokens * rows * 2)
        job = GemmJob(Matrix(x_place, 1, tokens, cols, cols), Matrix(weight_place, 1, rows, cols, cols), Matrix(out, 1, tokens, rows, rows),
                      0, 1, 1.0, 0.0, None, 1, 0, 0, 0, self.gemm.workspace)
        ours = self.clock(lambda: self.once("gemm_run", C.byref(job)))
        problem = dict(tokens=tokens, rows=rows, cols=cols, kind="CUDA_R_16BF", out_kind="CUDA_R_16BF", weight=weight_place, input=x_place, out=out)
        return ours, self.direct.linear(problem, self.workspace, self.clock), "plain"

    def linear(self, kind: str, tokens: int, rows: int, cols: int):
        from cuda_gemm import PATHS, LinearJob
        from cuda_library import Matrix, Staging

        import modelq._core as core

        scheme, inputs, element, *modes = KINDS[kind]
        parts = core.quantize(self.normal(rows, cols), scheme)
        here, taken = Staging(self.library.memory), C.c_int()
        linear = self.gemm.linear(here, parts, scheme, (rows, cols), **inputs)
        self.gemm.c.mq_cuda_linear_prepared_nbytes.restype = C.c_size_t
        prepared = self.gemm.c.mq_cuda_linear_prepared_nbytes(self.gemm.place, C.byref(linear))
        if prepared:
            linear.prepared = self.empty(prepared)
            self.once("linear_prepare", C.byref(linear), C.c_void_p(linear.prepared))
        out = self.empty(tokens * rows * 4)
        job = LinearJob(linear, Matrix(self.place(self.normal(tokens, cols)), 1, tokens, cols, cols), Matrix(out, 1, tokens, rows, rows), None, 0,
                        self.gemm.workspace)
        ours = self.clock(lambda: self.once("linear_run", C.byref(job), C.byref(taken)))
        direct = self.direct_linear(linear, element, modes, tokens, rows, cols, out) if PATHS[taken.value] != "dequantize" else None
        here.finish()
        return ours, direct, PATHS[taken.value]

    def direct_linear(self, linear, element: str, modes: list, tokens: int, rows: int, cols: int, out: int) -> float | None:
        """The same product of operands that lie there: codes of the input are the weight's own, scales are ones."""
        codes = self.place(self.np.random.default_rng(1).integers(0, 120, tokens * cols, self.np.uint8))
        ones = self.place(self.np.ones(max(tokens, rows) * (-(-cols // 128) + 3), self.np.float32))
        bytes_of_one = self.place(self.np.full((max(tokens, rows) + 128) * (cols // 16 + 4), 0x38, self.np.uint8))
        where = bytes_of_one if modes[0] in ("VEC16_UE4M3", "VEC32_UE8M0") else ones
        scales = [(side, mode, where) for side, mode in zip("AB", modes) if mode]
        problem = dict(tokens=tokens, rows=rows, cols=cols, kind=element, out_kind="CUDA_R_32I" if element == "CUDA_R_8I" else "CUDA_R_16BF",
                       weight=linear.codes, input=codes, out=out, scales=scales)
        try:
            return self.direct.linear(problem, self.workspace, self.clock)
        except (RuntimeError, ValueError):       # that scale mode is not this device's: ours scales the sums itself
            return self.direct.linear({**problem, "scales": []}, self.workspace, self.clock)

    def normal(self, rows: int, cols: int):
        import ml_dtypes
        return self.np.random.default_rng(rows).standard_normal((rows, cols), self.np.float32).astype(ml_dtypes.bfloat16)

    def run(self, kind: str, tokens: int, shape: tuple[int, int]) -> list[str]:
        ours, direct, path = self.bf16(tokens, *shape) if KINDS[kind] is None else self.linear(kind, tokens, *shape)
        operations = 2e-12 * tokens * shape[0] * shape[1]
        self.drop()
        compared = ["-", "-"] if direct is None else [f"{operations / direct:.1f}", f"{direct / ours:.0%}"]
        return [path, f"{ours * 1e6:.0f}", f"{operations / ours:.1f}", *compared]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16,512,4096")
    parser.add_argument("--kinds", default=",".join(name.replace(", ", "+") for name in KINDS), help="with + for the comma in a name")
    parser.add_argument("--cublaslt", default="libcublasLt.so.13")
    parser.add_argument("--fast", action="store_true", help="FP8 sums in less than float32, of the wrapper only")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--capability", type=int, default=90, help="of the emulated device: 10 * major + minor")
    options = parser.parse_args()
    bench = Bench(options)
    shapes = {"128 x 256": (128, 256)} if options.emulated else SHAPES
    tokens = [4] if options.emulated else [int(count) for count in options.tokens.split(",")]
    print("| kind | weight | tokens | way | microseconds | TFLOPS | cuBLASLt alone | share |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in options.kinds.split(","):
        kind = kind.replace("+", ", ")
        for name, shape in shapes.items():
            for count in tokens:
                print(f"| {kind} | {name} | {count} | " + " | ".join(bench.run(kind, count, shape)) + " |", flush=True)


if __name__ == "__main__":
    main()
