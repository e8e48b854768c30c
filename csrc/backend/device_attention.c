/* layer_attention.c on a device: hidden += attention(norm(hidden)), of a chunk of whole sequences. */
#include "backend/device_pass.h"

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

/* q or k: norm of each head or of all (where the family has it), rope, then its point. */
static int finish_heads(mq_device_pass *pass, mq_role role, mq_point *point, void *x, int64_t heads)
{
    const int64_t width = heads * pass->context->config->head_dim;
    const mq_rope_table *table = mq_ropes_of(pass->context->ropes, pass->layer->rope, pass->chunk->longest);
    int rc = MQ_OK;
    if (pass->device->norms[role] != NULL) rc = mq_device_norm(pass, role, x, x, width);
    if (rc == MQ_OK && table != NULL) {
        const mq_cuda_rope_job job = {
            .x = mq_device_matrix(pass, x, width), .heads = heads, .cosine = pass->scratch->cosine,
            .sine = pass->scratch->sine, .rotary = table->rotary, .positions = pass->chunk->positions,
        };
        rc = pass->device->backend->rope(&job, pass->device->compute, pass->err);
    }
    return rc == MQ_OK ? attention_point(pass, point, x, width) : rc;
}

mq_cuda_attention_job mq_device_attention(const mq_layer_context *context, const mq_layer *layer, int64_t rows,
                                          int64_t sequences, int64_t longest)
{
    const mq_attention_args args = mq_layer_attention(context, layer, longest);
    return (mq_cuda_attention_job){
        .dtype = args.dtype, .heads = args.heads, .kv_heads = args.kv_heads, .head_dim = args.head_dim,
        .value_dim = args.value_dim, .ldq = args.ldq, .ldk = args.ldk, .ldv = args.ldv, .ldo = args.ldo, .rows = rows,
        .sequences = sequences, .longest = longest, .scale = args.scale, .window = args.window,
    };
}

static int attend(mq_device_pass *pass)
{
    const mq_device_chunk *chunk = pass->chunk;
    const mq_device_scratch *scratch = pass->scratch;
    mq_cuda_attention_job job = mq_device_attention(pass->context, pass->layer, chunk->rows, chunk->sequences,
                                                    chunk->longest);
    job.q = scratch->q;
    job.k = scratch->k;
    job.v = scratch->v;
    job.out = scratch->mixed;
    job.starts = chunk->starts;
    job.key_mask = chunk->key_mask;
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
