/* Results that go into an array the caller gave (out=), or into a new one. */
#ifndef MQ_PY_OUTPUTS_H
#define MQ_PY_OUTPUTS_H

#include "py/state.h"

/* A new reference to out, if it is a writable, aligned, C-contiguous array of shape's dtype and shape; a new array like
 * shape if out is NULL or None. *view describes it. NULL with an exception that names it on failure. */
PyObject *mq_output_array(mq_state *state, PyObject *out, const char *name, const mq_tensor *shape, mq_tensor *view);

#endif
