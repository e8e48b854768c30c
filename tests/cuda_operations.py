"""The runtime's operations of the CUDA library (cuda/modelq_cuda_ops.h) by ctypes: structs are read from the header, and a call takes its
fields as NumPy arrays and numbers."""
import ctypes as C
import functools
import os
import re

import numpy as np
import pytest

from cuda_library import DTYPES, ORDERS, ROOT, SANITIZED, Library, Matrix, Staging, library_to_test

HEADER = ROOT / "cuda/modelq_cuda_ops.h"
TYPES = {"int64_t": C.c_int64, "int": C.c_int, "float": C.c_float, "double": C.c_double, "size_t": C.c_size_t, "mq_cuda_matrix": Matrix,
         "mq_dtype": C.c_int, "mq_cuda_columns": C.c_int, "mq_cuda_activation": C.c_int}
WORKSPACES = {"rmsnorm_backward": "rmsnorm", "column_sums": "columns"}     # of which function, where not its own
SUM, SUM_MAGNITUDES = range(2)
LOSS_ROW = np.dtype([("max", np.float32), ("sum", np.float64), ("target", np.float32)], align=True)


@functools.cache
def structs() -> dict[str, type]:
    """Of the header, by their names."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    found = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, flags=re.S):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+) ([\w\s,*]+);", body):
            fields += [(field.strip(" *"), C.c_void_p if "*" in field else TYPES[kind]) for field in names.split(",")]
        found[name] = type(name, (C.Structure,), {"_fields_": fields})
    return found


class Operations(Library):
    def fill(self, struct: str, here: Staging, fields: dict) -> C.Structure:
        job = structs()[struct]()
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                value = here.matrix(value) if dict(job._fields_)[name] is Matrix else here.pointer(value)
            elif isinstance(value, np.dtype):
                value = DTYPES.index(value)
            setattr(job, name, value)
        return job

    def workspace(self, function: str, job, here: Staging) -> None:
        if (count := getattr(self.c, f"mq_cuda_{function}_workspace", None)) is not None:
            count.restype = C.c_size_t
            job.workspace_nbytes = count(C.byref(job))
            job.workspace = here.scratch(job.workspace_nbytes)

    def run(self, function: str, struct: str | None = None, **fields) -> None:
        """mq_cuda_<function> with a job of these fields; arrays are written in place."""
        here = Staging(self.memory)
        job = self.fill(f"mq_cuda_{struct or function}_job", here, fields)
        self.workspace(WORKSPACES.get(function, function), job, here)
        self.call(function, job, here)


@pytest.fixture(scope="module")
def unordered():
    return Operations(library_to_test())


# On a GPU there is one order; and what sanitizers look for does not depend on it, while they take their time.
@pytest.fixture(params=["random"] if SANITIZED or "MODELQ_CUDA_LIBRARY" in os.environ else ORDERS)
def cuda(unordered, request):
    unordered.order(request.param)
    return unordered
