/* The operations of a GPU: one struct of functions, filled from the CUDA library (cuda/modelq_cuda.h), a shared object
 * that is opened when a GPU is first asked for and never linked. */
#ifndef MQ_BACKEND_H
#define MQ_BACKEND_H

#include "modelq_cuda.h"

typedef struct mq_backend {
    void *library;              /* of dlopen; NULL = closed */
#define MQ_CUDA_CALL(returned, name, parameters) returned (*name) parameters;
#include "backend/cuda.def"
} mq_backend;

/* path: of the library. MQ_ERR_STATE, in words for users: it does not open, it lacks a call, or it was made for another
 * version of the interface. */
int mq_backend_open(mq_backend *backend, const char *path, mq_error *err);
void mq_backend_close(mq_backend *backend);

#endif
