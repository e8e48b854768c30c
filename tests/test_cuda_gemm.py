"""Products through cuBLASLt: what is asked of it, what is remembered, and what its errors say. On machines without a GPU it is the emulated
one (cuda/shim/cublaslt_shim.h), which refuses what cuBLAS's documentation says is refused; sums are compared with NumPy's in float64."""
import ctypes as C
import os
import shutil
import subprocess
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cuda_gemm import Gemm
from cuda_library import ROOT, SANITIZED, CudaError, Library, Staging, cuda_build, library_to_test

BF16 = np.dtype(ml_dtypes.bfloat16)
F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
TYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
# What sums are off by, in units of the magnitudes that were added: the emulated library's are rounded once; a GPU's are float32, and those of
# FP8 on Hopper less than that.
SUMS = 2.0**-11 if "MODELQ_CUDA_LIBRARY" in os.environ else 2.0**-20
STEP = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}      # half a unit in the last place of 1

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def library():
    return Library(library_to_test())


@pytest.fixture
def gemm(library):
    with Gemm(library) as made:
        yield made


@pytest.fixture
def emulated(gemm):
    if not gemm.library.is_emulated:
        pytest.skip("asks the emulated cuBLASLt what it was asked")
    return gemm


def normal(shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def strided(x, gap=3):
    """The same rows further apart, which no vector fits."""
    memory = np.full((x.shape[0], x.shape[1] + gap), np.nan, x.dtype)
    memory[:, 1:1 + x.shape[1]] = x
    return memory[:, 1:1 + x.shape[1]]


def close(got, wanted, size):
    """size: the sum of the magnitudes that were added. Sums are rounded to the dtype of out, too."""
    bound = np.abs(wanted) * STEP[got.dtype] + np.asarray(size, np.float64) * SUMS + 2.0**-24
    error = np.abs(got.astype(np.float64) - wanted)
    assert (error <= bound).all(), f"{error.max()} at {np.unravel_index(error.argmax(), error.shape)}"


def both(a, b):
    """The product, and that of magnitudes."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b, np.abs(a) @ np.abs(b)


@pytest.mark.parametrize("types", TYPES, ids=lambda pair: "-".join(map(str, pair)))
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 33), (64, 96, 32), (3, 130, 257)])
def test_products(gemm, shape, types):
    rows, cols, depth = shape
    a, b = normal((rows, depth), types[0], 1), normal((depth, cols), types[0], 2)
    bias = normal(cols, types[1], 3)
    wanted, size = both(a, b)
    for transpose_a in (False, True):
        for transpose_b in (False, True):
            for layout in (np.ascontiguousarray, strided):
                given = layout(np.ascontiguousarray(a.T) if transpose_a else a), layout(np.ascontiguousarray(b.T) if transpose_b else b)
                out = layout(np.full((rows, cols), np.nan, types[1]))
                gemm.product(*given, out, transpose_a, transpose_b)
                close(out, wanted, size)
                gemm.product(*given, out, transpose_a, transpose_b, bias=bias)
                close(out, wanted + bias.astype(np.float64), size + 1)
                before = out.astype(np.float64)
                gemm.product(*given, out, transpose_a, transpose_b, beta=1.0, alpha=0.5, bias=bias)
                close(out, 0.5 * wanted + before + bias.astype(np.float64), size + np.abs(before) + 1)
                assert not np.isnan(out.astype(np.float32)).any()


def test_what_lies_between_rows_is_left_alone(gemm):
    out = strided(np.zeros((4, 6), F32))
    gemm.product(normal((4, 8)), normal((8, 6)), out)
    assert np.isnan(out.base[:, 0]).all() and np.isnan(out.base[:, 7:]).all()


def test_the_way_back(gemm):
    """d_in = d_out weight, d_weight += d_out^T in, as csrc/model has them."""
    x, weight, d_out = normal((9, 24), BF16, 1), normal((16, 24), BF16, 2), normal((9, 16), BF16, 3)
    d_in, d_weight = np.zeros((9, 24), F32), normal((16, 24), F32, 4)
    before = d_weight.astype(np.float64)
    gemm.product(d_out, weight, d_in)
    gemm.product(d_out, x, d_weight, transpose_a=True, beta=1.0)
    close(d_in, *both(d_out, weight))
    wanted, size = both(d_out.T, x)
    close(d_weight, before + wanted, size + np.abs(before))


def test_batches(gemm):
    a, b = normal((3, 5, 8), BF16, 1), normal((3, 6, 8), BF16, 2)
    out = np.zeros((3, 5, 6), F32)
    gemm.product(a, b, out, transpose_b=True)
    for i in range(3):
        close(out[i], *both(a[i], b[i].T))
    heads = np.zeros((5, 3, 6), F32).transpose(1, 0, 2)      # as heads lie in a row of tokens
    gemm.product(a, b, heads, transpose_b=True)
    np.testing.assert_array_equal(heads, out)


def test_nothing_to_add_up(gemm):
    bias, out = normal(4, BF16), np.full((3, 4), 2, BF16)
    gemm.product(np.zeros((3, 0), BF16), np.zeros((4, 0), BF16), out, transpose_b=True, beta=1.0, bias=bias)
    np.testing.assert_array_equal(out, np.broadcast_to((bias.astype(F32) + 2).astype(BF16), (3, 4)))
    for rows, cols in ((0, 4), (3, 0)):
        gemm.product(np.zeros((rows, 5), F32), np.zeros((cols, 5), F32), np.zeros((rows, cols), F32), transpose_b=True)


def test_tf32_only_where_it_is_allowed(library):
    """1 + 2^-12 has more bits than TF32."""
    a, b, out = np.full((4, 4), 1 + 2.0**-12, F32), np.eye(4, dtype=F32), np.zeros((4, 4), F32)
    with Gemm(library) as exact, Gemm(library, allow_tf32=1) as fast:
        assert (exact.product(a, b, out) == a).all()
        assert (fast.product(a, b, out) == 1).all()


# ---- what is remembered ----

@pytest.mark.skipif(SANITIZED, reason="counts plans, which depend on how memory is aligned")
def test_plans_are_kept(emulated):
    a, b, out = normal((4, 8)), normal((6, 8)), np.zeros((4, 6), F32)
    for _ in range(5):
        emulated.product(a, b, out, transpose_b=True)
    counts = emulated.counts()
    assert (counts.hits, counts.misses, counts.plans) == (4, 1, 1)
    asked = emulated.calls("MatmulAlgoGetHeuristic")
    emulated.product(normal((4, 8), seed=5), b, np.zeros((4, 6), F32), transpose_b=True)        # other places, the same plan
    assert emulated.calls("MatmulAlgoGetHeuristic") == asked
    for change in (dict(a=normal((5, 8)), out=np.zeros((5, 6), F32)), dict(a=strided(a)), dict(bias=normal(6)), dict(out=strided(out))):
        emulated.product(**{**dict(a=a, b=b, out=out, transpose_b=True), **change})
    assert emulated.counts().misses == 5 and emulated.calls("MatmulAlgoGetHeuristic") == asked + 4


def moved(x, elements=1):
    """The same rows, as far apart, at an address that is aligned to less."""
    memory = np.zeros(x.size + elements + 64, x.dtype)
    start = -memory.ctypes.data % 64 // x.dtype.itemsize + elements
    memory[start:start + x.size] = x.reshape(-1)
    return memory[start:start + x.size].reshape(x.shape)


@pytest.mark.skipif(SANITIZED, reason="counts plans, which depend on how memory is aligned")
def test_alignment_is_part_of_a_plan(emulated):
    """An algorithm that was chosen for aligned matrices is not used for others of the same shape; with the bias it is the same."""
    given = dict(a=normal((4, 8)), b=normal((8, 8), seed=1), out=np.zeros((4, 8), F32), bias=normal(8))
    wanted = given["a"] @ given["b"].T + given["bias"]
    for change in ({}, *({name: elements} for name in given for elements in (2, 1))):
        arrays = {name: moved(array, change.get(name, 64)) for name, array in given.items()}
        emulated.product(**arrays, transpose_b=True)
        np.testing.assert_allclose(arrays["out"], wanted, rtol=1e-5, atol=1e-5)
    assert emulated.counts().misses == 9


@pytest.mark.skipif(SANITIZED, reason="counts plans, which depend on how memory is aligned")
def test_the_least_recently_used_plan_goes(library):
    with Gemm(library, plans=3) as gemm:
        def run(rows):
            before = gemm.counts().misses
            gemm.product(normal((rows, 8)), normal((6, 8)), np.zeros((rows, 6), F32), transpose_b=True)
            return gemm.counts().misses > before
        assert [run(rows) for rows in (1, 2, 3, 1, 4, 1, 3, 2)] == [True, True, True, False, True, False, False, True]
        counts = gemm.counts()
        assert counts.plans == 3 and counts.evictions == 2
        for rows in range(1, 60):
            run(rows)
        assert gemm.counts().plans == 3
    if library.is_emulated:
        assert gemm.c.mq_shim_lt_live() == 0        # nothing leaks, what was thrown out included


def test_threads(library):
    """One context, eight threads, few plans: what one throws out is not in use by another, and pointers are not mixed up."""
    wrong = []
    with Gemm(library, plans=2) as gemm:
        def work(seed):
            for i in range(20):
                rows = 1 + (seed + i) % 5
                a, b, bias, out = normal((rows, 16), F32, i), normal((8, 16), F32, seed), normal(8, F32, seed + i), np.zeros((rows, 8), F32)
                gemm.product(a, b, out, transpose_b=True, bias=bias, change=lambda job: setattr(job.workspace, "nbytes", 0))
                wrong.append(not np.allclose(out, a @ b.T + bias, atol=1e-5))
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 160 and not any(wrong)


def test_any_workspace(gemm):
    a, b, out = normal((4, 8)), normal((6, 8)), np.zeros((4, 6), F32)
    for data, nbytes in ((None, 0), (gemm.workspace.data, 0), (gemm.workspace.data + 256, 4096)):
        def change(job):
            job.workspace.data, job.workspace.nbytes = data, nbytes
        gemm.product(a, b, out, transpose_b=True, change=change)
        close(out, *both(a, b.T))


# ---- errors ----

def test_what_is_wrong_is_said(gemm):
    a, b, out = normal((4, 8)), normal((6, 8)), np.zeros((4, 6), F32)
    for change, text in ((dict(b=b.astype(BF16)), "expected a and b of one dtype"), (dict(out=out.astype(F16)), "expected a and b of one dtype"),
                         (dict(transpose_b=False), r"a \[4, 8\] float32.* times b \[6, 8\] float32.* does not give out \[4, 6\] float32"),
                         (dict(change=lambda job: setattr(job.workspace, "data", 8)), "256 divides"),
                         (dict(change=lambda job: setattr(job.a, "ld", 7)), "rows overlap")):
        with pytest.raises(CudaError, match=text):
            gemm.product(**{**dict(a=a, b=b, out=out, transpose_b=True), **change})


@pytest.mark.parametrize("call", ["MatmulDescCreate", "MatmulDescSetAttribute", "MatrixLayoutCreate", "MatrixLayoutSetAttribute",
                                  "MatmulPreferenceCreate", "MatmulPreferenceSetAttribute", "MatmulAlgoGetHeuristic", "Matmul"])
def test_every_failing_call_is_named(emulated, call):
    a, b = normal((2, 4, 8)), normal((2, 6, 8))
    for status, name, code in ((3, "CUBLAS_STATUS_ALLOC_FAILED", -3), (14, "CUBLAS_STATUS_INTERNAL_ERROR", -5)):
        for nth in range(1, 3 if call.endswith(("Attribute", "LayoutCreate")) else 2):
            emulated.c.mq_shim_lt_fail(f"cublasLt{call}".encode(), nth, status)
            with pytest.raises(CudaError) as raised:
                emulated.product(a, b, np.zeros((2, 4, 6), F32), transpose_b=True)
            assert raised.value.code == code
            assert str(raised.value) == (f"cublasLt{call}: {name} ({status}): 2 times out [4, 6] float32 = a [4, 8] float32 * b [6, 8]^T "
                                         "float32; cuBLAS 130100, compute capability 9.0")
            live = emulated.c.mq_shim_lt_live()
            assert SANITIZED or live == (1 if call != "Matmul" else 5)       # the handle; and the plan, where only the product failed
    emulated.product(a, b, out := np.zeros((2, 4, 6), F32), transpose_b=True)       # and then it works
    close(out[1], *both(a[1], b[1].T))


@pytest.mark.skipif(SANITIZED, reason="counts plans, which depend on how memory is aligned")
def test_what_cublas_refuses_is_remembered(library):
    if not library.is_emulated:
        pytest.skip("depends on the device")
    with Gemm(library, capability=75) as gemm:
        for _ in range(3):
            with pytest.raises(CudaError, match=r"cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED .*bfloat16.* capability 7\.5"):
                gemm.product(normal((4, 8), BF16), normal((8, 8), BF16), np.zeros((4, 8), BF16))
        assert gemm.c.mq_shim_lt_reason() == b"bfloat16 is for 8.0 and later"
        counts = gemm.counts()
        assert (counts.misses, counts.refusals, counts.hits) == (1, 1, 2)


def test_opening(library, tmp_path):
    with pytest.raises(CudaError, match=r"cuBLASLt.* was not found: /none/libcublasLt.so.13: cannot open .*pip install 'modelq\[cuda\]'"):
        Gemm(library, "/none/libcublasLt.so.13")
    (tmp_path / "empty.c").write_text("int nothing;")
    cuda_build.run([["gcc", "-shared", str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty.so")]])
    with pytest.raises(CudaError, match="empty.so is not cuBLASLt: it has no cublasLtCreate"):
        Gemm(library, str(tmp_path / "empty.so"))
    (tmp_path / "old.c").write_text("".join(f"long {name}(void) {{ return 110800; }}\n" for name in calls()))
    cuda_build.run([["gcc", "-shared", str(tmp_path / "old.c"), "-o", str(tmp_path / "old.so")]])
    with pytest.raises(CudaError, match="cuBLASLt is too old: version 110800, at least 120000"):
        Gemm(library, str(tmp_path / "old.so"))
    with pytest.raises(CudaError, match="a workspace of 5 bytes"):
        Gemm(library, workspace_nbytes=5)
    if library.is_emulated:
        library.c.mq_shim_lt_fail(b"cublasLtCreate", 1, 1)
        with pytest.raises(CudaError, match=r"cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED \(1\)"):
            Gemm(library)
        assert library.c.mq_shim_lt_live() == 0


# ---- against the real library and its headers, where they are ----

def calls():
    import re
    return re.findall(r"^MQ_LT_CALL\([^,]+, (\w+)", (ROOT / "cuda/cublaslt.def").read_text(), re.M)


def nvidia(pattern):
    """A file of NVIDIA's packages (nvidia-cublas), or of a toolkit."""
    import sys
    roots = [*(Path(path) / "nvidia" for path in sys.path), Path("/usr/local/cuda")]
    found = [path for root in roots if root.is_dir() for path in sorted(root.glob(pattern))]
    return found[0] if found else pytest.skip(f"no {pattern} of nvidia-cublas here")


def test_the_headers_say_the_same(tmp_path):
    header = nvidia("**/cublasLt.h")
    runtime = Path("/usr/local/cuda/include")
    if not (runtime / "cuda_runtime_api.h").exists():
        pytest.skip("no headers of the CUDA runtime")
    (tmp_path / "check.cc").write_text(r"""
        #include <cublasLt.h>
        #include <type_traits>
        #define MQ_LT_CONSTANT(name, value) static_assert((int)name == value, #name);
        #include "cublaslt.def"
        typedef cudaDataType cublas_data_type;
        #define MQ_LT_CALL(result, name, parameters) static_assert(std::is_same<decltype(&::name), result (*) parameters>::value, #name);
        #include "cublaslt.def"
        static_assert(sizeof(cublasLtMatmulAlgo_t) == 64 && sizeof(cublasLtMatmulHeuristicResult_t) == 96, "");
        static_assert(offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) == 64 && sizeof(cublasStatus_t) == sizeof(int), "");
    """)
    done = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{header.parent}", f"-I{runtime}", f"-I{ROOT / 'cuda'}",
                           str(tmp_path / "check.cc")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_real_library_takes_the_same_descriptors(emulated):
    """It makes descriptors without a GPU: every attribute, its number and its size."""
    library = nvidia("**/libcublasLt.so.1?")
    assert emulated.c.mq_shim_lt_mirror(str(library).encode()) == 0
    for types in TYPES:
        out = np.zeros((2, 4, 6), types[1])
        emulated.product(normal((2, 4, 8), types[0]), normal((2, 6, 8), types[0]), out, transpose_b=True, bias=normal(6, types[1]))
    assert emulated.counts().misses == len(TYPES)
    emulated.c.mq_shim_lt_mirror(None)


def test_the_real_library_says_what_it_lacks(library):
    path = nvidia("**/libcublasLt.so.1?")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(CudaError, match="cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED"):
        Gemm(library, str(path))


def test_staging_is_used(gemm):
    """Device memory that the emulated library's host side touches would crash this process: see cuda/shim/cuda_shim.h."""
    here = Staging(gemm.library.memory)
    assert here.matrix(normal((3, 4))).ld == 4
    here.finish()


@pytest.mark.skipif(SANITIZED, reason="a process without the sanitizers' runtime")
def test_the_bench_runs_up_to_where_it_needs_a_gpu(tmp_path):
    """tests/gpu/bench_gemm.py: with the emulated library all of it, and what is missing is said."""
    import sys
    def run(*arguments, **environment):
        known = [str(Path(path).resolve()) for path in sys.path if path]
        return subprocess.run([sys.executable, str(ROOT / "tests/gpu/bench_gemm.py"), *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(known), **environment})
    done = run("--emulated", "--kinds", "bf16,fp8 tensor,nvfp4", "--capability", "100")
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[4].strip() for line in done.stdout.splitlines()[2:]] == ["plain", "fp8_tensor", "nvfp4"]
    assert "MODELQ_CUDA_LIBRARY is not set" in run().stderr
