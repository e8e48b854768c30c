/* NumPy arrays in and out. ndarray.c is the only file that includes NumPy's headers. */
#ifndef MQ_PY_NDARRAY_H
#define MQ_PY_NDARRAY_H

#include "py/state.h"

/* A view of obj (NumPy array, DLPack producer, or anything that np.asarray takes) as *out. *keep receives a new
 * reference that must live as long as the view. name is used in errors. Returns 0, or -1 with an exception set. */
int mq_view_object(mq_state *state, PyObject *obj, const char *name, mq_tensor *out, PyObject **keep);

/* The same, C-contiguous (copied if it is not). */
int mq_view_contiguous(mq_state *state, PyObject *obj, const char *name, mq_tensor *out, PyObject **keep);

/* The same, C-contiguous and converted to dtype by NumPy's safe ("same_kind") casting. */
int mq_view_as(mq_state *state, PyObject *obj, const char *name, mq_dtype dtype, mq_tensor *out, PyObject **keep);

/* A new array, uninitialised, that owns its memory; *view describes it. NULL with an exception set on failure. */
PyObject *mq_new_array(mq_state *state, mq_dtype dtype, int ndim, const int64_t *shape, mq_tensor *view);

#endif
