/* Scales of NVFP4 blocks by trying every FP8 number (the reference's fp8_scale_sweep), for the least squared error of
 * each block, or the least d H d^T with the Gram matrix H of the block's inputs (its local Hessian). */
#ifndef MQ_SWEEP_H
#define MQ_SWEEP_H

#include "core/tensor.h"

enum { MQ_SWEEP_BLOCK = 16 };

typedef struct mq_sweep_job {
    const char *name;
    const mq_tensor *weight;     /* [rows, columns], columns a multiple of MQ_SWEEP_BLOCK */
    float global_amax, divisor;  /* the tensor's scale is their quotient */
    const float *hessian;        /* [columns / 16][16][16], or NULL */
} mq_sweep_job;

/* amax [rows, columns / 16]: what makes a block's scale the chosen number, global_amax * number / 448. */
int mq_sweep_block_scales(const mq_sweep_job *job, float *amax, mq_error *err);

#endif
