/* x += attention(norm(x)); x += mlp(norm(x)): the decoder layer that the families of archs.def share; some have no
 * norm of what a half reads, some one of what it adds. With experts, the second half is a choice of experts for each
 * row, and then each expert's part (run_experts.c). layer_attention.c and layer_mlp.c say in which order the operations
 * of ops.h come, and pass.c where quantizers and calibrators look on. */
#include "model/layer.h"

#include <stdio.h>
#include <string.h>

#include "core/alloc.h"
#include "model/pass.h"

/* Rows of the MLP half done at a time: few enough that the gate's and up's outputs stay in L2 (a fifth faster), but
 * many where the weights would have to come from memory again for each piece. Also bounds the scratch. */
enum { MLP_FEW_ROWS = 256, MLP_MANY_ROWS = 512, MLP_CACHED_BYTES = 4 << 20 };

static int64_t mlp_piece(const mq_config *config, mq_dtype dtype)
{
    int64_t nbytes = config->hidden_size * config->intermediate_size * (int64_t)mq_dtype_size(dtype);
    return nbytes <= MLP_CACHED_BYTES && config->num_experts == 0 ? MLP_FEW_ROWS : MLP_MANY_ROWS;
}

static void enter_rows(mq_pass *pass, int64_t first, int64_t rows)
{
    const uint8_t *mask = pass->context->count_mask;
    pass->first = first;
    pass->rows = rows;
    pass->count_mask = mask ? mask + first : NULL;
}

int mq_layer_forward(mq_layer *layer, const mq_layer_context *context, const mq_unit *unit, void *hidden,
                     const mq_scratch *scratch, mq_error *err)
{
    mq_pass pass = {.layer = layer, .context = context, .err = err};
    size_t stride = (size_t)context->config->hidden_size * mq_dtype_size(context->dtype);
    enter_rows(&pass, unit->first, unit->rows);
    int rc = layer->kind.attention != MQ_BLOCK_NONE ? mq_pass_attention_half(&pass, unit, hidden, scratch) : MQ_OK;
    if (layer->experts == 0 && layer->kind.mlp == MQ_BLOCK_NONE) return rc;
    const int64_t most = mlp_piece(context->config, context->dtype);
    for (int64_t done = 0; rc == MQ_OK && done < unit->rows; done += most) {
        void *piece = (char *)hidden + (size_t)done * stride;
        enter_rows(&pass, unit->first + done, MQ_MIN(most, unit->rows - done));
        rc = layer->experts > 0 ? mq_pass_route_half(&pass, piece, scratch) : mq_pass_mlp_half(&pass, piece, scratch);
    }
    return rc;
}

/* Takes the next buffer of `count` elements of size bytes, at a cache line; a NULL memory only counts. */
static void *carve(const mq_scratch *scratch, size_t *used, int64_t count, size_t size)
{
    void *at = scratch->memory ? scratch->memory + *used : NULL;
    *used += MQ_ROUND_UP((size_t)count * size, (size_t)MQ_ALIGNMENT);
    return at;
}

static size_t attention_nbytes(const mq_layer_context *context, int64_t tokens)
{
    mq_attention_args args = mq_layer_attention(context, NULL, tokens);
    if (context->cache == NULL) return mq_attention_scratch(&args);
    args.T_kv = context->cache->capacity;
    const size_t one = mq_attention_step_scratch(&args);
    return tokens == 1 ? one : MQ_MAX(one, mq_attention_scratch(&args));
}

/* The attention half's buffers; returns what they take. */
static size_t cut_attention(mq_scratch *scratch, const mq_layer_context *context, int64_t rows, int64_t tokens)
{
    const mq_config *config = context->config;
    const int64_t hidden = config->hidden_size, q_width = config->num_attention_heads * config->head_dim;
    const int64_t out = config->num_attention_heads * config->value_head_dim;
    const int64_t k_width = config->num_key_value_heads * config->head_dim;
    const int64_t v_width = config->num_key_value_heads * config->value_head_dim;
    const int64_t narrow = MQ_MAX(config->q_lora_rank, mq_dim_of(config, NULL, MQ_DIM_KV_A));
    const int64_t widest = MQ_MAX(MQ_MAX(hidden, out), narrow), latent = config->kv_lora_rank > 0;
    const size_t size = mq_dtype_size(context->dtype);
    size_t used = 0;
    /* The attention's output takes the place of the norm's, which is read for the last time before. */
    scratch->normed = scratch->mixed = carve(scratch, &used, rows * widest, size);
    scratch->q = carve(scratch, &used, rows * q_width, size);
    scratch->k = carve(scratch, &used, rows * k_width, size);
    scratch->v = carve(scratch, &used, rows * v_width, size);
    const int64_t joined = context->fused ? q_width + k_width + v_width : latent ? narrow : 0;
    scratch->joined = carve(scratch, &used, rows * joined, size);
    scratch->latent = carve(scratch, &used, rows * config->kv_lora_rank, size);
    scratch->expanded = carve(scratch, &used, latent ? rows * mq_dim_of(config, NULL, MQ_DIM_KV_B) : 0, size);
    scratch->attention = carve(scratch, &used, (int64_t)attention_nbytes(context, tokens), 1);
    scratch->quantized = carve(scratch, &used, rows * widest, size);
    scratch->temporary = carve(scratch, &used, rows * hidden, size);
    scratch->prepared = carve(scratch, &used, context->rank > 0 ? rows * widest : 0, size);
    scratch->low = carve(scratch, &used, rows * context->rank, size);
    return used;
}

static size_t cut_mlp(mq_scratch *scratch, const mq_layer_context *context, int64_t rows)
{
    const mq_config *config = context->config;
    const int64_t hidden = config->hidden_size, experts = config->num_experts;
    const int64_t expert = MQ_MAX(config->moe_intermediate_size, config->shared_intermediate_size);
    const int64_t inner = MQ_MAX(config->intermediate_size, experts > 0 ? expert : 0), widest = MQ_MAX(hidden, inner);
    const size_t size = mq_dtype_size(context->dtype);
    size_t used = 0;
    scratch->mlp_normed = carve(scratch, &used, rows * hidden, size);
    scratch->gate = carve(scratch, &used, rows * inner, size);
    scratch->up = carve(scratch, &used, rows * inner, size);
    scratch->mlp_joined = carve(scratch, &used, context->fused ? 2 * rows * inner : 0, size);
    scratch->mlp_quantized = carve(scratch, &used, rows * widest, size);
    scratch->mlp_temporary = carve(scratch, &used, rows * hidden, size);
    scratch->mlp_prepared = carve(scratch, &used, context->rank > 0 ? rows * widest : 0, size);
    scratch->mlp_low = carve(scratch, &used, rows * context->rank, size);
    scratch->router = carve(scratch, &used, rows * experts, size);
    scratch->factors = carve(scratch, &used, experts > 0 ? rows : 0, sizeof(float));
    scratch->count_mask = carve(scratch, &used, experts > 0 ? rows : 0, 1);
    scratch->mlp_rows = rows;
    return used;
}

size_t mq_scratch_init(mq_scratch *scratch, const mq_layer_context *context, int64_t rows, int64_t tokens)
{
    const size_t attention = cut_attention(scratch, context, rows, tokens);
    const size_t mlp = cut_mlp(scratch, context, MQ_MIN(rows, mlp_piece(context->config, context->dtype)));
    scratch->nbytes = MQ_MAX(attention, mlp);
    return scratch->nbytes;
}

static int check_point(const mq_point *point, int64_t width, const char *module, const char *what, mq_error *err)
{
    char name[256];
    if (point->quantizer == NULL || !mq_quantizer_acts(point->quantizer)) return MQ_OK;
    snprintf(name, sizeof name, "%s.%s", module, what);
    return mq_quantizer_ready(point->quantizer, -1, width, name, err);
}

int mq_layer_check(const mq_layer *layer, const mq_config *config, mq_error *err)
{
    const int64_t k_width = mq_dim_of(config, &layer->kind, MQ_DIM_KV);
    const int64_t v_width = mq_dim_of(config, &layer->kind, MQ_DIM_V);
    int rc = MQ_OK;
    for (int role = 0; rc == MQ_OK && role < MQ_ROLE_COUNT; role++) {
        const mq_linear *linear = &layer->linears[role];
        if (linear->cols == 0 || mq_role_is_router((mq_role)role)) continue;
        rc = check_point(&linear->input, linear->cols, linear->name, "input_quantizer", err);
        if (rc == MQ_OK) rc = check_point(&linear->output, linear->rows, linear->name, "output_quantizer", err);
    }
    if (rc == MQ_OK)
        rc = check_point(&layer->q, config->num_attention_heads * config->head_dim, layer->attention_name,
                         "q_bmm_quantizer", err);
    if (rc == MQ_OK) rc = check_point(&layer->k, k_width, layer->attention_name, "k_bmm_quantizer", err);
    if (rc == MQ_OK) rc = check_point(&layer->v, v_width, layer->attention_name, "v_bmm_quantizer", err);
    return rc;
}

size_t mq_layer_points(mq_layer *layer, mq_point **out)
{
    size_t count = 0;
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        if (layer->linears[role].cols == 0 || mq_role_is_router((mq_role)role)) continue;
        out[count++] = &layer->linears[role].input;
        out[count++] = &layer->linears[role].output;
    }
    out[count++] = &layer->q;
    out[count++] = &layer->k;
    out[count++] = &layer->v;
    return count;
}
