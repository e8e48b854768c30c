#include "model/score.h"

#include <stdio.h>
#include <string.h>

#include "core/alloc.h"
#include "model/ops.h"
#include "model/runtime.h"
#include "model/score_parts.h"

static void forget_rows(mq_output_score *score)
{
    mq_free(score->quantized);
    mq_free(score->output);
    mq_free(score->sums);
    score->quantized = score->output = NULL;
    score->sums = NULL;
    score->capacity = 0;
    score->input_nbytes = score->output_nbytes = 0;
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

int mq_output_score_check(const mq_output_score *score, const mq_observed *rows, mq_error *err)
{
    char text[96];
    int rc = MQ_OK;
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        const mq_tensor *weight = &score->candidates[i].weight;
        const mq_quantizer *input = score->candidates[i].input;
        if (weight->shape[1] != rows->columns || weight->shape[0] != rows->outputs)
            return mq_fail(err, MQ_ERR_VALUE, "candidate %d: a weight of %s at a linear of [%lld, %lld]", (int)i,
                           mq_tensor_describe(weight, text, sizeof text), (long long)rows->outputs,
                           (long long)rows->columns);
        if (input != NULL) rc = mq_quantizer_ready(input, -1, rows->columns, "a candidate's input quantizer", err);
    }
    return rc;
}

/* The rows of every candidate's weight that make the observed columns. */
static int pack(mq_output_score *score, const mq_observed *rows, mq_error *err)
{
    const mq_gemm_kind kind = rows->dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    if (score->column == rows->column) return MQ_OK;
    forget_weights(score);
    int rc = mq_output_score_check(score, rows, err);
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
    const size_t inputs = (size_t)(rows->rows * rows->columns) * mq_dtype_size(rows->dtype);
    const size_t outputs = (size_t)(rows->rows * rows->width) * mq_dtype_size(rows->output_dtype);
    if (score->capacity >= rows->rows && score->input_nbytes >= inputs && score->output_nbytes >= outputs) return MQ_OK;
    forget_rows(score);
    score->quantized = mq_alloc(inputs);
    score->output = mq_alloc(outputs);
    score->sums = mq_alloc_array((size_t)rows->rows, sizeof *score->sums);
    if (score->quantized == NULL || score->output == NULL || score->sums == NULL) {
        forget_rows(score);
        return mq_fail_memory(err, "outputs of a candidate", inputs + outputs);
    }
    score->capacity = rows->rows;
    score->input_nbytes = inputs;
    score->output_nbytes = outputs;
    return MQ_OK;
}

/* output (rows, width) = what the candidate makes of the input. */
static void make(const mq_output_score *score, const mq_score_candidate *candidate, const mq_observed *rows)
{
    const mq_row_sizes sizes = {.rows = rows->rows, .width = rows->columns, .dtype = rows->dtype};
    mq_gemm_args args = {
        .m = rows->rows, .a = mq_score_quantized(candidate->input, score->quantized, rows->input, &sizes),
        .a_dtype = rows->dtype, .lda = rows->columns, .b = &candidate->packed, .bias = score->packed_bias,
        .c = score->output, .c_dtype = rows->output_dtype, .ldc = rows->width, .alpha = 1.0f,
    };
    mq_gemm_run(&args);
}

static int see(mq_observer *observer, const mq_observed *rows, mq_error *err)
{
    mq_output_score *score = (mq_output_score *)(void *)observer;
    if (rows->input == NULL || rows->tokens != NULL)
        return mq_fail(err, MQ_ERR_STATE, "an OutputScore sits at a linear, not at a layer's experts");
    int rc = pack(score, rows, err);
    if (rc == MQ_OK) rc = reserve(score, rows, err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        const mq_score_rows sum = {.gradient = rows->gradient, .made = score->output, .was = rows->output,
                                   .dtype = rows->output_dtype, .rows = rows->rows, .width = rows->width};
        make(score, &score->candidates[i], rows);
        score->candidates[i].score += mq_score_sum(score->sums, &sum);
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

mq_output_score *mq_output_score_of(mq_observer *observer)
{
    return observer != NULL && observer->see == see ? (mq_output_score *)(void *)observer : NULL;
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
