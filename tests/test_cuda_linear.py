"""Linears of quantized checkpoints on every compute capability: which way they go, and that the result is that of the dequantized weight and
the fake-quantized input in float64. Run through the emulated cuBLASLt, which reads layouts, scale modes and tiled scales by cuBLAS's
documentation; on a GPU (MODELQ_CUDA_LIBRARY) through the real one, for the capability that it has."""
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core
from cuda_gemm import PATHS, Gemm
from cuda_library import SANITIZED, CudaError, Library, Staging, library_to_test
from test_cuda_gemm import close, moved, nvidia, strided

SCHEMES = core.schemes()
BF16, F32, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float16)
CAPABILITIES = [90, 100] if SANITIZED else [80, 86, 89, 90, 100, 103, 120]
if "MODELQ_CUDA_LIBRARY" in os.environ:
    CAPABILITIES = [int(os.environ.get("MODELQ_CAPABILITY", 90))]
BLACKWELL, ADA_ON = {100, 103, 120}, {89, 90, 100, 103, 120}

# (weight, inputs, kind or scheme of them): on which capabilities what; elsewhere the weight is dequantized
WAYS = {
    ("fp8", "tensor", "float"): {"fp8_tensor": ADA_ON},
    ("fp8", "token", "float"): {"fp8_outer": {90}, "fp8_scaled": ADA_ON - {90}},
    ("fp8_channel", "token", "float"): {"fp8_outer": {90}, "fp8_scaled": ADA_ON - {90}},
    ("fp8_channel", "tensor", "float"): {"fp8_outer": {90}, "fp8_scaled": ADA_ON - {90}},
    ("fp8_block", "group", "float"): {"fp8_block": {90}},
    ("int8", "token", "int"): {"int8": set(CAPABILITIES)},
    ("int8", "tensor", "int"): {"int8": set(CAPABILITIES)},
    ("nvfp4", "scheme", "nvfp4"): {"nvfp4": BLACKWELL},
    ("mxfp8", "scheme", "mxfp8"): {"mxfp8": BLACKWELL},
    ("mxfp4", "scheme", "mxfp4"): {}, ("mxfp6", "scheme", "mxfp6"): {}, ("mxint8", "scheme", "mxint8"): {},
    ("mxfp4", "tensor", "float"): {}, ("nvfp4_w4a8", "tensor", "float"): {}, ("int4", "tensor", "float"): {}, ("int4", "token", "float"): {},
    ("mxfp8_e5m2", "scheme", "mxfp8_e5m2"): {}, ("mxfp6_e2m3", "scheme", "mxfp6_e2m3"): {}, ("nvfp4", "token", "float"): {},
    **{(scheme, "plain", None): {} for scheme in SCHEMES},
}
NARROW = [way for way, paths in WAYS.items() if paths]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def library():
    made = Library(library_to_test())
    made.order("random")
    return made


def normal(shape, dtype, seed):
    """Rows and columns of different sizes, so that a scale of another row or block shows."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) * np.exp2(random.integers(-3, 4, (shape[0], 1))) * np.exp2(random.integers(-2, 3, (1, shape[1])))
    return x.astype(dtype)


def expected_path(way, capability):
    return next((path for path, where in WAYS[way].items() if capability in where), "dequantize")


def capability_for(way):
    """The last that came to have a way of its own for it; on a GPU its own."""
    if "MODELQ_CUDA_LIBRARY" in os.environ:
        return CAPABILITIES[0]
    return max((min(where) for where in WAYS[way].values()), default=80)


def quantizer_of(way, amax):
    """The one that simulates these inputs."""
    _, inputs, of = way
    if inputs == "tensor":
        made = core.Quantizer(num_bits=8 if of == "int" else (4, 3), **({"type": "dynamic"} if amax is None else {}))
    elif inputs == "token":
        made = core.Quantizer(num_bits=8 if of == "int" else (4, 3), block_sizes={-1: None}, type="dynamic")
    elif inputs == "group":
        return grouped
    else:
        row = SCHEMES[of]
        bits = {"fp4_e2m1": (2, 1), "fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2), "fp6_e3m2": (3, 2), "fp6_e2m3": (2, 3), "int8": 8}[row["element"]]
        scale = (8, 0) if row["scale"] == "e8m0" else (4, 3)
        made = core.Quantizer(num_bits=bits, block_sizes={-1: row["block"][1], "type": "dynamic", "scale_bits": scale})
    if made.needs_amax:
        made.amax = float(amax)
    return made


def grouped(x):
    """FP8 with a scale per 128 columns of a row, found in it: each group as a token of its own."""
    pad = -x.shape[1] % 128
    rows = np.pad(x, ((0, 0), (0, pad))).reshape(-1, 128)
    per_token = core.Quantizer(num_bits=(4, 3), block_sizes={-1: None}, type="dynamic")
    return per_token(np.ascontiguousarray(rows)).reshape(len(x), -1)[:, :x.shape[1]]


def wanted_of(way, path, x, parts, amax, **options):
    """The product in float64, and that of magnitudes. Where the weight is dequantized, both factors are rounded to the input's dtype."""
    dtype = x.dtype if path == "dequantize" else F32
    weight = core.dequantize(parts, way[0], dtype=str(dtype), **options)
    if way[1] != "plain":
        x = np.asarray(quantizer_of(way, amax)(np.ascontiguousarray(x.astype(dtype))))
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return x @ weight.T, np.abs(x) @ np.abs(weight.T)


def static_amax(way, x):
    """One number for a tensor, or none where the input finds its own."""
    if way[1] == "tensor" or (way[1] == "scheme" and SCHEMES[way[2]]["second_divisor"]):
        return np.full(1, np.abs(x.astype(np.float32)).max() * np.float32(0.8), np.float32)
    return None


def run(gemm, way, shape, dtype=BF16, out_dtype=None, amax=None, bias=False, accumulate=False, layout=np.ascontiguousarray, seed=0, **options):
    """Runs one linear and compares; returns the path."""
    rows, weight_rows, cols = shape
    scheme, inputs, of = way
    parts = core.quantize(normal((weight_rows, cols), BF16, seed), scheme)
    x = layout(normal((rows, cols), dtype, seed + 1))
    out = layout(normal((rows, weight_rows), out_dtype or dtype, seed + 2))
    before, added = out.astype(np.float64), normal((1, weight_rows), out.dtype, seed + 3)[0] if bias else None
    amax = static_amax(way, x) if amax is None else amax or None
    settings = dict(inputs=inputs, kind=of if inputs in ("tensor", "token") else "float", input_scheme=of if inputs == "scheme" else None)
    path = gemm.run_linear(x, parts, scheme, out, added, accumulate, input_amax=amax, **settings, **options)
    found = np.abs(x.astype(np.float32)).max() if amax is None else amax[0]
    wanted, size = wanted_of(way, path, x, parts, found)
    wanted = wanted + (added.astype(np.float64) if bias else 0) + (before if accumulate else 0)
    close(out, wanted, size + (np.abs(before) if accumulate else 0) + (np.abs(added.astype(np.float64)) if bias else 0))
    return path


def name_of(way):
    return "-".join(str(part) for part in way if part)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_every_scheme_everywhere(library, way, capability):
    with Gemm(library, capability=capability) as gemm:
        for seed, rows in enumerate((1, 6)):
            for options in (dict(), dict(bias=True, accumulate=True)):
                assert run(gemm, way, (rows, 32, 256), seed=10 * seed, **options) == expected_path(way, capability)
        assert gemm.counts().refusals == 0


@pytest.mark.parametrize("way", NARROW, ids=name_of)
def test_every_way_in_full(library, way):
    """Dtypes, biases, sums that are added to, scales prepared or not, one amax found in the input; 7 rows are no multiple of anything."""
    capability = capability_for(way)
    with Gemm(library, capability=capability) as gemm:
        path = expected_path(way, capability)
        for dtype, out_dtype in ((BF16, BF16), (BF16, F32), (F16, F16), (F32, F32)):
            for bias in (False, True):
                for accumulate in (False, True):
                    assert run(gemm, way, (7, 48, 384), dtype, out_dtype, bias=bias, accumulate=accumulate, prepare=bias) == path
        for rows in (4, 130, 257):
            assert run(gemm, way, (rows, 144, 512), prepare=True, seed=rows) == path
        if static_amax(way, np.ones((1, 1))) is not None and way[1] == "scheme":
            assert run(gemm, way, (9, 32, 256), amax=0) == path
        assert gemm.counts().refusals == 0


def spaced(x, cols=0):
    """Rows that begin at whole 16 bytes, however long they are; or so many columns apart."""
    memory = np.zeros((x.shape[0], cols or -(-x.shape[1] // 16) * 16), x.dtype)
    memory[:, :x.shape[1]] = x
    return memory[:, :x.shape[1]]


@pytest.mark.parametrize("way", NARROW, ids=name_of)
def test_results_that_cublas_cannot_write(library, way):
    """Columns that are no whole 16 bytes, rows further apart, addresses that no vector fits."""
    capability = capability_for(way)
    with Gemm(library, capability=capability) as gemm:
        for dtype in (BF16, F32):
            assert run(gemm, way, (5, 36, 256), dtype, bias=True) == expected_path(way, capability)
            assert run(gemm, way, (5, 36, 256), dtype, layout=spaced) == expected_path(way, capability)
            for layout in (moved, lambda x: spaced(x, x.shape[1] + 1)):
                assert run(gemm, way, (5, 32, 256), dtype, layout=layout) == expected_path(way, capability)
            assert run(gemm, way, (5, 32, 256), dtype, layout=strided, accumulate=True) == expected_path(way, capability)


@pytest.mark.parametrize("way", [("fp8", "tensor", "float"), ("fp8_channel", "token", "float"), ("fp8_block", "group", "float"),
                                 ("int8", "token", "int"), ("int4", "plain", None), ("int4", "token", "float"), ("fp8_block", "plain", None)],
                         ids=name_of)
def test_odd_sizes_are_dequantized(library, way):
    with Gemm(library) as gemm:
        for shape in ((3, 34, 129), (1, 6, 7), (5, 130, 20)):
            for dtype in (BF16, F32, F16):
                assert run(gemm, way, shape, dtype, bias=True, accumulate=dtype == F32, layout=strided) == "dequantize"


@pytest.mark.parametrize("way", [*NARROW, ("nvfp4", "plain", None), ("int4", "plain", None), ("fp8_block", "plain", None),
                                 ("mxfp4", "scheme", "mxfp4")], ids=name_of)
def test_small_workspaces_take_more_turns(library, way):
    """Rows of inputs, or of the weight, go in pieces; too little is an error that says so."""
    capability = capability_for(way)
    if not library.is_emulated:
        pytest.skip("counts the emulated cuBLASLt's calls")
    with Gemm(library, capability=capability) as gemm:
        def products(nbytes):
            before = gemm.calls("Matmul")
            run(gemm, way, (180, 272, 384), bias=True, accumulate=True, change=lambda job: setattr(job.workspace, "nbytes", nbytes))
            return gemm.calls("Matmul") - before
        assert products(gemm.nbytes) == 1
        turns, nbytes = [], 320 << 10
        while not turns or turns[-1] < 3:
            turns.append(products(nbytes))
            nbytes = nbytes * 3 // 4 // 256 * 256
        assert turns == sorted(turns)
        with pytest.raises(CudaError, match=r"a workspace of 1024 bytes is too small for [0-9]+ rows of a linear \[272, 384\], scheme " + way[0]):
            products(1024)


def test_fp8_after_int4(library):
    """W4A8: what INT4 codes dequantize to goes through FP8 once more."""
    parts = core.quantize(normal((64, 256), BF16, 1), "int4")
    x, out, amax = normal((5, 256), BF16, 2), np.zeros((5, 64), BF16), np.float32([9.0])
    with Gemm(library) as gemm:
        assert gemm.run_linear(x, parts, "int4", out, fp8_amax=amax) == "dequantize"
    weight = np.asarray(core.fake_quantize(core.dequantize(parts, "int4", dtype="bfloat16"), "fp8", amax=amax)).astype(np.float64)
    close(out, x.astype(np.float64) @ weight.T, np.abs(x.astype(np.float64)) @ np.abs(weight.T))
    assert (weight != core.dequantize(parts, "int4", dtype="bfloat16").astype(np.float64)).any()


@pytest.mark.parametrize("way", [("int4", "plain", None), ("nvfp4", "plain", None)], ids=name_of)
def test_other_block_sizes(library, way):
    parts = core.quantize(normal((32, 256), BF16, 1), way[0], block_size=64)
    x, out = normal((5, 256), BF16, 2), np.zeros((5, 32), BF16)
    with Gemm(library, capability=100) as gemm:
        assert gemm.run_linear(x, parts, way[0], out, block_size=64) == "dequantize"
    close(out, *wanted_of(way, "dequantize", x, parts, None, block_size=64))


@pytest.mark.parametrize("rounded", ["bfloat16", "float16"])
def test_numbers_that_are_rounded_to_a_dtype_of_their_own(library, rounded):
    """Of a checkpoint in bfloat16 that is computed in float32, or the other way round."""
    dtype = np.dtype(getattr(ml_dtypes, rounded, None) or rounded)
    for way in (("nvfp4", "plain", None), ("fp8_channel", "plain", None), ("int4", "plain", None)):
        parts = core.quantize(normal((288, 130 if way[0] == "fp8_channel" else 256), F32, 1), way[0])
        stated = core.dequantize(parts, way[0], dtype=rounded)
        for x_dtype in (F32, BF16):
            x = normal((5, stated.shape[1]), x_dtype, 2)
            with Gemm(library, capability=100) as gemm:
                for nbytes in (gemm.nbytes, 1 << 19):
                    out = np.zeros((5, 288), F32)
                    assert gemm.run_linear(x, parts, way[0], out, rounded=dtype,
                                           change=lambda job: setattr(job.workspace, "nbytes", nbytes)) == "dequantize"
                    weight = stated.astype(x_dtype).astype(np.float64)
                    close(out, x.astype(np.float64) @ weight.T, np.abs(x.astype(np.float64)) @ np.abs(weight.T))
            exact = core.dequantize(parts, way[0], dtype="float32")
            assert x_dtype != F32 or (exact != stated.astype(np.float32)).any()


def test_zeros(library):
    for way in WAYS:
        parts = core.quantize(np.zeros((16, 256), BF16), way[0])
        for capability in (90, 100):
            with Gemm(library, capability=capability) as gemm:
                out = np.ones((3, 16), BF16)
                settings = dict(inputs=way[1], kind=way[2] if way[1] in ("tensor", "token") else "float",
                                input_scheme=way[2] if way[1] == "scheme" else None)
                gemm.run_linear(np.zeros((3, 256), BF16), parts, way[0], out, **settings)
                assert not out.astype(F32).any()


# ---- the next way ----

def test_what_cublas_refuses_goes_the_next_way(library):
    """A device of a capability that the table says more of than its cuBLASLt can: nothing is added twice."""
    if not library.is_emulated:
        pytest.skip("depends on the device")
    for way, next_path in ((("fp8_channel", "token", "float"), "fp8_scaled"), (("nvfp4", "scheme", "nvfp4"), "dequantize"),
                           (("fp8_block", "group", "float"), "dequantize"), (("mxfp8", "scheme", "mxfp8"), "dequantize")):
        with Gemm(library, capability=100 if way[1] == "scheme" else 90) as gemm:
            gemm.c.mq_shim_lt_set_capability(89)
            for _ in range(2):
                assert run(gemm, way, (9, 32, 256), accumulate=True, bias=True, prepare=True) == next_path
            assert gemm.counts().refusals >= 1


def test_an_old_cublas_has_fewer_ways(library, tmp_path):
    pytest.skip("the emulated library has one version") if not library.is_emulated else None
    with Gemm(library, capability=90) as gemm:
        gemm.c.mq_shim_lt_set_version(120800)
    try:
        with Gemm(library, capability=90) as gemm:
            assert gemm.counts().version == 120800
            assert run(gemm, ("fp8_channel", "token", "float"), (8, 32, 256)) == "fp8_scaled"
            assert run(gemm, ("fp8_block", "group", "float"), (8, 32, 256)) == "dequantize"
        with Gemm(library, capability=100) as gemm:
            assert run(gemm, ("nvfp4", "scheme", "nvfp4"), (8, 32, 256)) == "nvfp4"
    finally:
        library.c.mq_shim_lt_set_version(130100)


# ---- scales in cuBLASLt's order ----

def tiled(scales):
    """As cuBLAS's documentation has it ("1D Block Scaling Factors Layout"), and torch's to_blocked: tiles of 128 x 4, of which a row is
    four rows 32 apart."""
    rows, cols = (-(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4)
    padded = np.zeros((rows, cols), np.uint8)
    padded[:scales.shape[0], :scales.shape[1]] = scales
    tiles = padded.reshape(rows // 128, 128, cols // 4, 4).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, 4, 32, 4).transpose(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize("shape", [(1, 64), (32, 256), (128, 64), (129, 320), (300, 2048)])
@pytest.mark.parametrize("way", [("nvfp4", "scheme", "nvfp4"), ("mxfp8", "scheme", "mxfp8")], ids=name_of)
def test_prepared_scales(library, way, shape):
    """The bytes, and nothing beyond them."""
    import ctypes as C
    parts = core.quantize(normal((shape[0] * 4, shape[1]), BF16, 1), way[0])
    scales = parts["weight_scale"].view(np.uint8)
    wanted = tiled(scales)
    with Gemm(library, capability=100) as gemm:
        here = Staging(library.memory)
        linear = gemm.linear(here, parts, way[0], (shape[0] * 4, shape[1]), inputs=way[1], input_scheme=way[2])
        gemm.c.mq_cuda_linear_prepared_nbytes.restype = C.c_size_t
        assert gemm.c.mq_cuda_linear_prepared_nbytes(gemm.place, C.byref(linear)) == wanted.size
        memory = np.full(wanted.size + 48, 0x5a, np.uint8)
        start = -memory.ctypes.data % 16 + 16
        out = memory[start:start + wanted.size]
        gemm.call("linear_prepare", here, C.byref(linear), C.c_void_p(here.pointer(out)))
        np.testing.assert_array_equal(out, wanted)
        assert (memory[:start] == 0x5a).all() and (memory[start + wanted.size:] == 0x5a).all()


def test_prepared_scales_of_fp8(library):
    """Blocks' K-major, columns a multiple of 4 apart, zeros between; a tensor's one per row where rows have their own."""
    import ctypes as C
    for way, shape, wanted in ((("fp8_block", "group", "float"), (256, 640), lambda s: np.pad(s.reshape(2, 5), ((0, 0), (0, 3)))),
                               (("fp8_block", "group", "float"), (256, 512), None), (("fp8_channel", "token", "float"), (32, 64), None),
                               (("fp8", "token", "float"), (32, 64), lambda s: np.repeat(s, 32))):
        parts = core.quantize(normal(shape, BF16, 1), way[0])
        with Gemm(library, capability=90) as gemm:
            here = Staging(library.memory)
            linear = gemm.linear(here, parts, way[0], shape, inputs=way[1])
            gemm.c.mq_cuda_linear_prepared_nbytes.restype = C.c_size_t
            made = None if wanted is None else wanted(np.asarray(parts["weight_scale"], np.float32)).astype(np.float32).reshape(-1)
            assert gemm.c.mq_cuda_linear_prepared_nbytes(gemm.place, C.byref(linear)) == (0 if made is None else made.nbytes)
            memory = np.full(4096, np.nan, np.float32)
            out = memory[-memory.ctypes.data % 16 // 4:][:0 if made is None else made.size]
            gemm.call("linear_prepare", here, C.byref(linear), C.c_void_p(here.pointer(out)))
            assert made is None or out.tobytes() == made.tobytes()


def test_the_real_library_takes_the_same_descriptors(library):
    """Scale modes, pointers, types of biases: every attribute is set in the real library, too, which needs no GPU for that."""
    path = nvidia("**/libcublasLt.so.1?")
    if not library.is_emulated:
        pytest.skip("it is the real one")
    assert library.c.mq_shim_lt_mirror(str(path).encode()) == 0
    for way in NARROW:
        for capability in (90, 100):
            with Gemm(library, capability=capability) as gemm:
                run(gemm, way, (8, 32, 256), bias=True)
                assert gemm.counts().misses >= 1
    library.c.mq_shim_lt_mirror(None)


# ---- errors ----

def test_what_is_wrong_is_said(library):
    parts = core.quantize(normal((32, 256), BF16, 1), "nvfp4")
    x, out = normal((4, 256), BF16, 2), np.zeros((4, 32), BF16)
    with Gemm(library, capability=100) as gemm:
        def failing(text, **change):
            with pytest.raises(CudaError, match=text):
                gemm.run_linear(**{**dict(x=x, parts=parts, scheme="nvfp4", out=out), **change})
        failing(r"in \[4, 128\] bfloat16.* times a linear \[32, 256\]\^T does not give out", change=lambda job: setattr(job.in_, "cols", 128))
        failing("scale_2 is needed", change=lambda job: setattr(job.linear, "scale_2", None))
        failing("codes and scales are needed", change=lambda job: setattr(job.linear, "codes", None))
        failing("expected one dtype, or float32 out", out=out.astype(F16))
        failing("256 divides", change=lambda job: setattr(job.workspace, "data", None))
        failing("no such way to treat inputs", change=lambda job: setattr(job.linear, "inputs", 5))
        if library.is_emulated:
            gemm.c.mq_shim_lt_fail(b"cublasLtMatmul", 1, 13)
            failing(r"cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED \(13\): out \[4, 32\] bfloat16 = a \[4, 256\] fp4_e2m1 a scale per 16 \* "
                    r"b \[32, 256\]\^T fp4_e2m1 a scale per 16", inputs="scheme", input_scheme="nvfp4", input_amax=np.float32([3]))


def test_paths_are_those_of_the_header():
    import re

    from cuda_library import ROOT
    text = (ROOT / "cuda/modelq_cuda_gemm.h").read_text()
    assert [name.lower() for name in re.findall(r"MQ_CUDA_PATH_(\w+),", text)] == PATHS
