/* The attention half of a layer, again and back: middle = input + o_proj(attention(q, k, v of norm(input))). */
#include <string.h>

#include "model/backward.h"

static mq_row_sizes sizes_of(const mq_back_unit *it, int64_t width)
{
    return (mq_row_sizes){.rows = it->unit->rows, .width = width, .dtype = it->back->run->runtime->dtype};
}

static int64_t q_width(const mq_config *config)
{
    return config->num_attention_heads * config->head_dim;
}

static int64_t kv_width(const mq_config *config)
{
    return config->num_key_value_heads * config->head_dim;
}

static const mq_sequence *sequence_of(const mq_back_unit *it, int64_t index)
{
    return &it->back->run->sequences[it->unit->first_sequence + index];
}

static mq_rope_sizes rope_sizes(const mq_back_unit *it, int64_t index, int64_t heads)
{
    const mq_runtime *runtime = it->back->run->runtime;
    return (mq_rope_sizes){.tokens = sequence_of(it, index)->tokens, .heads = heads,
                           .head_dim = runtime->config.head_dim, .dtype = runtime->dtype};
}

/* heads = rope(norm(raw)), of q or k. */
static void finish_heads(const mq_back_unit *it, mq_role norm, void *heads, const void *raw, int64_t count)
{
    const mq_config *config = &it->back->run->runtime->config;
    const float *weight = it->layer->norms[norm];
    const mq_row_sizes whole = sizes_of(it, count * config->head_dim);
    const mq_row_sizes sizes = {.rows = whole.rows * count, .width = config->head_dim, .dtype = whole.dtype};
    const size_t stride = (size_t)whole.width * mq_dtype_size(whole.dtype);
    if (weight == NULL) memcpy(heads, raw, (size_t)whole.rows * stride);
    else mq_rmsnorm_forward(heads, raw, weight, config->rms_norm_eps, &sizes);
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_rope_sizes rope = rope_sizes(it, i, count);
        char *at = (char *)heads + (size_t)(sequence_of(it, i)->first - it->unit->first) * stride;
        mq_rope_forward(at, &it->back->run->rope, &rope);
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
    mq_attention_args args = mq_layer_attention(&context, it->layer->window, sequence->tokens);
    args.q = (const char *)scratch->q + row * (size_t)args.ldq * size;
    args.k = (const char *)scratch->k + row * (size_t)args.ldk * size;
    args.v = (const char *)scratch->v + row * (size_t)args.ldv * size;
    args.out = (char *)scratch->mixed + row * (size_t)args.ldo * size;
    args.key_mask = context.key_mask ? context.key_mask + sequence->first : NULL;
    args.maxima = scratch->maxima + row * (size_t)args.heads;
    args.factors = scratch->factors + row * (size_t)args.heads;
    return args;
}

void mq_backward_attention_again(const mq_back_unit *it)
{
    const mq_config *config = &it->back->run->runtime->config;
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_linear *linears = it->layer->linears;
    const mq_row_sizes hidden = sizes_of(it, config->hidden_size), mixed = sizes_of(it, q_width(config));
    mq_rmsnorm_forward(scratch->normed, it->input, it->layer->norms[MQ_ROLE_INPUT_NORM], config->rms_norm_eps, &hidden);
    mq_linear_forward(scratch->raw_q, scratch->normed, &linears[MQ_ROLE_Q].weight, 0, &hidden);
    mq_linear_forward(scratch->raw_k, scratch->normed, &linears[MQ_ROLE_K].weight, 0, &hidden);
    mq_linear_forward(scratch->v, scratch->normed, &linears[MQ_ROLE_V].weight, 0, &hidden);
    finish_heads(it, MQ_ROLE_Q_NORM, scratch->q, scratch->raw_q, config->num_attention_heads);
    finish_heads(it, MQ_ROLE_K_NORM, scratch->k, scratch->raw_k, config->num_key_value_heads);
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_attention_args args = attention_of(it, i);
        mq_attention_forward(&args, scratch->attention);
    }
    memcpy(scratch->middle, it->input, (size_t)(hidden.rows * hidden.width) * mq_dtype_size(hidden.dtype));
    mq_linear_forward(scratch->middle, scratch->mixed, &linears[MQ_ROLE_O].weight, 1, &mixed);
}

static void attention_back(const mq_back_unit *it)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_config *config = &it->back->run->runtime->config;
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_attention_args args = attention_of(it, i);
        const int64_t row = sequence_of(it, i)->first - it->unit->first;
        mq_attention_gradient gradient = {
            .d_out = scratch->d_mixed + row * q_width(config), .d_q = scratch->d_q + row * q_width(config),
            .d_k = scratch->d_k + row * kv_width(config), .d_v = scratch->d_v + row * kv_width(config),
        };
        mq_attention_backward(&gradient, &args, scratch->attention);
    }
}

/* gradient: by heads at first, then by raw. */
static void heads_back(const mq_back_unit *it, const mq_back_rows *rows, mq_role norm, float *gradient, int64_t count)
{
    const mq_run *run = it->back->run;
    const int64_t head_dim = run->runtime->config.head_dim;
    for (int64_t i = 0; i < it->unit->sequences; i++) {
        const mq_rope_sizes rope = rope_sizes(it, i, count);
        const int64_t row = sequence_of(it, i)->first - it->unit->first;
        mq_rope_backward(gradient + row * count * head_dim, &run->rope, &rope);
    }
    const void *raw = norm == MQ_ROLE_Q_NORM ? it->back->scratch.raw_q : it->back->scratch.raw_k;
    mq_back_norm back = {.in = raw, .d_out = gradient, .d_in = gradient, .heads = count, .width = head_dim};
    if (it->layer->norms[norm] != NULL) mq_backward_norm(rows, norm, &back);
}

int mq_backward_attention(const mq_back_unit *it)
{
    const mq_config *config = &it->back->run->runtime->config;
    const mq_back_scratch *scratch = &it->back->scratch;
    const mq_linear *o = &it->layer->linears[MQ_ROLE_O];
    const mq_back_rows rows = {.back = it->back, .layer = it->layer, .first = it->unit->first, .rows = it->unit->rows,
                               .expert = -1, .err = it->err};
    const mq_row_sizes mixed = sizes_of(it, q_width(config));
    if (o->observer != NULL) mq_linear_forward(scratch->attended, scratch->mixed, &o->weight, 0, &mixed);
    mq_back_linear out = {.in = scratch->mixed, .out = scratch->attended, .d_out = it->gradient,
                          .d_in = scratch->d_mixed};
    mq_back_linear q = {.in = scratch->normed, .out = scratch->raw_q, .d_out = scratch->d_q, .d_in = scratch->d_normed};
    mq_back_linear k = {.in = scratch->normed, .out = scratch->raw_k, .d_out = scratch->d_k, .d_in = scratch->d_normed,
                        .accumulate = 1};
    mq_back_linear v = {.in = scratch->normed, .out = scratch->v, .d_out = scratch->d_v, .d_in = scratch->d_normed,
                        .accumulate = 1};
    mq_back_norm norm = {.in = it->input, .d_out = scratch->d_normed, .d_in = it->gradient, .accumulate = 1, .heads = 1,
                         .width = config->hidden_size};
    int rc = mq_backward_linear(&rows, MQ_ROLE_O, &out);
    if (rc != MQ_OK) return rc;
    attention_back(it);
    heads_back(it, &rows, MQ_ROLE_Q_NORM, scratch->d_q, config->num_attention_heads);
    heads_back(it, &rows, MQ_ROLE_K_NORM, scratch->d_k, config->num_key_value_heads);
    rc = mq_backward_linear(&rows, MQ_ROLE_Q, &q);
    if (rc == MQ_OK) rc = mq_backward_linear(&rows, MQ_ROLE_K, &k);
    if (rc == MQ_OK) rc = mq_backward_linear(&rows, MQ_ROLE_V, &v);
    if (rc == MQ_OK) mq_backward_norm(&rows, MQ_ROLE_INPUT_NORM, &norm);
    return rc;
}
