#include "py/outputs.h"

#include "py/ndarray.h"

static int fits(const mq_tensor *got, const mq_tensor *wanted)
{
    if (got->dtype != wanted->dtype || got->ndim != wanted->ndim || got->readonly) return 0;
    for (int i = 0; i < got->ndim; i++)
        if (got->shape[i] != wanted->shape[i]) return 0;
    return mq_tensor_is_contiguous(got) && (uintptr_t)got->data % mq_dtype_size(got->dtype) == 0;
}

PyObject *mq_output_array(mq_state *state, PyObject *out, const char *name, const mq_tensor *shape, mq_tensor *view)
{
    const mq_tensor wanted = *shape;
    PyObject *keep = NULL;
    char text[96];
    if (out == NULL || out == Py_None) return mq_new_array(state, wanted.dtype, wanted.ndim, wanted.shape, view);
    if (mq_view_object(state, out, name, view, &keep) < 0) return NULL;
    if (keep == out && fits(view, &wanted)) return keep;
    Py_DECREF(keep);
    PyErr_Format(PyExc_ValueError, "out: %s must be a writable, contiguous array %s", name,
                 mq_tensor_describe(&wanted, text, sizeof text));
    return NULL;
}
