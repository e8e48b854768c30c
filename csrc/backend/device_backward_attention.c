/* backward_attention.c on a device: the attention half of a chunk, again and back. */
#include <string.h>

#include "backend/device_backward.h"

static mq_device_heads heads_of(const mq_device_back *it, const mq_cuda_matrix *x, int64_t count)
{
    return (mq_device_heads){
        .device = it->device, .context = it->context, .layer = it->layer, .chunk = it->chunk, .count = count, .x = *x,
        .cosine = it->scratch->cosine, .sine = it->scratch->sine, .err = it->err,
    };
}

/* heads = rope(norm(raw)), of q or k. */
static int finish_heads(const mq_device_back *it, mq_role norm, void *heads, const void *raw, int64_t count)
{
    const int64_t width = count * it->context->config->head_dim;
    const mq_cuda_matrix matrix = mq_device_back_matrix(it, heads, width);
    const mq_device_heads turned = heads_of(it, &matrix, count);
    int rc = it->layer->norms[norm] != NULL ? mq_device_back_normed(it, norm, heads, raw, width)
                                            : mq_device_back_copy(it, heads, raw, width);
    if (rc == MQ_OK) rc = mq_device_turn(&turned);
    return rc == MQ_OK && norm == MQ_ROLE_Q_NORM ? mq_device_grow(&turned) : rc;
}

static int64_t width_of(const mq_device_back *it, mq_dim dim)
{
    return mq_dim_of(it->context->config, &it->layer->kind, dim);
}

/* q, k and v of what one linear makes, or put back together. */
static int split(const mq_device_back *it, void *const *parts, void *joined, int back)
{
    static const mq_dim dims[3] = {MQ_DIM_Q, MQ_DIM_KV, MQ_DIM_V};
    mq_device_columns columns = {.joined = joined, .whole = it->layer->linears[MQ_ROLE_QKV].rows,
                                 .dtype = back ? MQ_F32 : it->context->dtype, .back = back};
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < 3; i++) {
        columns.part = parts[i];
        columns.width = width_of(it, dims[i]);
        rc = mq_device_back_columns(it, &columns);
        columns.first += columns.width;
    }
    return rc;
}

/* raw_q, raw_k and v again. */
static int project(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    void *const parts[3] = {scratch->raw_q, scratch->raw_k, scratch->v};
    int rc;
    if (it->layer->linears[MQ_ROLE_QKV].cols > 0) {
        rc = mq_device_back_forward(it, MQ_ROLE_QKV, scratch->joined, scratch->normed, 0);
        return rc == MQ_OK ? split(it, parts, scratch->joined, 0) : rc;
    }
    if (it->layer->linears[MQ_ROLE_KV_A].cols > 0) return mq_device_latent_again(it);
    rc = mq_device_back_forward(it, MQ_ROLE_Q, scratch->raw_q, scratch->normed, 0);
    if (rc == MQ_OK) rc = mq_device_back_forward(it, MQ_ROLE_K, scratch->raw_k, scratch->normed, 0);
    return rc == MQ_OK ? mq_device_back_forward(it, MQ_ROLE_V, scratch->v, scratch->normed, 0) : rc;
}

static mq_cuda_attention_job job_of(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    mq_cuda_attention_job job = mq_device_attention_of(it->device, it->context, it->layer, it->chunk);
    job.q = scratch->q;
    job.k = scratch->k;
    job.v = scratch->v;
    job.out = scratch->mixed;
    job.maxima = scratch->maxima;
    job.factors = scratch->factors;
    job.workspace = scratch->attention;
    job.workspace_nbytes = scratch->attention_nbytes;
    return job;
}

/* middle = input + what the half makes. */
static int add_half(const mq_device_back *it, mq_role role, const void *in)
{
    const mq_device_back_scratch *scratch = it->scratch;
    int rc = mq_device_back_copy(it, scratch->middle, it->chunk->hidden, it->context->config->hidden_size);
    if (rc == MQ_OK && mq_device_back_is_added_plainly(it, MQ_ROLE_ATTENTION_NORM))
        return mq_device_back_forward(it, role, scratch->middle, in, 1);
    if (rc == MQ_OK) rc = mq_device_back_forward(it, role, scratch->attended, in, 0);
    if (rc != MQ_OK) return rc;
    return mq_device_back_add(it, MQ_ROLE_ATTENTION_NORM, scratch->middle, scratch->attended, scratch->d_attended);
}

int mq_device_attention_again(const mq_device_back *it)
{
    const mq_config *config = it->context->config;
    const mq_device_back_scratch *scratch = it->scratch;
    if (it->layer->kind.attention == MQ_BLOCK_NONE)
        return mq_device_back_copy(it, scratch->middle, it->chunk->hidden, config->hidden_size);
    int rc = mq_device_back_enter(it, MQ_ROLE_INPUT_NORM, scratch->normed, it->chunk->hidden);
    if (rc == MQ_OK && it->layer->kind.attention == MQ_BLOCK_LINEAR)
        return add_half(it, MQ_ROLE_LINEAR_ATTENTION, scratch->normed);
    if (rc == MQ_OK) rc = project(it);
    if (rc == MQ_OK) rc = finish_heads(it, MQ_ROLE_Q_NORM, scratch->q, scratch->raw_q, config->num_attention_heads);
    if (rc == MQ_OK)
        rc = finish_heads(it, MQ_ROLE_K_NORM, scratch->k, scratch->raw_k, width_of(it, MQ_DIM_KV_HEADS));
    if (rc != MQ_OK) return rc;
    const mq_cuda_attention_job job = job_of(it);
    rc = it->device->backend->attention(&job, it->device->compute, it->err);
    return rc == MQ_OK ? add_half(it, MQ_ROLE_O, scratch->mixed) : rc;
}

/* By the heads before the norm that follows rope, which are turned once more, into heads. */
static int unit_norm_back(const mq_device_back *it, float *gradient, void *heads, const void *raw, int64_t count)
{
    const int64_t width = count * it->context->config->head_dim;
    const mq_cuda_matrix matrix = mq_device_back_matrix(it, heads, width);
    const mq_device_heads turned = heads_of(it, &matrix, count);
    const mq_cuda_rope_job again = mq_device_rope(&turned);
    mq_cuda_norm_job unit = mq_device_unit_norm(&turned);
    unit.d_out = unit.d_in = gradient;
    int rc = mq_device_back_copy(it, heads, raw, width);
    if (rc == MQ_OK) rc = it->device->backend->rope(&again, it->device->compute, it->err);
    return rc == MQ_OK ? it->device->backend->rmsnorm_backward(&unit, it->device->compute, it->err) : rc;
}

/* gradient: by heads at first, then by raw. */
static int heads_back(const mq_device_back *it, mq_role norm, float *gradient, int64_t count)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const int is_q = norm == MQ_ROLE_Q_NORM, is_turned = it->layer->rope != MQ_LAYER_NO_ROPE;
    const int64_t width = count * it->context->config->head_dim;
    const void *raw = is_q ? scratch->raw_q : scratch->raw_k;
    const mq_cuda_matrix matrix = mq_device_back_single(it, gradient, width);
    const mq_back_norm back = {.in = raw, .d_out = gradient, .d_in = gradient, .width = width};
    const mq_device_heads heads = heads_of(it, &matrix, count);
    int rc = is_q ? mq_device_grow(&heads) : MQ_OK;
    if (rc == MQ_OK && is_turned && it->context->config->qk_unit_norm)
        rc = unit_norm_back(it, gradient, is_q ? scratch->q : scratch->k, raw, count);
    if (rc == MQ_OK && is_turned) {
        const mq_cuda_rope_job rope = mq_device_rope(&heads);
        rc = it->device->backend->rope_backward(&rope, it->device->compute, it->err);
    }
    return rc == MQ_OK && it->layer->norms[norm] != NULL ? mq_device_back_norm(it, norm, &back) : rc;
}

/* d_normed from d_q, d_k and d_v, by raw. */
static int project_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    void *const parts[3] = {scratch->d_q, scratch->d_k, scratch->d_v};
    const mq_back_linear q = {.in = scratch->normed, .out = scratch->raw_q, .d_out = scratch->d_q,
                              .d_in = scratch->d_normed};
    const mq_back_linear k = {.in = scratch->normed, .out = scratch->raw_k, .d_out = scratch->d_k,
                              .d_in = scratch->d_normed, .accumulate = 1};
    const mq_back_linear v = {.in = scratch->normed, .out = scratch->v, .d_out = scratch->d_v,
                              .d_in = scratch->d_normed, .accumulate = 1};
    const mq_back_linear joined = {.in = scratch->normed, .out = scratch->joined, .d_out = scratch->d_joined,
                                   .d_in = scratch->d_normed};
    int rc;
    if (it->layer->linears[MQ_ROLE_QKV].cols > 0) {
        rc = split(it, parts, scratch->d_joined, 1);
        return rc == MQ_OK ? mq_device_back_linear(it, MQ_ROLE_QKV, &joined) : rc;
    }
    if (it->layer->linears[MQ_ROLE_KV_A].cols > 0) return mq_device_latent_back(it);
    rc = mq_device_back_linear(it, MQ_ROLE_Q, &q);
    if (rc == MQ_OK) rc = mq_device_back_linear(it, MQ_ROLE_K, &k);
    return rc == MQ_OK ? mq_device_back_linear(it, MQ_ROLE_V, &v) : rc;
}

/* Back through what the half ends with, o_proj or a linear in the place of all. */
static int leave_end(const mq_device_back *it, mq_role role, const void *in, float *d_in)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_linear *linear = &it->layer->linears[role];
    mq_back_linear back = {.in = in, .out = scratch->attended, .d_in = d_in, .d_out = it->gradient};
    int rc = MQ_OK;
    if (linear->observer != NULL && mq_device_back_is_added_plainly(it, MQ_ROLE_ATTENTION_NORM))
        rc = mq_device_back_forward(it, role, scratch->attended, in, 0);
    if (rc == MQ_OK)
        rc = mq_device_back_added(it, MQ_ROLE_ATTENTION_NORM, scratch->attended, &back.d_out, scratch->d_attended);
    return rc == MQ_OK ? mq_device_back_linear(it, role, &back) : rc;
}

/* d_q, d_k and d_v, and those of sinks where they are wanted. */
static int attend_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_backend *backend = it->device->backend;
    const int64_t heads = it->context->config->num_attention_heads;
    float *wanted = it->back->d_weights[MQ_ROLE_SINKS];
    const mq_cuda_attention_job job = job_of(it);
    const mq_cuda_attention_gradient gradient = {
        .d_out = scratch->d_mixed, .d_q = scratch->d_q, .d_k = scratch->d_k, .d_v = scratch->d_v,
        .d_sinks = wanted != NULL ? scratch->piece : NULL,
    };
    int rc = MQ_OK;
    if (wanted != NULL)
        rc = backend->fill(scratch->piece, 0, (size_t)heads * sizeof(float), it->device->compute, it->err);
    if (rc == MQ_OK) rc = backend->attention_backward(&job, &gradient, it->device->compute, it->err);
    return rc == MQ_OK && wanted != NULL ? mq_device_back_fetch(it, wanted, 1, heads) : rc;
}

int mq_device_attention_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const int64_t heads = it->context->config->num_attention_heads;
    int rc;
    if (it->layer->kind.attention == MQ_BLOCK_NONE) return MQ_OK;
    if (it->layer->kind.attention == MQ_BLOCK_LINEAR) {
        rc = leave_end(it, MQ_ROLE_LINEAR_ATTENTION, scratch->normed, scratch->d_normed);
    } else {
        rc = leave_end(it, MQ_ROLE_O, scratch->mixed, scratch->d_mixed);
        if (rc == MQ_OK) rc = attend_back(it);
        if (rc == MQ_OK) rc = heads_back(it, MQ_ROLE_Q_NORM, scratch->d_q, heads);
        if (rc == MQ_OK) rc = heads_back(it, MQ_ROLE_K_NORM, scratch->d_k, width_of(it, MQ_DIM_KV_HEADS));
        if (rc == MQ_OK) rc = project_back(it);
    }
    if (rc != MQ_OK) return rc;
    return mq_device_back_leave(it, MQ_ROLE_INPUT_NORM, it->chunk->hidden, scratch->d_normed, it->gradient);
}
