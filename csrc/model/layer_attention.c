/* hidden += attention(norm(hidden)), for whole sequences. */
#include <string.h>

#include "model/pass.h"

/* Positions that the sequence has been through before. */
static int64_t past_of(const mq_layer_context *context, const mq_sequence *sequence)
{
    return context->cache != NULL ? context->cache->lengths[sequence->slot] : 0;
}

/* to (rows, width) = columns of what one linear made in the place of several. */
static void split(const mq_pass *pass, void *to, const void *joined, int64_t first, int64_t width)
{
    const mq_linear *linear = &pass->layer->linears[MQ_ROLE_QKV];
    const mq_columns columns = {
        .to = to, .from = (const char *)joined + (size_t)first * mq_dtype_size(pass->context->dtype), .ld_to = width,
        .ld_from = linear->rows, .width = width, .rows = pass->rows, .dtype = pass->context->dtype,
    };
    mq_columns_copy(&columns);
}

static int project_joined(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    const mq_config *config = pass->context->config;
    const int64_t q = mq_dim_of(config, MQ_DIM_Q), k = mq_dim_of(config, MQ_DIM_KV), v = mq_dim_of(config, MQ_DIM_V);
    const int rc = mq_pass_linear(pass, MQ_ROLE_QKV, scratch->joined, in);
    if (rc != MQ_OK) return rc;
    split(pass, scratch->q, scratch->joined, 0, q);
    split(pass, scratch->k, scratch->joined, q, k);
    split(pass, scratch->v, scratch->joined, q + k, v);
    return MQ_OK;
}

/* q, k and v, before norm and rope. */
static int project(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    if (pass->layer->linears[MQ_ROLE_QKV].cols > 0) return project_joined(pass, in, scratch);
    int rc = mq_pass_linear(pass, MQ_ROLE_Q, scratch->q, in);
    if (rc == MQ_OK) rc = mq_pass_linear(pass, MQ_ROLE_K, scratch->k, in);
    if (rc == MQ_OK) rc = mq_pass_linear(pass, MQ_ROLE_V, scratch->v, in);
    return rc;
}

/* q or k: norm of each head or of all (where the family has it), rope, then its point. */
static int finish_heads(mq_pass *pass, mq_role norm, mq_point *point, void *x, int64_t heads, const mq_unit *unit)
{
    const mq_layer_context *context = pass->context;
    const int64_t width = heads * context->config->head_dim;
    if (pass->layer->norms[norm] != NULL) mq_pass_norm(pass, norm, x, x, width);
    for (int64_t i = 0; i < unit->sequences; i++) {
        const mq_sequence *sequence = &context->sequences[unit->first_sequence + i];
        const size_t at = (size_t)((sequence->first - unit->first) * width) * mq_dtype_size(context->dtype);
        mq_layer_turn(context, pass->layer, (char *)x + at, heads, sequence);
    }
    return mq_pass_attention_point(pass, point, x, width, unit);
}

mq_rope_sizes mq_layer_rope(const mq_layer_context *context, int64_t heads, const mq_sequence *sequence)
{
    const mq_config *config = context->config;
    return (mq_rope_sizes){
        .tokens = sequence->tokens, .heads = heads, .head_dim = config->head_dim, .first = past_of(context, sequence),
        .offset = config->qk_rope_head_dim > 0 ? config->head_dim - config->qk_rope_head_dim : 0,
        .dtype = context->dtype, .interleaved = config->rope_interleaved != 0,
    };
}

void mq_layer_turn(const mq_layer_context *context, const mq_layer *layer, void *x, int64_t heads,
                   const mq_sequence *sequence)
{
    const mq_rope_sizes sizes = mq_layer_rope(context, heads, sequence);
    const mq_rope_table *table = mq_ropes_of(context->ropes, layer->rope, sizes.first + sizes.tokens);
    if (table != NULL) mq_rope_forward(x, table, &sizes);
}

mq_attention_args mq_layer_attention(const mq_layer_context *context, const mq_layer *layer, int64_t tokens)
{
    const mq_config *config = context->config;
    const int64_t heads = config->num_attention_heads, kv_heads = config->num_key_value_heads;
    return (mq_attention_args){
        .T = tokens, .T_kv = tokens, .heads = heads, .kv_heads = kv_heads, .head_dim = config->head_dim,
        .value_dim = config->value_head_dim, .dtype = context->dtype, .ldq = heads * config->head_dim,
        .ldk = kv_heads * config->head_dim, .ldv = kv_heads * config->value_head_dim,
        .ldo = heads * config->value_head_dim, .scale = (float)config->attention_multiplier,
        .softcap = (float)config->attn_logit_softcapping, .window = layer ? layer->window : 0,
        .chunk = layer ? layer->chunk : 0,
    };
}

/* Keys and values of one sequence go into the cache, and attention reads them there with all that came before. */
static void attend_cached(const mq_pass *pass, const mq_sequence *sequence, mq_attention_args *args, void *scratch)
{
    const mq_layer_context *context = pass->context;
    const int64_t layer = context->cache_layer, slot = sequence->slot;
    const mq_cache_rows rows = {.k = args->k, .v = args->v, .tokens = sequence->tokens, .heads = args->kv_heads};
    mq_cache_store(context->cache, layer, slot, &rows);
    args->past = past_of(context, sequence);
    args->T_kv = args->past + args->T;
    args->k = mq_cache_keys(context->cache, layer, slot);
    args->v = mq_cache_values(context->cache, layer, slot);
    args->ldk = args->head_dim;
    args->ldv = args->value_dim;
    args->head_tokens = context->cache->capacity;
    if (args->T == 1) mq_attention_step(args, scratch);
    else mq_attention_forward(args, scratch);
}

static void attend(const mq_pass *pass, const mq_unit *unit, const mq_scratch *scratch)
{
    const mq_layer_context *context = pass->context;
    const size_t size = mq_dtype_size(context->dtype);
    for (int64_t i = 0; i < unit->sequences; i++) {
        const mq_sequence *sequence = &context->sequences[unit->first_sequence + i];
        mq_attention_args args = mq_layer_attention(context, pass->layer, sequence->tokens);
        const size_t row = (size_t)(sequence->first - unit->first);
        args.q = (const char *)scratch->q + row * (size_t)args.ldq * size;
        args.k = (const char *)scratch->k + row * (size_t)args.ldk * size;
        args.v = (const char *)scratch->v + row * (size_t)args.ldv * size;
        args.out = (char *)scratch->mixed + row * (size_t)args.ldo * size;
        args.key_mask = context->key_mask ? context->key_mask + sequence->first : NULL;
        if (context->cache != NULL) attend_cached(pass, sequence, &args, scratch->attention);
        else mq_attention_forward(&args, scratch->attention);
    }
}

int mq_pass_attention_half(mq_pass *pass, const mq_unit *unit, void *hidden, const mq_scratch *scratch)
{
    const mq_config *config = pass->context->config;
    mq_layer *layer = pass->layer;
    pass->quantized = scratch->quantized;
    pass->temporary = scratch->temporary;
    pass->prepared = scratch->prepared;
    pass->low = scratch->low;
    pass->applied = NULL;
    int rc = project(pass, mq_pass_normed(pass, MQ_ROLE_INPUT_NORM, scratch->normed, hidden), scratch);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_Q_NORM, &layer->q, scratch->q, config->num_attention_heads, unit);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_K_NORM, &layer->k, scratch->k, config->num_key_value_heads, unit);
    if (rc == MQ_OK) rc = mq_pass_attention_point(pass, &layer->v, scratch->v, mq_dim_of(config, MQ_DIM_V), unit);
    if (rc != MQ_OK) return rc;
    attend(pass, unit, scratch);
    return mq_pass_residual(pass, MQ_ROLE_O, MQ_ROLE_ATTENTION_NORM, hidden, scratch->mixed);
}
