/* backward_attention.c's latent attention on a device: queries, keys and values, each behind something narrow. */
#include "backend/device_backward.h"

/* Columns of a chunk's rows, in parts that lie `ld` apart. */
static mq_cuda_matrix part_of(const mq_device_back *it, const void *data, mq_dtype dtype, int64_t first, int64_t width,
                              int64_t ld)
{
    char *at = (char *)(uintptr_t)data + (size_t)first * mq_dtype_size(dtype);
    return (mq_cuda_matrix){at, dtype, it->chunk->rows, width, ld};
}

/* to = from, each of whose rows comes `repeat` times. */
static int move(const mq_device_back *it, const mq_cuda_matrix *to, const mq_cuda_matrix *from, int64_t repeat)
{
    const mq_cuda_rows_job job = {.x = *from, .y = *to, .repeat = repeat};
    return it->device->backend->rows(&job, it->device->compute, it->err);
}

/* What of keys and values lies in expanded, head by head, and of the end of keys in what kv_a makes: one for all. */
typedef struct places {
    mq_cuda_matrix k, k_end, v, made, made_end, narrow;
    int64_t heads;
} places;

static places places_of(const mq_device_back *it, int back)
{
    const mq_config *config = it->context->config;
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_dtype dtype = back ? MQ_F32 : it->context->dtype;
    const void *k = back ? scratch->d_k : scratch->raw_k, *v = back ? scratch->d_v : scratch->v;
    const void *kv_a = back ? scratch->d_kv_a : scratch->kv_a;
    const void *expanded = back ? scratch->d_expanded : scratch->expanded;
    const int64_t turned = config->qk_rope_head_dim, value = config->value_head_dim, head = config->head_dim;
    const int64_t plain = head - turned, lora = config->kv_lora_rank, heads = config->num_attention_heads;
    places found = {
        .heads = heads, .k = part_of(it, k, dtype, 0, plain, head), .v = part_of(it, v, dtype, 0, value, value),
        .k_end = part_of(it, k, dtype, plain, turned, head),
        .made = part_of(it, expanded, dtype, 0, plain, plain + value),
        .made_end = part_of(it, expanded, dtype, plain, value, plain + value),
        .narrow = part_of(it, kv_a, dtype, lora, turned, lora + turned),
    };
    found.k.rows = found.k_end.rows = found.v.rows = found.made.rows = found.made_end.rows = it->chunk->rows * heads;
    return found;
}

/* mq_layer_expand. */
static int expand(const mq_device_back *it)
{
    const places at = places_of(it, 0);
    int rc = move(it, &at.k, &at.made, 1);
    if (rc == MQ_OK) rc = move(it, &at.v, &at.made_end, 1);
    return rc == MQ_OK ? move(it, &at.k_end, &at.narrow, at.heads) : rc;
}

/* d_expanded, and the end of d_kv_a, from d_k and d_v: the other way round. */
static int expand_back(const mq_device_back *it)
{
    const places at = places_of(it, 1);
    mq_cuda_add_job add = {.x = at.k_end, .y = at.narrow};
    int rc = move(it, &at.made, &at.k, 1);
    if (rc == MQ_OK) rc = move(it, &at.made_end, &at.v, 1);
    add.x.rows = it->chunk->rows;
    add.x.ld = at.heads * at.k_end.ld;
    for (int64_t head = 0; rc == MQ_OK && head < at.heads; head++) {
        add.x.data = (float *)at.k_end.data + head * at.k_end.ld;
        add.accumulate = head > 0;
        rc = it->device->backend->add(&add, it->device->compute, it->err);
    }
    return rc;
}

static int queries_again(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    if (it->layer->linears[MQ_ROLE_Q_A].cols == 0)
        return mq_device_back_forward(it, MQ_ROLE_Q, scratch->raw_q, scratch->normed, 0);
    int rc = mq_device_back_forward(it, MQ_ROLE_Q_A, scratch->q_a, scratch->normed, 0);
    if (rc == MQ_OK)
        rc = mq_device_back_normed(it, MQ_ROLE_Q_A_NORM, scratch->q_latent, scratch->q_a,
                                   it->context->config->q_lora_rank);
    return rc == MQ_OK ? mq_device_back_forward(it, MQ_ROLE_Q_B, scratch->raw_q, scratch->q_latent, 0) : rc;
}

/* The narrow vector: the first columns of what kv_a makes. */
static mq_device_columns latent_of(const mq_device_back *it, int back)
{
    const mq_device_back_scratch *scratch = it->scratch;
    return (mq_device_columns){
        .part = back ? scratch->d_kv_latent : scratch->kv_raw, .joined = back ? scratch->d_kv_a : scratch->kv_a,
        .width = it->context->config->kv_lora_rank, .whole = it->layer->linears[MQ_ROLE_KV_A].rows,
        .dtype = back ? MQ_F32 : it->context->dtype, .back = back,
    };
}

int mq_device_latent_again(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_device_columns latent = latent_of(it, 0);
    int rc = queries_again(it);
    if (rc == MQ_OK) rc = mq_device_back_forward(it, MQ_ROLE_KV_A, scratch->kv_a, scratch->normed, 0);
    if (rc == MQ_OK) rc = mq_device_back_columns(it, &latent);
    if (rc == MQ_OK)
        rc = mq_device_back_normed(it, MQ_ROLE_KV_A_NORM, scratch->kv_latent, scratch->kv_raw, latent.width);
    if (rc == MQ_OK) rc = mq_device_back_forward(it, MQ_ROLE_KV_B, scratch->expanded, scratch->kv_latent, 0);
    return rc == MQ_OK ? expand(it) : rc;
}

/* d_normed from d_q. */
static int queries_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_back_linear q = {.in = scratch->normed, .out = scratch->raw_q, .d_out = scratch->d_q,
                              .d_in = scratch->d_normed};
    const mq_back_linear b = {.in = scratch->q_latent, .out = scratch->raw_q, .d_out = scratch->d_q,
                              .d_in = scratch->d_q_a};
    const mq_back_linear a = {.in = scratch->normed, .out = scratch->q_a, .d_out = scratch->d_q_a,
                              .d_in = scratch->d_normed};
    const mq_back_norm norm = {.in = scratch->q_a, .d_out = scratch->d_q_a, .d_in = scratch->d_q_a,
                               .width = it->context->config->q_lora_rank};
    if (it->layer->linears[MQ_ROLE_Q_A].cols == 0) return mq_device_back_linear(it, MQ_ROLE_Q, &q);
    int rc = mq_device_back_linear(it, MQ_ROLE_Q_B, &b);
    if (rc == MQ_OK) rc = mq_device_back_norm(it, MQ_ROLE_Q_A_NORM, &norm);
    return rc == MQ_OK ? mq_device_back_linear(it, MQ_ROLE_Q_A, &a) : rc;
}

int mq_device_latent_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_back_linear b = {.in = scratch->kv_latent, .out = scratch->expanded, .d_out = scratch->d_expanded,
                              .d_in = scratch->d_kv_latent};
    const mq_back_linear a = {.in = scratch->normed, .out = scratch->kv_a, .d_out = scratch->d_kv_a,
                              .d_in = scratch->d_normed, .accumulate = 1};
    const mq_device_columns latent = latent_of(it, 1);
    const mq_back_norm norm = {.in = scratch->kv_raw, .d_out = scratch->d_kv_latent, .d_in = scratch->d_kv_latent,
                               .width = latent.width};
    int rc = queries_back(it);
    if (rc == MQ_OK) rc = expand_back(it);
    if (rc == MQ_OK) rc = mq_device_back_linear(it, MQ_ROLE_KV_B, &b);
    if (rc == MQ_OK) rc = mq_device_back_norm(it, MQ_ROLE_KV_A_NORM, &norm);
    if (rc == MQ_OK) rc = mq_device_back_columns(it, &latent);
    return rc == MQ_OK ? mq_device_back_linear(it, MQ_ROLE_KV_A, &a) : rc;
}
