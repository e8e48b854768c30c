/* hidden += attention(norm(hidden)), for whole sequences. */
#include <math.h>

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
    const int64_t q = mq_dim_of(config, NULL, MQ_DIM_Q), k = mq_dim_of(config, NULL, MQ_DIM_KV);
    const int64_t v = mq_dim_of(config, NULL, MQ_DIM_V);
    const int rc = mq_pass_linear(pass, MQ_ROLE_QKV, scratch->joined, in);
    if (rc != MQ_OK) return rc;
    split(pass, scratch->q, scratch->joined, 0, q);
    split(pass, scratch->k, scratch->joined, q, k);
    split(pass, scratch->v, scratch->joined, q + k, v);
    return MQ_OK;
}

void mq_layer_expand(const mq_layer_context *context, int64_t rows, void *k, void *v, const void *expanded,
                     const void *narrow)
{
    const mq_config *config = context->config;
    const size_t size = mq_dtype_size(context->dtype);
    const int64_t heads = config->num_attention_heads, turned = config->qk_rope_head_dim;
    const int64_t value = config->value_head_dim, plain = config->head_dim - turned, lora = config->kv_lora_rank;
    mq_columns columns = {.to = k, .from = expanded, .ld_to = config->head_dim, .ld_from = plain + value,
                          .width = plain, .rows = rows * heads, .dtype = context->dtype};
    mq_columns_copy(&columns);
    columns.to = v;
    columns.from = (const char *)expanded + (size_t)plain * size;
    columns.ld_to = columns.width = value;
    mq_columns_copy(&columns);
    for (int64_t h = 0; h < heads; h++) {
        const mq_columns part = {.to = (char *)k + (size_t)(h * config->head_dim + plain) * size,
                                 .from = (const char *)narrow + (size_t)lora * size, .rows = rows, .width = turned,
                                 .ld_to = heads * config->head_dim, .ld_from = lora + turned, .dtype = context->dtype};
        mq_columns_copy(&part);
    }
}

/* Keys and values of what lies between two linears; the part of keys that is turned is the same for all heads. */
static int project_latent_keys(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    const int64_t lora = pass->context->config->kv_lora_rank;
    const mq_columns latent = {.to = scratch->latent, .from = scratch->joined, .ld_to = lora, .width = lora,
                               .ld_from = pass->layer->linears[MQ_ROLE_KV_A].rows, .rows = pass->rows,
                               .dtype = pass->context->dtype};
    int rc = mq_pass_linear(pass, MQ_ROLE_KV_A, scratch->joined, in);
    if (rc != MQ_OK) return rc;
    mq_columns_copy(&latent);
    mq_pass_norm(pass, MQ_ROLE_KV_A_NORM, scratch->latent, scratch->latent, lora);
    pass->applied = NULL;
    rc = mq_pass_linear(pass, MQ_ROLE_KV_B, scratch->expanded, scratch->latent);
    if (rc == MQ_OK)
        mq_layer_expand(pass->context, pass->rows, scratch->k, scratch->v, scratch->expanded, scratch->joined);
    return rc;
}

static int project_latent_queries(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    if (pass->layer->linears[MQ_ROLE_Q_A].cols == 0) return mq_pass_linear(pass, MQ_ROLE_Q, scratch->q, in);
    int rc = mq_pass_linear(pass, MQ_ROLE_Q_A, scratch->joined, in);
    if (rc != MQ_OK) return rc;
    mq_pass_norm(pass, MQ_ROLE_Q_A_NORM, scratch->joined, scratch->joined, pass->context->config->q_lora_rank);
    pass->applied = NULL;
    rc = mq_pass_linear(pass, MQ_ROLE_Q_B, scratch->q, scratch->joined);
    pass->applied = NULL;
    return rc;
}

/* q, k and v, before norm and rope. */
static int project(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    const mq_linear *linears = pass->layer->linears;
    if (linears[MQ_ROLE_QKV].cols > 0) return project_joined(pass, in, scratch);
    if (linears[MQ_ROLE_KV_A].cols > 0) {
        const int rc = project_latent_queries(pass, in, scratch);
        return rc == MQ_OK ? project_latent_keys(pass, in, scratch) : rc;
    }
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
        if (norm == MQ_ROLE_Q_NORM) mq_layer_grow(context, pass->layer, (char *)x + at, sequence);
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
    const mq_row_sizes heads_of = {.rows = sizes.tokens * heads, .width = sizes.head_dim, .dtype = sizes.dtype};
    const float *unit = layer->norms[MQ_ROLE_UNIT_NORM];
    if (table == NULL) return;
    mq_rope_forward(x, table, &sizes);
    if (unit != NULL) mq_rmsnorm_forward(x, x, unit, context->config->rms_norm_eps, &heads_of);
}

float mq_layer_growth(const mq_layer_context *context, int64_t position)
{
    const double floored = floor((double)(position + 1) / (double)context->config->attention_floor);
    return (float)(log1p(floored) * context->config->attention_scale + 1.0);
}

void mq_layer_grow(const mq_layer_context *context, const mq_layer *layer, void *q, const mq_sequence *sequence)
{
    const int64_t width = mq_dim_of(context->config, &layer->kind, MQ_DIM_Q), past = past_of(context, sequence);
    const mq_row_sizes sizes = {.rows = 1, .width = width, .dtype = context->dtype};
    if (layer->rope != MQ_LAYER_NO_ROPE || context->config->attention_floor == 0) return;
    for (int64_t i = 0; i < sequence->tokens; i++) {
        const float factor = mq_layer_growth(context, past + i);
        char *row = (char *)q + (size_t)(i * width) * mq_dtype_size(context->dtype);
        if (factor != 1.0f) mq_scale_rows_forward(row, &factor, &sizes);
    }
}

mq_attention_args mq_layer_attention(const mq_layer_context *context, const mq_layer *layer, int64_t tokens)
{
    const mq_config *config = context->config;
    const int64_t heads = config->num_attention_heads;
    const int64_t kv_heads = mq_dim_of(config, layer ? &layer->kind : NULL, MQ_DIM_KV_HEADS);
    return (mq_attention_args){
        .T = tokens, .T_kv = tokens, .heads = heads, .kv_heads = kv_heads, .head_dim = config->head_dim,
        .value_dim = config->value_head_dim, .dtype = context->dtype, .ldq = heads * config->head_dim,
        .ldk = kv_heads * config->head_dim, .ldv = kv_heads * config->value_head_dim,
        .ldo = heads * config->value_head_dim, .scale = (float)config->attention_multiplier,
        .softcap = (float)config->attn_logit_softcapping, .window = layer ? layer->window : 0,
        .chunk = layer ? layer->chunk : 0, .sinks = layer ? layer->norms[MQ_ROLE_SINKS] : NULL,
    };
}

void mq_layer_hide_padding(const mq_layer_context *context, const mq_sequence *sequence, mq_attention_args *args)
{
    args->key_mask = context->key_mask ? context->key_mask + sequence->first : NULL;
    if (args->key_mask == NULL || args->chunk == 0) return;
    while (args->chunk_first < sequence->tokens && !args->key_mask[args->chunk_first]) args->chunk_first++;
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
        mq_layer_hide_padding(context, sequence, &args);
        if (context->cache != NULL) attend_cached(pass, sequence, &args, scratch->attention);
        else mq_attention_forward(&args, scratch->attention);
    }
}

int mq_pass_attention_half(mq_pass *pass, const mq_unit *unit, void *hidden, const mq_scratch *scratch)
{
    const mq_config *config = pass->context->config;
    mq_layer *layer = pass->layer;
    const int64_t kv_heads = mq_dim_of(config, &layer->kind, MQ_DIM_KV_HEADS);
    pass->quantized = scratch->quantized;
    pass->temporary = scratch->temporary;
    pass->prepared = scratch->prepared;
    pass->low = scratch->low;
    pass->applied = NULL;
    const void *in = mq_pass_normed(pass, MQ_ROLE_INPUT_NORM, scratch->normed, hidden);
    if (layer->kind.attention == MQ_BLOCK_LINEAR)
        return mq_pass_residual(pass, MQ_ROLE_LINEAR_ATTENTION, MQ_ROLE_ATTENTION_NORM, hidden, in);
    int rc = project(pass, in, scratch);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_Q_NORM, &layer->q, scratch->q, config->num_attention_heads, unit);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_K_NORM, &layer->k, scratch->k, kv_heads, unit);
    if (rc == MQ_OK)
        rc = mq_pass_attention_point(pass, &layer->v, scratch->v, mq_dim_of(config, &layer->kind, MQ_DIM_V), unit);
    if (rc != MQ_OK) return rc;
    attend(pass, unit, scratch);
    return mq_pass_residual(pass, MQ_ROLE_O, MQ_ROLE_ATTENTION_NORM, hidden, scratch->mixed);
}
