#include "model/score.h"

#include <stdio.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"
#include "model/runtime.h"

enum { LANES = 8 };
static const double LARGEST = 1e10;     /* of a product, as in Model Optimizer */

static void forget_rows(mq_output_score *score)
{
    mq_free(score->quantized);
    mq_free(score->output);
    mq_free(score->sums);
    score->quantized = score->output = NULL;
    score->sums = NULL;
    score->capacity = 0;
}

static void forget_weights(mq_output_score *score)
{
    for (size_t i = 0; i < score->count; i++) {
        mq_free(score->candidates[i].packed.data);
        score->candidates[i].packed.data = NULL;
    }
    mq_free(score->packed_bias);
    score->packed_bias = NULL;
    score->column = -1;
}

static int check_shapes(const mq_output_score *score, const mq_observed *rows, mq_error *err)
{
    char text[96];
    for (size_t i = 0; i < score->count; i++) {
        const mq_tensor *weight = &score->candidates[i].weight;
        if (weight->shape[1] == rows->columns && rows->column + rows->width <= weight->shape[0]) continue;
        return mq_fail(err, MQ_ERR_VALUE, "candidate %d: a weight of %s at a linear of [%lld, %lld]", (int)i,
                       mq_tensor_describe(weight, text, sizeof text), (long long)(rows->column + rows->width),
                       (long long)rows->columns);
    }
    return MQ_OK;
}

/* The rows of every candidate's weight that make the observed columns. */
static int pack(mq_output_score *score, const mq_observed *rows, mq_error *err)
{
    const mq_gemm_kind kind = rows->dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    if (score->column == rows->column) return MQ_OK;
    forget_weights(score);
    int rc = check_shapes(score, rows, err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        mq_score_candidate *candidate = &score->candidates[i];
        mq_linear_weight weight = {.bias = NULL};
        mq_tensor part = candidate->weight;
        char name[48];
        part.shape[0] = rows->width;
        part.data = (char *)part.data + rows->column * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
        snprintf(name, sizeof name, "the weight of candidate %d", (int)i);
        rc = mq_linear_load(&weight, &part, kind, name, err);
        candidate->packed = weight.packed;
        if (rc == MQ_OK && candidate->input != NULL)
            rc = mq_quantizer_ready(candidate->input, -1, rows->columns, "a candidate's input quantizer", err);
    }
    if (rc == MQ_OK && score->bias.data != NULL) {
        score->packed_bias = mq_read_vector(&score->bias, rows->dtype, "a candidate's bias", err);
        if (score->packed_bias == NULL) rc = err->code;
    }
    if (rc != MQ_OK) forget_weights(score);
    else score->column = rows->column;
    return rc;
}

static int reserve(mq_output_score *score, const mq_observed *rows, mq_error *err)
{
    const size_t size = mq_dtype_size(rows->dtype), count = (size_t)rows->rows;
    if (score->capacity >= rows->rows) return MQ_OK;
    forget_rows(score);
    score->quantized = mq_alloc_array(count, (size_t)rows->columns * size);
    score->output = mq_alloc_array(count, (size_t)rows->width * size);
    score->sums = mq_alloc_array(count, sizeof *score->sums);
    if (score->quantized == NULL || score->output == NULL || score->sums == NULL) {
        forget_rows(score);
        return mq_fail_memory(err, "outputs of a candidate", count * (size_t)(rows->columns + rows->width) * size);
    }
    score->capacity = rows->rows;
    return MQ_OK;
}

typedef struct score_job {
    const mq_output_score *score;
    const mq_score_candidate *candidate;
    const mq_observed *rows;
} score_job;

static float value_of(const void *x, mq_dtype dtype, int64_t i)
{
    uint32_t bits;
    float value;
    if (dtype == MQ_F32) return ((const float *)x)[i];
    bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float rounded(float x, mq_dtype dtype)
{
    uint16_t half;
    if (dtype == MQ_F32) return x;
    mq_row_ops_of(MQ_BF16)->from_f32(&half, &x, 1);
    return value_of(&half, MQ_BF16, 0);
}

/* The sum over one row; LANES sums next to each other, as one after the other would wait for each addition. */
static double sum_row(const score_job *job, int64_t row)
{
    const mq_observed *rows = job->rows;
    const int64_t at = row * rows->width;
    double sums[LANES] = {0.0};
    for (int64_t j = 0; j < rows->width; j++) {
        float made = value_of(job->score->output, rows->dtype, at + j), was = value_of(rows->output, rows->dtype, at + j);
        double product = (double)(rows->gradient[at + j] * rounded(made - was, rows->dtype));
        product = MQ_MIN(MQ_MAX(product, -LARGEST), LARGEST);
        sums[j % LANES] += product * product;
    }
    for (int i = 1; i < LANES; i++) sums[0] += sums[i];
    return sums[0];
}

static void quantize_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const score_job *job = argument;
    const int64_t columns = job->rows->columns;
    const size_t at = (size_t)(begin * columns) * mq_dtype_size(job->rows->dtype);
    mq_quant_rows rows = {
        .x = (const char *)job->rows->input + at, .y = (char *)job->score->quantized + at, .dtype = job->rows->dtype,
        .rows = end - begin, .cols = columns, .ldx = columns, .ldy = columns, .steps = MQ_QUANT_ALL,
    };
    (void)worker;
    mq_quantizer_apply(job->candidate->input, &rows);
}

static void sum_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const score_job *job = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++) job->score->sums[i] = sum_row(job, i);
}

static int see(mq_observer *observer, const mq_observed *rows, mq_error *err)
{
    mq_output_score *score = (mq_output_score *)(void *)observer;
    if (rows->input == NULL || rows->tokens != NULL)
        return mq_fail(err, MQ_ERR_STATE, "an OutputScore sits at a linear, not at a layer's experts");
    int rc = pack(score, rows, err);
    if (rc == MQ_OK) rc = reserve(score, rows, err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        mq_score_candidate *candidate = &score->candidates[i];
        score_job job = {.score = score, .candidate = candidate, .rows = rows};
        const int quantized = candidate->input != NULL && mq_quantizer_acts(candidate->input);
        const mq_linear_weight weight = {.packed = candidate->packed, .bias = score->packed_bias};
        const mq_row_sizes sizes = {.rows = rows->rows, .width = rows->columns, .dtype = rows->dtype};
        if (quantized) mq_parallel_for(rows->rows, mq_row_grain(rows->columns), quantize_rows, &job);
        mq_linear_forward(score->output, quantized ? score->quantized : rows->input, &weight, 0, &sizes);
        mq_parallel_for(rows->rows, mq_row_grain(rows->width), sum_rows, &job);
        for (int64_t j = 0; j < rows->rows; j++) candidate->score += score->sums[j];
    }
    return rc;
}

int mq_output_score_init(mq_output_score *score, const mq_score_candidate *candidates, size_t count,
                         const mq_tensor *bias, mq_error *err)
{
    *score = (mq_output_score){.observer.see = see, .column = -1};
    score->candidates = mq_alloc_array(count, sizeof *candidates);
    if (score->candidates == NULL) return mq_fail_memory(err, "candidates", count * sizeof *candidates);
    memcpy(score->candidates, candidates, count * sizeof *candidates);
    score->count = count;
    if (bias != NULL) score->bias = *bias;
    return MQ_OK;
}

void mq_output_score_free(mq_output_score *score)
{
    forget_weights(score);
    forget_rows(score);
    mq_free(score->candidates);
    *score = (mq_output_score){.column = -1};
}

static int keep(mq_observer *observer, const mq_observed *rows, mq_error *err)
{
    mq_kept_gradient *kept = (mq_kept_gradient *)(void *)observer;
    if (rows->tokens != NULL) return MQ_OK;
    if (rows->first + rows->rows > kept->rows || rows->column + rows->width > kept->width)
        return mq_fail(err, MQ_ERR_VALUE, "an OutputGradient of [%lld, %lld] sees row %lld, column %lld",
                       (long long)kept->rows, (long long)kept->width, (long long)(rows->first + rows->rows),
                       (long long)(rows->column + rows->width));
    for (int64_t i = 0; i < rows->rows; i++)
        memcpy(kept->values + (rows->first + i) * kept->width + rows->column, rows->gradient + i * rows->width,
               (size_t)rows->width * sizeof(float));
    return MQ_OK;
}

void mq_kept_gradient_init(mq_kept_gradient *kept, float *values, int64_t rows, int64_t width)
{
    *kept = (mq_kept_gradient){.observer.see = keep, .values = values, .rows = rows, .width = width};
}
