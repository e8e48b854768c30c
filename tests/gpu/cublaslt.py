"""cuBLASLt called directly, by ctypes, as NVIDIA's samples call it: the fastest of its first algorithms for a product. What
bench_gemm.py compares modelq's wrapper with. Numbers and calls are those of cuda/cublaslt.def."""
from __future__ import annotations

import ctypes as C
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {name: int(value) for name, value in re.findall(r"^MQ_LT_CONSTANT\((\w+), (\d+)\)", (ROOT / "cuda/cublaslt.def").read_text(), re.M)}
ALGORITHMS, WORKSPACE = 8, 32 << 20


class Result(C.Structure):
    _fields_ = [("algo", C.c_uint64 * 8), ("workspace_nbytes", C.c_size_t), ("state", C.c_int), ("waves", C.c_float), ("reserved", C.c_int * 4)]


class CuBlasLt:
    def __init__(self, library: C.CDLL) -> None:
        self.c, self.handle = library, C.c_void_p()
        self.call("Create", C.byref(self.handle))

    def call(self, name: str, *arguments) -> None:
        status = getattr(self.c, f"cublasLt{name}")(*arguments)
        if status:
            raise RuntimeError(f"cublasLt{name} gave status {status}")

    def make(self, what: str, *arguments) -> C.c_void_p:
        made = C.c_void_p()
        self.call(f"{what}Create", C.byref(made), *arguments)
        return made

    def set(self, what: str, made: C.c_void_p, attribute: str, value) -> None:
        self.call(f"{what}SetAttribute", made, NUMBERS[f"CUBLASLT_{attribute}"], C.byref(value), C.c_size_t(C.sizeof(value)))

    def layout(self, kind: str, rows: int, cols: int) -> C.c_void_p:
        return self.make("MatrixLayout", NUMBERS[kind], C.c_uint64(rows), C.c_uint64(cols), C.c_int64(rows))

    def linear(self, problem: dict, workspace: int, seconds) -> float:
        """Seconds of out (N, O) = in (N, I) * weight (O, I)^T by the fastest algorithm; seconds: what times a call.

        problem: tokens, rows, cols (N, O, I); kind, out_kind (CUDA_R_...); weight, input, out: device addresses; and, of narrow types,
        modes and scales of weight and input."""
        n, m, k = problem["tokens"], problem["rows"], problem["cols"]
        integers = problem["kind"] == "CUDA_R_8I"
        scale_kind = "CUDA_R_32I" if integers else "CUDA_R_32F"
        desc = self.make("MatmulDesc", NUMBERS["CUBLAS_COMPUTE_32I" if integers else "CUBLAS_COMPUTE_32F"], NUMBERS[scale_kind])
        self.set("MatmulDesc", desc, "MATMUL_DESC_TRANSA", C.c_int32(NUMBERS["CUBLAS_OP_T"]))
        for side, mode, scales in problem.get("scales", ()):
            self.set("MatmulDesc", desc, f"MATMUL_DESC_{side}_SCALE_MODE", C.c_int32(NUMBERS[f"CUBLASLT_MATMUL_MATRIX_SCALE_{mode}"]))
            self.set("MatmulDesc", desc, f"MATMUL_DESC_{side}_SCALE_POINTER", C.c_void_p(scales))
        a, b, d = self.layout(problem["kind"], k, m), self.layout(problem["kind"], k, n), self.layout(problem["out_kind"], m, n)
        preference = self.make("MatmulPreference")
        self.set("MatmulPreference", preference, "MATMUL_PREF_MAX_WORKSPACE_BYTES", C.c_uint64(WORKSPACE))
        results, count = (Result * ALGORITHMS)(), C.c_int()
        self.call("MatmulAlgoGetHeuristic", self.handle, desc, a, b, d, d, preference, ALGORITHMS, results, C.byref(count))
        one, zero = (C.c_int32(1), C.c_int32(0)) if integers else (C.c_float(1), C.c_float(0))
        places = [C.c_void_p(problem[name]) for name in ("weight", "input", "out")]

        def run(result: Result) -> None:
            self.call("Matmul", self.handle, desc, C.byref(one), places[0], a, places[1], b, C.byref(zero), places[2], d, places[2], d,
                      C.byref(result.algo), C.c_void_p(workspace), C.c_size_t(WORKSPACE), None)
        best = min(seconds(lambda result=result: run(result)) for result in results[:count.value] if result.state == 0)
        self.call("MatmulDescDestroy", desc)
        self.call("MatmulPreferenceDestroy", preference)
        for layout in (a, b, d):
            self.call("MatrixLayoutDestroy", layout)
        return best
