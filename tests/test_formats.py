"""Element formats: the tables, and every encoder and decoder against ml_dtypes and NumPy."""
import ml_dtypes
import numpy as np
import pytest

import modelq._core as core

FORMATS = core.formats()
CODE_TYPES = {4: np.uint8, 6: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}
ORACLES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn, "fp4_e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu,
    "bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32, "int8": np.int8, "int4": ml_dtypes.int4,
}
FLOATS = [name for name, row in FORMATS.items() if row["kind"] == "float"]
INTS = [name for name, row in FORMATS.items() if row["kind"] == "int"]
SWEEP_STRIDE = 1009      # prime, so that every exponent and many mantissas are met: 4.3 million patterns


def sweep_inputs() -> np.ndarray:
    """Every bfloat16, every float16, and each SWEEP_STRIDE-th float32 pattern."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    patterns = np.arange(0, 1 << 32, SWEEP_STRIDE, dtype=np.uint64).astype(np.uint32)
    with np.errstate(all="ignore"):
        return np.concatenate([halves.view(ml_dtypes.bfloat16).astype(np.float32), halves.view(np.float16).astype(np.float32),
                               patterns.view(np.float32)])


INPUTS = sweep_inputs()


def all_codes(name: str) -> np.ndarray:
    bits = FORMATS[name]["bits"]
    return np.arange(1 << bits, dtype=CODE_TYPES[bits])


def oracle_decode(name: str, codes: np.ndarray) -> np.ndarray:
    if name == "int4":
        return ((codes.astype(np.int32) ^ 8) - 8).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return codes.view(ORACLES[name]).astype(np.float32)


def oracle_encode(name: str, values: np.ndarray) -> np.ndarray:
    """Saturating where the row says so; NaN is not compared here."""
    row = FORMATS[name]
    with np.errstate(over="ignore", invalid="ignore"):
        if row["saturates"]:
            values = np.clip(values, np.float32(-row["max"]), np.float32(row["max"]))
        return values.astype(ORACLES[name]).view(CODE_TYPES[row["bits"]])


def neighbours(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))])


def test_tables_are_complete_and_read_only():
    assert set(ORACLES) == set(FORMATS)
    assert FORMATS["fp4_e2m1"]["max"] == 6 and FORMATS["fp8_e4m3"]["max"] == 448 and FORMATS["fp6_e3m2"]["max"] == 28
    assert FORMATS["fp8_e5m2"]["max"] == 57344 and FORMATS["fp6_e2m3"]["max"] == 7.5 and FORMATS["fp16"]["max"] == 65504
    with pytest.raises(TypeError):
        FORMATS["fp8_e4m3"]["max"] = 1
    with pytest.raises(TypeError):
        core.schemes()["nvfp4"] = {}


@pytest.mark.parametrize("name", [name for name in FLOATS if name != "fp32"])
def test_limits_are_those_of_the_type(name):
    row, info = FORMATS[name], ml_dtypes.finfo(ORACLES[name])
    assert (row["max"], row["smallest_normal"], row["smallest"]) == (
        float(info.max), float(info.smallest_normal), float(info.smallest_subnormal))
    assert row["bits"] == info.bits and row["mantissa_bits"] == info.nmant


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp32"])
def test_decode_of_every_code(name):
    codes = all_codes(name)
    np.testing.assert_array_equal(core.decode(codes, name), oracle_decode(name, codes))
    zeros = core.decode(codes, name) == 0
    np.testing.assert_array_equal(np.signbit(core.decode(codes, name)[zeros]), np.signbit(oracle_decode(name, codes)[zeros]))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp32"])
def test_codes_survive_a_round_trip(name):
    codes = all_codes(name)
    finite = np.isfinite(core.decode(codes, name))
    np.testing.assert_array_equal(core.encode(core.decode(codes[finite], name), name), codes[finite])


@pytest.mark.parametrize("name", FLOATS)
def test_encode_sweep(name):
    values = INPUTS[~np.isnan(INPUTS)]
    np.testing.assert_array_equal(core.encode(values, name), oracle_encode(name, values))


@pytest.mark.parametrize("name", [name for name in FLOATS if name != "fp32"])
def test_encode_around_ties_and_values(name):
    """Every value, every midpoint between neighbours, one float32 step to either side: rounding, ties, saturation, +-0."""
    grid = core.decode(all_codes(name), name)
    grid = np.unique(grid[np.isfinite(grid)]).astype(np.float64)
    points = neighbours(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32))
    np.testing.assert_array_equal(core.encode(points, name), oracle_encode(name, points))


@pytest.mark.parametrize("name", INTS)
def test_encode_integers(name):
    bits = FORMATS[name]["bits"]
    values = np.concatenate([INPUTS[~np.isnan(INPUTS)], neighbours(np.arange(-300, 300, 0.25, dtype=np.float32))])
    wanted = np.clip(np.rint(values), -(1 << (bits - 1)), (1 << (bits - 1)) - 1).astype(np.int32) & ((1 << bits) - 1)
    np.testing.assert_array_equal(core.encode(values, name), wanted.astype(np.uint8))
    assert core.encode(np.float32("nan"), name) == 0


def test_encode_scales_rounds_up():
    values = np.abs(INPUTS[np.isfinite(INPUTS)])
    mantissa, exponent = np.frexp(values.astype(np.float64))
    wanted = np.where(values > 0, np.clip(exponent - (mantissa == 0.5), -127, 127), -127) + 127
    np.testing.assert_array_equal(core.encode(values, "e8m0"), wanted.astype(np.uint8))
    np.testing.assert_array_equal(core.encode(np.float32([np.nan, np.inf]), "e8m0"), [255, 254])


@pytest.mark.parametrize("name", FLOATS)
def test_nan(name):
    """NaN stays NaN with its sign where the format has one, else it is the largest value."""
    decoded = core.decode(core.encode(np.float32([np.nan, -np.nan]), name), name)
    if FORMATS[name]["special"] == "none":
        np.testing.assert_array_equal(decoded, np.float32(FORMATS[name]["max"]))
    else:
        assert np.isnan(decoded).all()
    if name in ("fp8_e4m3", "fp8_e5m2"):
        np.testing.assert_array_equal(core.encode(np.float32([np.nan]), name), [0x7F])


def test_shapes_dtypes_and_errors():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert core.encode(values.transpose(2, 0, 1), "fp8_e4m3").shape == (4, 2, 3)
    np.testing.assert_array_equal(core.encode(values[:, ::2], "bf16"), core.encode(values, "bf16")[:, ::2])
    assert core.encode(values, "fp16").dtype == np.uint16 and core.encode(values, "fp32").dtype == np.uint32
    assert core.encode(np.float64(3.0), "int4").shape == () and core.encode(np.zeros((0, 3)), "int8").shape == (0, 3)
    assert core.encode(values.astype(ml_dtypes.bfloat16), "fp16").dtype == np.uint16
    readonly = values.copy()
    readonly.flags.writeable = False
    np.testing.assert_array_equal(core.encode(readonly, "int8"), core.encode(values, "int8"))
    with pytest.raises(ValueError, match="fp9"):
        core.encode(values, "fp9")
    with pytest.raises(TypeError):
        core.encode(np.array(["a"]), "int8")


def test_schemes_point_at_formats():
    for name, row in core.schemes().items():
        assert row["name"] == name and row["element"] in FORMATS and row["scale"] in FORMATS
        assert row["bits_per_weight"] >= FORMATS[row["element"]]["bits"]
    assert core.schemes()["nvfp4"]["bits_per_weight"] == 4.5 and core.schemes()["mxfp8"]["bits_per_weight"] == 8.25
