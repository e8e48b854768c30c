"""A framework whose arrays lie on a CUDA device, in memory of the library that is tested: the emulated one, which the host may not touch, or
a GPU's. It checks what is asked of it: streams by DLPack's rules, and copies to the host, of which there may be none."""
import ctypes as C
import functools
import sys
import types

import ml_dtypes
import numpy as np

from cuda_library import Error, library_to_test
from dlpack_producer import CUDA, Producer

CODES = {np.dtype(np.float32): (2, 32), np.dtype(np.float16): (2, 16), np.dtype(ml_dtypes.bfloat16): (4, 16)}
OUT_OF_MEMORY = -3      # MQ_ERR_MEMORY
DEFAULT, PER_THREAD = 1, 2      # DLPack's and CUDA's names of streams


class Device:
    """Memory and streams, by the library's own calls (cuda/modelq_cuda_device.h)."""
    def __init__(self):
        self.c = C.CDLL(str(library_to_test()))
        self.c.mq_cuda_memory_free.argtypes = [C.c_void_p]

    def call(self, name, *arguments):
        err = Error()
        if code := getattr(self.c, f"mq_cuda_{name}")(*arguments, C.byref(err)):
            raise (MemoryError if code == OUT_OF_MEMORY else RuntimeError)(err.text.decode())

    def new(self, nbytes):
        place = C.c_void_p()
        self.call("memory_new", C.byref(place), C.c_size_t(nbytes), b"an array")
        return place.value

    def copy(self, to, source, nbytes):
        """All that was asked of the device before is done by then."""
        self.call("copy", C.c_void_p(to), C.c_void_p(source), C.c_size_t(nbytes), C.c_void_p(DEFAULT))
        self.call("stream_wait", C.c_void_p(DEFAULT))

    def place(self, address):
        return C.c_void_p(address)

    def stream(self):
        place = C.c_void_p()
        self.call("stream_new", C.byref(place))
        return place.value


@functools.cache
def device():
    return Device()


@functools.cache
def own_stream():
    """This framework's current stream."""
    return device().stream()


class Memory:
    def __init__(self, nbytes):
        self.device, self.nbytes, self.place = device(), nbytes, None
        self.place = self.device.new(nbytes) if nbytes else None

    def __del__(self):
        if self.place is not None:
            self.device.c.mq_cuda_memory_free(self.place)


class CudaArray(Producer):
    """A contiguous array of device `index`, whose framework's current stream is `current` (None: own_stream()). strides: other ones, in
    elements."""

    def __init__(self, values, index=0, current=None, read_only=False, strides=None):
        values = np.ascontiguousarray(values)
        code, bits = CODES[values.dtype]
        usual = tuple(stride // values.itemsize for stride in values.strides)
        super().__init__(shape=values.shape, strides=strides or usual, code=code, bits=bits, device=(CUDA, index), flags=int(read_only),
                         keep_capsule=False)
        self.shape, self.ndim, self.dtype, self.index, self.streams = values.shape, values.ndim, values.dtype, index, []
        self.current, self.buffer = own_stream() if current is None else current, Memory(values.nbytes)
        if values.nbytes:
            self.buffer.device.copy(self.buffer.place, values.ctypes.data, values.nbytes)
        self.tensor = (self.buffer.place, *self.tensor[1:])

    device = property(lambda self: self.index)

    @property
    def host(self):
        """A copy of its values."""
        made = np.empty(self.shape, self.dtype)
        if made.nbytes:
            self.buffer.device.copy(made.ctypes.data, self.buffer.place, made.nbytes)
        return made

    def __len__(self):
        return self.shape[0]

    def __dlpack__(self, *, stream=None, max_version=None):
        """The rules: None is not for a consumer with a stream of its own; 0 is ambiguous and not allowed; -1 is no stream."""
        assert stream not in (None, 0, -1), "a consumer on a CUDA device must name its stream"
        self.streams.append(stream)
        return super().__dlpack__(**({} if max_version is None else {"max_version": max_version}))

    def current_stream(self):
        return self.current

    def reshape(self, *shape):
        return type(self)(self.host.reshape(*shape), self.index, self.current)

    def __array_namespace__(self):
        return sys.modules[__name__].namespace

    def __array__(self, *args, **options):
        raise AssertionError("copied to the host behind our back")


def empty(shape, dtype, device):
    return CudaArray(np.full(shape, 7, dtype), device)


namespace = types.SimpleNamespace(empty=empty, float32=np.dtype(np.float32))
