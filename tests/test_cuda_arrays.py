"""Quantizers on arrays of a CUDA device: in by DLPack on the producer's stream, without a copy, with the bits of the CPU. The device is the
emulated library's; the framework is tests/cuda_arrays.py."""
import copy

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core
from cuda_arrays import CudaArray, own_stream
from cuda_library import library_to_test
from modelq import cuda, device_arrays
from modelq.nn import TensorQuantizer

BF16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = {
    "int8": {"num_bits": 8}, "int8 by row": {"num_bits": 8, "axis": 0}, "int8 by column": {"num_bits": 8, "axis": -1},
    "fp8": {"num_bits": (4, 3)}, "fp8 by token": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}},
    "int4 blocks": {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}},
    "fp8 blocks": {"num_bits": (4, 3), "block_sizes": {-1: 32, -2: 32}},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    "nvfp4 static": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


def values(shape=(6, 64), dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8).tolist()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_as_on_the_cpu(name, dtype):
    there, here, x = TensorQuantizer(FORMATS[name]), TensorQuantizer(FORMATS[name]), values(dtype=dtype)
    for quantizer, array in ((there, CudaArray(x)), (here, x)):
        if quantizer.needs_calibration:
            quantizer.enable_calib()
            quantizer.disable_quant()
            assert quantizer(array) is array
            quantizer.disable_calib()
            quantizer.enable_quant()
            quantizer.load_calib_amax()
    assert (there.amax is None) == (here.amax is None)
    if here.amax is not None:
        np.testing.assert_array_equal(there.amax, here.amax)
    array = CudaArray(x)
    made = there(array)
    assert isinstance(made, CudaArray) and made.shape == x.shape and made.dtype == dtype
    assert bits(made.host) == bits(here(x)) and bits(x) == bits(values(dtype=dtype))
    assert not np.array_equal(made.host, x)


def test_work_goes_to_the_producers_stream_and_its_memory_is_returned():
    array, quantizer = CudaArray(values()), TensorQuantizer(FORMATS["int8"], amax=2.0)
    quantizer(array)
    assert set(array.streams) == {own_stream()} and array.deleted == array.capsules > 0
    default = CudaArray(values(), current=device_arrays.DEFAULT_STREAM)
    quantizer(default)
    assert set(default.streams) == {1}


def test_maxima_merge_over_calls_and_many_of_them():
    quantizer = TensorQuantizer(FORMATS["int8 by column"], if_quant=False, if_calib=True)
    arrays = [values(seed=seed) for seed in range(70)]
    for array in arrays:
        quantizer(CudaArray(array))
    quantizer(arrays[0] * 4)                        # one on the CPU between
    np.testing.assert_array_equal(quantizer.compute_amax().ravel(), np.abs([*arrays, arrays[0] * 4]).max(axis=(0, 1)))
    np.testing.assert_array_equal(copy.deepcopy(quantizer).compute_amax(), quantizer.compute_amax())
    quantizer.reset_calibrator()
    assert quantizer.compute_amax() is None


def test_nan_in_a_calibration_is_said_when_the_range_is_asked_for():
    quantizer = TensorQuantizer(FORMATS["fp8"], if_quant=False, if_calib=True)
    bad = values()
    bad[3, 5] = np.nan
    quantizer(CudaArray(bad))
    with pytest.raises(ValueError, match=r"quantizer: NaN or infinity in an array of shape \[6, 64\]"):
        quantizer.load_calib_amax()


def test_smoothing_and_rotation_come_first():
    x, scale = values(), np.linspace(0.5, 2, 64, dtype=np.float32)
    there, here = TensorQuantizer(FORMATS["int8"], amax=3.0), TensorQuantizer(FORMATS["int8"], amax=3.0)
    for quantizer in (there, here):
        quantizer.pre_quant_scale, quantizer.core.rotate = scale, 32
    assert bits(there(CudaArray(x)).host) == bits(here(x))
    assert bits(there.prepared(CudaArray(x)).host) == bits(here.prepared(x)) != bits(x)
    there.disable()
    here.disable()
    assert bits(there(CudaArray(x)).host) == bits(here(x))


@pytest.mark.parametrize("rotate", [0, 32])
@pytest.mark.parametrize("name", ["int8", "int8 by row", "fp8", "nvfp4"])
def test_gradients(name, rotate):
    x, g = values(), values(seed=1)
    amax = np.full((6, 1), 2.0, np.float32) if name == "int8 by row" else 2.0
    there, here = TensorQuantizer(FORMATS[name], amax=amax), TensorQuantizer(FORMATS[name], amax=amax)
    for quantizer in (there, here):
        quantizer.pre_quant_scale, quantizer.core.rotate = np.linspace(0.5, 2, 64, dtype=np.float32), rotate
    made = there.gradient(CudaArray(g), CudaArray(x))
    assert isinstance(made, CudaArray) and bits(made.host) == bits(here.gradient(g, x))
    assert rotate or ((made.host == 0).any() and not (made.host == 0).all())      # what was clipped


def test_numbers_that_change_are_seen():
    x, quantizer = values(), TensorQuantizer(FORMATS["int8"], amax=2.0)
    first = quantizer(CudaArray(x)).host
    quantizer.amax = 4.0
    assert bits(quantizer(CudaArray(x)).host) == bits(TensorQuantizer(FORMATS["int8"], amax=4.0)(x)) != bits(first)


def test_shapes_without_elements_and_with_many_dimensions():
    quantizer = TensorQuantizer(FORMATS["int8"], amax=2.0)
    empty = CudaArray(values((0, 64)))
    assert quantizer(empty) is empty
    x = values((2, 3, 4, 16))
    assert bits(quantizer(CudaArray(x)).host) == bits(TensorQuantizer(FORMATS["int8"], amax=2.0)(x))


def test_a_range_is_needed():
    with pytest.raises(ValueError, match="quantizer: no amax yet: calibrate first, or set amax"):
        TensorQuantizer(FORMATS["int8"])(CudaArray(values()))
    with pytest.raises(ValueError, match="amax has 6 values, .*needs 5"):
        quantizer = TensorQuantizer(FORMATS["int8 by row"], amax=np.ones((6, 1), np.float32))
        quantizer(CudaArray(values((5, 64))))


def test_without_a_library_the_cpu_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ValueError, match="is on cuda:0 .DLPack device type 2., expected CPU memory"):
        TensorQuantizer(FORMATS["int8"], amax=2.0)(CudaArray(values()))


def test_what_the_calls_refuse():
    library, quantizer, x = cuda.library(), core.Quantizer(8), values()
    quantizer.amax = np.float32(2)
    out = CudaArray(x)
    with pytest.raises(ValueError, match="out: expected an array like x"):
        core.cuda_quantize(library, quantizer, CudaArray(x), CudaArray(values((6, 32))), own_stream())
    with pytest.raises(ValueError, match="out: is read-only"):
        core.cuda_quantize(library, quantizer, CudaArray(x), CudaArray(x, read_only=True), own_stream())
    with pytest.raises(ValueError, match="x: is on DLPack device type 1, expected a CUDA device's memory"):
        core.cuda_quantize(library, quantizer, x, out, own_stream())
    with pytest.raises(TypeError, match="expected a CudaLibrary, got"):
        core.cuda_quantize(None, quantizer, CudaArray(x), out, own_stream())
    with pytest.raises(TypeError, match="expected a Quantizer, got"):
        core.cuda_quantize(library, None, CudaArray(x), out, own_stream())
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        core.cuda_quantize(library, quantizer, CudaArray(x, index=5), CudaArray(x, index=5), own_stream())
    with pytest.raises(ValueError, match=r"out: expected float32 \[1, 4\]"):
        core.cuda_amax(library, CudaArray(x), CudaArray(values((1, 1))), own_stream(), 0, 16)
