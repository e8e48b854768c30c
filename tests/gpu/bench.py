"""How fast kernels are on a GPU: what they move as a share of what a copy within the device does, and attention in operations. A line of
JSON for each: what, milliseconds, rate, unit, share, has_goal (tensors over 64 MiB of kernels that only move). With --smoke, at sizes for the
emulated library, whose times mean nothing."""
import argparse
import ctypes as C
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modelq._core as core  # noqa: E402
from cuda_library import DTYPES, NO_ROW, AmaxJob, BlockJob, Error, Matrix, ScaledJob, library_to_test  # noqa: E402 (from tests/)
from cuda_operations import Operations  # noqa: E402

BF16 = DTYPES.index(DTYPES[1])
MIB = 1 << 20


class Clock:
    """Seconds of one call, of several behind some that do not count."""
    def __init__(self, library: Operations):
        self.runtime = None if library.is_emulated else library.memory

    def seconds(self, call, times: int) -> float:
        if self.runtime is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        runtime, events, elapsed = self.runtime, [C.c_void_p(), C.c_void_p()], C.c_float()
        for _ in range(3):
            call()
        for event in events:
            runtime.check(runtime.c.cudaEventCreate(C.byref(event)))
        runtime.check(runtime.c.cudaEventRecord(events[0], None))
        for _ in range(times):
            call()
        runtime.check(runtime.c.cudaEventRecord(events[1], None))
        runtime.check(runtime.c.cudaEventSynchronize(events[1]))
        runtime.check(runtime.c.cudaEventElapsedTime(C.byref(elapsed), *events))
        return elapsed.value / 1e3 / times


class Bench:
    def __init__(self, is_smoke: bool):
        self.library = Operations(library_to_test())
        if self.library.is_emulated != is_smoke:
            raise SystemExit("--smoke is for the emulated library, and only for it")
        self.is_smoke, self.clock, self.copy_rate = is_smoke, Clock(self.library), None

    def device(self, nbytes: int) -> int:
        """Device memory with random bfloat16 (or half of float32) numbers of ordinary size."""
        piece = np.random.default_rng(0).standard_normal(min(nbytes, 4 * MIB) // 2, dtype=np.float32).astype(DTYPES[1])
        place = self.library.memory.alloc(nbytes)
        for at in range(0, nbytes, piece.nbytes):
            self.library.memory.copy(place + at, piece.ctypes.data, min(piece.nbytes, nbytes - at))
        return place

    def host(self, array: np.ndarray) -> int:
        place = self.library.memory.alloc(array.nbytes)
        self.library.memory.copy(place, array.ctypes.data, array.nbytes)
        return place

    def call(self, name: str, job, *more):
        err = Error()
        if getattr(self.library.c, f"mq_cuda_{name}")(C.byref(job), *map(C.byref, more), None, C.byref(err)):
            raise RuntimeError(err.text.decode())

    def row(self, what: str, call, moved: int = 0, operations: int = 0, has_goal: bool = False) -> float:
        seconds = self.clock.seconds(call, 20)
        rate = (moved or operations) / seconds
        share = rate / self.copy_rate if moved and self.copy_rate else None
        print(json.dumps(dict(what=what, milliseconds=seconds * 1e3, rate=rate / (1e9 if moved else 1e12),
                              unit="GB/s" if moved else "TFLOP/s", share=share, has_goal=has_goal)), flush=True)
        return rate

    def matrix(self, rows: int, cols: int) -> tuple[Matrix, int]:
        return Matrix(self.device(2 * rows * cols), BF16, rows, cols, cols), 2 * rows * cols

    def copies(self, rows: int, cols: int) -> None:
        (x, nbytes), (y, _) = self.matrix(rows, cols), self.matrix(rows, cols)
        memory = self.library.memory
        if self.is_smoke:
            self.copy_rate = self.row("copy", lambda: memory.copy(y.data, x.data, nbytes), 2 * nbytes)
        else:
            self.copy_rate = self.row("copy", lambda: memory.check(memory.c.cudaMemcpyAsync(
                C.c_void_p(y.data), C.c_void_p(x.data), C.c_size_t(nbytes), 3, None)), 2 * nbytes)

    def moving(self, rows: int, cols: int) -> None:
        """Maxima and quantization of one matrix, which is what the goal is about."""
        (x, nbytes), (y, _) = self.matrix(rows, cols), self.matrix(rows, cols)
        size = f"bfloat16 [{rows}, {cols}]"
        out, has_goal = self.device(4 * rows * max(cols // 16, 1)), nbytes > 64 * MIB
        for name, blocks in (("tensor", (0, 0)), ("rows", (1, 0)), ("columns", (0, 1)), ("blocks of 16", (1, 16))):
            self.row(f"amax per {name} {size}", lambda b=blocks: self.call("amax", AmaxJob(x, *b, out)), nbytes, has_goal=has_goal)
        for name in ("nvfp4", "mxfp8", "int4"):
            self.schemes(name, x, y, nbytes, has_goal)
        amax = self.host(np.float32([4]))
        for name, kind, bits in (("FP8", 0, 0), ("INT8", 1, 8)):
            job = ScaledJob(kind, bits, 0, 0, x, y, 0, 0, amax, 0, None)
            self.row(f"fake-quantize {name} {size}", lambda j=job: self.call("scaled", j), 2 * nbytes, has_goal=has_goal)

    def schemes(self, name: str, x: Matrix, y: Matrix, nbytes: int, has_goal: bool) -> None:
        row = core.schemes()[name]
        job = BlockJob(list(core.schemes()).index(name), 0, 0.0, x, y)
        job.codes, job.scales, job.scale_2 = self.device(nbytes), self.device(nbytes), self.device(16)
        job.bad_row = self.host(np.uint64([NO_ROW]))
        if row["second_divisor"]:
            job.amax = self.host(np.float32([4]))           # calibrated: one pass
        job.workspace_nbytes = self.library.c.mq_cuda_block_workspace(C.byref(job))
        job.workspace = self.device(max(job.workspace_nbytes, 16))
        packed = nbytes // 2 * core.formats()[row["element"]]["bits"] // 8
        size = f"bfloat16 [{x.rows}, {x.cols}]"
        self.row(f"fake-quantize {name} {size}", lambda: self.call("block_fake_quantize", job), 2 * nbytes, has_goal=has_goal)
        self.row(f"quantize {name} {size}", lambda: self.call("block_quantize", job), nbytes + packed, has_goal=has_goal)

    def operations(self, rows: int, cols: int) -> None:
        (x, nbytes), (y, _) = self.matrix(rows, cols), self.matrix(rows, cols)
        size, weight, fill = f"bfloat16 [{rows}, {cols}]", self.device(4 * cols), self.library.fill
        norm = fill("mq_cuda_norm_job", None, dict(x=x, y=y, weight=weight, eps=1e-5))
        self.row(f"rmsnorm {size}", lambda: self.call("rmsnorm", norm), 2 * nbytes)
        swiglu = fill("mq_cuda_swiglu_job", None, dict(gate=x, up=y))
        self.row(f"swiglu {size}", lambda: self.call("swiglu", swiglu), 3 * nbytes)
        rotate = fill("mq_cuda_prepare_job", None, dict(x=x, y=y, rotate=min(128, cols)))
        self.row(f"rotate by 128 {size}", lambda: self.call("prepare", rotate), 2 * nbytes)
        logits = Matrix(x.data, 0, rows, cols // 2, cols // 2)
        loss = fill("mq_cuda_loss_job", None, dict(logits=logits, labels=self.host(np.zeros(rows, np.int32)), state=self.device(24 * rows)))
        self.row(f"loss float32 [{rows}, {cols // 2}]", lambda: self.call("loss", loss), nbytes)

    def attention(self, sequences: int, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
        rows = sequences * tokens
        places = {name: self.device(2 * rows * count * dim) for name, count in
                  (("q", heads), ("k", kv_heads), ("v", kv_heads), ("out", heads))}
        job = self.library.fill("mq_cuda_attention_job", None, dict(
            dtype=BF16, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim, ldq=heads * dim, ldk=kv_heads * dim, ldv=kv_heads * dim,
            ldo=heads * dim, rows=rows, sequences=sequences, longest=tokens, scale=dim ** -0.5,
            starts=self.host(np.arange(sequences + 1) * tokens), maxima=self.device(4 * rows * heads), factors=self.device(4 * rows * heads),
            **places))
        forward = 2 * sequences * heads * tokens * tokens * dim         # two products, of which the causal half
        what = f"{sequences} x {tokens} tokens, {heads} heads of {dim} on {kv_heads}"
        self.row(f"attention {what}", lambda: self.call("attention", job), operations=forward)
        self.library.c.mq_cuda_attention_backward_workspace.restype = C.c_size_t
        job.workspace_nbytes = self.library.c.mq_cuda_attention_backward_workspace(C.byref(job))
        job.workspace = self.device(job.workspace_nbytes)
        gradient = self.library.fill("mq_cuda_attention_gradient", None, {
            name: self.device(4 * rows * count * dim) for name, count in (("d_out", heads), ("d_q", heads), ("d_k", kv_heads), ("d_v", kv_heads))})
        self.row("its gradients", lambda: self.call("attention_backward", job, gradient), operations=forward * 5 // 2)

    def step(self, sequences: int, keys: int, heads: int, kv_heads: int, dim: int) -> None:
        nbytes = 2 * sequences * keys * kv_heads * dim
        job = self.library.fill("mq_cuda_attention_job", None, dict(
            dtype=BF16, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim, ldq=heads * dim, ldk=kv_heads * dim, ldv=kv_heads * dim,
            ldo=heads * dim, rows=sequences, sequences=sequences, longest=1, longest_keys=keys, scale=dim ** -0.5,
            starts=self.host(np.arange(sequences + 1)), key_starts=self.host(np.arange(sequences) * keys),
            past=self.host(np.full(sequences, keys - 1)), q=self.device(2 * sequences * heads * dim), k=self.device(nbytes),
            v=self.device(nbytes), out=self.device(2 * sequences * heads * dim)))
        self.library.c.mq_cuda_attention_workspace.restype = C.c_size_t
        job.workspace_nbytes = self.library.c.mq_cuda_attention_workspace(C.byref(job))
        job.workspace = self.device(job.workspace_nbytes)
        self.row(f"attention of a step, {sequences} x {keys} keys", lambda: self.call("attention", job), 2 * nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.smoke)
    rows, cols = (16, 256) if given.smoke else (32768, 8192)        # 512 MiB
    bench.copies(rows, cols)
    bench.moving(rows, cols)
    bench.operations(rows, cols)
    bench.attention(*((1, 40, 2, 1, 64) if given.smoke else (8, 2048, 32, 8, 128)))
    bench.step(*((1, 300, 2, 1, 64) if given.smoke else (32, 4096, 32, 8, 128)))


if __name__ == "__main__":
    main()
