/* A quantizer on a device: copies of its numbers there, and the work of mq_quantizer_apply (quant/quantizer.h) by the
 * CUDA library's kernels, with the same bits. */
#ifndef MQ_DEVICE_QUANTIZER_H
#define MQ_DEVICE_QUANTIZER_H

#include "backend/backend.h"
#include "quant/quantizer.h"

/* Numbers of the host in device memory, copied again when they have changed. */
typedef struct mq_device_values {
    float *host, *device;
    int64_t count;
} mq_device_values;

typedef struct mq_device_quantizer {
    const mq_backend *backend;      /* not owned; NULL = never used */
    int device;
    mq_device_values amax, block_amax, limits, pre_scale, bias;
    void *workspace;
    size_t workspace_nbytes;
    void *event, *stream;           /* behind what was written last, values or the workspace; its stream */
    int wrote;                      /* whether the call at work did */
} mq_device_quantizer;

/* Rows of one matrix, as mq_quant_rows. x and y are of the device; y may be x. */
typedef struct mq_device_rows {
    mq_cuda_matrix x, y;
    mq_quant_steps steps;
    int find;                       /* without an amax, that of x is taken */
} mq_device_rows;

/* On the thread's current device, which is `device`. Nothing waits, but for numbers that changed since the last call,
 * and for a workspace that has to grow. mq_quantizer_ready must have said MQ_OK. */
int mq_device_quantizer_apply(mq_device_quantizer *self, const mq_backend *backend, int device,
                              const mq_quantizer *quantizer, const mq_device_rows *rows, void *stream, mq_error *err);

/* *out = its amax on the device, one number: of the tensor. It has one. */
int mq_device_quantizer_amax(mq_device_quantizer *self, const mq_backend *backend, int device,
                             const mq_quantizer *quantizer, const float **out, void *stream, mq_error *err);

/* out = gradient, where what was given, x, is no larger than its block's amax (mq_straight_through). */
typedef struct mq_device_gradient {
    mq_cuda_matrix x, gradient, out;
} mq_device_gradient;

/* MQ_ERR_VALUE: it rotates, which only the CPU's does. */
int mq_device_quantizer_gradient(mq_device_quantizer *self, const mq_backend *backend, int device,
                                 const mq_quantizer *quantizer, const mq_device_gradient *rows, void *stream,
                                 mq_error *err);

void mq_device_quantizer_free(mq_device_quantizer *self);

#endif
