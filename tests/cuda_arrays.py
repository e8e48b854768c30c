"""A framework whose arrays say that they lie on a CUDA device, and lie in host memory: for the emulated library, which runs on it. It
checks what is asked of it: streams by DLPack's rules, and copies to the host, of which there may be none."""
import ctypes
import sys
import types

import ml_dtypes
import numpy as np

from dlpack_producer import CUDA, Producer

CODES = {np.dtype(np.float32): (2, 32), np.dtype(np.float16): (2, 16), np.dtype(ml_dtypes.bfloat16): (4, 16)}
STREAM = 0x7000             # of this framework's current stream


class CudaArray(Producer):
    """A contiguous array of device `index`."""

    def __init__(self, values, index=0, current=STREAM, read_only=False):
        self.host = np.ascontiguousarray(values)
        code, bits = CODES[self.host.dtype]
        super().__init__(shape=self.host.shape, strides=tuple(s // self.host.itemsize for s in self.host.strides), code=code, bits=bits,
                         device=(CUDA, index), flags=int(read_only), keep_capsule=False)
        self.buffer, self.index, self.current, self.streams = self.host, index, current, []
        self.tensor = (self.host.ctypes.data, *self.tensor[1:])

    shape = property(lambda self: self.host.shape)
    ndim = property(lambda self: self.host.ndim)
    dtype = property(lambda self: self.host.dtype)
    device = property(lambda self: self.index)

    def __len__(self):
        return len(self.host)

    def __dlpack__(self, *, stream=None, max_version=None):
        """The rules: None is not for a consumer with a stream of its own; 0 is ambiguous and not allowed."""
        assert stream not in (None, 0), "a consumer on a CUDA device must name its stream"
        self.streams.append(stream)
        return super().__dlpack__(**({} if max_version is None else {"max_version": max_version}))

    def current_stream(self):
        return self.current

    def reshape(self, *shape):
        return CudaArray(self.host.reshape(*shape), self.index, self.current)

    def __array_namespace__(self):
        return sys.modules[__name__].namespace

    def __array__(self, *args, **options):
        raise AssertionError("copied to the host behind our back")


def empty(shape, dtype, device):
    made = CudaArray(np.zeros(shape, dtype), device)
    ctypes.memset(made.host.ctypes.data, 0x5a, made.host.nbytes)
    return made


namespace = types.SimpleNamespace(empty=empty, float32=np.dtype(np.float32))
