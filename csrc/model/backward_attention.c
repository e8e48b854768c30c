/* The attention half of a layer, again and back: middle = input + o_proj(attention(q, k, v of norm(input))). */
#include <string.h>

#include "model/backward.h"

static mq_row_sizes sizes_of(const mq_back_unit *it, int64_t width)
{
    return (mq_row_sizes){.rows = it->unit->rows, .width = width, .dtype = it->back->run->runtime->dtype};
}

static const mq_sequence *sequence_of(const mq_back_unit *it, int64_t index)
{
    return &it->back->run->sequences[it->unit->first_sequence + index];
}

/* heads = rope(norm(raw)), of q or k. */
static void finish_heads(const mq_back_rows *rows, const mq_back_unit *it, mq_role norm, void *heads, const void *raw,
                         int64_t count)
{
    const mq_layer_context context = mq_run_context(it->back->run);
    const mq_row_sizes whole = sizes_of(it, count * context.config->head_dim);
    const size_t stride = (size_t)whole.width * mq_dtype_size(whole.dtype);
    const float *weight = it->layer->norms[norm];
    mq_row_sizes sizes = {.width = it->layer->widths[norm], .dtype = whole.dtype};
    if (weight == NULL) memcpy(heads, raw, (size_t)whole.rows * stride);
    else sizes.rows = rows->rows * (whole.width / sizes.width);
    if (weight != NULL) mq_rmsnorm_forward(heads, raw, weight, context.config->rms_norm_eps, &sizes);
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_sequence *sequence = sequence_of(it, i);
        char *at = (char *)heads + (size_t)(sequence->first - it->unit->first) * stride;
        mq_layer_turn(&context, it->layer, at, count, sequence);
        if (norm == MQ_ROLE_Q_NORM) mq_layer_grow(&context, it->layer, at, sequence);
    }
}

/* The attention over one sequence of the unit, as the forward or the backward takes it. */
static mq_attention_args attention_of(const mq_back_unit *it, int64_t index)
{
    const mq_run *run = it->back->run;
    const mq_layer_context context = mq_run_context(run);
    const mq_sequence *sequence = sequence_of(it, index);
    const mq_back_scratch *scratch = &it->back->scratch;
    const size_t row = (size_t)(sequence->first - it->unit->first), size = mq_dtype_size(context.dtype);
    mq_attention_args args = mq_layer_attention(&context, it->layer, sequence->tokens);
    args.q = (const char *)scratch->q + row * (size_t)args.ldq * size;
    args.k = (const char *)scratch->k + row * (size_t)args.ldk * size;
    args.v = (const char *)scratch->v + row * (size_t)args.ldv * size;
    args.out = (char *)scratch->mixed + row * (size_t)args.ldo * size;
    mq_layer_hide_padding(&context, sequence, &args);
    args.maxima = scratch->maxima + row * (size_t)args.heads;
    args.factors = scratch->factors + row * (size_t)args.heads;
    return args;
}

static mq_back_rows rows_of(const mq_back_unit *it)
{
    return (mq_back_rows){.back = it->back, .layer = it->layer, .first = it->unit->first, .rows = it->unit->rows,
                          .expert = -1, .err = it->err};
}

/* Columns of what one linear makes in the place of several, taken out or put back. */
static void move_columns(const mq_back_unit *it, void *part, void *joined, mq_dim dim, int64_t first, int back)
{
    const mq_dtype dtype = back ? MQ_F32 : it->back->run->runtime->dtype;
    const int64_t width = mq_dim_of(&it->back->run->runtime->config, &it->layer->kind, dim);
    const int64_t whole = it->layer->linears[MQ_ROLE_QKV].rows;
    void *at = (char *)joined + (size_t)first * mq_dtype_size(dtype);
    const mq_columns out = {.to = part, .from = at, .ld_to = width, .ld_from = whole, .width = width,
                            .rows = it->unit->rows, .dtype = dtype};
    const mq_columns in = {.to = at, .from = part, .ld_to = whole, .ld_from = width, .width = width,
                           .rows = it->unit->rows, .dtype = dtype};
    mq_columns_copy(back ? &in : &out);
}

static void split(const mq_back_unit *it, void *q, void *k, void *v, void *joined, int back)
{
    const mq_config *config = &it->back->run->runtime->config;
    const int64_t q_width = mq_dim_of(config, NULL, MQ_DIM_Q), k_width = mq_dim_of(config, NULL, MQ_DIM_KV);
    move_columns(it, q, joined, MQ_DIM_Q, 0, back);
    move_columns(it, k, joined, MQ_DIM_KV, q_width, back);
    move_columns(it, v, joined, MQ_DIM_V, q_width + k_width, back);
}

static void project_latent(const mq_back_unit *it)
{
    const mq_layer_context context = mq_run_context(it->back->run);
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_layer *layer = it->layer;
    const mq_linear *linears = layer->linears;
    const int64_t lora = context.config->kv_lora_rank;
    const mq_row_sizes hidden = sizes_of(it, context.config->hidden_size), kv = sizes_of(it, lora);
    const mq_row_sizes q = sizes_of(it, context.config->q_lora_rank);
    const mq_columns latent = {.to = scratch->kv_raw, .from = scratch->kv_a, .ld_to = lora, .width = lora,
                               .ld_from = linears[MQ_ROLE_KV_A].rows, .rows = kv.rows, .dtype = kv.dtype};
    if (linears[MQ_ROLE_Q_A].cols > 0) {
        mq_linear_forward(scratch->q_a, scratch->normed, &linears[MQ_ROLE_Q_A].weight, 0, &hidden);
        mq_rmsnorm_forward(scratch->q_latent, scratch->q_a, layer->norms[MQ_ROLE_Q_A_NORM],
                           mq_norm_eps(context.config, MQ_ROLE_Q_A_NORM), &q);
        mq_linear_forward(scratch->raw_q, scratch->q_latent, &linears[MQ_ROLE_Q_B].weight, 0, &q);
    } else {
        mq_linear_forward(scratch->raw_q, scratch->normed, &linears[MQ_ROLE_Q].weight, 0, &hidden);
    }
    mq_linear_forward(scratch->kv_a, scratch->normed, &linears[MQ_ROLE_KV_A].weight, 0, &hidden);
    mq_columns_copy(&latent);
    mq_rmsnorm_forward(scratch->kv_latent, scratch->kv_raw, layer->norms[MQ_ROLE_KV_A_NORM],
                       mq_norm_eps(context.config, MQ_ROLE_KV_A_NORM), &kv);
    mq_linear_forward(scratch->expanded, scratch->kv_latent, &linears[MQ_ROLE_KV_B].weight, 0, &kv);
    mq_layer_expand(&context, it->unit->rows, scratch->raw_k, scratch->v, scratch->expanded, scratch->kv_a);
}

/* raw_q, raw_k and v again. */
static void project(const mq_back_unit *it)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_linear *linears = it->layer->linears;
    const mq_row_sizes hidden = sizes_of(it, it->back->run->runtime->config.hidden_size);
    if (linears[MQ_ROLE_QKV].cols > 0) {
        mq_linear_forward(scratch->joined, scratch->normed, &linears[MQ_ROLE_QKV].weight, 0, &hidden);
        split(it, scratch->raw_q, scratch->raw_k, scratch->v, scratch->joined, 0);
        return;
    }
    if (linears[MQ_ROLE_KV_A].cols > 0) {
        project_latent(it);
        return;
    }
    mq_linear_forward(scratch->raw_q, scratch->normed, &linears[MQ_ROLE_Q].weight, 0, &hidden);
    mq_linear_forward(scratch->raw_k, scratch->normed, &linears[MQ_ROLE_K].weight, 0, &hidden);
    mq_linear_forward(scratch->v, scratch->normed, &linears[MQ_ROLE_V].weight, 0, &hidden);
}

void mq_backward_attention_again(const mq_back_unit *it)
{
    const mq_config *config = &it->back->run->runtime->config;
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_back_rows rows = rows_of(it);
    const mq_linear_weight *o = &it->layer->linears[MQ_ROLE_O].weight;
    const int64_t kv_heads = mq_dim_of(config, &it->layer->kind, MQ_DIM_KV_HEADS);
    const mq_row_sizes hidden = sizes_of(it, config->hidden_size);
    const mq_row_sizes mixed = sizes_of(it, mq_dim_of(config, &it->layer->kind, MQ_DIM_O));
    memcpy(scratch->middle, it->input, (size_t)(hidden.rows * hidden.width) * mq_dtype_size(hidden.dtype));
    if (it->layer->kind.attention == MQ_BLOCK_NONE) return;
    mq_backward_enter(&rows, MQ_ROLE_INPUT_NORM, scratch->normed, it->input);
    if (it->layer->kind.attention == MQ_BLOCK_LINEAR) {
        const mq_linear_weight *linear = &it->layer->linears[MQ_ROLE_LINEAR_ATTENTION].weight;
        mq_linear_forward(scratch->attended, scratch->normed, linear, 0, &hidden);
        mq_backward_add(&rows, MQ_ROLE_ATTENTION_NORM, scratch->middle, scratch->attended, scratch->d_attended);
        return;
    }
    project(it);
    finish_heads(&rows, it, MQ_ROLE_Q_NORM, scratch->q, scratch->raw_q, config->num_attention_heads);
    finish_heads(&rows, it, MQ_ROLE_K_NORM, scratch->k, scratch->raw_k, kv_heads);
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_attention_args args = attention_of(it, i);
        mq_attention_forward(&args, scratch->attention);
    }
    if (mq_backward_is_added_plainly(&rows, MQ_ROLE_ATTENTION_NORM)) {
        mq_linear_forward(scratch->middle, scratch->mixed, o, 1, &mixed);
    } else {
        mq_linear_forward(scratch->attended, scratch->mixed, o, 0, &mixed);
        mq_backward_add(&rows, MQ_ROLE_ATTENTION_NORM, scratch->middle, scratch->attended, scratch->d_attended);
    }
}

static void attention_back(const mq_back_unit *it)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_config *config = &it->back->run->runtime->config;
    const int64_t k_width = mq_dim_of(config, &it->layer->kind, MQ_DIM_KV);
    const int64_t v_width = mq_dim_of(config, &it->layer->kind, MQ_DIM_V);
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_attention_args args = attention_of(it, i);
        const int64_t row = sequence_of(it, i)->first - it->unit->first;
        mq_attention_gradient gradient = {
            .d_out = scratch->d_mixed + row * args.ldo, .d_q = scratch->d_q + row * args.ldq,
            .d_k = scratch->d_k + row * k_width, .d_v = scratch->d_v + row * v_width,
            .d_sinks = it->back->d_weights[MQ_ROLE_SINKS],
        };
        mq_attention_backward(&gradient, &args, scratch->attention);
    }
}

/* By queries before they grow. */
static void growth_back(const mq_back_unit *it, mq_role norm, float *gradient, int64_t index, int64_t count)
{
    const mq_layer_context context = mq_run_context(it->back->run);
    const mq_sequence *sequence = sequence_of(it, index);
    const mq_row_sizes sizes = {.rows = 1, .width = count * context.config->head_dim, .dtype = MQ_F32};
    const int grown = norm == MQ_ROLE_Q_NORM && it->layer->rope == MQ_LAYER_NO_ROPE && context.config->attention_floor;
    for (int64_t i = 0; grown && i < sequence->tokens; i++)
        mq_scale_forward(gradient + i * sizes.width, (double)mq_layer_growth(&context, i), &sizes);
}

/* By the heads before the norm that follows rope, which are turned once more, into heads. */
static void unit_norm_back(const mq_back_unit *it, const mq_sequence *sequence, float *gradient, void *heads,
                           const void *raw, int64_t count)
{
    const mq_layer_context context = mq_run_context(it->back->run);
    const int64_t width = count * context.config->head_dim;
    const size_t offset = (size_t)((sequence->first - it->unit->first) * width) * mq_dtype_size(context.dtype);
    const mq_rope_sizes sizes = mq_layer_rope(&context, count, sequence);
    const mq_row_sizes rows = {.rows = sequence->tokens * count, .width = sizes.head_dim, .dtype = context.dtype};
    memcpy((char *)heads + offset, (const char *)raw + offset,
           (size_t)(sequence->tokens * width) * mq_dtype_size(context.dtype));
    mq_rope_forward((char *)heads + offset, mq_ropes_of(context.ropes, it->layer->rope, sizes.tokens), &sizes);
    mq_rmsnorm_backward(gradient, gradient, (char *)heads + offset, it->layer->norms[MQ_ROLE_UNIT_NORM],
                        context.config->rms_norm_eps, 0, &rows);
}

/* gradient: by heads at first, then by raw. */
static void heads_back(const mq_back_unit *it, const mq_back_rows *rows, mq_role norm, float *gradient, int64_t count)
{
    const mq_layer_context context = mq_run_context(it->back->run);
    const mq_back_scratch *scratch = &it->back->scratch;
    const int64_t width = count * context.config->head_dim;
    const void *raw = norm == MQ_ROLE_Q_NORM ? scratch->raw_q : scratch->raw_k;
    void *heads = norm == MQ_ROLE_Q_NORM ? scratch->q : scratch->k;
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_sequence *sequence = sequence_of(it, i);
        const mq_rope_sizes sizes = mq_layer_rope(&context, count, sequence);
        const mq_rope_table *table = mq_ropes_of(context.ropes, it->layer->rope, sizes.tokens);
        float *at = gradient + (sequence->first - it->unit->first) * width;
        growth_back(it, norm, at, i, count);
        if (table != NULL && it->layer->norms[MQ_ROLE_UNIT_NORM] != NULL)
            unit_norm_back(it, sequence, at, heads, raw, count);
        if (table != NULL) mq_rope_backward(at, table, &sizes);
    }
    mq_back_norm back = {.in = raw, .d_out = gradient, .d_in = gradient, .width = width};
    if (it->layer->norms[norm] != NULL) mq_backward_norm(rows, norm, &back);
}

/* d_expanded, and the end of d_kv_a, from d_k and d_v: mq_layer_expand the other way round. */
static void expand_back(const mq_back_unit *it)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_config *config = &it->back->run->runtime->config;
    const int64_t heads = config->num_attention_heads, turned = config->qk_rope_head_dim;
    const int64_t value = config->value_head_dim, plain = config->head_dim - turned, lora = config->kv_lora_rank;
    const int64_t rows = it->unit->rows;
    mq_columns columns = {.to = scratch->d_expanded, .from = scratch->d_k, .ld_to = plain + value, .dtype = MQ_F32,
                          .ld_from = config->head_dim, .width = plain, .rows = rows * heads};
    mq_columns_copy(&columns);
    columns.to = scratch->d_expanded + plain;
    columns.from = scratch->d_v;
    columns.ld_from = columns.width = value;
    mq_columns_copy(&columns);
    for (int64_t h = 0; h < heads; h++) {
        const mq_columns part = {.to = scratch->d_kv_a + lora, .from = scratch->d_k + h * config->head_dim + plain,
                                 .ld_to = lora + turned, .ld_from = heads * config->head_dim, .width = turned,
                                 .rows = rows, .dtype = MQ_F32};
        if (h == 0) mq_columns_copy(&part);
        else mq_columns_add(&part);
    }
}

static int latent_queries_back(const mq_back_unit *it, const mq_back_rows *rows)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    mq_back_linear q = {.in = scratch->normed, .out = scratch->raw_q, .d_out = scratch->d_q, .d_in = scratch->d_normed};
    mq_back_linear b = {.in = scratch->q_latent, .out = scratch->raw_q, .d_out = scratch->d_q, .d_in = scratch->d_q_a};
    mq_back_linear a = {.in = scratch->normed, .out = scratch->q_a, .d_out = scratch->d_q_a, .d_in = scratch->d_normed};
    const mq_back_norm norm = {.in = scratch->q_a, .d_out = scratch->d_q_a, .d_in = scratch->d_q_a,
                               .width = it->back->run->runtime->config.q_lora_rank};
    if (it->layer->linears[MQ_ROLE_Q_A].cols == 0) return mq_backward_linear(rows, MQ_ROLE_Q, &q);
    const int rc = mq_backward_linear(rows, MQ_ROLE_Q_B, &b);
    if (rc != MQ_OK) return rc;
    mq_backward_norm(rows, MQ_ROLE_Q_A_NORM, &norm);
    return mq_backward_linear(rows, MQ_ROLE_Q_A, &a);
}

static int latent_back(const mq_back_unit *it, const mq_back_rows *rows)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    const int64_t lora = it->back->run->runtime->config.kv_lora_rank;
    mq_back_linear b = {.in = scratch->kv_latent, .out = scratch->expanded, .d_out = scratch->d_expanded,
                        .d_in = scratch->d_kv_latent};
    mq_back_linear a = {.in = scratch->normed, .out = scratch->kv_a, .d_out = scratch->d_kv_a,
                        .d_in = scratch->d_normed, .accumulate = 1};
    const mq_back_norm norm = {.in = scratch->kv_raw, .d_out = scratch->d_kv_latent, .d_in = scratch->d_kv_latent,
                               .width = lora};
    const mq_columns latent = {.to = scratch->d_kv_a, .from = scratch->d_kv_latent, .ld_from = lora, .width = lora,
                               .ld_to = it->layer->linears[MQ_ROLE_KV_A].rows, .rows = rows->rows, .dtype = MQ_F32};
    int rc = latent_queries_back(it, rows);
    if (rc != MQ_OK) return rc;
    expand_back(it);
    rc = mq_backward_linear(rows, MQ_ROLE_KV_B, &b);
    if (rc != MQ_OK) return rc;
    mq_backward_norm(rows, MQ_ROLE_KV_A_NORM, &norm);
    mq_columns_copy(&latent);
    return mq_backward_linear(rows, MQ_ROLE_KV_A, &a);
}

/* d_normed from d_q, d_k and d_v, by raw. */
static int project_back(const mq_back_unit *it, const mq_back_rows *rows)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    mq_back_linear q = {.in = scratch->normed, .out = scratch->raw_q, .d_out = scratch->d_q, .d_in = scratch->d_normed};
    mq_back_linear k = {.in = scratch->normed, .out = scratch->raw_k, .d_out = scratch->d_k, .d_in = scratch->d_normed,
                        .accumulate = 1};
    mq_back_linear v = {.in = scratch->normed, .out = scratch->v, .d_out = scratch->d_v, .d_in = scratch->d_normed,
                        .accumulate = 1};
    mq_back_linear joined = {.in = scratch->normed, .out = scratch->joined, .d_out = scratch->d_joined,
                             .d_in = scratch->d_normed};
    if (it->layer->linears[MQ_ROLE_QKV].cols > 0) {
        split(it, scratch->d_q, scratch->d_k, scratch->d_v, scratch->d_joined, 1);
        return mq_backward_linear(rows, MQ_ROLE_QKV, &joined);
    }
    if (it->layer->linears[MQ_ROLE_KV_A].cols > 0) return latent_back(it, rows);
    int rc = mq_backward_linear(rows, MQ_ROLE_Q, &q);
    if (rc == MQ_OK) rc = mq_backward_linear(rows, MQ_ROLE_K, &k);
    if (rc == MQ_OK) rc = mq_backward_linear(rows, MQ_ROLE_V, &v);
    return rc;
}

/* A linear in the place of the attention. */
static int linear_back(const mq_back_unit *it, const mq_back_rows *rows)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    mq_back_linear linear = {
        .in = scratch->normed, .out = scratch->attended, .d_in = scratch->d_normed,
        .d_out = mq_backward_added(rows, MQ_ROLE_ATTENTION_NORM, scratch->attended, it->gradient, scratch->d_attended),
    };
    const int rc = mq_backward_linear(rows, MQ_ROLE_LINEAR_ATTENTION, &linear);
    if (rc == MQ_OK) mq_backward_leave(rows, MQ_ROLE_INPUT_NORM, it->input, scratch->d_normed, it->gradient);
    return rc;
}

int mq_backward_attention(const mq_back_unit *it)
{
    const mq_config *config = &it->back->run->runtime->config;
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_linear *o = &it->layer->linears[MQ_ROLE_O];
    const mq_back_rows rows = rows_of(it);
    const mq_row_sizes mixed = sizes_of(it, mq_dim_of(config, &it->layer->kind, MQ_DIM_O));
    if (it->layer->kind.attention == MQ_BLOCK_NONE) return MQ_OK;
    if (it->layer->kind.attention == MQ_BLOCK_LINEAR) return linear_back(it, &rows);
    if (o->observer != NULL) mq_linear_forward(scratch->attended, scratch->mixed, &o->weight, 0, &mixed);
    mq_back_linear out = {
        .in = scratch->mixed, .out = scratch->attended, .d_in = scratch->d_mixed,
        .d_out = mq_backward_added(&rows, MQ_ROLE_ATTENTION_NORM, scratch->attended, it->gradient, scratch->d_attended),
    };
    int rc = mq_backward_linear(&rows, MQ_ROLE_O, &out);
    if (rc != MQ_OK) return rc;
    attention_back(it);
    heads_back(it, &rows, MQ_ROLE_Q_NORM, scratch->d_q, config->num_attention_heads);
    heads_back(it, &rows, MQ_ROLE_K_NORM, scratch->d_k, mq_dim_of(config, &it->layer->kind, MQ_DIM_KV_HEADS));
    rc = project_back(it, &rows);
    if (rc == MQ_OK) mq_backward_leave(&rows, MQ_ROLE_INPUT_NORM, it->input, scratch->d_normed, it->gradient);
    return rc;
}
