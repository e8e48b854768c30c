/* layer_attention.c on a device: hidden += attention(norm(hidden)), of a chunk of whole sequences. */
#include "backend/device_pass.h"

/* k and v of what the second linear makes, and of the end of what the first made (mq_layer_expand). */
static int expand(mq_device_pass *pass)
{
    const mq_config *config = pass->context->config;
    const mq_device_scratch *scratch = pass->scratch;
    const int64_t heads = config->num_attention_heads, turned = config->qk_rope_head_dim;
    const int64_t value = config->value_head_dim, head = config->head_dim, plain = head - turned;
    const int64_t all = pass->chunk->rows * heads;
    const mq_device_part k = {.data = scratch->k, .rows = all, .ld = head};
    const mq_device_part v = {.data = scratch->v, .rows = all, .ld = value};
    const mq_device_part k_end = {.data = scratch->k, .first = plain, .rows = all, .ld = head};
    const mq_device_part made = {.data = scratch->expanded, .ld = plain + value};
    const mq_device_part made_end = {.data = scratch->expanded, .first = plain, .ld = plain + value};
    const mq_device_part narrow = {.data = scratch->joined, .first = config->kv_lora_rank,
                                   .ld = config->kv_lora_rank + turned};
    int rc = mq_device_columns(pass, &k, &made, plain, 1);
    if (rc == MQ_OK) rc = mq_device_columns(pass, &v, &made_end, value, 1);
    return rc == MQ_OK ? mq_device_columns(pass, &k_end, &narrow, turned, heads) : rc;
}

/* Queries, keys and values, each behind something narrow. */
static int project_latent(mq_device_pass *pass, const void *in)
{
    const mq_config *config = pass->context->config;
    const mq_device_scratch *scratch = pass->scratch;
    const int64_t lora = config->kv_lora_rank, q_lora = config->q_lora_rank;
    int rc;
    if (pass->layer->linears[MQ_ROLE_Q_A].cols == 0) {
        rc = mq_device_linear_of(pass, MQ_ROLE_Q, scratch->q, in);
    } else {
        rc = mq_device_linear_of(pass, MQ_ROLE_Q_A, scratch->joined, in);
        if (rc == MQ_OK) rc = mq_device_norm(pass, MQ_ROLE_Q_A_NORM, scratch->joined, scratch->joined, q_lora);
        pass->applied = NULL;
        if (rc == MQ_OK) rc = mq_device_linear_of(pass, MQ_ROLE_Q_B, scratch->q, scratch->joined);
        pass->applied = NULL;
    }
    if (rc == MQ_OK) rc = mq_device_linear_of(pass, MQ_ROLE_KV_A, scratch->joined, in);
    if (rc == MQ_OK) rc = mq_device_split(pass, scratch->latent, 0, lora, lora + config->qk_rope_head_dim);
    if (rc == MQ_OK) rc = mq_device_norm(pass, MQ_ROLE_KV_A_NORM, scratch->latent, scratch->latent, lora);
    pass->applied = NULL;
    if (rc == MQ_OK) rc = mq_device_linear_of(pass, MQ_ROLE_KV_B, scratch->expanded, scratch->latent);
    return rc == MQ_OK ? expand(pass) : rc;
}

/* q, k and v, before norm and rope. */
static int project(mq_device_pass *pass, const void *in)
{
    const mq_config *config = pass->context->config;
    const mq_device_scratch *scratch = pass->scratch;
    const int64_t q = mq_dim_of(config, NULL, MQ_DIM_Q), k = mq_dim_of(config, NULL, MQ_DIM_KV);
    const int64_t v = mq_dim_of(config, NULL, MQ_DIM_V);
    int rc;
    if (pass->layer->linears[MQ_ROLE_QKV].cols > 0) {
        rc = mq_device_linear_of(pass, MQ_ROLE_QKV, scratch->joined, in);
        if (rc == MQ_OK) rc = mq_device_split(pass, scratch->q, 0, q, q + k + v);
        if (rc == MQ_OK) rc = mq_device_split(pass, scratch->k, q, k, q + k + v);
        return rc == MQ_OK ? mq_device_split(pass, scratch->v, q + k, v, q + k + v) : rc;
    }
    if (pass->layer->linears[MQ_ROLE_KV_A].cols > 0) return project_latent(pass, in);
    rc = mq_device_linear_of(pass, MQ_ROLE_Q, scratch->q, in);
    if (rc == MQ_OK) rc = mq_device_linear_of(pass, MQ_ROLE_K, scratch->k, in);
    return rc == MQ_OK ? mq_device_linear_of(pass, MQ_ROLE_V, scratch->v, in) : rc;
}

static int attention_point(mq_device_pass *pass, mq_point *point, void *x, int64_t width)
{
    const mq_quantizer *quantizer = point->quantizer;
    int rc = MQ_OK;
    if (quantizer != NULL && mq_quantizer_prepares(quantizer))
        rc = mq_device_quantize(pass, point, x, x, width, MQ_QUANT_PREPARE);
    if (rc == MQ_OK) rc = mq_device_watch(pass, point, x, width);
    if (rc == MQ_OK && quantizer != NULL && quantizer->enabled)
        rc = mq_device_quantize(pass, point, x, x, width, MQ_QUANT_PREPARED);
    return rc;
}

mq_cuda_rope_job mq_device_rope(const mq_device_heads *heads)
{
    const mq_layer_context *context = heads->context;
    const mq_sequence *first = &context->sequences[heads->chunk->first_sequence];
    const mq_rope_sizes sizes = mq_layer_rope(context, heads->count, first);
    const int64_t at = mq_device_rope_at(context->ropes, heads->layer->rope);
    return (mq_cuda_rope_job){
        .x = heads->x, .heads = heads->count, .cosine = heads->cosine + at, .sine = heads->sine + at,
        .rotary = mq_config_rotary(context->config), .positions = heads->chunk->positions, .offset = sizes.offset,
        .interleaved = sizes.interleaved,
    };
}

mq_cuda_norm_job mq_device_unit_norm(const mq_device_heads *heads)
{
    return (mq_cuda_norm_job){.x = heads->x, .y = heads->x, .heads = heads->count,
                              .eps = (float)heads->context->config->rms_norm_eps};
}

int mq_device_turn(const mq_device_heads *heads)
{
    const mq_backend *backend = heads->device->backend;
    if (heads->layer->rope == MQ_LAYER_NO_ROPE) return MQ_OK;
    const mq_cuda_rope_job rope = mq_device_rope(heads);
    const mq_cuda_norm_job unit = mq_device_unit_norm(heads);
    const int rc = backend->rope(&rope, heads->device->compute, heads->err);
    if (rc != MQ_OK || !heads->context->config->qk_unit_norm) return rc;
    return backend->rmsnorm(&unit, heads->device->compute, heads->err);
}

int mq_device_grow(const mq_device_heads *heads)
{
    const mq_cuda_add_job job = {.x = heads->x, .y = heads->x, .row_scales = heads->chunk->growth};
    if (heads->layer->rope != MQ_LAYER_NO_ROPE || heads->context->config->attention_floor == 0) return MQ_OK;
    return heads->device->backend->add(&job, heads->device->compute, heads->err);
}

/* q or k: norm of each head or of all (where the family has it), rope, then its point. */
static int finish_heads(mq_device_pass *pass, mq_role role, mq_point *point, void *x, int64_t heads)
{
    const int64_t width = heads * pass->context->config->head_dim;
    const mq_device_heads turned = {
        .device = pass->device, .context = pass->context, .layer = pass->layer, .chunk = pass->chunk, .count = heads,
        .cosine = pass->scratch->cosine, .sine = pass->scratch->sine, .x = mq_device_matrix(pass, x, width),
        .err = pass->err,
    };
    int rc = MQ_OK;
    if (pass->device->norms[role] != NULL) rc = mq_device_norm(pass, role, x, x, width);
    if (rc == MQ_OK) rc = mq_device_turn(&turned);
    if (rc == MQ_OK && role == MQ_ROLE_Q_NORM) rc = mq_device_grow(&turned);
    return rc == MQ_OK ? attention_point(pass, point, x, width) : rc;
}

mq_cuda_attention_job mq_device_attention(const mq_layer_context *context, const mq_layer *layer, int64_t rows,
                                          int64_t sequences, int64_t longest)
{
    const mq_attention_args args = mq_layer_attention(context, layer, longest);
    return (mq_cuda_attention_job){
        .dtype = args.dtype, .heads = args.heads, .kv_heads = args.kv_heads, .head_dim = args.head_dim,
        .value_dim = args.value_dim, .ldq = args.ldq, .ldk = args.ldk, .ldv = args.ldv, .ldo = args.ldo, .rows = rows,
        .sequences = sequences, .longest = longest, .scale = args.scale, .window = args.window, .chunk = args.chunk,
        .softcap = args.softcap,
    };
}

mq_cuda_attention_job mq_device_attention_of(const mq_device *device, const mq_layer_context *context,
                                             const mq_layer *layer, const mq_device_chunk *chunk)
{
    mq_cuda_attention_job job = mq_device_attention(context, layer, chunk->rows, chunk->sequences, chunk->longest);
    job.starts = chunk->starts;
    job.chunk_first = chunk->chunk_first;
    job.key_mask = chunk->key_mask;
    job.sinks = device->norms[MQ_ROLE_SINKS];
    return job;
}

static int attend(mq_device_pass *pass)
{
    const mq_device_scratch *scratch = pass->scratch;
    mq_cuda_attention_job job = mq_device_attention_of(pass->device, pass->context, pass->layer, pass->chunk);
    job.q = scratch->q;
    job.k = scratch->k;
    job.v = scratch->v;
    job.out = scratch->mixed;
    job.workspace = scratch->attention;
    job.workspace_nbytes = scratch->attention_nbytes;
    return pass->device->backend->attention(&job, pass->device->compute, pass->err);
}

int mq_device_attention_half(mq_device_pass *pass)
{
    const mq_config *config = pass->context->config;
    const mq_device_scratch *scratch = pass->scratch;
    mq_layer *layer = pass->layer;
    const void *in = pass->chunk->hidden;
    const int64_t kv_heads = mq_dim_of(config, &layer->kind, MQ_DIM_KV_HEADS);
    pass->applied = NULL;
    int rc = mq_device_normed(pass, MQ_ROLE_INPUT_NORM, scratch->normed, &in);
    if (rc == MQ_OK && layer->kind.attention == MQ_BLOCK_LINEAR)
        return mq_device_residual(pass, MQ_ROLE_LINEAR_ATTENTION, MQ_ROLE_ATTENTION_NORM, pass->chunk->hidden, in);
    if (rc == MQ_OK) rc = project(pass, in);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_Q_NORM, &layer->q, scratch->q, config->num_attention_heads);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_K_NORM, &layer->k, scratch->k, kv_heads);
    if (rc == MQ_OK) rc = attention_point(pass, &layer->v, scratch->v, mq_dim_of(config, &layer->kind, MQ_DIM_V));
    if (rc == MQ_OK) rc = attend(pass);
    if (rc != MQ_OK) return rc;
    return mq_device_residual(pass, MQ_ROLE_O, MQ_ROLE_ATTENTION_NORM, pass->chunk->hidden, scratch->mixed);
}
