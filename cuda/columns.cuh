/* Sums over the columns of a matrix, as columns.cu adds them: for biases, for statistics, and for norms' weights. */
#ifndef MODELQ_COLUMNS_CUH
#define MODELQ_COLUMNS_CUH

#include "rows.cuh"

typedef struct mq_columns {
    mq_view x;
    mq_dtype dtype;
    int64_t rows, heads, cols;  /* a row of memory holds `heads` rows of cols */
    mq_cuda_columns what;
    const uint8_t *mask;
    const float *d_out, *scales; /* given: the sum is of d_out [rows, cols] * (x * scales [rows]) */
    float *sums_f32;
    double *sums_f64;
    float *lows, *highs;
    void *workspace;
} mq_columns;

size_t mq_columns_nbytes(int64_t rows, int64_t cols, bool has_bounds);
int mq_cuda_columns_add(const mq_columns *of, void *stream, mq_error *err);

#endif
