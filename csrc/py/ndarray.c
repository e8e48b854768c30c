#include "py/ndarray.h"

#include "py/dlpack.h"

#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

static const int numpy_types[MQ_DTYPE_COUNT] = {
    [MQ_F32] = NPY_FLOAT32, [MQ_BF16] = -1, [MQ_F16] = NPY_FLOAT16, [MQ_F64] = NPY_FLOAT64,
    [MQ_F8_E4M3] = -1, [MQ_F8_E5M2] = -1, [MQ_F8_E8M0] = -1,
    [MQ_I8] = NPY_INT8, [MQ_U8] = NPY_UINT8, [MQ_I16] = NPY_INT16, [MQ_U16] = NPY_UINT16,
    [MQ_I32] = NPY_INT32, [MQ_U32] = NPY_UINT32, [MQ_I64] = NPY_INT64, [MQ_U64] = NPY_UINT64, [MQ_BOOL] = NPY_BOOL,
};

/* The NumPy dtype of an mq_dtype, borrowed from the state; ml_dtypes is imported when one of its types is first
 * needed. */
static PyArray_Descr *dtype_object(mq_state *state, mq_dtype dtype)
{
    if (state->dtype_objects[dtype] != NULL) return (PyArray_Descr *)state->dtype_objects[dtype];
    PyArray_Descr *descr = NULL;
    if (numpy_types[dtype] >= 0) {
        descr = PyArray_DescrFromType(numpy_types[dtype]);
    } else {
        PyObject *ml_dtypes = PyImport_ImportModule("ml_dtypes");
        PyObject *scalar = ml_dtypes ? PyObject_GetAttrString(ml_dtypes, mq_dtype_name(dtype)) : NULL;
        if (scalar != NULL) PyArray_DescrConverter(scalar, &descr);
        Py_XDECREF(scalar);
        Py_XDECREF(ml_dtypes);
    }
    state->dtype_objects[dtype] = (PyObject *)descr;
    return descr;
}

/* Named types first: ml_dtypes registers its own type numbers, which differ from process to process. */
static int dtype_of(PyArray_Descr *descr, mq_dtype *out)
{
    int type = descr->type_num;
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) {
        if (numpy_types[i] < 0 || !PyArray_EquivTypenums(numpy_types[i], type)) continue;
        *out = (mq_dtype)i;
        return 0;
    }
    const char *name = descr->typeobj->tp_name;
    const char *dot = strrchr(name, '.');
    return mq_dtype_from_name(dot ? dot + 1 : name, out) == MQ_OK ? 0 : -1;
}

static int fill_view(PyArrayObject *array, const char *name, mq_tensor *out)
{
    PyArray_Descr *descr = PyArray_DESCR(array);
    mq_dtype dtype;
    if (dtype_of(descr, &dtype) < 0 || PyArray_ISBYTESWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: dtype %S is not supported", name, (PyObject *)descr);
        return -1;
    }
    if (PyArray_NDIM(array) > MQ_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: %d dimensions, at most %d are supported", name, PyArray_NDIM(array),
                     MQ_MAX_NDIM);
        return -1;
    }
    *out = (mq_tensor){.data = PyArray_DATA(array), .dtype = dtype, .ndim = PyArray_NDIM(array),
                       .readonly = !PyArray_ISWRITEABLE(array)};
    npy_intp size = (npy_intp)mq_dtype_size(dtype);
    for (int i = 0; i < out->ndim; i++) {
        if (PyArray_STRIDE(array, i) % size != 0) {
            PyErr_Format(PyExc_ValueError, "%s: strides must be whole elements", name);
            return -1;
        }
        out->shape[i] = PyArray_DIM(array, i);
        out->stride[i] = PyArray_STRIDE(array, i) / size;
    }
    return 0;
}

static int view_array(PyObject *array, const char *name, mq_tensor *out, PyObject **keep)
{
    if (array == NULL) return -1;
    if (fill_view((PyArrayObject *)array, name, out) < 0) {
        Py_DECREF(array);
        return -1;
    }
    *keep = array;
    return 0;
}

/* An array over memory that owner keeps alive (its base). Steals owner. */
static PyObject *array_over(mq_state *state, const mq_tensor *view, PyObject *owner)
{
    PyArray_Descr *descr = dtype_object(state, view->dtype);
    npy_intp dims[MQ_MAX_NDIM], strides[MQ_MAX_NDIM];
    npy_intp size = (npy_intp)mq_dtype_size(view->dtype);
    for (int i = 0; i < view->ndim; i++) {
        dims[i] = view->shape[i];
        /* Of an axis of at most one element the stride means nothing, and producers put anything there. */
        strides[i] = view->shape[i] > 1 ? view->stride[i] * size : size;
    }
    Py_XINCREF(descr);
    PyObject *array = descr == NULL ? NULL
                                    : PyArray_NewFromDescr(&PyArray_Type, descr, view->ndim, dims, strides, view->data,
                                                           view->readonly ? 0 : NPY_ARRAY_WRITEABLE, NULL);
    if (array == NULL) {
        Py_DECREF(owner);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) Py_CLEAR(array);
    return array;
}

/* obj as an array: itself, a view of a DLPack producer's memory, or what np.asarray makes of it. A new reference. */
static PyObject *array_of(mq_state *state, PyObject *obj, const char *name)
{
    if (PyArray_Check(obj) || !PyObject_HasAttrString(obj, "__dlpack__")) return PyArray_FROM_O(obj);
    mq_tensor view;
    PyObject *owner;
    return mq_dlpack_import(obj, name, &view, &owner) < 0 ? NULL : array_over(state, &view, owner);
}

int mq_view_object(mq_state *state, PyObject *obj, const char *name, mq_tensor *out, PyObject **keep)
{
    return view_array(array_of(state, obj, name), name, out, keep);
}

int mq_view_contiguous(mq_state *state, PyObject *obj, const char *name, mq_tensor *out, PyObject **keep)
{
    PyObject *given = array_of(state, obj, name);
    if (given == NULL) return -1;
    PyObject *array = PyArray_FROM_OF(given, NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED);
    Py_DECREF(given);
    return view_array(array, name, out, keep);
}

int mq_view_as(mq_state *state, PyObject *obj, const char *name, mq_dtype dtype, mq_tensor *out, PyObject **keep)
{
    PyArray_Descr *descr = dtype_object(state, dtype);
    if (descr == NULL) return -1;
    PyObject *given = array_of(state, obj, name);
    if (given == NULL) return -1;
    if (!PyArray_CanCastArrayTo((PyArrayObject *)given, descr, NPY_SAME_KIND_CASTING)) {
        PyErr_Format(PyExc_TypeError, "%s: cannot use dtype %S as %s", name,
                     (PyObject *)PyArray_DESCR((PyArrayObject *)given), mq_dtype_name(dtype));
        Py_DECREF(given);
        return -1;
    }
    Py_INCREF(descr);
    PyObject *array = PyArray_FromAny(given, descr, 0, 0,
                                      NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_FORCECAST, NULL);
    Py_DECREF(given);
    return view_array(array, name, out, keep);
}

PyObject *mq_new_array(mq_state *state, mq_dtype dtype, int ndim, const int64_t *shape, mq_tensor *view)
{
    PyArray_Descr *descr = dtype_object(state, dtype);
    if (descr == NULL) return NULL;
    npy_intp dims[MQ_MAX_NDIM];
    for (int i = 0; i < ndim; i++) dims[i] = (npy_intp)shape[i];
    Py_INCREF(descr);
    PyObject *array = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, NULL, NULL, 0, NULL);
    if (array != NULL && fill_view((PyArrayObject *)array, "result", view) < 0) Py_CLEAR(array);
    return array;
}

PyDoc_STRVAR(as_array_doc,
"as_array(obj, name='array')\n--\n\n"
"obj as a NumPy array over the same memory: an array as it is, a DLPack producer (a CPU torch tensor, bfloat16 and\n"
"float8 too) without a copy, and what np.asarray takes. name is used in errors.");

static PyObject *as_array(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"obj", "name", NULL};
    PyObject *obj, *keep;
    const char *name = "array";
    mq_tensor view;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s:as_array", names, &obj, &name)) return NULL;
    return mq_view_object(mq_state_of(module), obj, name, &view, &keep) == 0 ? keep : NULL;
}

static PyMethodDef methods[] = {
    {"as_array", (PyCFunction)(void (*)(void))as_array, METH_VARARGS | METH_KEYWORDS, as_array_doc},
    {NULL, NULL, 0, NULL},
};

static int ndarray_init(PyObject *module, mq_state *state)
{
    (void)module;
    (void)state;
    import_array1(-1);
    return 0;
}

const mq_py_part mq_py_ndarray = {.methods = methods, .init = ndarray_init};
