/* mq_experts_score on a device. What each candidate changes of the sum of all experts stays there from a layer's first
 * expert to its last, for all rows of the run, if there is room beside them for what else the layer needs; else the
 * host is shown a copy of what passes. */
#include "backend/device_backward.h"
#include "core/alloc.h"

/* Rows of an expert that there must be room for beside the changes. */
enum { LEAST_ROWS = 32 };

/* ---- changes of all rows ---- */

static size_t change_nbytes(const mq_device_changes *changes)
{
    return MQ_ROUND_UP((size_t)(changes->rows * changes->width) * sizeof(float), (size_t)MQ_ALIGN_DEVICE);
}

static float *change_of(const mq_device_changes *changes, size_t index)
{
    return (float *)(void *)(changes->memory + index * change_nbytes(changes));
}

/* (candidates, rows), behind all changes. */
static double *sums_of(const mq_device_changes *changes)
{
    return (double *)(void *)(changes->memory + changes->score->count * change_nbytes(changes));
}

void mq_device_drop_changes(mq_device *device)
{
    mq_device_give(device, (void **)&device->changes.memory, device->changes.nbytes);
    device->changes = (mq_device_changes){0};
}

/* Whether the rows of a layer, and of an expert, have room beside so many bytes. */
static int is_room(const mq_device_back_room *room, size_t nbytes)
{
    const mq_run *run = room->back->run;
    const mq_device_back_room layer = {.device = room->device, .back = room->back, .layer = room->layer};
    mq_device_back_room expert = layer;
    expert.experts_only = 1;
    const size_t least = MQ_MAX(mq_device_back_nbytes(&layer, run->longest, run->longest),
                                mq_device_back_nbytes(&expert, MQ_MIN(run->rows, (int64_t)LEAST_ROWS), 1));
    return nbytes + least <= mq_device_available(room->device, &room->device->work);
}

int mq_device_scores_experts(const mq_device_back_room *room)
{
    mq_device *device = room->device;
    mq_device_changes *changes = &device->changes;
    const mq_run *run = room->back->run;
    const mq_experts_score *score = mq_experts_score_of(room->layer->experts_observer);
    mq_error err;
    if (score == NULL) return 0;
    if (changes->score == score) return changes->memory != NULL;
    mq_device_drop_changes(device);
    *changes = (mq_device_changes){.score = score, .rows = run->rows, .width = run->runtime->config.hidden_size};
    changes->nbytes = score->count * (change_nbytes(changes) + (size_t)run->rows * sizeof(double));
    if (!is_room(room, changes->nbytes)) return 0;
    mq_arena_drop(device, &device->work);       /* rows before may have what there is */
    if (mq_device_take(device, (void **)&changes->memory, changes->nbytes, "changes of experts", &err) != MQ_OK)
        return 0;
    if (device->backend->fill(changes->memory, 0, changes->nbytes, device->compute, &err) == MQ_OK) return 1;
    mq_device_give(device, (void **)&changes->memory, changes->nbytes);
    return 0;
}

int mq_device_score_changes(const mq_device_back *it)
{
    const mq_device_changes *changes = &it->device->changes;
    const mq_device_chunk *chunk = it->chunk;
    int rc = MQ_OK;
    for (size_t i = 0; rc == MQ_OK && i < changes->score->count; i++) {
        float *change = change_of(changes, i) + chunk->first * changes->width;
        const mq_cuda_score_job job = {.gradient = it->gradient,
                                       .made = mq_device_back_single(it, change, changes->width),
                                       .sums = sums_of(changes) + (int64_t)i * changes->rows + chunk->first};
        rc = it->device->backend->score(&job, it->device->compute, it->err);
    }
    return rc;
}

int mq_device_take_changes(const mq_device_back *it)
{
    const mq_device_changes *changes = &it->device->changes;
    const mq_experts_score *score = changes->score;
    const mq_backend *backend = it->device->backend;
    const double factor = it->context->config->residual_multiplier;
    const size_t nbytes = score->count * (size_t)changes->rows * sizeof(double);
    double *sums = mq_alloc(nbytes);
    if (sums == NULL) return mq_fail_memory(it->err, "scores of experts", nbytes);
    int rc = backend->copy(sums, sums_of(changes), nbytes, it->device->compute, it->err);
    if (rc == MQ_OK) rc = backend->stream_wait(it->device->compute, it->err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        double sum = 0.0;
        for (int64_t row = 0; row < changes->rows; row++) sum += sums[(int64_t)i * changes->rows + row];
        score->candidates[i].score += factor * factor * sum;
    }
    mq_free(sums);
    return rc;
}

/* ---- rows of one expert ---- */

void mq_device_cut_expert_scores(mq_arena *arena, const mq_device_back_room *room, int64_t rows,
                                 mq_device_expert_scores *out)
{
    const mq_runtime *runtime = room->back->run->runtime;
    const mq_experts_score *score = mq_experts_score_of(room->layer->experts_observer);
    const int64_t width = runtime->config.hidden_size;
    const size_t size = mq_dtype_size(runtime->dtype), numbers = (size_t)(rows * width);
    int64_t inner = 0;
    for (size_t i = 0; i < score->count; i++) inner = MQ_MAX(inner, score->candidates[i].weights[0].shape[0]);
    for (int j = 0; j < MQ_SCORE_LINEARS; j++)
        mq_device_cut_candidates(arena, (int64_t)score->count, room->kept != 0, (size_t)(inner * width) * size,
                                 &out->weights[j]);
    out->made = mq_arena_take(arena, numbers * size);
    out->gate = mq_arena_take(arena, (size_t)(rows * inner) * size);
    out->up = mq_arena_take(arena, (size_t)(rows * inner) * size);
    out->change = mq_arena_take(arena, numbers * sizeof *out->change);
    out->tokens = mq_arena_take(arena, (size_t)rows * sizeof *out->tokens);
    out->shares = mq_arena_take(arena, (size_t)rows * sizeof *out->shares);
}

static int load_weights(const mq_device_back *it, const mq_experts_score *score, size_t index, mq_cuda_matrix *weights)
{
    const mq_experts_candidate *candidate = &score->candidates[index];
    int rc = MQ_OK;
    for (int j = 0; rc == MQ_OK && j < MQ_SCORE_LINEARS; j++)
        rc = mq_device_load_candidate(it, &it->scratch->expert_scores.weights[j], index, &candidate->weights[j],
                                      &weights[j]);
    return rc == MQ_OK ? mq_device_back_ready(it->device, it->err) : rc;
}

/* out (rows, O) = in * weight^T + the bias of that role. */
static int multiply(const mq_device_back *it, mq_role role, const mq_cuda_matrix *in, const mq_cuda_matrix *weight,
                    mq_cuda_matrix *out)
{
    mq_device *device = it->device;
    *out = mq_device_back_matrix(it, out->data, weight->rows);
    const mq_cuda_gemm_job job = {.a = *in, .b = *weight, .out = *out, .transpose_b = 1, .alpha = 1.0f,
                                  .bias = device->linears[role].bias, .workspace = device->workspace};
    return device->backend->gemm_run(device->gemm, &job, device->compute, it->err);
}

/* made = what the candidate makes of the rows. */
static int make(const mq_device_back *it, const mq_experts_score *score, size_t index, const mq_observed *observed)
{
    const mq_device_expert_scores *room = &it->scratch->expert_scores;
    const mq_experts_candidate *candidate = &score->candidates[index];
    mq_cuda_matrix weights[MQ_SCORE_LINEARS], in = mq_device_back_matrix(it, observed->input, observed->columns);
    mq_cuda_matrix gate = {.data = room->gate}, up = {.data = room->up}, made = {.data = room->made};
    int rc = load_weights(it, score, index, weights);
    if (rc == MQ_OK) rc = mq_device_as_candidate(it, candidate->input, 2 * index, room->made, &in);
    if (rc == MQ_OK) rc = multiply(it, MQ_ROLE_GATE, &in, &weights[0], &gate);
    if (rc == MQ_OK) rc = multiply(it, MQ_ROLE_UP, &in, &weights[1], &up);
    if (rc != MQ_OK) return rc;
    const mq_cuda_swiglu_job job = {.gate = gate, .up = up, .limit = observed->gate->limit,
                                    .activation = (mq_cuda_activation)observed->gate->activation};
    rc = it->device->backend->swiglu(&job, it->device->compute, it->err);
    if (rc == MQ_OK) rc = mq_device_as_candidate(it, candidate->product, 2 * index + 1, room->up, &gate);
    return rc == MQ_OK ? multiply(it, MQ_ROLE_DOWN, &gate, &weights[2], &made) : rc;
}

/* change [token] += share * (made - output). */
static int add_change(const mq_device_back *it, size_t index, const mq_observed *observed)
{
    const mq_device_expert_scores *room = &it->scratch->expert_scores;
    const mq_device_changes *changes = &it->device->changes;
    const mq_backend *backend = it->device->backend;
    const int64_t width = observed->width;
    const mq_cuda_matrix change = mq_device_back_single(it, room->change, width);
    const mq_cuda_rows_job made = {.x = mq_device_back_matrix(it, room->made, width), .y = change};
    const mq_cuda_add_job less = {.x = mq_device_back_matrix(it, observed->output, width), .y = change,
                                  .accumulate = 1, .scale = -1.0f};
    const mq_cuda_scatter_job add = {
        .x = change, .y = {change_of(changes, index), MQ_F32, changes->rows, width, width}, .index = room->tokens,
        .shares = room->shares,
    };
    int rc = backend->rows(&made, it->device->compute, it->err);
    if (rc == MQ_OK) rc = backend->add(&less, it->device->compute, it->err);
    return rc == MQ_OK ? backend->scatter(&add, it->device->compute, it->err) : rc;
}

int mq_device_score_expert(const mq_device_back *it, mq_experts_score *score, const mq_observed *observed)
{
    const mq_device_expert_scores *room = &it->scratch->expert_scores;
    const mq_backend *backend = it->device->backend;
    const size_t rows = (size_t)observed->rows;
    int rc = mq_experts_score_check(score, observed, it->err);
    if (rc == MQ_OK)
        rc = backend->copy(room->tokens, observed->tokens, rows * sizeof *room->tokens, it->device->compute, it->err);
    if (rc == MQ_OK)
        rc = backend->copy(room->shares, observed->shares, rows * sizeof *room->shares, it->device->compute, it->err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) {
        rc = make(it, score, i, observed);
        if (rc == MQ_OK) rc = add_change(it, i, observed);
    }
    return rc;
}
