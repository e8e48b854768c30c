/* Scales in the orders in which cuBLASLt reads them. */
#ifndef MODELQ_LT_SCALES_CUH
#define MODELQ_LT_SCALES_CUH

#include "common.cuh"

/* Bytes of tiled scales: whole tiles of 128 x 4. */
size_t mq_lt_tiled_nbytes(int64_t rows, int64_t cols);
/* in [rows, cols] one byte per block, as exports have them; out: tiles of 128 rows and 4 columns, row after row, zero
 * beyond the ends, aligned to 4 bytes (cuBLAS documentation, "1D Block Scaling Factors Layout"). */
int mq_lt_tile(const uint8_t *in, int64_t rows, int64_t cols, uint8_t *out, void *stream, mq_error *err);

/* out [rows, ld] = in [rows, cols], zero beyond cols; step 0: in is one number. */
typedef struct mq_lt_spread_job {
    const float *in;
    int64_t rows, cols, ld, step;
    float *out;
} mq_lt_spread_job;

int mq_lt_spread(const mq_lt_spread_job *job, void *stream, mq_error *err);

/* out [2] = a * b and beta: what a product is multiplied by, on the device. */
int mq_lt_factors(const float *a, const float *b, float beta, float *out, void *stream, mq_error *err);

#endif
