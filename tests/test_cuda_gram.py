"""Gram matrices on a device: those of NumPy in float64, and the state of the core's calibrator, whose order the sums have."""
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core
from cuda_gemm import Gemm
from cuda_library import CudaError, Library, library_to_test
from test_cuda_gemm import strided

BF16, F32, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float16)
ERROR = 2.0**-15 if "MODELQ_CUDA_LIBRARY" in os.environ else 2.0**-20        # of the magnitudes that were added: products are summed in float32

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def library():
    return Library(library_to_test())


def normal(shape, dtype, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) + 0.5).astype(dtype)


def triangle(h):
    return h[np.triu_indices(len(h))]


def blocks_of(h, size):
    """The blocks on the diagonal, upper halves only."""
    count = -(-len(h) // size)
    padded = np.zeros((count * size, count * size))
    padded[:len(h), :len(h)] = h
    return np.stack([np.triu(padded[i * size:(i + 1) * size, i * size:(i + 1) * size]) for i in range(count)])


def wanted_of(x, mask=None):
    x = x.astype(np.float64) if mask is None else x[mask != 0].astype(np.float64)
    return x.T @ x, np.abs(x).T @ np.abs(x)


@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (70, 130), (9, 257)])
def test_all_of_it(library, shape, dtype):
    x, more = normal(shape, dtype, 1), normal((3, shape[1]), dtype, 2)
    mask = (np.arange(shape[0]) % 3 != 1).astype(np.uint8)
    with Gemm(library) as gemm:
        for layout in (np.ascontiguousarray, strided):
            sums = np.zeros(shape[1] * (shape[1] + 1) // 2)
            gemm.gram(layout(x), sums)
            h, size = wanted_of(x)
            assert (np.abs(sums - triangle(h)) <= triangle(size) * ERROR).all()
            gemm.gram(layout(x), sums, mask)
            gemm.gram(layout(more), sums)
            h, size = wanted_of(np.concatenate([x, x[mask != 0], more]))
            assert (np.abs(sums - triangle(h)) <= triangle(size) * ERROR).all()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("n, size", [(32, 16), (130, 16), (7, 16), (128, 128), (200, 64)])
def test_blocks(library, n, size, dtype):
    x, mask = normal((21, n), dtype, 3), (np.arange(21) % 4 > 0).astype(np.uint8)
    with Gemm(library) as gemm:
        for chosen in (None, mask):
            sums = np.zeros((-(-n // size), size, size))
            gemm.gram(strided(x), sums, chosen, size)
            h, bound = (blocks_of(part, size) for part in wanted_of(x, chosen))
            assert (np.abs(sums - h) <= bound * ERROR).all() and (sums != 0).sum() == (h != 0).sum()


@pytest.mark.parametrize("block", [0, 16])
def test_the_sums_are_the_calibrators_state(library, block):
    """They can be loaded into it, and what it makes of them is the result of its own sums."""
    x = normal((50, 96), BF16, 4)
    calibrator, loaded = (core.Calibrator("gram", option=block) for _ in range(2))
    calibrator.collect(x)
    state = calibrator.save()
    count = (6 * 16 * 16) if block else 96 * 97 // 2
    own = np.frombuffer(state, np.float64, count, len(state) - 8 * count)
    sums = np.zeros(count)
    with Gemm(library) as gemm:
        gemm.gram(x, sums, block=block)
    np.testing.assert_allclose(sums, own, rtol=1e-5, atol=1e-6 * np.abs(own).max())
    assert np.count_nonzero(sums) == np.count_nonzero(own)
    loaded.load(state[:-8 * count] + sums.tobytes())
    np.testing.assert_allclose(loaded.compute_gram(), calibrator.compute_gram(), rtol=1e-5, atol=1e-6 * np.abs(own).max())


def test_masked_rows_may_hold_anything(library):
    x, mask = normal((6, 20), F32), np.uint8([1, 0, 1, 1, 0, 1])
    x[1], x[4, 3] = np.nan, np.inf
    sums = np.zeros(210)
    with Gemm(library) as gemm:
        gemm.gram(x, sums, mask)
        np.testing.assert_allclose(sums, triangle(wanted_of(x, mask)[0]), rtol=1e-5)
        gemm.gram(x, sums)
    assert not np.isfinite(sums[[0, -1]]).any()        # on the diagonal, where the calibrator looks


@pytest.mark.parametrize("block", [0, 32])
def test_many_tokens_and_little_room(library, block):
    """More tokens than are summed in float32, strips of columns, masked copies in pieces: the same to rounding, the same bits again."""
    x = normal((5000, 72), F32, 5)
    mask = (np.arange(5000) % 7 > 0).astype(np.uint8)
    results = []
    if not library.is_emulated:
        pytest.skip("counts the emulated cuBLASLt's calls")
    with Gemm(library, workspace_nbytes=1 << 20) as gemm:
        for nbytes in (1 << 20, 1 << 20, 24 << 10):
            gemm.workspace.nbytes = nbytes
            before, sums = gemm.calls("Matmul"), np.zeros((3, 32, 32) if block else 72 * 73 // 2)
            gemm.gram(x, sums, mask, block)
            results.append((gemm.calls("Matmul") - before, sums))
        gemm.workspace.nbytes = 128
        with pytest.raises(CudaError, match=r"a workspace of 128 bytes is too small for the Gram matrix of \[5000, 72\] float32"):
            gemm.gram(x, np.zeros(72 * 73 // 2), mask, block)
    h, size = wanted_of(x, mask)
    wanted, bound = (blocks_of(h, block), blocks_of(size, block)) if block else (triangle(h), triangle(size))
    for _, sums in results:
        assert (np.abs(sums - wanted) <= bound * ERROR).all()
    assert results[0][0] >= 3 and results[2][0] > 3 * results[0][0] and results[0][1].tobytes() == results[1][1].tobytes()


def test_tf32_never(library):
    x = np.full((1, 4), 1 + 2.0**-12, F32)
    sums = np.zeros(10)
    with Gemm(library, allow_tf32=1) as gemm:
        gemm.gram(x, sums)
    np.testing.assert_array_equal(sums, np.float64(np.float32(np.float64(x[0, 0])**2)))


def test_nothing_and_nonsense(library):
    with Gemm(library) as gemm:
        gemm.gram(np.zeros((0, 4), F32), np.zeros(10))
        with pytest.raises(CudaError, match="blocks of -1"):
            gemm.gram(np.zeros((3, 4), F32), np.zeros(10), block=-1)
