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
        if (module->kind == MQ_MODULE_NORM) continue;
        const mq_tensor *weight = mq_find_tensor(tensors, count, module->weight, module->shape, 2, err);
        mq_packed *packed = &back->weights[module->role];
        mq_free(packed->data);
        packed->data = NULL;
        rc = weight ? mq_linear_load_backward(packed, weight, runtime->gemm, module->weight, err) : err->code;
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

/* Cuts scratch->memory; returns how much there must be. */
static size_t cut(mq_back_scratch *scratch, const mq_run *run)
{
    const mq_layer_context context = mq_run_context(run);
    const mq_config *config = context.config;
    const int64_t n = run->largest_unit, m = MQ_MIN(n, (int64_t)PIECE), hidden = config->hidden_size;
    const int64_t q_width = config->num_attention_heads * config->head_dim;
    const int64_t kv_width = config->num_key_value_heads * config->head_dim;
    const int64_t expert = config->num_experts > 0 ? config->moe_intermediate_size : 0;
    const int64_t inner = MQ_MAX(config->intermediate_size, expert);
    const mq_attention_args args = mq_layer_attention(&context, 0, run->longest);
    const size_t size = mq_dtype_size(context.dtype), single = sizeof(float);
    size_t shared = 0;
    scratch->piece = m;
    scratch->normed = carve(scratch, &shared, n * hidden, size);
    scratch->raw_q = carve(scratch, &shared, n * q_width, size);
    scratch->raw_k = carve(scratch, &shared, n * kv_width, size);
    scratch->q = carve(scratch, &shared, n * q_width, size);
    scratch->k = carve(scratch, &shared, n * kv_width, size);
    scratch->v = carve(scratch, &shared, n * kv_width, size);
    scratch->mixed = carve(scratch, &shared, n * q_width, size);
    scratch->middle = carve(scratch, &shared, n * hidden, size);
    scratch->maxima = carve(scratch, &shared, n * config->num_attention_heads, single);
    scratch->factors = carve(scratch, &shared, n * config->num_attention_heads, single);
    size_t attention = shared, mlp = shared;
    size_t needed = MQ_MAX(mq_attention_scratch(&args), mq_attention_backward_scratch(&args));
    scratch->attention = carve(scratch, &attention, (int64_t)needed, 1);
    scratch->attended = carve(scratch, &attention, n * hidden, size);
    scratch->d_normed = carve(scratch, &attention, n * hidden, single);
    scratch->d_q = carve(scratch, &attention, n * q_width, single);
    scratch->d_k = carve(scratch, &attention, n * kv_width, single);
    scratch->d_v = carve(scratch, &attention, n * kv_width, single);
    scratch->d_mixed = carve(scratch, &attention, n * q_width, single);
    scratch->mlp_normed = carve(scratch, &mlp, m * hidden, size);
    scratch->gate = carve(scratch, &mlp, m * inner, size);
    scratch->up = carve(scratch, &mlp, m * inner, size);
    scratch->product = carve(scratch, &mlp, m * inner, size);
    scratch->output = carve(scratch, &mlp, m * hidden, size);
    scratch->router = carve(scratch, &mlp, m * config->num_experts, size);
    scratch->d_mlp_normed = carve(scratch, &mlp, m * hidden, single);
    scratch->d_gate = carve(scratch, &mlp, m * inner, single);
    scratch->d_up = carve(scratch, &mlp, m * inner, single);
    scratch->d_output = carve(scratch, &mlp, config->num_experts > 0 ? m * hidden : 0, single);
    scratch->d_shares = carve(scratch, &mlp, m, single);
    scratch->d_router = carve(scratch, &mlp, m * config->num_experts, single);
    return MQ_MAX(attention, mlp);
}

int mq_backward_reserve(mq_backward *back, mq_error *err)
{
    mq_back_scratch *scratch = &back->scratch;
    if (scratch->memory != NULL) return MQ_OK;
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
    const double eps = back->run->runtime->config.rms_norm_eps;
    const mq_row_sizes sizes = {.rows = rows->rows * it->heads, .width = it->width, .dtype = back->run->runtime->dtype};
    if (back->d_weights[role] != NULL)
        mq_rmsnorm_weight_backward(back->d_weights[role], it->d_out, it->in, eps, &sizes);
    mq_rmsnorm_backward(it->d_in, it->d_out, it->in, rows->layer->norms[role], eps, it->accumulate, &sizes);
}
