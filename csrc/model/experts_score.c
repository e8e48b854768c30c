#include "model/experts_score.h"

#include <stdio.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/score_parts.h"

static const char *const names[MQ_SCORE_LINEARS] = {"gate", "up", "down"};

static void drop_packed(mq_experts_score *score)
{
    for (size_t i = 0; i < score->count; i++)
        for (int j = 0; j < MQ_SCORE_LINEARS; j++) mq_linear_free(&score->candidates[i].linears[j]);
    score->is_packed = 0;
}

static void drop_changes(mq_experts_score *score)
{
    for (size_t i = 0; i < score->count; i++) {
        mq_free(score->candidates[i].change);
        score->candidates[i].change = NULL;
    }
    score->rows = score->width = 0;
    score->last = -1;
}

int mq_experts_score_load(mq_experts_score *score, int64_t expert, mq_gemm_kind kind, const mq_expert_weights *weights,
                          mq_error *err)
{
    int rc = MQ_OK;
    drop_packed(score);
    score->expert = -1;
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        const mq_tensor *linears = weights[i].linears;
        const int64_t inner = linears[0].shape[0], width = linears[0].shape[1];
        mq_experts_candidate *candidate = &score->candidates[i];
        if (linears[1].shape[0] != inner || linears[1].shape[1] != width || linears[2].shape[0] != width ||
            linears[2].shape[1] != inner)
            rc = mq_fail(err, MQ_ERR_VALUE, "candidate %d of expert %d: gate, up and down do not fit each other",
                         (int)i, (int)expert);
        memcpy(candidate->weights, linears, sizeof candidate->weights);
        candidate->input = weights[i].input;
        candidate->product = weights[i].product;
        if (rc == MQ_OK && weights[i].input != NULL)
            rc = mq_quantizer_ready(weights[i].input, -1, width, "a candidate's input quantizer", err);
        if (rc == MQ_OK && weights[i].product != NULL)
            rc = mq_quantizer_ready(weights[i].product, -1, inner, "a candidate's quantizer of down's input", err);
    }
    if (rc != MQ_OK) return rc;
    score->kind = kind;
    score->expert = expert;
    return rc;
}

int mq_experts_score_check(const mq_experts_score *score, const mq_observed *rows, mq_error *err)
{
    if (score->expert != rows->expert)
        return mq_fail(err, MQ_ERR_STATE, "an ExpertsScore sees expert %lld, but candidates of expert %lld were loaded",
                       (long long)rows->expert, (long long)score->expert);
    for (size_t i = 0; i < score->count; i++) {
        const int64_t columns = score->candidates[i].weights[0].shape[1];
        if (columns == rows->columns) continue;
        return mq_fail(err, MQ_ERR_VALUE, "candidate %d: a weight of %lld columns for inputs of %lld", (int)i,
                       (long long)columns, (long long)rows->columns);
    }
    return MQ_OK;
}

/* ---- on the host ---- */

static int pack(mq_experts_score *score, mq_error *err)
{
    int rc = MQ_OK;
    if (score->is_packed) return rc;
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++)
        for (int j = 0; rc == MQ_OK && j < MQ_SCORE_LINEARS; j++) {
            mq_experts_candidate *candidate = &score->candidates[i];
            char name[64];
            snprintf(name, sizeof name, "%s of candidate %d of expert %d", names[j], (int)i, (int)score->expert);
            rc = mq_linear_load(&candidate->linears[j], &candidate->weights[j], score->kind, name, err);
        }
    score->is_packed = rc == MQ_OK;
    if (rc != MQ_OK) drop_packed(score);
    return rc;
}

/* Changes of all rows, at first none. */
static int begin(mq_experts_score *score, const mq_observed *rows, mq_error *err)
{
    const size_t nbytes = (size_t)(rows->total * rows->width) * sizeof(float);
    /* Rows that come again are those of another pass: the one before did not get to its end. */
    const int goes_on = rows->input == NULL || rows->first > score->last;
    if (goes_on && score->rows == rows->total && score->width == rows->width) {
        score->last = rows->first;
        return MQ_OK;
    }
    drop_changes(score);
    for (size_t i = 0; i < score->count; i++) {
        score->candidates[i].change = mq_alloc_zeroed(nbytes);
        if (score->candidates[i].change != NULL) continue;
        drop_changes(score);
        return mq_fail_memory(err, "changes of the experts' outputs", nbytes * score->count);
    }
    score->rows = rows->total;
    score->width = rows->width;
    score->last = rows->first;
    return MQ_OK;
}

static int reserve(mq_experts_score *score, size_t nbytes, mq_error *err)
{
    if (score->nbytes >= nbytes) return MQ_OK;
    mq_free(score->memory);
    score->nbytes = 0;
    score->memory = mq_alloc(nbytes);
    if (score->memory == NULL) return mq_fail_memory(err, "outputs of a candidate", nbytes);
    score->nbytes = nbytes;
    return MQ_OK;
}

typedef struct change_job {
    float *change;
    const char *made, *was;
    const mq_observed *rows;
} change_job;

/* change[token] += share * (made - was). */
static void change_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    enum { COLUMNS = 256 };
    const change_job *job = argument;
    const mq_typed_row_ops *kernels = mq_row_ops_of(job->rows->dtype);
    const int64_t width = job->rows->width;
    float made[COLUMNS], was[COLUMNS];
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        for (int64_t first = 0; first < width; first += COLUMNS) {
            const int64_t n = MQ_MIN((int64_t)COLUMNS, width - first);
            const size_t at = (size_t)(i * width + first) * mq_dtype_size(job->rows->dtype);
            kernels->to_f32(made, job->made + at, n);
            kernels->to_f32(was, job->was + at, n);
            for (int64_t j = 0; j < n; j++) made[j] -= was[j];
            mq_row_ops_table()->add_scaled(job->change + job->rows->tokens[i] * width + first, made, n,
                                           job->rows->shares[i]);
        }
}

static int see_rows(mq_experts_score *score, const mq_observed *rows, mq_error *err)
{
    int rc = mq_experts_score_check(score, rows, err);
    if (rc == MQ_OK) rc = pack(score, err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        mq_experts_candidate *candidate = &score->candidates[i];
        const int64_t inner = candidate->linears[0].packed.n;
        const size_t size = mq_dtype_size(rows->dtype), hidden = (size_t)(rows->rows * rows->columns) * size;
        const size_t product = (size_t)(rows->rows * inner) * size;
        const mq_row_sizes outer = {.rows = rows->rows, .width = rows->columns, .dtype = rows->dtype};
        const mq_row_sizes narrow = {.rows = rows->rows, .width = inner, .dtype = rows->dtype};
        rc = reserve(score, 2 * hidden + 3 * product, err);
        if (rc != MQ_OK) return rc;
        char *made = score->memory, *input = made + hidden, *gate = input + hidden, *up = gate + product;
        const void *in = mq_score_quantized(candidate->input, input, rows->input, &outer);
        mq_linear_weight linears[MQ_SCORE_LINEARS];
        for (int j = 0; j < MQ_SCORE_LINEARS; j++) {
            linears[j] = candidate->linears[j];
            linears[j].bias = rows->biases[j];
        }
        mq_linear_forward(gate, in, &linears[0], 0, &outer);
        mq_linear_forward(up, in, &linears[1], 0, &outer);
        mq_gate_forward(gate, up, rows->gate, &narrow);
        in = mq_score_quantized(candidate->product, up + product, gate, &narrow);
        mq_linear_forward(made, in, &linears[2], 0, &narrow);
        change_job job = {.change = candidate->change, .made = made, .was = rows->output, .rows = rows};
        mq_parallel_for(rows->rows, mq_row_grain(rows->width), change_rows, &job);
    }
    return rc;
}

static int finish(mq_experts_score *score, const mq_observed *rows, mq_error *err)
{
    int rc = reserve(score, (size_t)rows->rows * sizeof(double), err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        mq_experts_candidate *candidate = &score->candidates[i];
        const mq_score_rows sum = {.gradient = rows->gradient, .made = candidate->change, .dtype = MQ_F32,
                                   .rows = rows->rows, .width = rows->width};
        candidate->score += rows->factor * rows->factor * mq_score_sum((double *)(void *)score->memory, &sum);
    }
    drop_changes(score);
    return rc;
}

static int see(mq_observer *observer, const mq_observed *rows, mq_error *err)
{
    mq_experts_score *score = (mq_experts_score *)(void *)observer;
    if (rows->input != NULL && rows->tokens == NULL)
        return mq_fail(err, MQ_ERR_STATE, "an ExpertsScore sits at a layer's experts, not at a linear");
    int rc = begin(score, rows, err);
    if (rc != MQ_OK) return rc;
    return rows->input != NULL ? see_rows(score, rows, err) : finish(score, rows, err);
}

int mq_experts_score_init(mq_experts_score *score, size_t count, mq_error *err)
{
    *score = (mq_experts_score){.observer.see = see, .expert = -1, .last = -1};
    score->candidates = mq_alloc_zeroed(count * sizeof *score->candidates);
    if (score->candidates == NULL) return mq_fail_memory(err, "candidates", count * sizeof *score->candidates);
    score->count = count;
    return MQ_OK;
}

mq_experts_score *mq_experts_score_of(mq_observer *observer)
{
    return observer != NULL && observer->see == see ? (mq_experts_score *)(void *)observer : NULL;
}

void mq_experts_score_free(mq_experts_score *score)
{
    drop_packed(score);
    drop_changes(score);
    mq_free(score->candidates);
    mq_free(score->memory);
    *score = (mq_experts_score){.expert = -1};
}
