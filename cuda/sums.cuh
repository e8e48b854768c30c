/* What our own kernel does with the sums of a product that cuBLASLt could not finish. */
#ifndef MODELQ_SUMS_CUH
#define MODELQ_SUMS_CUH

#include "convert.cuh"

/* out = sums * (row_scale * col_scale) + bias + beta * out, in float32. */
typedef struct mq_sums_job {
    const void *sums;          /* [out.rows, out.cols] float32 or int32; NULL: zeros */
    bool is_int;
    int64_t ld;                /* of sums */
    const float *row_scale, *col_scale;     /* one per row, per column, or one; NULL: 1 */
    bool row_each, col_each;
    const void *bias;          /* [out.cols] of out's dtype, or NULL */
    float beta;
    mq_cuda_matrix out;
} mq_sums_job;

int mq_sums_finish(const mq_sums_job *job, void *stream, mq_error *err);

#endif
