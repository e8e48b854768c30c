/* CudaLibrary: the CUDA library, opened (csrc/backend/backend.h). */
#ifndef MQ_PY_TYPE_CUDA_H
#define MQ_PY_TYPE_CUDA_H

#include "py/state.h"

#include "backend/backend.h"

/* The operations of a CudaLibrary, which must outlive their use. Returns 0, or -1 with an exception set. */
int mq_backend_of(mq_state *state, PyObject *object, const mq_backend **out);

#endif
