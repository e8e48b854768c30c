"""cuda/modelq_cuda_gemm.h by ctypes: products, linears and Gram matrices of NumPy arrays. The emulated library holds an emulated
cuBLASLt (cuda/shim/cublaslt_shim.h), which is opened by the library's own path; on a GPU it is the real one."""
import ctypes as C

import numpy as np

import modelq._core as core
from cuda_library import DTYPES, CudaError, Error, Matrix, Staging

PATHS = ["nvfp4", "mxfp8", "fp8_block", "fp8_outer", "fp8_tensor", "fp8_scaled", "int8", "dequantize"]      # in the order of mq_cuda_path
INPUTS = ["plain", "scheme", "tensor", "token", "group"]                                                    # of mq_cuda_inputs


class Options(C.Structure):
    _fields_ = [("library", C.c_char_p), ("capability", C.c_int), ("allow_tf32", C.c_int), ("fast_fp8", C.c_int), ("plans", C.c_int64),
                ("workspace_nbytes", C.c_size_t)]


class Counts(C.Structure):
    _fields_ = [(name, C.c_int64) for name in ("version", "plans", "hits", "misses", "evictions", "refusals")]


class Workspace(C.Structure):
    _fields_ = [("data", C.c_void_p), ("nbytes", C.c_size_t)]


class GemmJob(C.Structure):
    _fields_ = [("a", Matrix), ("b", Matrix), ("out", Matrix), ("transpose_a", C.c_int), ("transpose_b", C.c_int), ("alpha", C.c_float),
                ("beta", C.c_float), ("bias", C.c_void_p), ("batch", C.c_int64), ("stride_a", C.c_int64), ("stride_b", C.c_int64),
                ("stride_out", C.c_int64), ("workspace", Workspace)]


class Linear(C.Structure):
    _fields_ = [("scheme", C.c_int), ("block_cols", C.c_int64), ("rows", C.c_int64), ("cols", C.c_int64), ("codes", C.c_void_p),
                ("scales", C.c_void_p), ("scale_2", C.c_void_p), ("fp8_amax", C.c_void_p), ("inputs", C.c_int), ("input_scheme", C.c_int),
                ("input_kind", C.c_int), ("input_amax", C.c_void_p), ("prepared", C.c_void_p), ("dtype", C.c_int)]


class LinearJob(C.Structure):
    _fields_ = [("linear", Linear), ("in_", Matrix), ("out", Matrix), ("bias", C.c_void_p), ("accumulate", C.c_int),
                ("workspace", Workspace)]


class GramJob(C.Structure):
    _fields_ = [("x", Matrix), ("mask", C.c_void_p), ("block", C.c_int64), ("sums", C.c_void_p), ("workspace", Workspace)]


class Gemm:
    """A mq_cuda_gemm with one workspace, whose contents are rubbish at first."""
    def __init__(self, library, path=None, **options):
        self.library, self.c = library, library.c
        if library.is_emulated:
            self.c.mq_shim_lt_set_capability(options.get("capability", 90))
            self.c.mq_shim_lt_calls.restype = self.c.mq_shim_lt_live.restype = C.c_int64
            self.c.mq_shim_lt_reason.restype = C.c_char_p
        self.c.mq_cuda_gemm_workspace.restype = C.c_size_t
        self.place, err = C.c_void_p(), Error()
        path = path or (self.c._name if library.is_emulated else None)
        given = Options(path.encode() if path else None, **{"capability": 90 if library.is_emulated else 0, "workspace_nbytes": 1 << 22, **options})
        code = self.c.mq_cuda_gemm_open(C.byref(given), C.byref(self.place), C.byref(err))
        if code:
            raise CudaError(code, err.text.decode())
        self.nbytes = self.c.mq_cuda_gemm_workspace(self.place)
        self.base = library.memory.alloc(self.nbytes + 256)
        self.workspace = Workspace(-(-self.base // 256) * 256, self.nbytes)
        rubbish = np.full(self.nbytes, 0xff, np.uint8)
        library.memory.copy(self.workspace.data, rubbish.ctypes.data, rubbish.size)

    def close(self):
        self.c.mq_cuda_gemm_close(self.place)
        self.library.memory.free(self.base)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def calls(self, name):
        return self.c.mq_shim_lt_calls(f"cublasLt{name}".encode())

    def counts(self) -> Counts:
        counts = Counts()
        self.c.mq_cuda_gemm_count(self.place, C.byref(counts))
        return counts

    def call(self, name, staging, *arguments, stream=None):
        err = Error()
        code = getattr(self.c, f"mq_cuda_{name}")(self.place, *arguments, stream, C.byref(err))
        staging.finish()
        if code:
            assert code == err.code < 0, (code, err.code)
            raise CudaError(code, err.text.decode())

    def product(self, a, b, out, transpose_a=False, transpose_b=False, alpha=1.0, beta=0.0, bias=None, change=lambda job: None):
        """Of 2-D arrays, or of 3-D ones: a batch. out is written and returned."""
        here = Staging(self.library.memory)
        job = GemmJob(*(matrix(here, x) for x in (a, b, out)), transpose_a, transpose_b, alpha, beta, here.pointer(bias))
        if out.ndim == 3:
            job.batch = len(out)
            job.stride_a, job.stride_b, job.stride_out = (x.strides[0] // x.dtype.itemsize for x in (a, b, out))
        job.workspace = self.workspace
        change(job)
        self.call("gemm_run", here, C.byref(job))
        return out

    def linear(self, here, parts, scheme, shape, inputs="plain", kind="float", input_scheme=None, input_amax=None, fp8_amax=None,
               block_size=None, rounded="float32") -> Linear:
        schemes = list(core.schemes())
        return Linear(schemes.index(scheme), block_size or 0, *shape, here.pointer(parts["weight"]), here.pointer(parts["weight_scale"]),
                      here.pointer(parts.get("weight_scale_2")), here.pointer(fp8_amax), INPUTS.index(inputs),
                      schemes.index(input_scheme) if input_scheme else 0, {"float": 0, "int": 1}[kind], here.pointer(input_amax), None,
                      DTYPES.index(np.dtype(rounded)))

    def run_linear(self, x, parts, scheme, out, bias=None, accumulate=False, prepare=False, change=lambda job: None, **options):
        """The path taken; out is written."""
        here, taken, err = Staging(self.library.memory), C.c_int(-1), Error()
        linear = self.linear(here, parts, scheme, (out.shape[1], x.shape[1]), **options)
        if prepare:
            self.c.mq_cuda_linear_prepared_nbytes.restype = C.c_size_t
            nbytes = self.c.mq_cuda_linear_prepared_nbytes(self.place, C.byref(linear))
            linear.prepared = -(-here.scratch(nbytes + 16) // 16) * 16 if nbytes else None
            assert self.c.mq_cuda_linear_prepare(self.place, C.byref(linear), C.c_void_p(linear.prepared), None, C.byref(err)) == 0, err.text
        job = LinearJob(linear, here.matrix(x), here.matrix(out), here.pointer(bias), accumulate, self.workspace)
        change(job)
        expected, refusals = self.c.mq_cuda_linear_path(self.place, C.byref(job.linear)), self.counts().refusals
        self.call("linear_run", here, C.byref(job), C.byref(taken))
        assert taken.value == expected or self.counts().refusals > refusals or refusals
        return PATHS[taken.value]

    def gram(self, x, sums, mask=None, block=0):
        here = Staging(self.library.memory)
        self.call("gram", here, C.byref(GramJob(here.matrix(x), here.pointer(mask), block, here.pointer(sums), self.workspace)))
        return sums


def matrix(here: Staging, x) -> Matrix:
    """Of a 2-D array, or of the first of a batch."""
    if x.ndim == 2:
        return here.matrix(x)
    size = x.dtype.itemsize
    return Matrix(here.pointer(x), DTYPES.index(x.dtype), *x.shape[1:], max(x.strides[1] // size, x.shape[2]))
