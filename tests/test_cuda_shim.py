"""The shim that runs kernels on the CPU: it does what CUDA does, and shows what is wrong in a kernel."""
import ctypes as C
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuda_library import ORDERS, ROOT, SANITIZED, cuda_build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: Path, sanitize: bool) -> Path:
    library = folder / "shim_cases.so"
    sources = [str(ROOT / "tests/cuda_shim_cases.cu"), str(ROOT / "cuda/shim/cuda_shim.cc"), str(ROOT / "cuda/shim/cuda_shim_runtime.cc")]
    extra = cuda_build.SANITIZERS if sanitize else []
    cuda_build.run([["g++", "-std=c++17", "-shared", "-pthread", *cuda_build.GXX, *extra, f"-I{ROOT / 'cuda'}", "-x", "c++", *sources,
                     "-o", str(library)]])
    return library


class Cases:
    def __init__(self, path):
        self.c = C.CDLL(str(path))
        self.c.case_name.restype = self.c.mq_shim_reason.restype = C.c_char_p
        self.c.mq_shim_set_order.argtypes = [C.c_int, C.c_uint64]
        self.numbers, i = {}, 0
        while name := self.c.case_name(i).decode():
            self.numbers[name] = i
            i += 1

    def run(self, name, n=0, grid=(1, 1, 1), block=(256, 1, 1)):
        """out [2048], and the error."""
        out, triple = np.zeros(2048, np.int32), C.c_uint * 3
        error = self.c.run_case(self.numbers[name], triple(*grid), triple(*block), out.ctypes.data_as(C.c_void_p), n)
        return out, error


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("shim"), SANITIZED)


@pytest.fixture(params=ORDERS)
def cases(library, request):
    cases = Cases(library)
    cases.c.mq_shim_set_order(ORDERS[request.param], 3)
    cases.order = request.param
    return cases


def test_every_thread_runs_once(cases):
    for grid, block in (((8, 1, 1), (256, 1, 1)), ((2, 3, 4), (5, 4, 3)), ((1, 1, 1), (1024, 1, 1)), ((7, 1, 1), (1, 1, 64))):
        out, error = cases.run("write_places", grid=grid, block=block)
        count = int(np.prod(grid) * np.prod(block))
        assert error == 0 and out[:count].tolist() == list(range(count)) and not out[count:].any()


def test_barriers(cases):
    for n in (1, 100, 255):
        for name in ("neighbours", "rotate"):
            out, error = cases.run(name, n)
            assert error == 0 and out[:256].tolist() == [(i + n) % 256 for i in range(256)]


def test_a_missing_barrier_shows(cases):
    """With the right distance one order may hide it; over both directions none does."""
    wrong = 0
    for n in (1, 255):
        out, error = cases.run("neighbours_without_a_barrier", n)
        wrong += error == 0 and out[:256].tolist() != [(i + n) % 256 for i in range(256)]
    assert wrong


def test_a_barrier_that_not_all_reach(cases):
    _, error = cases.run("barrier_for_some", 100)
    assert error == 719 and cases.c.mq_shim_reason() == b"block (0, 0, 0): 100 of 256 threads wait at a barrier and 0 in a warp's " \
                                                        b"exchange, 156 have ended"
    assert cases.run("neighbours", 1)[1] == 0        # and the next kernel is none the worse


def test_exchange(cases):
    for n in (1, 16, 31):
        out, error = cases.run("exchange", n)
        assert error == 0 and out[:256].tolist() == [i ^ n for i in range(256)]


def test_an_exchange_that_not_all_reach(cases):
    _, error = cases.run("exchange_for_some")
    assert error == 719 and b"31 in a warp's exchange" in cases.c.mq_shim_reason()
    assert cases.run("exchange", 1, block=(40, 1, 1))[1] == 719      # half a warp cannot take part as a whole one


def test_shared_memory_is_unset(cases):
    out, error = cases.run("unset_memory", grid=(3, 1, 1), block=(1, 1, 1))
    assert error == 0 and set(out[:3].tolist()) == {np.uint32(0xa5a5a5a5).view(np.int32).item()}


def test_limits(cases):
    for grid, block in (((0, 1, 1), (1, 1, 1)), ((1, 1, 1), (1025, 1, 1)), ((1, 65536, 1), (1, 1, 1)), ((2**31, 1, 1), (1, 1, 1)),
                        ((1, 1, 1), (0, 1, 1)), ((1, 1, 1), (1, 1, 65))):
        assert cases.run("exchange", grid=grid, block=block)[1] == 9


def test_orders(cases):
    out, _ = cases.run("order_of_blocks", grid=(4, 1, 1), block=(8, 1, 1))
    came, forward = out[1:33].tolist(), list(range(32))
    assert sorted(came) == forward
    assert came == {"forward": forward, "reverse": forward[::-1]}.get(cases.order, came)
    assert (cases.order == "random") == (came not in (forward, forward[::-1]))


def run_alone(library, call, **environment):
    """call, an expression of c (Cases), in a process that may crash."""
    code = "import sys, ctypes, numpy, test_cuda_shim as t; c = t.Cases(sys.argv[1]); c.c.mq_shim_alloc.restype = ctypes.c_void_p; " + call
    known = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *known]), **environment}
    return subprocess.run([sys.executable, "-c", code, str(library)], env=environment, cwd=ROOT / "tests", capture_output=True, text=True)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer watches device memory by other means")
def test_device_memory_is_for_kernels(library):
    memory = "place = ctypes.c_void_p(c.c.mq_shim_alloc(64)); triple = (ctypes.c_uint * 3); one = triple(1, 1, 1); "
    run = "print(c.c.run_case(0, one, triple({threads}, 1, 1), place, 0)); "
    right = run_alone(library, memory + run.format(threads=16))
    assert right.returncode == 0 and right.stdout.strip() == "0", right.stderr
    for wrong in (run.format(threads=17), "ctypes.string_at(place, 1)"):
        assert run_alone(library, memory + wrong).returncode == -signal.SIGSEGV


def test_the_sanitizer_sees_shared_memory(tmp_path):
    preload = [subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
               for name in ("libasan.so", "libstdc++.so.6")]
    library = build(tmp_path, True)

    def run(name, n):
        return run_alone(library, f"print(c.run({name!r}, {n})[1])", LD_PRELOAD=" ".join(preload), ASAN_OPTIONS="detect_leaks=0")
    right, wrong = run("rotate", 3), run("beyond_shared_memory", 32)
    assert right.returncode == 0 and right.stdout.strip() == "0", right.stderr
    assert wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr
