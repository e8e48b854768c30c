#include "py/dlpack.h"

#include "core/mq.h"

static const char legacy_name[] = "dltensor", legacy_used[] = "used_dltensor";
static const char versioned_name[] = "dltensor_versioned", versioned_used[] = "used_dltensor_versioned";
static const char owner_name[] = "modelq.dlpack_owner";

static const struct { uint8_t code, bits; } codes[MQ_DTYPE_COUNT] = {
    [MQ_F32] = {MQ_DL_FLOAT, 32}, [MQ_F16] = {MQ_DL_FLOAT, 16}, [MQ_F64] = {MQ_DL_FLOAT, 64},
    [MQ_BF16] = {MQ_DL_BFLOAT, 16},
    [MQ_F8_E4M3] = {MQ_DL_F8_E4M3FN, 8}, [MQ_F8_E5M2] = {MQ_DL_F8_E5M2, 8}, [MQ_F8_E8M0] = {MQ_DL_F8_E8M0FNU, 8},
    [MQ_I8] = {MQ_DL_INT, 8}, [MQ_U8] = {MQ_DL_UINT, 8}, [MQ_I16] = {MQ_DL_INT, 16}, [MQ_U16] = {MQ_DL_UINT, 16},
    [MQ_I32] = {MQ_DL_INT, 32}, [MQ_U32] = {MQ_DL_UINT, 32}, [MQ_I64] = {MQ_DL_INT, 64}, [MQ_U64] = {MQ_DL_UINT, 64},
    [MQ_BOOL] = {MQ_DL_BOOL, 8},
};

/* The memory goes back to its producer, whose deleter may run Python code: keep the exception that may be under way. */
#define RETURN_MEMORY(struct_type)                                                      \
    struct_type *managed = PyCapsule_GetPointer(owner, owner_name);                     \
    PyObject *type, *value, *traceback;                                                 \
    PyErr_Fetch(&type, &value, &traceback);                                             \
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);         \
    PyErr_Restore(type, value, traceback)

static void return_legacy(PyObject *owner)
{
    RETURN_MEMORY(mq_dl_managed);
}

static void return_versioned(PyObject *owner)
{
    RETURN_MEMORY(mq_dl_versioned);
}

static const char *device_name(int type)
{
    switch (type) {
    case MQ_DL_CUDA: return "cuda";
    case 8: return "metal";
    case 10: return "rocm";
    case 14: return "oneapi";
    default: return "device";
    }
}

/* What an import is for: memory of the CPU, or of a CUDA device. */
typedef struct wish {
    const char *name;       /* for errors */
    int cuda;
    Py_ssize_t stream;      /* of a CUDA device */
    int id;                 /* the device's number, found */
} wish;

static int suits(const wish *wish, int type)
{
    return wish->cuda ? type == MQ_DL_CUDA : type == MQ_DL_CPU || type == MQ_DL_CUDA_HOST;
}

/* Asked before __dlpack__, so that no producer is made to synchronise or copy in vain. */
static int check_device(PyObject *obj, wish *wish)
{
    const char *name = wish->name;
    int type, id;
    PyObject *device = PyObject_CallMethod(obj, "__dlpack_device__", NULL);
    if (device == NULL) return -1;
    int ok = PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &id);
    Py_DECREF(device);
    if (!ok) {
        PyErr_Format(PyExc_TypeError, "%s: __dlpack_device__() must give two integers", name);
        return -1;
    }
    wish->id = id;
    if (suits(wish, type)) return 0;
    if (wish->cuda)
        PyErr_Format(PyExc_ValueError, "%s: is on DLPack device type %d, expected a CUDA device's memory", name, type);
    else
        PyErr_Format(PyExc_ValueError,
                     "%s: is on %s:%d (DLPack device type %d), expected CPU memory: move it there first", name,
                     device_name(type), id, type);
    return -1;
}

static PyObject *call_with(PyObject *method, PyObject *options)
{
    PyObject *none = PyTuple_New(0);
    PyObject *capsule = none != NULL && options != NULL ? PyObject_Call(method, none, options) : NULL;
    Py_XDECREF(none);
    Py_XDECREF(options);
    return capsule;
}

/* Producers from before the array API of 2023 do not know max_version. */
static PyObject *ask_for_capsule(PyObject *obj, const wish *wish)
{
    PyObject *method = PyObject_GetAttrString(obj, "__dlpack__");
    if (method == NULL) return NULL;
    PyObject *capsule = call_with(method, wish->cuda ? Py_BuildValue("{s:(ii)s:n}", "max_version", MQ_DL_MAJOR, 0,
                                                                     "stream", wish->stream)
                                                     : Py_BuildValue("{s:(ii)}", "max_version", MQ_DL_MAJOR, 0));
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        capsule = call_with(method, wish->cuda ? Py_BuildValue("{s:n}", "stream", wish->stream) : PyDict_New());
    }
    Py_DECREF(method);
    return capsule;
}

static int find_dtype(mq_dl_dtype given, const char *name, mq_dtype *out)
{
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) {
        if (codes[i].code != given.code || codes[i].bits != given.bits || given.lanes != 1) continue;
        *out = (mq_dtype)i;
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s: DLPack dtype (code %d, %d bits, %d lanes) is not supported", name,
                 (int)given.code, (int)given.bits, (int)given.lanes);
    return -1;
}

/* What any of the tensor's bytes may be away from its first must be a distance that fits. */
static int fill_strides(const mq_dl_tensor *given, const char *name, mq_tensor *out)
{
    int64_t room = PY_SSIZE_T_MAX / 8;
    for (int i = 0; given->strides != NULL && i < given->ndim; i++) {
        const int64_t stride = given->strides[i], steps = given->shape[i] - 1;
        out->stride[i] = stride;
        if (steps < 1) continue;
        if (stride > room / steps || stride < -(room / steps)) {
            PyErr_Format(PyExc_ValueError, "%s: stride %d of %lld is too large", name, i, (long long)stride);
            return -1;
        }
        room -= steps * (stride < 0 ? -stride : stride);
    }
    return 0;
}

static int fill_view(const mq_dl_tensor *given, const wish *wish, mq_tensor *out)
{
    const char *name = wish->name;
    mq_dtype dtype;
    if (!suits(wish, given->device.type) || (wish->cuda && given->device.id != wish->id)) {
        PyErr_Format(PyExc_ValueError, "%s: its DLPack capsule is not of %s memory (device type %d)", name,
                     wish->cuda ? "that CUDA device's" : "CPU", given->device.type);
        return -1;
    }
    if (given->ndim < 0 || given->ndim > MQ_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: %d dimensions, at most %d are supported", name, given->ndim, MQ_MAX_NDIM);
        return -1;
    }
    if (given->ndim > 0 && given->shape == NULL) {
        PyErr_Format(PyExc_ValueError, "%s: its DLPack capsule has %d dimensions but no shape", name, given->ndim);
        return -1;
    }
    if (find_dtype(given->dtype, name, &dtype) < 0) return -1;
    int64_t room = PY_SSIZE_T_MAX / 8;
    for (int i = 0; i < given->ndim; i++) {
        if (given->shape[i] >= 0 && given->shape[i] <= room) {
            room /= MQ_MAX(given->shape[i], (int64_t)1);
            continue;
        }
        PyErr_Format(PyExc_ValueError, "%s: dimension %d of %lld is negative or makes the tensor too large", name, i,
                     (long long)given->shape[i]);
        return -1;
    }
    *out = mq_tensor_make(given->data, dtype, given->ndim, given->shape);
    if (fill_strides(given, name, out) < 0) return -1;
    if (given->data != NULL) {
        out->data = (char *)given->data + given->byte_offset;
    } else if (mq_tensor_count(out) != 0) {
        PyErr_Format(PyExc_ValueError, "%s: its DLPack capsule has elements but no memory", name);
        return -1;
    }
    return 0;
}

/* From here on the memory is ours to return: the capsule is renamed, which tells its destructor to let go. That comes
 * first, as making an object may let other threads run. */
static PyObject *take_over(PyObject *capsule, void *managed, int versioned)
{
    if (PyCapsule_SetName(capsule, versioned ? versioned_used : legacy_used) < 0) return NULL;
    PyObject *owner = PyCapsule_New(managed, owner_name, versioned ? return_versioned : return_legacy);
    if (owner == NULL) PyCapsule_SetName(capsule, versioned ? versioned_name : legacy_name);
    return owner;
}

static int import_versioned(PyObject *capsule, const wish *wish, mq_tensor *out, PyObject **owner)
{
    mq_dl_versioned *managed = PyCapsule_GetPointer(capsule, versioned_name);
    if (managed == NULL) return -1;
    if (managed->version.major != MQ_DL_MAJOR) {
        PyErr_Format(PyExc_BufferError, "%s: DLPack version %u.%u, expected %d.x", wish->name, managed->version.major,
                     managed->version.minor, MQ_DL_MAJOR);
        return -1;
    }
    if (fill_view(&managed->tensor, wish, out) < 0) return -1;
    out->readonly = (managed->flags & MQ_DL_FLAG_READ_ONLY) != 0;
    *owner = take_over(capsule, managed, 1);
    return *owner != NULL ? 0 : -1;
}

static int import_legacy(PyObject *capsule, const wish *wish, mq_tensor *out, PyObject **owner)
{
    mq_dl_managed *managed = PyCapsule_GetPointer(capsule, legacy_name);
    if (managed == NULL || fill_view(&managed->tensor, wish, out) < 0) return -1;
    out->readonly = 1;
    *owner = take_over(capsule, managed, 0);
    return *owner != NULL ? 0 : -1;
}

/* Of a capsule that was refused the destructor runs, which may be Python code: keep the exception that says why. */
static void drop_capsule(PyObject *capsule)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_DECREF(capsule);
    PyErr_Restore(type, value, traceback);
}

static int import(PyObject *obj, wish *wish, mq_tensor *out, PyObject **owner)
{
    const char *name = wish->name;
    if (check_device(obj, wish) < 0) return -1;
    PyObject *capsule = ask_for_capsule(obj, wish);
    if (capsule == NULL) return -1;
    int rc = -1;
    if (PyCapsule_IsValid(capsule, versioned_name))
        rc = import_versioned(capsule, wish, out, owner);
    else if (PyCapsule_IsValid(capsule, legacy_name))
        rc = import_legacy(capsule, wish, out, owner);
    else if (PyCapsule_IsValid(capsule, legacy_used) || PyCapsule_IsValid(capsule, versioned_used))
        PyErr_Format(PyExc_ValueError, "%s: its DLPack capsule was consumed before", name);
    else
        PyErr_Format(PyExc_TypeError, "%s: __dlpack__() gave no DLPack capsule", name);
    drop_capsule(capsule);
    return rc;
}

int mq_dlpack_import(PyObject *obj, const char *name, mq_tensor *out, PyObject **owner)
{
    wish wish = {.name = name};
    return import(obj, &wish, out, owner);
}

int mq_dlpack_import_device(PyObject *obj, const char *name, Py_ssize_t stream, mq_tensor *out, int *device,
                            PyObject **owner)
{
    wish wish = {.name = name, .cuda = 1, .stream = stream};
    if (import(obj, &wish, out, owner) < 0) return -1;
    *device = wish.id;
    return 0;
}
