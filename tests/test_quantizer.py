"""_core.Quantizer: settings, simulation of activations, state."""
import threading

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core
import reference
from test_block import DTYPES, assert_same, weight

NVFP4 = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
MX = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
TOKEN = {-1: None, "type": "dynamic"}


@pytest.mark.parametrize("kwargs, scheme", [
    (dict(num_bits=(4, 3)), "fp8"), (dict(num_bits=(4, 3), axis=0), "fp8_channel"), (dict(num_bits=8, axis=0), "int8"),
    (dict(num_bits=(4, 3), block_sizes={-1: 128, -2: 128}), "fp8_block"), (dict(num_bits=4, block_sizes={-1: 128, "type": "static"}), "int4"),
    (dict(num_bits=4, block_sizes={-1: 64}), "int4"), (dict(num_bits=(2, 1), block_sizes=NVFP4), "nvfp4"),
    (dict(num_bits=(2, 1), block_sizes={**NVFP4, -1: 32}), "nvfp4"), (dict(num_bits=(2, 1), block_sizes=MX), "mxfp4"),
    (dict(num_bits=(4, 3), block_sizes=MX), "mxfp8"), (dict(num_bits=(3, 2), block_sizes=MX), "mxfp6"), (dict(num_bits=8, block_sizes=MX), "mxint8"),
    (dict(num_bits=(5, 2), block_sizes=MX), "mxfp8_e5m2"), (dict(num_bits=8, axis=-1), None), (dict(num_bits=8), None),
    (dict(num_bits=6, axis=0), None), (dict(num_bits=8, axis=0, narrow_range=True), None),
])
def test_scheme_of_settings(kwargs, scheme):
    assert core.Quantizer(**kwargs).scheme == scheme


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_the_eager_formula(dtype):
    x = weight(40, 130, dtype, 1)
    quantizer = core.Quantizer((4, 3))
    assert_same(quantizer(x), reference.fake_fp8(x, core.amax(x)))     # no amax: the input's
    for amax in (0.37, 3.0, 1000.0, 2.0**-24, 0.0):
        quantizer.amax = amax
        assert_same(quantizer(x), reference.fake_fp8(x, np.float32(amax)))
    assert_same(core.Quantizer((4, 3), block_sizes=TOKEN)(x), reference.fake_fp8(x, core.amax(x, axis=0)))
    rows = core.Quantizer((4, 3), axis=0)
    rows.amax = core.amax(x, axis=0)
    assert_same(rows(x), reference.fake_fp8(x, core.amax(x, axis=0)))
    columns = core.Quantizer((4, 3), axis=-1)
    assert_same(columns(x), reference.fake_fp8(x, core.amax(x, axis=-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kwargs", [dict(), dict(narrow=True), dict(bits=4), dict(bits=6, narrow=True), dict(unsigned=True)])
def test_integers_are_the_reference_formula(dtype, kwargs):
    x = weight(40, 130, dtype, 2)
    if kwargs.get("unsigned"):
        x = np.abs(x)
    quantizer = core.Quantizer(kwargs.get("bits", 8), narrow_range=kwargs.get("narrow", False), unsigned=kwargs.get("unsigned", False))
    for amax in (core.amax(x), 0.37, 100.0, 2.0**-24, 0.0):
        quantizer.amax = amax
        assert_same(quantizer(x), reference.fake_int(x, np.float32(amax), **kwargs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_is_the_rule_of_the_export(dtype):
    x = weight(40, 160, dtype, 3)
    quantizer = core.Quantizer((2, 1), block_sizes=NVFP4)
    for amax in (core.amax(x), 0.5, 1e4):
        quantizer.amax = amax
        assert_same(quantizer(x), reference.fake_nvfp4(x, np.float32(amax)))
        assert_same(quantizer(x), core.fake_quantize(x, "nvfp4", amax=amax))
    quantizer.amax = None
    assert_same(quantizer(x), core.fake_quantize(x, "nvfp4"))


@pytest.mark.parametrize("bits, scheme", [((2, 1), "mxfp4"), ((3, 2), "mxfp6"), ((4, 3), "mxfp8"), (8, "mxint8")])
def test_mx_needs_no_amax(bits, scheme):
    x = weight(40, 160, seed=4)
    quantizer = core.Quantizer(bits, block_sizes=MX)
    assert not quantizer.needs_amax and quantizer.is_dynamic
    assert_same(quantizer(x), core.fake_quantize(x, scheme))


def test_static_blocks_are_padded():
    x = weight(8, 200, np.float32, 5)
    quantizer = core.Quantizer(4, block_sizes={-1: 128})
    amax = core.amax(x, block=128)
    wanted = np.concatenate([reference.fake_int(x[:, :128], amax[:, :1], bits=4), reference.fake_int(x[:, 128:], amax[:, 1:], bits=4)], axis=1)
    assert_same(quantizer(x), wanted)
    quantizer.amax = amax.reshape(-1, 1)
    assert_same(quantizer(x), wanted)
    assert quantizer.amax.shape == (16, 1)


def test_pre_quant_scale_is_applied_in_the_dtype():
    x = weight(8, 64, seed=6)
    scale = np.abs(weight(1, 64, seed=7)[0].astype(np.float32)) + np.float32(0.1)
    quantizer = core.Quantizer((4, 3))
    quantizer.amax, quantizer.pre_quant_scale = 3.0, scale
    scaled = (x.astype(np.float32) * scale).astype(x.dtype)
    assert_same(quantizer(x), reference.fake_fp8(scaled, 3.0))
    quantizer.enabled = False
    assert_same(quantizer(x), scaled)
    np.testing.assert_array_equal(quantizer.pre_quant_scale, scale)
    with pytest.raises(ValueError, match="64 values for 32 columns"):
        quantizer(x[:, :32])


def test_disabled_copies():
    x = weight(8, 64, seed=8)
    y = core.Quantizer(enabled=False)(x)
    assert_same(y, x)
    assert not np.shares_memory(x, y)


def test_nan_stays_in_its_place():
    x = weight(4, 64, np.float32, 9)
    x[1, 5] = np.nan
    for kwargs in (dict(num_bits=(4, 3)), dict(num_bits=8)):
        quantizer = core.Quantizer(**kwargs)
        quantizer.amax = 2.0
        y = quantizer(x)
        assert np.isnan(y[1, 5]) and np.isnan(y).sum() == 1


def test_shapes():
    quantizer = core.Quantizer((2, 1), block_sizes=NVFP4)
    quantizer.amax = 3.0
    x = weight(24, 48, seed=10)
    assert_same(quantizer(x.reshape(2, 3, 4, 48)), quantizer(x).reshape(2, 3, 4, 48))
    assert_same(quantizer(x[::2]), quantizer(x)[::2])
    assert quantizer(x[:0]).shape == (0, 48) and quantizer(x[:, :0]).shape == (24, 0)
    assert core.Quantizer(8)(np.float32(3.0)).shape == ()


@pytest.mark.parametrize("kwargs, text", [
    (dict(num_bits=1), "num_bits"), (dict(num_bits=(7, 7)), "formats"), (dict(num_bits="e4m3"), "num_bits"), (dict(num_bits=(2, 1)), "scale_bits"),
    (dict(num_bits=(5, 2)), "scale_bits"), (dict(axis=3), "axis"), (dict(axis=(0, 1)), "axis"), (dict(axis=0, block_sizes={-1: 16}), "not both"),
    (dict(type="sometimes"), "dynamic"), (dict(block_sizes={-1: 0}), "block_sizes"), (dict(block_sizes={"tpye": "static"}), "tpye"),
    (dict(num_bits=(2, 1), block_sizes={**MX, "type": "static"}), "dynamic"), (dict(num_bits=4, block_sizes=MX), "format that has such blocks"),
    (dict(num_bits=(2, 1), block_sizes={**NVFP4, "scale_bits": (5, 2)}), "scale_bits"), (dict(num_bits=(2, 1), block_sizes={**NVFP4, -1: 12}), "multiple of 8"),
])
def test_bad_settings(kwargs, text):
    with pytest.raises(ValueError, match=text):
        core.Quantizer(**kwargs)


def test_bad_state():
    quantizer = core.Quantizer(8)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="amax"):
            quantizer.amax = bad
    quantizer.amax = [1.0, 2.0]
    with pytest.raises(ValueError, match="amax has 2 values"):
        quantizer(np.zeros((4, 4), np.float32))
    with pytest.raises(TypeError, match="int32"):
        quantizer(np.zeros((4, 4), np.int32))
    with pytest.raises(TypeError):
        core.Quantizer.extra = 1


def test_repr():
    quantizer = core.Quantizer((2, 1), block_sizes=NVFP4)
    quantizer.amax = 3.25
    assert repr(quantizer) == "Quantizer((2, 1) bit fake block_sizes={-1: 16, 'type': 'dynamic', 'scale_bits': (4, 3)}, amax=3.25e+00)"
    quantizer = core.Quantizer(8, 0)
    assert repr(quantizer) == "Quantizer(8 bit fake axis=0 amax=dynamic)"
    quantizer.amax = [1, 2, 3]
    assert repr(quantizer) == "Quantizer(8 bit fake axis=0 amax=[1.00e+00, 3.00e+00](3))"
    assert repr(core.Quantizer(enabled=False)) == "Quantizer(disabled)"
    assert repr(core.Quantizer((4, 3), block_sizes=MX)).endswith("amax=None)")


def test_many_threads_and_a_setter():
    """Calls from several threads agree; replacing the amax meanwhile is refused or waits for nobody."""
    quantizer = core.Quantizer((4, 3))
    quantizer.amax = 2.0
    x = weight(512, 512, ml_dtypes.bfloat16, 11)
    wanted, wrong = quantizer(x), []

    def call():
        for _ in range(5):
            if quantizer(x).tobytes() != wanted.tobytes():
                wrong.append(1)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        try:
            quantizer.amax = 2.0
        except RuntimeError as error:
            assert "in use" in str(error)
    for thread in threads:
        thread.join()
    assert not wrong
