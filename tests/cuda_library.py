"""modelq's CUDA library by ctypes: the structs of cuda/modelq_cuda.h, and calls that take NumPy arrays. It is the emulated library,
unless MODELQ_CUDA_LIBRARY names one for a GPU (scripts/cuda_build.py library), where MODELQ_CUDART may name the CUDA runtime; or
MODELQ_CUDA_EMULATED another emulated one."""
import ctypes as C
import fcntl
import hashlib
import importlib.util
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np

import modelq._core as core

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]        # in the order of mq_dtype
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
NO_ROW = 2**64 - 1
INTERFACE = int(re.search(r"MQ_CUDA_INTERFACE = (\d+)", (ROOT / "cuda/modelq_cuda.h").read_text())[1])
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")       # make sanitize: kernels are then built the same way

spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "scripts/cuda_build.py")
cuda_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_build)


def tree_digest() -> str:
    files = [*(ROOT / "cuda").rglob("*.*"), *(ROOT / "csrc").rglob("*.[chd]*"), ROOT / "scripts/cuda_build.py"]
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def once(folder: Path, make) -> Path:
    """folder, after make(folder) for these sources; one process of a parallel run makes and the others wait. Not right under build/, where
    the Makefile removes lib*."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, digest = folder / "digest", tree_digest()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest:
            stamp.unlink(missing_ok=True)
            make(folder)
            stamp.write_text(digest)
    return folder


def library_to_test() -> Path:
    """The emulated library, built if its sources have changed; or another that is to be tested."""
    if given := os.environ.get("MODELQ_CUDA_LIBRARY") or os.environ.get("MODELQ_CUDA_EMULATED"):
        return Path(given)
    name = "emulated-sanitize" if SANITIZED else "emulated"
    return once(ROOT / "build/cuda" / name, lambda folder: cuda_build.emulated(folder, SANITIZED)) / cuda_build.EMULATED


def same_on_all_streams(monkeypatch, work) -> None:
    """work() gives numbers, by name or in a list. The first time, all that is asked of streams is done at once."""
    found = []
    for streams in ("at once", "late", "random"):
        monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
        made = work()
        found.append(made if isinstance(made, dict) else dict(enumerate(made)))
    for other in found[1:]:
        assert found[0].keys() == other.keys() and found[0]
        for name, value in found[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=str(name))


class Error(C.Structure):
    _fields_ = [("code", C.c_int), ("text", C.c_char * 512)]


class Matrix(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int), ("rows", C.c_int64), ("cols", C.c_int64), ("ld", C.c_int64)]


class AmaxJob(C.Structure):
    _fields_ = [("x", Matrix), ("block_rows", C.c_int64), ("block_cols", C.c_int64), ("out", C.c_void_p)]


class CodesJob(C.Structure):
    _fields_ = [("format", C.c_int), ("count", C.c_int64), ("values", C.c_void_p), ("codes", C.c_void_p)]


class BlockJob(C.Structure):
    _fields_ = [("scheme", C.c_int), ("block_cols", C.c_int64), ("second_divisor", C.c_float), ("x", Matrix), ("y", Matrix),
                ("amax", C.c_void_p), ("block_amax", C.c_void_p), ("codes", C.c_void_p), ("scales", C.c_void_p), ("scale_2", C.c_void_p),
                ("bad_row", C.c_void_p), ("workspace", C.c_void_p), ("workspace_nbytes", C.c_size_t)]


class ScaledJob(C.Structure):
    _fields_ = [("kind", C.c_int), ("bits", C.c_int), ("narrow_range", C.c_int), ("is_unsigned", C.c_int), ("x", Matrix), ("y", Matrix),
                ("block_rows", C.c_int64), ("block_cols", C.c_int64), ("amax", C.c_void_p), ("dynamic", C.c_int), ("workspace", C.c_void_p)]


class GradientJob(C.Structure):
    _fields_ = [("x", Matrix), ("gradient", Matrix), ("out", Matrix), ("block_rows", C.c_int64), ("block_cols", C.c_int64),
                ("amax", C.c_void_p), ("pre_scale", C.c_void_p), ("bias", C.c_void_p), ("rotate", C.c_int64)]


class HistogramJob(C.Structure):
    _fields_ = [("x", Matrix), ("piece", C.c_int64), ("bits", C.c_int), ("numbers", C.c_void_p), ("counts", C.c_void_p)]


HISTOGRAM = np.dtype([("above", np.int32), ("worst", np.uint32), ("first_amax", np.uint32), ("latest", np.uint32), ("first_piece", np.int64),
                      ("zeros", np.uint64)])


class HostMemory:
    """The emulated library's device memory: the host may not touch it while no kernel runs, so that a launcher that does crashes."""
    def __init__(self, library):
        self.c = library
        self.c.mq_shim_alloc.restype = C.c_void_p
        self.c.mq_shim_alloc.argtypes, self.c.mq_shim_free.argtypes = [C.c_size_t], [C.c_void_p]
        self.c.mq_shim_copy.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t]

    def alloc(self, nbytes):
        return self.c.mq_shim_alloc(nbytes)

    def free(self, place):
        self.c.mq_shim_free(place)

    def copy(self, to, source, nbytes):
        self.c.mq_shim_copy(to, source, nbytes)


class DeviceMemory:
    """A GPU's, by the CUDA runtime's shared library."""
    def __init__(self):
        self.c = C.CDLL(os.environ.get("MODELQ_CUDART", "libcudart.so"))

    def check(self, status):
        self.c.cudaGetErrorString.restype = C.c_char_p
        assert status == 0, self.c.cudaGetErrorString(status).decode()

    def alloc(self, nbytes):
        place = C.c_void_p()
        self.check(self.c.cudaMalloc(C.byref(place), C.c_size_t(nbytes)))
        return place.value

    def free(self, place):
        self.check(self.c.cudaFree(C.c_void_p(place)))

    def copy(self, to, source, nbytes):
        self.check(self.c.cudaMemcpy(C.c_void_p(to), C.c_void_p(source), C.c_size_t(nbytes), 4))      # 4: which way, the addresses say


class Staging:
    """The arrays of one call in device memory, as far from a multiple of 16 as here; afterwards they are what they are there."""
    def __init__(self, memory):
        self.memory, self.placed, self.scratch_places = memory, {}, []

    def pointer(self, array):
        if array is None:
            return None
        start, size = array.ctypes.data, array.dtype.itemsize
        nbytes = size + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides)) if array.size else 0
        if (start, nbytes) not in self.placed:
            base = self.memory.alloc(nbytes + start % 16)
            self.placed[start, nbytes] = base, array
            self.memory.copy(base + start % 16, start, nbytes)
        return self.placed[start, nbytes][0] + start % 16

    def matrix(self, array) -> Matrix:
        """Of a 2-D array whose rows are contiguous."""
        size = array.dtype.itemsize
        assert array.ndim == 2 and (array.shape[1] < 2 or not array.size or array.strides[1] == size)
        ld = array.strides[0] // size if array.shape[0] > 1 and array.size else array.shape[1]
        return Matrix(self.pointer(array), DTYPES.index(array.dtype), *array.shape, max(ld, array.shape[1]))

    def scratch(self, nbytes):
        """Filled with rubbish."""
        rubbish = np.full(max(nbytes, 1), 0xff, np.uint8)
        self.scratch_places.append(self.memory.alloc(rubbish.size))
        self.memory.copy(self.scratch_places[-1], rubbish.ctypes.data, rubbish.size)
        return self.scratch_places[-1]

    def finish(self):
        for (start, nbytes), (base, _array) in self.placed.items():
            self.memory.copy(start, base + start % 16, nbytes)
            self.memory.free(base)
        for place in self.scratch_places:
            self.memory.free(place)


class CudaError(Exception):
    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


class Library:
    def __init__(self, path):
        self.c = C.CDLL(str(path))
        self.c.mq_cuda_block_workspace.restype = C.c_size_t
        self.is_emulated = bool(self.c.mq_cuda_is_emulated())
        if self.is_emulated:
            self.c.mq_shim_set_order.argtypes = [C.c_int, C.c_uint64]
        self.memory = HostMemory(self.c) if self.is_emulated else DeviceMemory()

    def order(self, name: str, seed: int = 1) -> None:
        if self.is_emulated:
            self.c.mq_shim_set_order(ORDERS[name], seed)

    def call(self, name: str, job, staging: Staging, *more) -> None:
        err = Error()
        code = getattr(self.c, f"mq_cuda_{name}")(C.byref(job), *map(C.byref, more), None, C.byref(err))
        staging.finish()
        if code:
            assert code == err.code
            raise CudaError(code, err.text.decode())

    def amax(self, x, rows=0, cols=0):
        here = Staging(self.memory)
        shape = [-(-x.shape[0] // rows) if rows else 1, -(-x.shape[1] // cols) if cols else 1]
        out = np.full([max(n, 1) for n in shape], np.nan, np.float32)
        self.call("amax", AmaxJob(here.matrix(x), rows, cols, here.pointer(out)), here)
        return out

    def codes(self, what, values, codes, format):
        here = Staging(self.memory)
        self.call(what, CodesJob(list(core.formats()).index(format), codes.size, here.pointer(values), here.pointer(codes)), here)

    def encode(self, values, format):
        codes = np.zeros_like(core.encode(values, format))
        self.codes("encode", values, codes, format)
        return codes

    def decode(self, codes, format):
        values = np.full(codes.shape, 7, np.float32)
        self.codes("decode", values, codes, format)
        return values

    def block_call(self, name, scheme, change=lambda job: None, block_size=None, second_divisor=0.0, **arrays):
        """Calls with arrays by the job's names for them; change: the job, before it is given away. Returns the first bad row."""
        here = Staging(self.memory)
        job = BlockJob(list(core.schemes()).index(scheme), block_size or 0, second_divisor)
        bad = np.full(1, NO_ROW, np.uint64)
        for role, array in dict(arrays, bad_row=bad).items():
            setattr(job, role, here.matrix(array) if role in ("x", "y") else here.pointer(array))
        if "x" in arrays:
            job.workspace_nbytes = self.c.mq_cuda_block_workspace(C.byref(job))
            job.workspace = here.scratch(job.workspace_nbytes)
        change(job)
        self.call(name, job, here)
        return int(bad[0])

    def quantize(self, x, scheme, like, **options):
        """Parts shaped as those of `like` (core.quantize's), and the first bad row."""
        parts = {role: np.full(part.shape, 0x5a, np.uint8).view(part.dtype) if part.dtype.itemsize == 1
                 else np.full(part.shape, 7, part.dtype) for role, part in like.items()}
        places = dict(codes=parts["weight"], scales=parts["weight_scale"], scale_2=parts.get("weight_scale_2"))
        return parts, self.block_call("block_quantize", scheme, x=x, **places, **options)

    def fake_quantize(self, x, scheme, out=None, **options):
        out = np.zeros(x.shape, x.dtype) if out is None else out
        return out, self.block_call("block_fake_quantize", scheme, x=x, y=out, **options)

    def dequantize(self, parts, scheme, out, **options):
        places = dict(codes=parts["weight"], scales=parts["weight_scale"], scale_2=parts.get("weight_scale_2"))
        self.block_call("block_dequantize", scheme, y=out, **places, **options)
        return out

    def scaled(self, x, kind, amax=None, rows=0, cols=0, dynamic=False, **options):
        """kind: "float", or the bits of integers."""
        here, y = Staging(self.memory), np.zeros(x.shape, x.dtype)
        blocks = (-(-x.shape[0] // rows) if rows else 1) * (-(-x.shape[1] // cols) if cols else 1)
        bits = 0 if kind == "float" else kind
        job = ScaledJob(kind != "float", bits, options.get("narrow_range", False), options.get("unsigned", False), here.matrix(x),
                        here.matrix(y), rows, cols, here.pointer(amax), dynamic, here.scratch(4 * blocks) if dynamic else None)
        self.call("scaled", job, here)
        return y

    def straight_through(self, x, gradient, amax=None, rows=0, cols=0, pre_scale=None, bias=None, rotate=0):
        here, out = Staging(self.memory), np.zeros(x.shape, x.dtype)
        job = GradientJob(*map(here.matrix, (x, gradient, out)), rows, cols, *map(here.pointer, (amax, pre_scale, bias)), rotate)
        self.call("straight_through", job, here)
        return out

    def histogram(self, x, piece, bits, made=None):
        """(numbers, counts), those of an earlier call added to."""
        here = Staging(self.memory)
        numbers, counts = made or (np.zeros((), HISTOGRAM), np.zeros(1 << bits, np.uint64))
        job = HistogramJob(here.matrix(x), piece, bits, here.pointer(numbers), here.pointer(counts))
        self.call("histogram_add", job, here)
        return numbers, counts
