"""The CUDA kernels give the bits of the C kernels: every format, scheme and dtype. Run on the CPU by cuda/shim, with the threads of a
block in three orders; what that cannot show is said in cuda/shim/cuda_shim.h. Run on a GPU where MODELQ_CUDA_LIBRARY names the library
for it.

That these tests do notice a missing barrier is itself tested: scripts/cuda_mutants.py takes out each __syncthreads() in turn and runs
those for the kernels that have any (test_cuda_mutants.py)."""
import os
import shutil

import numpy as np
import pytest

import modelq._core as core
from cuda_library import DTYPES, INTERFACE, NO_ROW, SANITIZED, CudaError
from cuda_operations import cuda, unordered  # noqa: F401 (fixtures)
from kernel_digests import tame, wild

SCHEMES = core.schemes()
SHAPES = [(1, 1), (1, 7), (3, 65), (5, 200), (70, 33), (2, 5000), (130, 257)][: 5 if SANITIZED else None]
GRIDS = [(0, 0), (1, 0), (0, 1), (1, 16), (1, 32), (1, 10), (1, 128), (128, 128), (2, 3), (64, 1), (65, 33)]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def same(got, wanted):
    """Bit for bit, where any NaN is as good as another of its width: devices make only one."""
    got, wanted = np.ascontiguousarray(got), np.ascontiguousarray(wanted)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if wanted.dtype in DTYPES:
        nan = np.isnan(wanted.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        got, wanted = np.where(nan, 0, got), np.where(nan, 0, wanted)
    np.testing.assert_array_equal(got.reshape(-1).view(np.uint8), wanted.reshape(-1).view(np.uint8))


def same_parts(got, wanted):
    assert set(got) == set(wanted)
    for role, part in wanted.items():
        same(np.atleast_1d(got[role]).view(np.uint8), np.atleast_1d(part).view(np.uint8))


def numbers(rows, cols, dtype, seed=0):
    """Half of every exponent, half ordinary; a row of zeros."""
    x = np.concatenate([wild(rows * cols, dtype.type, seed), tame(rows * cols, dtype.type, seed)]).reshape(-1, cols)
    x = x[rows // 2:][:rows].copy()
    x[rows // 2, : cols // 2] = 0
    return x


def spoiled(x):
    x = x.copy()
    x[0, -1], x[-1, 0], x[x.shape[0] // 2, x.shape[1] // 2] = np.inf, -np.inf, np.nan
    return x


def strided(x):
    """The same rows further apart, at an address that no vector is aligned to."""
    memory = np.full((x.shape[0], x.shape[1] + 5), 3, x.dtype)
    memory[:, 3:-2] = x
    return memory[:, 3:-2]


def shapes_of(scheme):
    """Whole and partial blocks, where the scheme has them; of rows, pairs."""
    row = SCHEMES[scheme]
    block = row["block"][1]
    if row["scale"] != "fp32":
        return [(1, block), (3, 3 * block), (5, 40 * block)]
    return [(2, 1), (4, 20), (2, 256), (6, 384), (130, 140)]


def test_interface(unordered):
    assert unordered.c.mq_cuda_interface() == INTERFACE
    assert unordered.is_emulated or "MODELQ_CUDA_LIBRARY" in os.environ


# ---- maxima ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax(cuda, dtype):
    for seed, shape in enumerate(SHAPES):
        for x in (numbers(*shape, dtype, seed), strided(numbers(*shape, dtype, seed)), spoiled(numbers(*shape, dtype, seed))):
            for rows, cols in GRIDS:
                wanted = core.amax(x, block=(rows or shape[0], cols or shape[1]))
                same(cuda.amax(x, rows, cols), wanted.reshape(-(-shape[0] // (rows or shape[0])), -1))


def test_amax_of_nothing(cuda):
    assert cuda.amax(np.zeros((0, 5), np.float32)).item() == 0 and cuda.amax(np.zeros((3, 0), np.float32), 1, 0).tolist() == [[0]] * 3


# ---- schemes ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize(cuda, scheme, dtype):
    for seed, shape in enumerate(shapes_of(scheme)):
        for x in (numbers(*shape, dtype, seed), strided(tame(shape[0] * shape[1], dtype.type, seed).reshape(shape))):
            wanted = core.quantize(x, scheme)
            got, bad = cuda.quantize(x, scheme, wanted)
            assert bad == NO_ROW
            same_parts(got, wanted)
            same(cuda.fake_quantize(x, scheme)[0], core.fake_quantize(x, scheme))
            for name in map(str, DTYPES):
                want = core.dequantize(wanted, scheme, dtype=name)
                same(cuda.dequantize(wanted, scheme, np.zeros_like(want)), want)
                same(cuda.dequantize(wanted, scheme, strided(np.zeros_like(want))), want)


@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row["scale"] != "e8m0"])
def test_quantize_by_a_given_amax(cuda, scheme):
    random = np.random.default_rng(0)
    for dtype in DTYPES:
        for shape in shapes_of(scheme):
            x = numbers(*shape, dtype)
            count = core.quantize(x, scheme)["weight_scale"].size if not SCHEMES[scheme]["second_divisor"] else 1
            amax = np.abs(random.standard_normal(count)).astype(np.float32) * np.float32(3)
            amax[0] = [0, 1e-39, 3e38, 448][len(x) % 4]
            wanted = core.quantize(x, scheme, amax=amax)
            same_parts(cuda.quantize(x, scheme, wanted, amax=amax)[0], wanted)
            same(cuda.fake_quantize(x, scheme, amax=amax)[0], core.fake_quantize(x, scheme, amax=amax))


@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row["second_divisor"]])
def test_static_blocks_of_two_levels(cuda, scheme):
    block = SCHEMES[scheme]["block"][1]
    for dtype in DTYPES:
        x = tame(3 * 5 * block, dtype.type, 1).reshape(3, -1)
        block_amax = core.amax(x, block=block).reshape(-1) * np.float32(0.8)
        block_amax[2] = 0
        for options in (dict(), dict(amax=np.float32([9.5])), dict(second_divisor=1536.0), dict(amax=np.float32([0]))):
            options = dict(options, block_amax=block_amax)
            wanted = core.quantize(x, scheme, **options)
            same_parts(cuda.quantize(x, scheme, wanted, **options)[0], wanted)
            same(cuda.fake_quantize(x, scheme, **options)[0], core.fake_quantize(x, scheme, **options))


@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row["block"][1]])
def test_other_block_sizes(cuda, scheme):
    sizes = [8, 64, 256, 512, 24] + ([10, 3] if SCHEMES[scheme]["packing"] != "row" else [])
    for size in sizes:
        cols = size * 3 + (size // 2 if SCHEMES[scheme]["scale"] == "fp32" else 0)
        x = numbers(4, cols, DTYPES[1])
        wanted = core.quantize(x, scheme, block_size=size)
        same_parts(cuda.quantize(x, scheme, wanted, block_size=size)[0], wanted)
        same(cuda.fake_quantize(x, scheme, block_size=size)[0], core.fake_quantize(x, scheme, block_size=size))
        want = core.dequantize(wanted, scheme, block_size=size)
        same(cuda.dequantize(wanted, scheme, np.zeros_like(want), block_size=size), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_bad_row(cuda, scheme, dtype):
    cols = max(SCHEMES[scheme]["block"][1], 1) * 2
    for value in (np.nan, np.inf, -np.inf):
        x = tame(6 * cols, dtype.type, 3).reshape(6, cols)
        like = core.quantize(x, scheme)
        x[3, cols // 2], x[5, 0] = value, value
        with pytest.raises(ValueError, match="row 3 holds NaN or infinity"):
            core.quantize(x, scheme)
        assert cuda.quantize(x, scheme, like)[1] == 3 and cuda.fake_quantize(x, scheme)[1] == 3


def test_in_place(cuda):
    x = numbers(4, 64, DTYPES[1])
    wanted = core.fake_quantize(x, "nvfp4")
    same(cuda.fake_quantize(x, "nvfp4", out=x)[0], wanted)


# ---- codes of single elements ----

@pytest.mark.parametrize("format", core.formats())
def test_codes(cuda, format):
    """Every bfloat16 and its neighbours in float32, NaN of both signs, infinities; and every code back."""
    patterns = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + np.uint32([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff])
    values = patterns.reshape(-1).view(np.float32)[::1 if format == "fp8_e4m3" else 5].copy()
    codes = core.encode(values, format)
    assert cuda.encode(values, format).tobytes() == codes.tobytes()
    if core.formats()[format]["bits"] <= 16:
        codes = np.arange(1 << core.formats()[format]["bits"], dtype=f"uint{8 * codes.dtype.itemsize}").view(codes.dtype)
    assert cuda.decode(codes, format).tobytes() == core.decode(codes, format).tobytes()


# ---- activations ----

KINDS = {
    "fp8": ("float", dict(num_bits=(4, 3))), "int8": (8, dict(num_bits=8)), "int4": (4, dict(num_bits=4)),
    "int8 narrow": (8, dict(num_bits=8, narrow_range=True)), "int8 unsigned": (8, dict(num_bits=8, unsigned=True)),
}
PLACES = {
    "tensor": ((0, 0), {}), "channel": ((0, 1), dict(axis=-1)), "row": ((1, 0), dict(axis=0)),
    "block": ((1, 16), dict(block_sizes={-1: 16})), "2-D block": ((4, 10), dict(block_sizes={-1: 10, -2: 4})),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(cuda, kind, place, dtype):
    (rows, cols), blocks = PLACES[place]
    element, settings = KINDS[kind]
    options = {key: value for key, value in settings.items() if key != "num_bits"}
    for x in (numbers(8, 80, dtype), spoiled(tame(640, dtype.type, 1).reshape(8, 80)), strided(numbers(8, 80, dtype, 2))):
        quantizer = core.Quantizer(**settings, **blocks)
        finite = np.where(np.isfinite(x.astype(np.float32)), x, 0).astype(dtype)
        amax = core.amax(finite, block=(rows or 8, cols or 80)).reshape(-1) * np.float32(0.7)
        amax[-1] = 0
        quantizer.amax = amax if place != "tensor" else float(amax[0])
        same(cuda.scaled(x, element, amax, rows, cols, **options), quantizer(np.ascontiguousarray(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_that_find_their_own_scales(cuda, dtype):
    for x in (numbers(8, 80, dtype), spoiled(tame(640, dtype.type, 1).reshape(8, 80))):
        for element, settings in (("float", dict(num_bits=(4, 3))), (8, dict(num_bits=8)), (4, dict(num_bits=4))):
            per_token = core.Quantizer(**settings, block_sizes={-1: None}, type="dynamic")
            same(cuda.scaled(x, element, None, 1, 0, dynamic=True), per_token(x))
        cast = core.decode(core.encode(x.astype(np.float32), "fp8_e4m3"), "fp8_e4m3")
        same(cuda.scaled(x, "float"), cast.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [name for name, row in SCHEMES.items() if row["scale"] != "fp32"])
def test_activations_by_schemes(cuda, scheme, dtype):
    """NaN and infinity pass through a quantizer; a short last block, too, has a scale of its own."""
    element, block, scale = SCHEMES[scheme]["element"], SCHEMES[scheme]["block"][1], SCHEMES[scheme]["scale"]
    bits = {"fp4_e2m1": (2, 1), "fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2), "fp6_e3m2": (3, 2), "fp6_e2m3": (2, 3), "int8": 8}[element]
    settings = {-1: block, "type": "dynamic", "scale_bits": (8, 0) if scale == "e8m0" else (4, 3)}
    quantizer = core.Quantizer(num_bits=bits, block_sizes=settings)
    options = dict(block_size=block, second_divisor=quantizer.second_divisor)     # W4A8's blocks are NVFP4's to a quantizer, but longer
    amax = np.float32([5.5]) if quantizer.needs_amax else None
    if quantizer.needs_amax:
        quantizer.amax = 5.5
    for x in (numbers(6, 6 * block, dtype), spoiled(tame(36 * block, dtype.type, 1).reshape(6, -1)),
              numbers(6, 6 * block - 3, dtype, 2), strided(numbers(6, 6 * block, dtype, 3))):
        same(cuda.fake_quantize(x, quantizer.scheme, amax=amax, **options)[0], quantizer(np.ascontiguousarray(x)))


# ---- gradients and histograms ----

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_straight_through(cuda, place, dtype):
    (rows, cols), blocks = PLACES[place]
    random = np.random.default_rng(4)
    for x in (numbers(8, 80, dtype), spoiled(tame(640, dtype.type, 1).reshape(8, 80))):
        gradient = random.standard_normal(x.shape).astype(dtype)
        quantizer = core.Quantizer(num_bits=8, **blocks)
        amax = np.abs(random.standard_normal((-(-8 // rows) if rows else 1) * (-(-80 // cols) if cols else 1))).astype(np.float32)
        quantizer.amax = amax if place != "tensor" else float(amax[0])
        same(cuda.straight_through(x, gradient, amax, rows, cols), core.straight_through(quantizer, x, gradient))
        pre_scale, bias = (np.abs(random.standard_normal((2, 80))) + 0.1).astype(np.float32)
        quantizer.pre_quant_scale, quantizer.bias = pre_scale, bias
        same(cuda.straight_through(x, gradient, amax, rows, cols, pre_scale, bias), core.straight_through(quantizer, x, gradient))


def state_of(calibrator):
    """(exponent, zeros, worst, first amax, counts) of a saved histogram (csrc/calib/histogram.c): behind a header of 56 bytes, its numbers."""
    state = calibrator.save()[56:]
    longs, words = np.frombuffer(state[:24], np.int64), np.frombuffer(state[24:32], np.uint32)
    return int(longs[0]), int(longs[2]), int(words[0]), int(words[1]), np.frombuffer(state[40:], np.int64)


def same_histogram(cuda, x, piece, bits, made, calibrator):
    made = cuda.histogram(x, piece, bits, made)
    numbers, counts = made
    exponent, zeros, worst, first, expected = state_of(calibrator)
    np.testing.assert_array_equal(counts, expected)
    assert (numbers["above"] - 120, numbers["zeros"], numbers["worst"], numbers["first_amax"]) == (exponent, zeros, worst, first)
    return made


@pytest.mark.parametrize("bins", [2, 100, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histogram(cuda, dtype, bins):
    """Counts, range and the first data's maximum are the calibrator's, as larger and smaller values come; zeros at first say nothing."""
    calibrator, made = core.Calibrator("histogram", option=bins), None
    rng = np.random.default_rng(5)
    bits = int(np.ceil(np.log2(bins))) + 6
    for piece, scale in enumerate([0, 1e-3, 1e-3, 1.5e-3, 0.3, 1e-5, 200.0, 1.0, 1e4, 0]):
        x = (rng.standard_normal((3, 411)) * scale).astype(np.float32).astype(dtype)
        x[1, :40], x[2, 7] = 0, -0.0
        x = strided(x) if piece % 2 else x
        calibrator.collect(x)
        made = same_histogram(cuda, x, piece, bits, made, calibrator)
    assert made[1].sum() == 10 * x.size and made[0]["first_piece"] == 1


def test_histogram_of_many_values(cuda):
    """More than a thread block counts, and bins beyond those that it has at hand."""
    x = tame(70 * 3001, DTYPES[1].type, 6).reshape(70, -1)
    calibrator = core.Calibrator("histogram")
    calibrator.collect(x)
    same_histogram(cuda, x, 3, 17, None, calibrator)


def test_histogram_whose_first_piece_comes_in_parts(unordered):
    x = np.float32([[1, 2, 3], [7, 5, 6], [9, 0, 0]])
    made = None
    for row, piece in zip(x, (4, 4, 5)):
        made = unordered.histogram(row[None], piece, 8, made)
    assert np.uint32(made[0]["first_amax"]).view(np.float32) == 7 and made[0]["first_piece"] == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_histogram_of_what_is_not_finite(unordered, value):
    made = unordered.histogram(np.float32([[1, 2]]), 0, 8)
    before = made[1].copy()
    numbers, counts = unordered.histogram(np.float32([[3, value]]), 0, 8, made)
    assert numbers["worst"] == np.float32(abs(value)).view(np.uint32) and np.uint32(numbers["first_amax"]).view(np.float32) == 2
    np.testing.assert_array_equal(counts, before)


# ---- errors ----

def test_a_failed_launch_names_kernel_configuration_and_arguments(unordered):
    x = np.ones((4, 64), np.float32)
    if not unordered.is_emulated:
        pytest.skip("a GPU fails no launch on demand")
    for launch, kernel in ((1, "amax_zero"), (2, "amax_narrow"), (3, "second_level"), (4, "fake_quantize")):
        unordered.c.mq_shim_fail_launch(launch, 719)
        if kernel == "amax_narrow":
            with pytest.raises(CudaError, match=kernel):
                unordered.amax(np.ones((9, 16), np.float32))
            continue
        with pytest.raises(CudaError) as raised:
            unordered.fake_quantize(x, "nvfp4")
        text = str(raised.value)
        assert f"CUDA kernel {kernel}, grid (1, 1, 1), block (256, 1, 1)" in text and "cudaErrorLaunchFailure" in text
        assert "nvfp4" in text or kernel != "fake_quantize"
    unordered.c.mq_shim_fail_launch(0, 0)


def test_what_is_refused(unordered):
    x = np.ones((3, 40), np.float32)
    like = core.quantize(x[:, :32], "nvfp4")
    for scheme, of, options, text in (("nvfp4", x, {}, "short"), ("int4", x, {}, "pairs"), ("fp8", x, dict(block_size=8), "no blocks"),
                                      ("nvfp4", x[:, :12], dict(block_size=12), "whole bytes")):
        with pytest.raises(CudaError, match=text):
            unordered.quantize(of, scheme, like, **options)
    with pytest.raises(CudaError, match="expected shape and dtype of x"):
        unordered.fake_quantize(x, "nvfp4", out=np.ones((3, 41), np.float32))

    def less_workspace(job):
        job.workspace_nbytes -= 1

    def overlapping_rows(job):
        job.x.ld = 39
    for change, text in ((less_workspace, "needs a workspace of [0-9]+ bytes"), (overlapping_rows, "rows overlap")):
        with pytest.raises(CudaError, match=text):
            unordered.block_call("block_fake_quantize", "nvfp4", change, x=x, y=x)
