#include "model/score_parts.h"

#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"

enum { LANES = 8, COLUMNS = 256 };
static const double LARGEST = 1e10;

/* n numbers from index at on: made - was, rounded. */
static void differ(float *out, const mq_score_rows *rows, int64_t at, int64_t n)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(rows->dtype);
    const size_t offset = (size_t)at * mq_dtype_size(rows->dtype);
    float was[COLUMNS], rounded[COLUMNS];
    kernels->to_f32(out, (const char *)rows->made + offset, n);
    if (rows->was == NULL) return;
    kernels->to_f32(was, (const char *)rows->was + offset, n);
    for (int64_t i = 0; i < n; i++) out[i] -= was[i];
    kernels->from_f32(rounded, out, n);
    kernels->to_f32(out, rounded, n);
}

/* LANES sums next to each other: one after the other would wait for each addition. */
static double sum_row(const mq_score_rows *rows, int64_t row)
{
    double sums[LANES] = {0.0};
    float change[COLUMNS];
    for (int64_t first = 0; first < rows->width; first += COLUMNS) {
        const int64_t n = MQ_MIN((int64_t)COLUMNS, rows->width - first), at = row * rows->width + first;
        differ(change, rows, at, n);
        memset(change + n, 0, (size_t)(COLUMNS - n) * sizeof *change);
        for (int64_t i = 0; i < n; i++) change[i] *= rows->gradient[at + i];
        for (int64_t i = 0; i < n; i += LANES)
            for (int j = 0; j < LANES; j++) {
                double product = (double)change[i + j];
                product = product > LARGEST ? LARGEST : product < -LARGEST ? -LARGEST : product;
                sums[j] += product * product;
            }
    }
    for (int i = 1; i < LANES; i++) sums[0] += sums[i];
    return sums[0];
}

typedef struct sum_job {
    const mq_score_rows *rows;
    double *sums;
} sum_job;

static void sum_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const sum_job *job = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++) job->sums[i] = sum_row(job->rows, i);
}

double mq_score_sum(double *sums, const mq_score_rows *rows)
{
    sum_job job = {.rows = rows, .sums = sums};
    double total = 0.0;
    mq_parallel_for(rows->rows, mq_row_grain(rows->width), sum_rows, &job);
    for (int64_t i = 0; i < rows->rows; i++) total += sums[i];
    return total;
}

typedef struct quantize_job {
    const mq_quantizer *quantizer;
    char *out;
    const char *x;
    const mq_row_sizes *sizes;
} quantize_job;

static void quantize_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const quantize_job *job = argument;
    const int64_t width = job->sizes->width;
    const size_t at = (size_t)(begin * width) * mq_dtype_size(job->sizes->dtype);
    mq_quant_rows rows = {.x = job->x + at, .y = job->out + at, .dtype = job->sizes->dtype, .rows = end - begin,
                          .cols = width, .ldx = width, .ldy = width, .steps = MQ_QUANT_ALL};
    (void)worker;
    mq_quantizer_apply(job->quantizer, &rows);
}

const void *mq_score_quantized(const mq_quantizer *quantizer, void *out, const void *x, const mq_row_sizes *sizes)
{
    quantize_job job = {.quantizer = quantizer, .out = out, .x = x, .sizes = sizes};
    if (quantizer == NULL || !mq_quantizer_acts(quantizer)) return x;
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), quantize_rows, &job);
    return out;
}
