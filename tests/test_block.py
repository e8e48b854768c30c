"""Quantizing whole matrices: golden bytes, an independent NumPy implementation, simulation equals export, bad input."""
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modelq._core as core
import reference
from golden_data import cases, read_safetensors

SCHEMES = core.schemes()
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
GOLDEN = {
    "FP8_DEFAULT_CFG": "fp8", "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8_channel", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "fp8_block",
    "INT8_DEFAULT_CFG": "int8", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "int4", "NVFP4_DEFAULT_CFG": "nvfp4", "NVFP4_MLP_ONLY_CFG": "nvfp4",
    "W4A16_NVFP4_CFG": "nvfp4", "MXFP4_DEFAULT_CFG": "mxfp4", "MXFP8_DEFAULT_CFG": "mxfp8",
}
SIBLINGS = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def weight(rows=32, cols=256, dtype=ml_dtypes.bfloat16, seed=0):
    """Heavy-tailed, with blocks of different sizes, a zero block, zeros of both signs and denormals."""
    random = np.random.default_rng(seed)
    w = random.standard_t(3, (rows, cols)) * np.exp2(random.integers(-8, 4, (rows, -(-cols // 16))).repeat(16, 1)[:, :cols])
    w = w.astype(np.float32)
    if rows and cols:
        w[0, :16] = 0
        w[-1, : min(cols, 5)] = np.float32([0, -0.0, 1e-40, -1e-40, 1e-30])[: min(cols, 5)]
    return w.astype(dtype)


def assert_same(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    np.testing.assert_array_equal(got.reshape(-1).view(np.uint8), np.ascontiguousarray(wanted).reshape(-1).view(np.uint8))


def assert_parts(got, wanted):
    assert set(got) == set(wanted)
    for role, part in got.items():
        assert_same(part, wanted[role])


# ---- golden bytes ----

def shared_amax(case, linear, scheme, amax):
    """Linears that share an input share a per-tensor amax (not for plain FP8); that includes FP8 blocks if there is one block."""
    if not amax or scheme not in ("nvfp4", "fp8_block"):
        return None
    parent, own = linear.rsplit(".", 1)
    group = next((group for group in SIBLINGS if own in group), [own])
    values = {name: amax[f"{parent}.{name}.weight_quantizer.amax"] for name in group}
    if scheme == "fp8_block" and values[own].size > 1:
        return None
    return max(value.reshape(-1)[0] for value in values.values())


@pytest.mark.parametrize("case", cases(dtype="bfloat16", configs=list(GOLDEN), needs=["model.safetensors"]))
def test_golden_bytes(case):
    scheme = GOLDEN[case.config]
    source = read_safetensors(case.model.source / "model.safetensors")
    amax = case.amax if case.has("amax.safetensors") else {}
    linears = [name.removesuffix(".weight_scale") for name in case.exported if name.endswith(".weight_scale") and ".experts." not in name]
    assert linears
    for linear in linears:
        w = source[f"{linear}.weight"]
        parts = core.quantize(w, scheme, amax=shared_amax(case, linear, scheme, amax), name=linear)
        assert_parts(parts, {role: case.exported[f"{linear}.{role}"] for role in parts})
        assert ("weight_scale_2" in parts) == (f"{linear}.weight_scale_2" in case.exported)
        if amax:
            own = amax[f"{linear}.weight_quantizer.amax"]
            kwargs = {"fp8_channel": {"axis": 0}, "int8": {"axis": 0}, "int4": {"block": 128}, "fp8_block": {"block": (128, 128)}}
            np.testing.assert_array_equal(core.amax(w, **kwargs.get(scheme, {})).reshape(own.shape), own)


def test_documented_example():
    """The example of the introduction to quantization that users know: 4-bit symmetric, scale = amax / 7."""
    values = np.float32([4.75, 2.01, -3.44, -7.11, 0, 13.43, -4.91, -6.43])
    scale = core.amax(values) / np.float32(7)
    codes = core.encode(values / scale, "int4")
    np.testing.assert_array_equal(core.decode(codes, "int4"), [2, 1, -2, -4, 0, 7, -3, -3])
    parts = core.quantize(np.stack([values, values]), "int4", block_size=8)
    np.testing.assert_array_equal(parts["weight_scale"], np.full((2, 1), scale))
    np.testing.assert_array_equal(parts["weight"][0] & 15, codes)
    np.testing.assert_array_equal(parts["weight"][0] >> 4, codes)


# ---- against the NumPy implementation ----

def test_every_scheme_has_a_reference():
    assert set(reference.SCHEMES) == set(SCHEMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_numpy(scheme, dtype):
    for seed, (rows, cols) in enumerate([(32, 256), (2, 1152), (6, 128)]):
        w = weight(rows, cols, dtype, seed)
        assert_parts(core.quantize(w, scheme), reference.SCHEMES[scheme](w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["fp8", "fp8_channel", "fp8_block", "int8"])
def test_odd_shapes_against_numpy(scheme, dtype):
    for seed, (rows, cols) in enumerate([(1, 1), (3, 7), (130, 129), (5, 1025), (257, 300)]):
        w = weight(rows, cols, dtype, seed)
        assert_parts(core.quantize(w, scheme), reference.SCHEMES[scheme](w))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scaling_by_powers_of_two(scheme):
    """Multiplying the weight by 2^k multiplies the (top) scale and changes no code."""
    w = weight(8, 256, np.float32, 3)
    w[np.abs(w) < 1e-20] = 0
    one, big = core.quantize(w, scheme), core.quantize(w * np.float32(32), scheme)
    assert_same(one["weight"], big["weight"])
    if SCHEMES[scheme]["scale"] == "fp32":
        block_is_zero = core.dequantize(one, scheme).reshape(8, 2, 128).any(2) == 0
        keep = ~block_is_zero if one["weight_scale"].shape == (8, 2) else ...
        np.testing.assert_array_equal(one["weight_scale"][keep] * 32, big["weight_scale"][keep])


# ---- simulation equals export ----

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_simulation_equals_export(scheme, dtype):
    w = weight(64, 384, dtype, 5)
    assert_same(core.fake_quantize(w, scheme), core.dequantize(core.quantize(w, scheme), scheme, dtype=w.dtype.name))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_values(scheme):
    """element * scale of the stored parts, computed here."""
    w = weight(16, 256, np.float32, 6)
    parts, row = core.quantize(w, scheme), SCHEMES[scheme]
    codes = parts["weight"].view(np.uint8)
    if row["packing"] == "row_pairs":
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(16, 256)
    elif row["packing"] == "row" and row["element"].startswith("fp4"):
        codes = reference.unpack_row(codes)
    elif row["packing"] == "row":
        bits = np.unpackbits(codes, axis=1, bitorder="little").reshape(16, 256, 6)
        codes = (bits << np.arange(6)).sum(-1).astype(np.uint8)
    scale = parts["weight_scale"]
    if row["scale"] != "fp32":
        scale = core.decode(scale.view(np.uint8), row["scale"]) * parts.get("weight_scale_2", np.float32(1))
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0].repeat(128, 0)[:16]
    elif scale.ndim == 1:
        scale = scale[:, None]
    scale = np.broadcast_to(scale, (16, scale.shape[1] if scale.ndim else 1)).repeat(256 // (scale.shape[1] if scale.ndim else 1), 1)
    np.testing.assert_array_equal(core.dequantize(parts, scheme), core.decode(codes, row["element"]) * scale)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if SCHEMES[name]["scale"] != "fp8_e4m3"])
def test_idempotent(scheme):
    """Quantized values are fixed points. (Not NVFP4's: a block's maximum need not be a code times its rounded scale.)"""
    once = core.fake_quantize(weight(32, 256, np.float32, 7), scheme)
    twice = core.fake_quantize(once, scheme)
    np.testing.assert_allclose(twice, once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_bound(scheme):
    """At most half a step at the top of the range times the scale, and a block's scale is within e4m3's or e8m0's rounding."""
    w = weight(64, 256, np.float32, 8)
    row = SCHEMES[scheme]
    half_step = 2.0 ** -(core.formats()[row["element"]]["mantissa_bits"] + 1) if "fp" in row["element"] else 0.5 / (127 if "8" in scheme else 7)
    rows, cols = (block or extent for block, extent in zip(row["block"], w.shape))
    amax = core.amax(w, block=(rows, cols)).repeat(rows, 0)[:64].repeat(cols, 1)[:, :256]
    slack = {"fp32": 1, "e8m0": 2, "fp8_e4m3": 1.0625}[row["scale"]]
    floor = core.amax(w) * 2.0 ** -18
    assert (np.abs(core.fake_quantize(w, scheme) - w) <= amax * half_step * slack + floor).all()


# ---- amax ----

@pytest.mark.parametrize("dtype", DTYPES)
def test_amax(dtype):
    x = weight(70, 100, dtype, 9)
    f = np.abs(x.astype(np.float32))
    np.testing.assert_array_equal(core.amax(x), f.max())
    np.testing.assert_array_equal(core.amax(x, axis=0), f.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(core.amax(x, axis=-1), f.max(axis=0, keepdims=True))
    np.testing.assert_array_equal(core.amax(x, block=16), np.pad(f, ((0, 0), (0, 12))).reshape(70, 7, 16).max(2))
    padded = np.pad(f, ((0, 26), (0, 28))).reshape(3, 32, 2, 64)
    np.testing.assert_array_equal(core.amax(x, block=(32, 64)), padded.max(axis=(1, 3)))
    np.testing.assert_array_equal(core.amax(x.reshape(2, 35, 100), axis=-1), f.max(axis=0).reshape(1, 1, 100))
    np.testing.assert_array_equal(core.amax(x.T), f.max())
    assert core.amax(x[:0]) == 0 and core.amax(x[0, 0]).shape == ()


def test_amax_nan_wins():
    x = weight(300, 40, np.float32)
    x[7, 3], x[200, 39] = np.inf, np.nan
    assert np.isnan(core.amax(x)) and np.isinf(core.amax(x[:100]))
    assert np.isnan(core.amax(x, axis=-1)[0, 39]) and np.isinf(core.amax(x, axis=0)[7, 0])
    assert np.isnan(core.amax(x.astype(ml_dtypes.bfloat16))) and np.isnan(core.amax(x.astype(np.float16)))
    with pytest.raises(ValueError, match="axis or block"):
        core.amax(x, axis=0, block=4)
    with pytest.raises(TypeError, match="float64"):
        core.amax(x.astype(np.float64))


# ---- layouts ----

@pytest.mark.parametrize("scheme", SCHEMES)
def test_layout_does_not_matter(scheme):
    w = weight(16, 256, seed=11)
    wanted = core.quantize(w, scheme)
    wide = np.zeros((16, 512), w.dtype)
    wide[:, ::2] = w
    raw = bytearray(w.nbytes + 1)
    raw[1:] = w.tobytes()
    misaligned = np.frombuffer(raw, w.dtype, offset=1).reshape(w.shape)
    readonly = w.copy()
    readonly.flags.writeable = False
    for same in (np.asfortranarray(w), wide[:, ::2], w[::-1][::-1], misaligned, readonly, w[:, ::-1].copy()[:, ::-1]):
        assert_parts(core.quantize(same, scheme), wanted)
        assert_same(core.fake_quantize(same, scheme), core.fake_quantize(w, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty(scheme):
    for shape in [(0, 128), (4, 0), (0, 0)]:
        w = np.zeros(shape, ml_dtypes.bfloat16)
        parts = core.quantize(w, scheme)
        assert core.dequantize(parts, scheme).shape == shape and core.fake_quantize(w, scheme).shape == shape
        if SCHEMES[scheme]["scale"] == "fp32":
            assert (parts["weight_scale"] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_and_denormal_tensors(scheme, dtype):
    zero = np.zeros((4, 128), dtype)
    assert not np.any(core.fake_quantize(zero, scheme).astype(np.float32))
    parts = core.quantize(zero, scheme)
    if scheme == "nvfp4":
        assert parts["weight_scale_2"] == np.float32(6) / np.float32(2688) and (parts["weight_scale"].astype(np.float32) == 1).all()
    if scheme == "mxfp4":
        assert (parts["weight"] == 0x88).all()
    tiny = zero.copy()
    tiny[1, 3] = tiny[1, 4] = np.finfo(np.float16).smallest_subnormal if dtype == np.float16 else 1e-40
    assert np.isfinite(core.fake_quantize(tiny, scheme).astype(np.float32)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_out(scheme):
    """Results go into given memory, and nothing else does for it."""
    w = weight(16, 256, seed=15)
    wanted, fake = core.quantize(w, scheme), core.fake_quantize(w, scheme)
    out = {role: np.zeros_like(part) for role, part in wanted.items()}
    got = core.quantize(w, scheme, out=out)
    assert_parts(got, wanted)
    assert all(got[role] is out[role] for role in out)
    values = np.zeros_like(w)
    assert core.fake_quantize(w, scheme, out=values) is values
    assert_same(values, fake)
    assert_same(core.dequantize(wanted, scheme, dtype="bfloat16", out=np.zeros_like(w)), fake)
    assert_same(core.fake_quantize(values := w.copy(), scheme, out=values), fake)
    readonly = np.zeros_like(w)
    readonly.flags.writeable = False
    for bad in (np.zeros((16, 255), w.dtype), np.zeros(w.shape, np.float32), np.zeros((16, 512), w.dtype)[:, ::2], readonly,
                [[0.0] * 256] * 16):
        with pytest.raises(ValueError, match=r"out.*\[16, 256\] bfloat16"):
            core.fake_quantize(w, scheme, out=bad)
    with pytest.raises(KeyError):
        core.quantize(w, scheme, out={})


# ---- given amax ----

def test_given_amax():
    w = weight(32, 256, seed=12)
    for scheme, twice in [("fp8", 2 * core.amax(w)), ("nvfp4", 2 * core.amax(w))]:
        assert_parts(core.quantize(w, scheme, amax=twice), reference.SCHEMES[scheme](w, amax=twice))
    rows = core.amax(w, axis=0)
    assert_parts(core.quantize(w, "int8", amax=rows), core.quantize(w, "int8"))
    clipped = core.quantize(w, "int8", amax=rows / 2)
    np.testing.assert_array_equal(clipped["weight_scale"], rows[:, 0] / 2 / np.float32(127))
    assert clipped["weight"].min() == -128 and clipped["weight"].max() == 127
    blocks = core.amax(w, block=128)
    assert_parts(core.quantize(w, "int4", amax=blocks.reshape(-1, 1)), core.quantize(w, "int4"))
    tiles = core.amax(w, block=(128, 128))
    assert_parts(core.quantize(w, "fp8_block", amax=tiles), core.quantize(w, "fp8_block"))


def test_block_size():
    w = weight(8, 256, seed=13)
    assert_parts(core.quantize(w, "nvfp4", block_size=32), reference.nvfp4(w, size=32))
    assert_parts(core.quantize(w, "int4", block_size=64), reference.int4(w, size=64))
    parts = core.quantize(w, "nvfp4", block_size=32)
    assert_same(core.dequantize(parts, "nvfp4", dtype="bfloat16", block_size=32), core.fake_quantize(w, "nvfp4", block_size=32))


# ---- bad input ----

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(scheme, bad):
    w = weight(12, 256, seed=14)
    w[5, 77] = bad
    for function in (core.quantize, core.fake_quantize):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.q_proj.*row 5 "):
            function(w, scheme, name="model.layers.0.q_proj")


def test_errors_name_the_tensor_and_the_remedy():
    w = weight(8, 100)
    with pytest.raises(ValueError, match=r"lin.*\[8, 100\].*nvfp4.*block size 16"):
        core.quantize(w, "nvfp4", name="lin")
    with pytest.raises(ValueError, match="even number"):
        core.quantize(weight(7, 128), "int4")
    with pytest.raises(ValueError, match="unknown scheme 'nvfp5'"):
        core.quantize(w, "nvfp5")
    with pytest.raises(ValueError, match="takes 8 amax values, got 3"):
        core.quantize(w, "int8", amax=[1, 2, 3])
    with pytest.raises(ValueError, match="amax 0 is -1"):
        core.quantize(w, "fp8", amax=-1.0)
    with pytest.raises(ValueError, match="takes 0 amax values"):
        core.quantize(weight(8, 128), "mxfp8", amax=1.0)
    with pytest.raises(ValueError, match="no block size"):
        core.quantize(w, "fp8", block_size=16)
    with pytest.raises(ValueError, match="2 dimensions"):
        core.quantize(w[0], "fp8")
    with pytest.raises(TypeError, match="lin.*float64"):
        core.quantize(w.astype(np.float64), "fp8", name="lin")
    with pytest.raises(ValueError, match="weight_scale' is missing"):
        core.dequantize({"weight": np.zeros((4, 8), np.uint8)}, "nvfp4")
    with pytest.raises(ValueError, match=r"weight_scale: expected \[4, 1\] float8_e4m3fn"):
        core.dequantize({"weight": np.zeros((4, 8), np.uint8), "weight_scale": np.zeros(3, np.uint8), "weight_scale_2": 1.0}, "nvfp4")


# ---- properties ----

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(0, 6), st.integers(0, 5), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_any_shape(scheme, pairs, blocks, dtype, seed):
    w = weight(2 * pairs, 128 * blocks, dtype, seed)
    if w.size:
        assert_parts(core.quantize(w, scheme), reference.SCHEMES[scheme](w))
    assert_same(core.fake_quantize(w, scheme), core.dequantize(core.quantize(w, scheme), scheme, dtype=w.dtype.name))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["nvfp4", "mxfp4", "mxfp6", "mxfp8", "int4"]), st.integers(0, 2**32 - 1))
def test_blocks_are_independent(scheme, seed):
    """Exchanging blocks exchanges their codes and scales."""
    w = weight(4, 512, np.float32, seed)
    swapped = np.concatenate([w[:, 256:], w[:, :256]], axis=1)
    np.testing.assert_array_equal(np.roll(core.fake_quantize(w, scheme), 256, axis=1), core.fake_quantize(swapped, scheme))
