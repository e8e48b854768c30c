"""Producers of DLPack capsules, made by hand with ctypes so that their deleters and destructors can be watched."""
import ctypes

import numpy as np

CPU, CUDA = 1, 2
READ_ONLY, COPIED = 1, 2
VERSIONED, LEGACY = b"dltensor_versioned", b"dltensor"

# Capsules by address, as a destructor gets its capsule when that has no references left to take.
DELETER = DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager", ctypes.c_void_p), ("deleter", DELETER),
                ("flags", ctypes.c_uint64), ("tensor", Tensor)]


_exported = {}      # by address: the struct, what it points to, what counts


@DELETER
def _delete(address):
    """Of both generations."""
    *_, deletions, alive = _exported.pop(address)
    deletions.append(address)
    alive.discard(address)


@DESTRUCTOR
def _destroy(capsule):
    for name, structure in ((VERSIONED, Versioned), (LEGACY, Managed)):
        if _is_valid(capsule, name):
            managed = structure.from_address(_pointer(capsule, name))
            if managed.deleter:
                managed.deleter(ctypes.addressof(managed))


def is_named(capsule, name):
    return bool(_is_valid(id(capsule), name))


class Producer:
    """Exports one buffer, each time as a tensor of its own whose deleter is counted (a second call of one is an error)."""

    def __init__(self, kind=VERSIONED, shape=(2, 3), strides=None, code=2, bits=32, lanes=1, device=(CPU, 0), said_device=None,
                 version=(1, 0), flags=0, offset=0, null=False, no_shape=False, know_max_version=True, deleter=True, keep_capsule=True):
        self.kind, self.said_device, self.know_max_version = kind, said_device or device, know_max_version
        self.version, self.flags, self.has_deleter, self.keep_capsule = version, flags, deleter, keep_capsule
        self.buffer, self.alive, self.deletions, self.exports, self.capsule = np.arange(256, dtype=np.uint8), set(), [], [], None
        self.layout = [None if values is None else (ctypes.c_int64 * max(len(values), 1))(*values) for values in (shape, strides)]
        pointers = [None if values is None else ctypes.cast(values, ctypes.POINTER(ctypes.c_int64)) for values in self.layout]
        self.tensor = (None if null else self.buffer.ctypes.data, *device, len(shape), code, bits, lanes, None if no_shape else pointers[0],
                       pointers[1], offset)

    @property
    def deleted(self):
        return len(self.deletions)

    @property
    def capsules(self):
        return len(self.exports)

    def __dlpack_device__(self):
        return self.said_device

    def __dlpack__(self, **options):
        if not self.know_max_version and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        self.options = options
        managed = Versioned(*self.version, flags=self.flags) if self.kind == VERSIONED else Managed()
        managed.deleter = _delete if self.has_deleter else DELETER()
        managed.tensor = Tensor(*self.tensor)
        address = ctypes.addressof(managed)
        _exported[address] = managed, self.buffer, self.layout, self.deletions, self.alive
        self.alive.add(address)
        self.exports.append(address)
        capsule = _new(address, self.kind, ctypes.cast(_destroy, ctypes.c_void_p))
        self.capsule = capsule if self.keep_capsule else None
        return capsule

    def values(self, dtype="float32", offset=0):
        return np.frombuffer(self.buffer, dtype=dtype, offset=offset, count=(len(self.buffer) - offset) // np.dtype(dtype).itemsize)
