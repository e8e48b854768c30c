#include "model/backward.h"

#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"

/* Rows of the MLP at a time. */
enum { PIECE = 512 };

int mq_backward_init(mq_backward *back, mq_run *run, const mq_weight_gradient *wanted, size_t count, mq_error *err)
{
    const int64_t layers = run->runtime->config.num_hidden_layers;
    const size_t nbytes = (size_t)(run->rows * run->runtime->config.hidden_size) * sizeof(float);
    memset(back, 0, sizeof *back);
    if (run->next_layer != layers)
        return mq_fail(err, MQ_ERR_STATE, "backward: the run has not been through all layers (next is %lld of %lld)",
                       (long long)run->next_layer, (long long)layers);
    if (run->onlooking > run->runtime->config.num_experts_per_tok)
        return mq_fail(err, MQ_ERR_STATE, "backward: the run was started for experts that only look on");
    back->run = run;
    back->wanted = wanted;
    back->wanted_count = count;
    back->next = layers;
    back->gradient = mq_alloc(nbytes);
    return back->gradient ? MQ_OK : mq_fail_memory(err, "the gradients of the hidden states", nbytes);
}

void mq_backward_drop(mq_backward *back)
{
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        mq_free(back->weights[role].data);
        back->weights[role] = (mq_packed){.data = NULL};
        back->d_weights[role] = back->d_biases[role] = NULL;
    }
}

void mq_backward_free(mq_backward *back)
{
    mq_elsewhere *there = back->run != NULL ? back->run->runtime->elsewhere : NULL;
    if (there != NULL) there->forget_backward(there, back);
    mq_backward_drop(back);
    mq_free(back->gradient);
    mq_free(back->d_experts);
    mq_free(back->d_shares);
    mq_free(back->scratch.memory);
    memset(back, 0, sizeof *back);
}

size_t mq_backward_nbytes(const mq_backward *back)
{
    const mq_run *run = back->run;
    const size_t hidden = (size_t)(run->rows * run->runtime->config.hidden_size) * sizeof(float);
    size_t total = hidden + back->scratch.nbytes;
    if (back->d_experts != NULL)
        total += hidden + (size_t)(run->rows * run->runtime->config.num_experts_per_tok) * sizeof(float);
    return total;
}

float *mq_backward_wanted(const mq_backward *back, const char *name)
{
    for (size_t i = 0; *name != '\0' && i < back->wanted_count; i++)
        if (strcmp(back->wanted[i].name, name) == 0) return back->wanted[i].values;
    return NULL;
}

int mq_backward_poll(const mq_backward *back, mq_error *err)
{
    int rc = back->run->poll ? back->run->poll(back->run->poll_context) : MQ_OK;
    return rc == MQ_OK ? rc : mq_fail(err, rc, "interrupted");
}

int mq_backward_load(mq_backward *back, int64_t layer, int64_t expert, const mq_named_tensor *tensors, size_t count,
                     mq_error *err)
{
    const mq_runtime *runtime = back->run->runtime;
    int rc = MQ_OK;
    for (size_t i = runtime->layer_start[layer]; rc == MQ_OK && i < runtime->layer_start[layer + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        if (module->weight[0] == '\0' || module->expert != expert) continue;
        back->d_weights[module->role] = mq_backward_wanted(back, module->weight);
        back->d_biases[module->role] = mq_backward_wanted(back, module->bias);
        if (module->kind == MQ_MODULE_NORM || module->kind == MQ_MODULE_VECTOR) continue;
        const mq_tensor *weight = mq_find_tensor(tensors, count, module->weight, module->shape, 2, err);
        if (weight == NULL) return err->code;
        if (runtime->elsewhere != NULL) continue;
        mq_packed *packed = &back->weights[module->role];
        mq_free(packed->data);
        packed->data = NULL;
        rc = mq_linear_load_backward(packed, weight, runtime->gemm, module->weight, err);
    }
    return rc;
}

/* The next buffer of `count` elements of size bytes, at a cache line; a NULL memory only counts. */
static void *carve(const mq_back_scratch *scratch, size_t *used, int64_t count, size_t size)
{
    void *at = scratch->memory ? scratch->memory + *used : NULL;
    *used += MQ_ROUND_UP((size_t)count * size, (size_t)MQ_ALIGNMENT);
    return at;
}

/* What lives while both halves of a unit are on their way. */
static size_t cut_unit(mq_back_scratch *scratch, const mq_layer_context *context, int64_t n)
{
    const mq_config *config = context->config;
    const int64_t hidden = config->hidden_size, q_width = mq_dim_of(config, NULL, MQ_DIM_Q);
    const size_t size = mq_dtype_size(context->dtype), single = sizeof(float);
    size_t used = 0;
    scratch->normed = carve(scratch, &used, n * hidden, size);
    scratch->raw_q = carve(scratch, &used, n * q_width, size);
    scratch->raw_k = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_KV), size);
    scratch->q = carve(scratch, &used, n * q_width, size);
    scratch->k = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_KV), size);
    scratch->v = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_V), size);
    scratch->joined = carve(scratch, &used, context->fused ? n * mq_dim_of(config, NULL, MQ_DIM_QKV) : 0, size);
    const int64_t latent = config->kv_lora_rank > 0 ? n : 0;
    scratch->q_a = carve(scratch, &used, latent * config->q_lora_rank, size);
    scratch->q_latent = carve(scratch, &used, latent * config->q_lora_rank, size);
    scratch->kv_a = carve(scratch, &used, latent * mq_dim_of(config, NULL, MQ_DIM_KV_A), size);
    scratch->kv_raw = carve(scratch, &used, latent * config->kv_lora_rank, size);
    scratch->kv_latent = carve(scratch, &used, latent * config->kv_lora_rank, size);
    scratch->expanded = carve(scratch, &used, latent * mq_dim_of(config, NULL, MQ_DIM_KV_B), size);
    scratch->mixed = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_O), size);
    scratch->attended = carve(scratch, &used, n * hidden, size);
    scratch->middle = carve(scratch, &used, n * hidden, size);
    scratch->maxima = carve(scratch, &used, n * config->num_attention_heads, single);
    scratch->factors = carve(scratch, &used, n * config->num_attention_heads, single);
    return used;
}

static size_t cut_attention(mq_back_scratch *scratch, const mq_layer_context *context, const mq_run *run, size_t used)
{
    const mq_config *config = context->config;
    const mq_attention_args args = mq_layer_attention(context, NULL, run->longest);
    const int64_t n = run->largest_unit, hidden = config->hidden_size;
    const size_t single = sizeof(float);
    const size_t needed = MQ_MAX(mq_attention_scratch(&args), mq_attention_backward_scratch(&args));
    scratch->attention = carve(scratch, &used, (int64_t)needed, 1);
    scratch->d_normed = carve(scratch, &used, n * hidden, single);
    scratch->d_q = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_Q), single);
    scratch->d_k = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_KV), single);
    scratch->d_v = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_V), single);
    scratch->d_joined = carve(scratch, &used, context->fused ? n * mq_dim_of(config, NULL, MQ_DIM_QKV) : 0, single);
    const int64_t latent = config->kv_lora_rank > 0 ? n : 0;
    scratch->d_q_a = carve(scratch, &used, latent * config->q_lora_rank, single);
    scratch->d_kv_a = carve(scratch, &used, latent * mq_dim_of(config, NULL, MQ_DIM_KV_A), single);
    scratch->d_kv_latent = carve(scratch, &used, latent * config->kv_lora_rank, single);
    scratch->d_expanded = carve(scratch, &used, latent * mq_dim_of(config, NULL, MQ_DIM_KV_B), single);
    scratch->d_mixed = carve(scratch, &used, n * mq_dim_of(config, NULL, MQ_DIM_O), single);
    scratch->d_attended = carve(scratch, &used, n * hidden, single);
    return used;
}

static size_t cut_mlp(mq_back_scratch *scratch, const mq_layer_context *context, size_t used)
{
    const mq_config *config = context->config;
    const int64_t m = scratch->piece, hidden = config->hidden_size, experts = config->num_experts;
    const int64_t expert = MQ_MAX(config->moe_intermediate_size, config->shared_intermediate_size);
    const int64_t inner = MQ_MAX(config->intermediate_size, experts > 0 ? expert : 0);
    const size_t size = mq_dtype_size(context->dtype), single = sizeof(float);
    scratch->mlp_normed = carve(scratch, &used, m * hidden, size);
    scratch->gate = carve(scratch, &used, m * inner, size);
    scratch->up = carve(scratch, &used, m * inner, size);
    scratch->mlp_joined = carve(scratch, &used, context->fused ? 2 * m * inner : 0, size);
    scratch->product = carve(scratch, &used, m * inner, size);
    scratch->output = carve(scratch, &used, m * hidden, size);
    scratch->router = carve(scratch, &used, m * experts, size);
    scratch->d_mlp_normed = carve(scratch, &used, m * hidden, single);
    scratch->d_gate = carve(scratch, &used, m * inner, single);
    scratch->d_up = carve(scratch, &used, m * inner, single);
    scratch->d_mlp_joined = carve(scratch, &used, context->fused ? 2 * m * inner : 0, single);
    scratch->d_output = carve(scratch, &used, m * hidden, single);
    scratch->d_shares = carve(scratch, &used, m, single);
    scratch->shared = carve(scratch, &used, m, single);
    scratch->d_router = carve(scratch, &used, m * experts, single);
    return used;
}

/* Cuts scratch->memory; returns how much there must be. */
static size_t cut(mq_back_scratch *scratch, const mq_run *run)
{
    const mq_layer_context context = mq_run_context(run);
    scratch->piece = MQ_MIN(run->largest_unit, (int64_t)PIECE);
    const size_t used = cut_unit(scratch, &context, run->largest_unit);
    const size_t attention = cut_attention(scratch, &context, run, used), mlp = cut_mlp(scratch, &context, used);
    return MQ_MAX(attention, mlp);
}

int mq_backward_reserve(mq_backward *back, mq_error *err)
{
    mq_back_scratch *scratch = &back->scratch;
    if (scratch->memory != NULL || back->run->runtime->elsewhere != NULL) return MQ_OK;
    scratch->nbytes = cut(scratch, back->run);
    scratch->memory = mq_alloc(scratch->nbytes);
    if (scratch->memory == NULL) return mq_fail_memory(err, "scratch of the way back", scratch->nbytes);
    cut(scratch, back->run);
    return MQ_OK;
}

static int observe(const mq_back_rows *rows, const mq_linear *linear, const mq_back_linear *it)
{
    const mq_run *run = rows->back->run;
    mq_observed observed = {
        .input = it->in, .output = it->out, .gradient = it->d_out, .dtype = run->runtime->dtype,
        .output_dtype = run->runtime->dtype, .rows = rows->rows, .columns = linear->cols, .width = linear->rows,
        .outputs = linear->rows, .first = rows->first, .total = run->rows, .expert = -1,
    };
    return linear->observer->see(linear->observer, &observed, rows->err);
}

int mq_backward_linear(const mq_back_rows *rows, mq_role role, const mq_back_linear *it)
{
    const mq_backward *back = rows->back;
    const mq_linear *linear = &rows->layer->linears[role];
    const mq_row_sizes sizes = {.rows = rows->rows, .width = linear->cols, .dtype = back->run->runtime->dtype};
    int rc = MQ_OK;
    if (linear->observer != NULL && rows->expert < 0) rc = observe(rows, linear, it);
    if (rc == MQ_OK && back->d_weights[role] != NULL)
        rc = mq_linear_weight_backward(back->d_weights[role], it->d_out, it->in, linear->rows, &sizes, rows->err);
    if (rc != MQ_OK) return rc;
    if (back->d_biases[role] != NULL) mq_bias_backward(back->d_biases[role], it->d_out, rows->rows, linear->rows);
    mq_linear_backward(it->d_in, it->d_out, &back->weights[role], it->accumulate, rows->rows);
    return MQ_OK;
}

void mq_backward_norm(const mq_back_rows *rows, mq_role role, const mq_back_norm *it)
{
    const mq_backward *back = rows->back;
    const double eps = mq_norm_eps(&back->run->runtime->config, role);
    const int64_t width = rows->layer->widths[role];
    const mq_row_sizes sizes = {.rows = rows->rows * (it->width / width), .width = width,
                                .dtype = back->run->runtime->dtype};
    if (back->d_weights[role] != NULL)
        mq_rmsnorm_weight_backward(back->d_weights[role], it->d_out, it->in, eps, &sizes);
    mq_rmsnorm_backward(it->d_in, it->d_out, it->in, rows->layer->norms[role], eps, it->accumulate, &sizes);
}

static mq_row_sizes hidden_sizes(const mq_back_rows *rows, mq_dtype dtype)
{
    return (mq_row_sizes){.rows = rows->rows, .width = rows->back->run->runtime->config.hidden_size, .dtype = dtype};
}

void mq_backward_enter(const mq_back_rows *rows, mq_role norm, void *out, const void *in)
{
    const mq_row_sizes sizes = hidden_sizes(rows, rows->back->run->runtime->dtype);
    const float *weight = rows->layer->norms[norm];
    if (weight != NULL) mq_rmsnorm_forward(out, in, weight, rows->back->run->runtime->config.rms_norm_eps, &sizes);
    else if (out != in) memcpy(out, in, (size_t)(sizes.rows * sizes.width) * mq_dtype_size(sizes.dtype));
}

void mq_backward_leave(const mq_back_rows *rows, mq_role norm, const void *in, float *d_out, float *gradient)
{
    const mq_row_sizes sizes = hidden_sizes(rows, MQ_F32);
    const mq_back_norm it = {.in = in, .d_out = d_out, .d_in = gradient, .accumulate = 1, .width = sizes.width};
    if (rows->layer->norms[norm] != NULL) mq_backward_norm(rows, norm, &it);
    else mq_add_forward(gradient, d_out, &sizes);
}

int mq_backward_is_added_plainly(const mq_back_rows *rows, mq_role norm)
{
    return rows->layer->norms[norm] == NULL && rows->back->run->runtime->config.residual_multiplier == 1.0;
}

const float *mq_backward_added(const mq_back_rows *rows, mq_role norm, const void *made, const float *gradient,
                               float *out)
{
    const mq_row_sizes sizes = hidden_sizes(rows, MQ_F32);
    const mq_back_norm it = {.in = made, .d_out = out, .d_in = out, .width = sizes.width};
    if (mq_backward_is_added_plainly(rows, norm)) return gradient;
    memcpy(out, gradient, (size_t)(sizes.rows * sizes.width) * sizeof *out);
    mq_scale_forward(out, rows->back->run->runtime->config.residual_multiplier, &sizes);
    if (rows->layer->norms[norm] != NULL) mq_backward_norm(rows, norm, &it);
    return out;
}

void mq_backward_add(const mq_back_rows *rows, mq_role norm, void *hidden, const void *made, void *changed)
{
    const mq_row_sizes sizes = hidden_sizes(rows, rows->back->run->runtime->dtype);
    mq_backward_enter(rows, norm, changed, made);
    mq_add_scaled_forward(hidden, changed, rows->back->run->runtime->config.residual_multiplier, &sizes);
}
