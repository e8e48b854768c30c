"""modelq's CUDA library by ctypes: the structs of cuda/modelq_cuda.h, and calls that take NumPy arrays (the emulated library's device
memory is the host's)."""
import ctypes as C
import fcntl
import hashlib
import importlib.util
import os
from pathlib import Path

import ml_dtypes
import numpy as np

import modelq._core as core

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]        # in the order of mq_dtype
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
NO_ROW = 2**64 - 1
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")       # make sanitize: kernels are then built the same way

spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "scripts/cuda_build.py")
cuda_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_build)


def tree_digest() -> str:
    files = [*(ROOT / "cuda").rglob("*.*"), *(ROOT / "csrc").rglob("*.[chd]*"), ROOT / "scripts/cuda_build.py"]
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def once(folder: Path, make) -> Path:
    """folder, after make(folder) for these sources; one process of a parallel run makes and the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, digest = folder / "digest", tree_digest()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest:
            stamp.unlink(missing_ok=True)
            make(folder)
            stamp.write_text(digest)
    return folder


def emulated() -> Path:
    """The emulated library, built if its sources have changed; or the one that scripts/cuda_mutants.py wants to be tested."""
    if given := os.environ.get("MODELQ_CUDA_EMULATED"):
        return Path(given)
    name = "cuda-emulated-sanitize" if SANITIZED else "cuda-emulated"
    return once(ROOT / "build" / name, lambda folder: cuda_build.emulated(folder, SANITIZED)) / cuda_build.EMULATED


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
                ("amax", C.c_void_p), ("pre_scale", C.c_void_p), ("bias", C.c_void_p)]


class HistogramJob(C.Structure):
    _fields_ = [("x", Matrix), ("mask", C.c_void_p), ("exponent", C.c_int), ("bins", C.c_int64), ("counts", C.c_void_p),
                ("zeros", C.c_void_p)]


def pointer(array):
    return None if array is None else array.ctypes.data


def matrix(array) -> Matrix:
    """Of a 2-D array whose rows are contiguous; a last axis of length 1 counts as such."""
    size = array.dtype.itemsize
    assert array.ndim == 2 and (array.shape[1] < 2 or not array.size or array.strides[1] == size)
    ld = array.strides[0] // size if array.shape[0] > 1 and array.size else array.shape[1]
    return Matrix(array.ctypes.data, DTYPES.index(array.dtype), *array.shape, max(ld, array.shape[1]))


class CudaError(Exception):
    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


class Library:
    def __init__(self, path):
        self.c = C.CDLL(str(path))
        self.c.mq_cuda_block_workspace.restype = C.c_size_t
        self.c.mq_shim_set_order.argtypes = [C.c_int, C.c_uint64]

    def order(self, name: str, seed: int = 1) -> None:
        self.c.mq_shim_set_order(ORDERS[name], seed)

    def call(self, name: str, job) -> None:
        err = Error()
        code = getattr(self.c, f"mq_cuda_{name}")(C.byref(job), None, C.byref(err))
        if code:
            assert code == err.code
            raise CudaError(code, err.text.decode())

    def amax(self, x, rows=0, cols=0):
        shape = [-(-x.shape[0] // rows) if rows else 1, -(-x.shape[1] // cols) if cols else 1]
        out = np.full([max(n, 1) for n in shape], np.nan, np.float32)
        self.call("amax", AmaxJob(matrix(x), rows, cols, pointer(out)))
        return out

    def encode(self, values, format):
        like = core.encode(values, format)
        codes = np.zeros(like.shape, like.dtype)
        self.call("encode", CodesJob(list(core.formats()).index(format), values.size, pointer(values), pointer(codes)))
        return codes

    def decode(self, codes, format):
        values = np.full(codes.shape, 7, np.float32)
        self.call("decode", CodesJob(list(core.formats()).index(format), codes.size, pointer(values), pointer(codes)))
        return values

    def block_job(self, scheme, x=None, amax=None, block_size=None, block_amax=None, second_divisor=0.0, **parts):
        """A job with workspace and a bad row, and what must live as long as it."""
        job = BlockJob(list(core.schemes()).index(scheme), block_size or 0, second_divisor, amax=pointer(amax), block_amax=pointer(block_amax))
        bad = np.full(1, NO_ROW, np.uint64)
        job.bad_row = pointer(bad)
        if x is not None:
            job.x = matrix(x)
        for name, array in parts.items():
            setattr(job, name, matrix(array) if name == "y" else pointer(array))
        nbytes = self.c.mq_cuda_block_workspace(C.byref(job)) if x is not None else 0
        workspace = np.full(nbytes // 4 + 8, np.nan, np.float32)
        start = (-workspace.ctypes.data % 16) // 4
        job.workspace, job.workspace_nbytes = workspace.ctypes.data + 4 * start, nbytes
        return job, bad, workspace

    def quantize(self, x, scheme, like, **options):
        """Parts shaped as those of `like` (core.quantize's), and the first bad row."""
        parts = {role: np.full(part.shape, 0x5a, np.uint8).astype(part.dtype) if part.dtype.itemsize == 1
                 else np.full(part.shape, 7, part.dtype) for role, part in like.items()}
        places = dict(codes=parts["weight"], scales=parts["weight_scale"], scale_2=parts.get("weight_scale_2"))
        job, bad, _keep = self.block_job(scheme, x, **places, **options)
        self.call("block_quantize", job)
        return parts, int(bad[0])

    def fake_quantize(self, x, scheme, out=None, **options):
        out = np.zeros(x.shape, x.dtype) if out is None else out
        job, bad, _keep = self.block_job(scheme, x, y=out, **options)
        self.call("block_fake_quantize", job)
        return out, int(bad[0])

    def dequantize(self, parts, scheme, out, **options):
        places = dict(codes=parts["weight"], scales=parts["weight_scale"], scale_2=parts.get("weight_scale_2"))
        job, _, _keep = self.block_job(scheme, y=out, **places, **options)
        self.call("block_dequantize", job)
        return out

    def scaled(self, x, kind, amax=None, rows=0, cols=0, dynamic=False, **options):
        """kind: "float", or the bits of integers."""
        y = np.zeros(x.shape, x.dtype)
        blocks = (-(-x.shape[0] // rows) if rows else 1) * (-(-x.shape[1] // cols) if cols else 1)
        workspace = np.full(blocks, np.nan, np.float32) if dynamic else None
        self.call("scaled", ScaledJob(kind != "float", 0 if kind == "float" else kind, options.get("narrow_range", False),
                                      options.get("unsigned", False), matrix(x), matrix(y), rows, cols, pointer(amax), dynamic,
                                      pointer(workspace)))
        return y

    def straight_through(self, x, gradient, amax=None, rows=0, cols=0, pre_scale=None, bias=None):
        out = np.zeros(x.shape, x.dtype)
        self.call("straight_through", GradientJob(matrix(x), matrix(gradient), matrix(out), rows, cols, pointer(amax), pointer(pre_scale),
                                                  pointer(bias)))
        return out

    def histogram(self, x, exponent, bins, mask=None):
        counts, zeros = np.zeros(bins, np.uint32), np.zeros(1, np.uint32)
        self.call("histogram", HistogramJob(matrix(x), pointer(mask), exponent, bins, pointer(counts), pointer(zeros)))
        return counts, int(zeros[0])
