"""DLPack import: who owns the memory when, both capsule generations, dtypes, what is refused. Producers are made with ctypes here, so
that their deleter can be watched; NumPy and (where it is installed) torch are producers nobody here wrote."""
import ctypes
import gc
import threading

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core

CPU, CUDA = 1, 2
VERSIONED, LEGACY = b"dltensor_versioned", b"dltensor"
api = ctypes.pythonapi
api.PyCapsule_New.restype, api.PyCapsule_New.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
api.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager", ctypes.c_void_p), ("deleter", DELETER),
                ("flags", ctypes.c_uint64), ("tensor", Tensor)]


class Producer:
    """Exports one buffer. Counts deleter calls, in whatever thread they come; keeps everything alive itself, so that a late deleter
    is seen and not crashed on."""

    def __init__(self, kind=VERSIONED, shape=(2, 3), strides=None, code=2, bits=32, lanes=1, device=(CPU, 0), version=(1, 0), flags=0,
                 offset=0, null=False, know_max_version=True):
        self.kind, self.device, self.know_max_version, self.deleted, self.capsules = kind, device, know_max_version, 0, 0
        self.buffer = np.arange(64, dtype=np.uint8)
        self.shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self.strides = (ctypes.c_int64 * max(len(strides), 1))(*strides) if strides is not None else None
        self.managed = Versioned(*version, flags=flags) if kind == VERSIONED else Managed()
        self.callback = DELETER(self._delete)
        self.managed.deleter = self.callback
        self.managed.tensor = Tensor(None if null else self.buffer.ctypes.data, *device, len(shape), code, bits, lanes,
                                     ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64)),
                                     ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64)) if strides is not None else None, offset)

    def _delete(self, pointer):
        assert pointer == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if not self.know_max_version and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        self.options = options
        self.capsules += 1
        self.capsule = api.PyCapsule_New(ctypes.addressof(self.managed), self.kind, None)
        return self.capsule

    def values(self, dtype="float32"):
        return np.frombuffer(self.buffer, dtype=dtype)


@pytest.mark.parametrize("kind", [VERSIONED, LEGACY])
def test_memory_is_shared_and_returned_once(kind):
    producer = Producer(kind, strides=(3, 1))
    array = core.as_array(producer)
    assert array.dtype == np.float32 and array.shape == (2, 3)
    assert array.ctypes.data == producer.buffer.ctypes.data
    np.testing.assert_array_equal(array.ravel(), producer.values()[:6])
    assert api.PyCapsule_IsValid(producer.capsule, b"used_" + kind)   # so its own destructor leaves the memory alone
    view = array[1:]
    del array
    gc.collect()
    assert producer.deleted == 0   # a view still needs it
    del view
    assert producer.deleted == 1


def test_max_version_is_offered_and_old_producers_are_asked_again():
    producer = Producer()
    core.as_array(producer)
    assert producer.options == {"max_version": (1, 0)}
    old = Producer(LEGACY, know_max_version=False)
    core.as_array(old)
    assert (old.options, old.capsules, old.deleted) == ({}, 1, 1)


def test_missing_strides_mean_contiguous_and_offsets_count():
    array = core.as_array(Producer(shape=(2, 2), code=1, bits=8, offset=5))
    assert array.tolist() == [[5, 6], [7, 8]]


def test_any_strides():
    array = core.as_array(Producer(shape=(3, 2), strides=(1, 4), code=1, bits=8))
    assert array.tolist() == [[0, 4], [1, 5], [2, 6]]
    backwards = core.as_array(Producer(shape=(3,), strides=(-2,), code=1, bits=8, offset=10))
    assert backwards.tolist() == [10, 8, 6]
    one = core.as_array(Producer(shape=(1, 3), strides=(1 << 62, 1), code=1, bits=8))   # the stride of one element means nothing
    assert one.tolist() == [[0, 1, 2]] and one.flags.c_contiguous


def test_scalar_and_empty():
    assert core.as_array(Producer(shape=(), code=1, bits=8, offset=9)).item() == 9
    producer = Producer(shape=(0, 3), null=True)
    array = core.as_array(producer)
    assert array.shape == (0, 3)
    del array
    assert producer.deleted == 1


def test_read_only():
    assert core.as_array(Producer()).flags.writeable
    assert not core.as_array(Producer(flags=1)).flags.writeable
    assert not core.as_array(Producer(LEGACY)).flags.writeable   # that generation cannot say


@pytest.mark.parametrize("code, bits, dtype", [
    (2, 16, "float16"), (2, 32, "float32"), (2, 64, "float64"), (4, 16, "bfloat16"), (6, 8, "bool"),
    (10, 8, "float8_e4m3fn"), (12, 8, "float8_e5m2"), (14, 8, "float8_e8m0fnu"),
    (0, 8, "int8"), (0, 16, "int16"), (0, 32, "int32"), (0, 64, "int64"),
    (1, 8, "uint8"), (1, 16, "uint16"), (1, 32, "uint32"), (1, 64, "uint64")])
def test_dtypes(code, bits, dtype):
    expected = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    producer = Producer(shape=(4,), code=code, bits=bits)
    array = core.as_array(producer)
    assert array.dtype == expected
    assert array.tobytes() == producer.buffer.tobytes()[:4 * expected.itemsize]


@pytest.mark.parametrize("options, error, message", [
    (dict(code=5, bits=64), TypeError, r"weight: DLPack dtype .code 5, 64 bits, 1 lanes. is not supported"),
    (dict(code=17, bits=4), TypeError, "code 17, 4 bits"),
    (dict(lanes=4), TypeError, "4 lanes"),
    (dict(device=(CUDA, 3)), ValueError, "weight: is on cuda:3 .* move it"),
    (dict(device=(99, 0)), ValueError, "device type 99"),
    (dict(shape=(1,) * 9), ValueError, "9 dimensions, at most 8"),
    (dict(shape=(2, -1)), ValueError, "dimension 1 of -1 is negative"),
    (dict(shape=(1 << 40, 1 << 40)), ValueError, "too large"),
    (dict(shape=(2,), strides=(1 << 62,)), ValueError, "stride 0 of .* is too large"),
    (dict(null=True), ValueError, "has elements but no memory"),
    (dict(version=(2, 0)), BufferError, "DLPack version 2.0, expected 1.x"),
])
def test_what_is_refused_stays_the_producers(options, error, message):
    producer = Producer(**options)
    with pytest.raises(error, match=message):
        core.as_array(producer, name="weight")
    assert producer.deleted == 0   # not consumed: the capsule keeps its name, and its own destructor would delete
    if producer.capsules:
        assert api.PyCapsule_IsValid(producer.capsule, VERSIONED)
    else:
        assert options.get("device")   # refused before the producer was made to do anything


def test_a_consumer_that_fails_after_the_import_returns_the_memory():
    producer = Producer(shape=(2, 3))
    with pytest.raises(ValueError, match="could not broadcast|cannot reshape"):
        core.as_array(producer).reshape(7)
    gc.collect()
    assert producer.deleted == 1


def test_capsules_cannot_be_used_twice():
    producer = Producer()
    first = producer.__dlpack__()
    again = type("Again", (), {"__dlpack__": lambda self, **options: first, "__dlpack_device__": lambda self: (CPU, 0)})()
    array = core.as_array(again)
    with pytest.raises(ValueError, match="consumed before"):
        core.as_array(again)
    assert producer.deleted == 0
    del array
    assert producer.deleted == 1


def test_producers_that_misbehave():
    def broken(capsule=None, device=(CPU, 0)):
        def give(self, **options):
            if isinstance(capsule, Exception):
                raise capsule
            return capsule
        return type("Broken", (), {"__dlpack__": give, "__dlpack_device__": lambda self: device})()
    with pytest.raises(TypeError, match="gave no DLPack capsule"):
        core.as_array(broken("text"))
    with pytest.raises(BufferError, match="needs grad"):
        core.as_array(broken(BufferError("needs grad")))
    with pytest.raises(TypeError):
        core.as_array(broken(device="cpu"))
    with pytest.raises(AttributeError):
        core.as_array(type("Half", (), {"__dlpack__": lambda self: None})())


def test_the_producer_may_go_first():
    class Fleeting:
        def __init__(self):
            self.array = np.arange(5.0)

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    array = core.as_array(Fleeting())
    gc.collect()
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_the_last_reference_may_go_on_another_thread():
    producers = [Producer() for _ in range(50)]
    arrays = [core.as_array(producer) for producer in producers]

    def drop():
        while arrays:
            try:
                arrays.pop()
            except IndexError:
                return
    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [producer.deleted for producer in producers] == [1] * 50


def test_a_pending_exception_survives_the_deleter():
    producer = Producer()

    def fail():
        array = core.as_array(producer)   # noqa: F841  dropped while the exception is under way
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        fail()
    gc.collect()
    assert producer.deleted == 1


def test_numpy_arrays_pass_through_and_other_things_are_converted():
    array = np.arange(3)
    assert core.as_array(array) is array
    assert core.as_array([1.5, 2]).tolist() == [1.5, 2.0]
    with pytest.raises(TypeError, match="tokens: dtype object is not supported"):
        core.as_array([object()], name="tokens")


def test_a_thousand_rounds_leave_nothing_behind():
    import sys

    def round_trip():
        producer = Producer()
        array = core.as_array(producer)
        try:
            core.as_array(Producer(lanes=2))
        except TypeError:
            pass
        del array
        assert producer.deleted == 1

    for _ in range(1000):   # ctypes fills caches of its own
        round_trip()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        round_trip()
    gc.collect()
    assert sys.getallocatedblocks() - before < 200   # one object leaked per round would be 1000


def test_torch_tensors_are_viewed():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16)
    array = core.as_array(tensor)
    assert array.dtype == ml_dtypes.bfloat16 and array.ctypes.data == tensor.data_ptr()
    tensor[1, 2] = 40
    assert array[1, 2] == 40
    assert core.as_array(tensor.t()).strides == (2, 6)
    assert core.as_array(torch.tensor([True, False])).tolist() == [True, False]
    assert core.as_array(torch.tensor([1.5]).to(torch.float8_e4m3fn)).dtype == ml_dtypes.float8_e4m3fn
    with pytest.raises((BufferError, RuntimeError), match="grad"):
        core.as_array(torch.zeros(2, requires_grad=True))
