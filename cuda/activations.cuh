/* Inputs of a product in 8 bits: the codes of mq_cuda_scaled, and what they are to be multiplied by. */
#ifndef MODELQ_ACTIVATIONS_CUH
#define MODELQ_ACTIVATIONS_CUH

#include "convert.cuh"

/* codes [padded, x.cols] without gaps, FP8 E4M3 or INT8; rows from x.rows on are zero. scales: [blocks of columns,
 * padded], the order in which cuBLASLt reads those of blocks ("128-element 1D and 128x128 2D Block Scaling": M-major);
 * one per row is the case of one block. */
typedef struct mq_activations_job {
    bool is_int;
    mq_cuda_matrix x;
    int64_t block_cols;        /* 0: the whole row */
    const float *amax;         /* [x.rows, blocks], or [1] */
    bool one_amax;
    int64_t padded;
    uint8_t *codes;
    float *scales;
} mq_activations_job;

int mq_activations_quantize(const mq_activations_job *job, void *stream, mq_error *err);

#endif
