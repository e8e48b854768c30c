"""What quantizers do with arrays of torch, CuPy and JAX on a GPU, by fakes of them that keep the rules of the real ones, over the emulated
library's memory: which stream is named to whom, detached and contiguous copies, new memory on the array's own device, and what the CPU gets."""
import ctypes
import sys
import types

import numpy as np
import pytest

import modelq._core as core
from cuda_arrays import DEFAULT, PER_THREAD, CudaArray, device, own_stream
from cuda_library import library_to_test
from modelq import cuda, device_arrays
from modelq.nn import TensorQuantizer

INT8, BY_CHANNEL = {"num_bits": 8}, {"num_bits": 8, "axis": -1}
pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    monkeypatch.setenv("MODELQ_SHIM_DEVICES", "2")


def values(shape=(6, 64), seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(np.float32)


# ---- torch ----

class Tensor(CudaArray):
    """torch's (2.13): no export of what requires a gradient, nor to the per-thread stream; no values for NumPy from a GPU."""
    requires_grad, gap = False, False

    @property
    def device(self):
        return types.SimpleNamespace(type="cuda", index=self.index)

    def __dlpack__(self, *, stream=None, max_version=None):
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        if stream == PER_THREAD:
            raise BufferError("per-thread default stream is not supported.")
        assert not self.gap, "an array with gaps was not made contiguous"
        return super().__dlpack__(stream=stream, max_version=max_version)

    def detach(self):
        return self.like(False, self.gap)

    def contiguous(self):
        return self if not self.gap else self.like(self.requires_grad, False)

    def like(self, requires_grad, gap):
        made = Tensor(self.host, self.index)
        made.requires_grad, made.gap, made.streams = requires_grad, gap, self.streams
        return made

    def __array_namespace__(self):
        raise AttributeError("torch's tensors have none")

    current_stream = None


@pytest.fixture
def torch(monkeypatch):
    """A module whose current stream is asked for by device, and made arrays of. quantizers: made before it is there, so that they are no
    torch.nn.Module of it."""
    fake = types.ModuleType("torch")
    fake.quantizers = TensorQuantizer(BY_CHANNEL, name="q"), TensorQuantizer(BY_CHANNEL)
    fake.Tensor, fake.float32, fake.asked, fake.made = Tensor, np.dtype(np.float32), [], []
    streams = {0: own_stream(), 1: 0}       # 0: the default one, as torch has it

    def current_stream(where):
        fake.asked.append(where.index)
        return types.SimpleNamespace(cuda_stream=streams[where.index])

    def empty(shape, dtype, device):
        fake.made.append(device.index)
        return Tensor(np.full(shape, 7, dtype), device.index)
    fake.cuda, fake.empty = types.SimpleNamespace(current_stream=current_stream), empty
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


@pytest.mark.parametrize("index", [0, 1])
def test_torch(torch, index):
    """Rounding, maxima and gradients of a tensor with gaps that requires a gradient, on its own device and torch's current stream of that."""
    (there, here), x = torch.quantizers, values()
    tensor = Tensor(x, index)
    tensor.requires_grad = tensor.gap = True
    for quantizer, array in ((there, tensor), (here, x)):
        quantizer.enable_calib()
        quantizer.disable_quant()
        quantizer(array)
        quantizer.disable_calib()
        quantizer.enable_quant()
        quantizer.load_calib_amax()
    np.testing.assert_array_equal(there.amax, here.amax)
    made = there(tensor)
    assert isinstance(made, Tensor) and made.index == index
    np.testing.assert_array_equal(made.host, here(x))
    np.testing.assert_array_equal(there.gradient(tensor, tensor).host, here.gradient(x, x))
    there.pre_quant_scale = here.pre_quant_scale = np.linspace(0.5, 2, 64, dtype=np.float32)
    np.testing.assert_array_equal(there.prepared(tensor).host, here.prepared(x))
    np.testing.assert_array_equal(there.gradient(tensor).host, here.gradient(x))
    assert set(torch.asked) == set(torch.made) == {index}
    assert set(tensor.streams) == {own_stream() if index == 0 else DEFAULT}


def test_torch_tensors_of_the_cpu_are_the_cpus(torch):
    tensor = Tensor(values())
    type(tensor).device = property(lambda self: types.SimpleNamespace(type="cpu"))
    try:
        assert device_arrays.library_for(tensor) is None
    finally:
        type(tensor).device = property(lambda self: types.SimpleNamespace(type="cuda", index=self.index))
    assert device_arrays.library_for(tensor) is cuda.library()


def test_what_torch_models_see_on_a_gpu(torch):
    """to_host and largest, by which torch models calibrate."""
    x = values((2, 3, 32))
    tensor = Tensor(x)
    library = device_arrays.library_for(tensor)
    np.testing.assert_array_equal(device_arrays.to_host(tensor), x)
    np.testing.assert_array_equal(device_arrays.largest(library, tensor).host, [[np.abs(x).max()]])
    np.testing.assert_array_equal(device_arrays.largest(library, tensor, (0, 16)).host,
                                  np.abs(x).reshape(6, 2, 16).max(axis=(0, 2))[None])
    np.testing.assert_array_equal(device_arrays.largest(library, tensor, (1, 0)).host, np.abs(x).reshape(6, 32).max(axis=1)[:, None])
    scalar = Tensor(np.float32(-3).reshape(()))
    np.testing.assert_array_equal(device_arrays.largest(library, scalar).host, [[3]])


# ---- CuPy ----

class Ndarray(CudaArray):
    """CuPy's: its module is what tells."""
    gap = False
    current_stream = None

    def __dlpack__(self, *, stream=None, max_version=None):
        assert not self.gap, "an array with gaps was not made contiguous"
        return super().__dlpack__(stream=stream, max_version=max_version)

    def __array_namespace__(self):
        return sys.modules["cupy"]


Ndarray.__module__ = "cupy"


@pytest.mark.parametrize("current", [None, 0, PER_THREAD])
def test_cupy(monkeypatch, current):
    fake, x = types.ModuleType("cupy"), values()
    here = own_stream() if current is None else current
    fake.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=here))
    fake.ascontiguousarray = lambda array: array if not array.gap else Ndarray(array.host, array.index)
    fake.empty, fake.float32 = lambda shape, dtype, device: Ndarray(np.full(shape, 7, dtype), device), np.dtype(np.float32)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    array, quantizer = Ndarray(x), TensorQuantizer(INT8, amax=2.0)
    made = quantizer(array)
    assert isinstance(made, Ndarray)
    np.testing.assert_array_equal(made.host, TensorQuantizer(INT8, amax=2.0)(x))
    assert set(array.streams) == {here or DEFAULT}
    array.gap = True
    np.testing.assert_array_equal(quantizer(array).host, made.host)


# ---- JAX ----

class Array(CudaArray):
    """JAX's: nothing may be written into it, and NumPy copies it to the host."""
    current_stream = None

    def devices(self):
        return [types.SimpleNamespace(platform="gpu")]

    def __array__(self, *args, **options):
        return self.host

    def __array_namespace__(self):
        raise AssertionError("memory that is to be written is not JAX's to give")


Array.__module__ = "jaxlib.xla_extension"


def test_jax_goes_through_the_cpu(monkeypatch):
    fake = types.ModuleType("jax")
    fake.core, fake.Array = types.SimpleNamespace(Tracer=type("Tracer", (), {})), Array
    fake.numpy = types.SimpleNamespace(asarray=lambda array: Array(array))
    monkeypatch.setitem(sys.modules, "jax", fake)
    x = values()
    array, quantizer = Array(x), TensorQuantizer(INT8, amax=2.0)
    assert device_arrays.library_for(array) is None
    made = quantizer(array)
    assert isinstance(made, Array) and not array.streams
    np.testing.assert_array_equal(made.host, TensorQuantizer(INT8, amax=2.0)(x))


# ---- others, by the array API and DLPack alone ----

class Plain(CudaArray):
    """No word about streams."""
    current_stream = None


class Older(CudaArray):
    """From before DLPack 1.0: no max_version, and a capsule without flags, which must not be written."""
    def __dlpack__(self, *, stream=None):
        assert stream not in (None, 0, -1)
        self.streams.append(stream)
        return super(CudaArray, self).__dlpack__()


def test_the_default_stream_of_those_that_do_not_say():
    plain = Plain(values())
    TensorQuantizer(INT8, amax=2.0)(plain)
    assert set(plain.streams) == {DEFAULT}


@pytest.mark.parametrize("given, named", [(0, DEFAULT), (DEFAULT, DEFAULT), (PER_THREAD, PER_THREAD), ("own", "own")])
def test_streams_by_number(given, named):
    given, named = (own_stream() if stream == "own" else stream for stream in (given, named))
    x, out, quantizer = CudaArray(values()), CudaArray(values() * 0), core.Quantizer(8)
    quantizer.amax = np.float32(2)
    core.cuda_quantize(cuda.library(), quantizer, x, out, given)
    assert x.streams == out.streams == [named]
    np.testing.assert_array_equal(out.host, TensorQuantizer(INT8, amax=2.0)(values()))


@pytest.mark.parametrize("stream", [-1, -7, None])
def test_a_stream_must_be_one(stream):
    """-1 is DLPack's word for no stream at all, None for the producer's: neither is a place to work on."""
    x, quantizer = CudaArray(values()), core.Quantizer(8)
    quantizer.amax = np.float32(2)
    calls = [lambda: core.cuda_quantize(cuda.library(), quantizer, x, x, stream), lambda: core.cuda_amax(cuda.library(), x, x, stream),
             lambda: core.cuda_straight_through(cuda.library(), quantizer, x, x, x, stream),
             lambda: core.cuda_to_host(cuda.library(), x, stream)]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match="stream|integer"):
            call()
    assert not x.streams


def test_capsules_of_older_frameworks():
    older = Older(values())
    older.kind = b"dltensor"
    np.testing.assert_array_equal(device_arrays.to_host(older), values())
    assert older.streams == [own_stream()] and older.deleted == 1
    with pytest.raises(ValueError, match="out: is read-only"):
        core.cuda_amax(cuda.library(), older, older, own_stream())


def test_arrays_on_different_devices():
    x, g, quantizer = values(), values(seed=1), core.Quantizer(8)
    quantizer.amax, library = np.float32(2), cuda.library()
    with pytest.raises(ValueError, match="out: expected an array like x .*, got"):
        core.cuda_quantize(library, quantizer, CudaArray(x), CudaArray(x, index=1), own_stream())
    with pytest.raises(ValueError, match="gradient: expected an array like x"):
        core.cuda_straight_through(library, quantizer, CudaArray(x), CudaArray(g, index=1), CudaArray(x), own_stream())
    with pytest.raises(ValueError, match="out: expected float32 .* on the device of x"):
        core.cuda_amax(library, CudaArray(x), CudaArray(x[:1, :1], index=1), own_stream())


def test_the_threads_device_is_what_it_was():
    """A quantizer works on the array's device, and its numbers move with it; whoever called finds its own device current."""
    x, quantizer, current = values(), TensorQuantizer(INT8, amax=2.0), ctypes.c_int()
    device().call("device_set", 0)
    for index in (1, 0, 1):
        np.testing.assert_array_equal(quantizer(CudaArray(x, index=index)).host, TensorQuantizer(INT8, amax=2.0)(x))
        device().call("device_current", ctypes.byref(current))
        assert current.value == 0


def test_what_is_said_and_what_is_given_differ():
    """__dlpack_device__ says one device, the capsule another, or the host's memory."""
    for said in ((2, 1), (1, 0)):
        x = CudaArray(values())
        x.said_device = said
        with pytest.raises(ValueError, match="x: (its DLPack capsule is not of that CUDA device's memory|is on DLPack device type 1)"):
            core.cuda_to_host(cuda.library(), x, own_stream())
        assert x.deleted == x.capsules      # nothing is kept


def test_arrays_with_gaps_are_refused():
    x = CudaArray(values((4, 32)), strides=(64, 1))
    with pytest.raises(ValueError, match="x: expected a contiguous array of float32, bfloat16 or float16, got"):
        core.cuda_to_host(cuda.library(), x, own_stream())
    assert x.deleted == 1


def test_what_kernels_do_not_know_goes_to_the_host():
    """A cache's biases by head; maxima along an axis in the middle."""
    quantizer = TensorQuantizer({"num_bits": 8, "axis": 1}, if_quant=False, if_calib=True)
    with pytest.raises(ValueError, match="expected CPU memory: move it there first"):
        quantizer(CudaArray(values((2, 3, 4))))     # a framework that nobody knows how to move
