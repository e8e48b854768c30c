/* DLPack: memory of other libraries' tensors, without a copy. Import of both capsule generations ("dltensor" and
 * "dltensor_versioned"), of CPU memory or, where it is asked for, of a CUDA device.
 *
 * The structs are an ABI (dmlc/dlpack, include/dlpack/dlpack.h, version 1.x); names and layout follow its
 * documentation. */
#ifndef MQ_PY_DLPACK_H
#define MQ_PY_DLPACK_H

#include "py/state.h"

enum { MQ_DL_CPU = 1, MQ_DL_CUDA = 2, MQ_DL_CUDA_HOST = 3 }; /* DLDeviceType */
enum {                                                       /* DLDataTypeCode */
    MQ_DL_INT = 0, MQ_DL_UINT = 1, MQ_DL_FLOAT = 2, MQ_DL_BFLOAT = 4, MQ_DL_BOOL = 6,
    MQ_DL_F8_E4M3FN = 10, MQ_DL_F8_E5M2 = 12, MQ_DL_F8_E8M0FNU = 14
};
#define MQ_DL_FLAG_READ_ONLY ((uint64_t)1)
#define MQ_DL_MAJOR 1 /* a different major version means a different ABI */

typedef struct mq_dl_device { int32_t type, id; } mq_dl_device;
typedef struct mq_dl_dtype { uint8_t code, bits; uint16_t lanes; } mq_dl_dtype;

typedef struct mq_dl_tensor {
    void *data;
    mq_dl_device device;
    int32_t ndim;
    mq_dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL = C-contiguous (before version 1.2) */
    uint64_t byte_offset;
} mq_dl_tensor;

typedef struct mq_dl_managed { /* capsule "dltensor" */
    mq_dl_tensor tensor;
    void *manager;
    void (*deleter)(struct mq_dl_managed *self);
} mq_dl_managed;

typedef struct mq_dl_versioned { /* capsule "dltensor_versioned" */
    struct { uint32_t major, minor; } version;
    void *manager;
    void (*deleter)(struct mq_dl_versioned *self);
    uint64_t flags;
    mq_dl_tensor tensor;
} mq_dl_versioned;

/* Takes over obj.__dlpack__(). *out views its memory; *owner receives a new reference that returns the memory to the
 * producer when it goes. A legacy capsule cannot say that it is read-only, so it is taken to be. Returns 0, or -1
 * with an exception set and the tensor still the producer's. */
int mq_dlpack_import(PyObject *obj, const char *name, mq_tensor *out, PyObject **owner);

/* The same of CUDA memory, which *device says whose it is. stream: where it will be used (a cudaStream_t as a number;
 * 1 = the default one, 0 is not allowed); the producer sees to it that what it has under way comes before. */
int mq_dlpack_import_device(PyObject *obj, const char *name, Py_ssize_t stream, mq_tensor *out, int *device,
                            PyObject **owner);

#endif
