/* layer.c on a device: the same steps in the same order, each an operation of the CUDA library. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

/* ---- points ---- */

static int point_index(const mq_layer *layer, const mq_point *point)
{
    if (point == &layer->q) return 2 * MQ_ROLE_COUNT;
    if (point == &layer->k) return 2 * MQ_ROLE_COUNT + 1;
    if (point == &layer->v) return 2 * MQ_ROLE_COUNT + 2;
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        if (point == &layer->linears[role].input) return 2 * role;
        if (point == &layer->linears[role].output) return 2 * role + 1;
    }
    return MQ_QUANTIZERS - 1;
}

mq_cuda_matrix mq_device_matrix(const mq_device_pass *pass, void *data, int64_t width)
{
    return (mq_cuda_matrix){data, pass->context->dtype, pass->chunk->rows, width, width};
}

static int acts(const mq_quantizer *quantizer)
{
    return quantizer != NULL && mq_quantizer_acts(quantizer);
}

static int quantize(mq_device_pass *pass, const mq_point *point, void *y, const void *x, int64_t width,
                    mq_quant_steps steps)
{
    mq_device *device = pass->device;
    const mq_device_rows rows = {.x = mq_device_matrix(pass, (void *)(uintptr_t)x, width),
                                 .y = mq_device_matrix(pass, y, width), .steps = steps};
    return mq_device_quantizer_apply(&device->quantizers[point_index(pass->layer, point)], device->backend,
                                     device->index, point->quantizer, &rows, device->compute, pass->err);
}

static int collect(mq_device_pass *pass, mq_point *point, const void *x, int64_t width)
{
    const mq_cuda_matrix matrix = mq_device_matrix(pass, (void *)(uintptr_t)x, width);
    if (!mq_point_is_watched(point)) return MQ_OK;
    const mq_device_look look = {.x = matrix, .chunk = pass->chunk, .context = pass->context,
                                 .by_sequence = point_index(pass->layer, point) >= 2 * MQ_ROLE_COUNT};
    return mq_device_collect(pass->device, point, &look, pass->scratch->counted, pass->err);
}

/* What reaches x: statistics, then the quantizer, in place. */
static int pass_point(mq_device_pass *pass, mq_point *point, void *x, int64_t width)
{
    const int rc = collect(pass, point, x, width);
    return rc == MQ_OK && acts(point->quantizer) ? quantize(pass, point, x, x, width, MQ_QUANT_ALL) : rc;
}

/* The input of a linear as its quantizer leaves it. Siblings with the same quantizer find the work done. */
static int quantized_input(mq_device_pass *pass, const mq_linear *linear, const void *in, const void **out)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    int rc = MQ_OK;
    *out = in;
    if (!acts(quantizer)) return rc;
    if (pass->applied == NULL || !mq_quantizer_same(pass->applied, quantizer))
        rc = quantize(pass, &linear->input, pass->scratch->quantized, in, linear->cols, MQ_QUANT_ALL);
    pass->applied = quantizer;
    *out = pass->scratch->quantized;
    return rc;
}

static int collect_input(mq_device_pass *pass, mq_linear *linear, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    int rc = MQ_OK;
    if (!mq_point_is_watched(&linear->input)) return rc;
    if (linear->input.watch_quantized) {
        rc = quantized_input(pass, linear, in, &in);
    } else if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        rc = quantize(pass, &linear->input, pass->scratch->quantized, in, linear->cols, MQ_QUANT_PREPARE);
        pass->applied = NULL;
        in = pass->scratch->quantized;
    }
    return rc == MQ_OK ? collect(pass, &linear->input, in, linear->cols) : rc;
}

/* ---- products ---- */

static int product(mq_device_pass *pass, void *out, const void *in, const mq_cuda_matrix *weight, const void *bias,
                   int accumulate)
{
    mq_device *device = pass->device;
    const mq_cuda_gemm_job job = {
        .a = mq_device_matrix(pass, (void *)(uintptr_t)in, weight->cols), .b = *weight,
        .out = mq_device_matrix(pass, out, weight->rows), .transpose_b = 1, .alpha = 1.0f,
        .beta = accumulate ? 1.0f : 0.0f, .bias = bias, .workspace = device->workspace,
    };
    return device->backend->gemm_run(device->gemm, &job, device->compute, pass->err);
}

/* out (rows, O) += up(down(in)), of the input as it is before it is rounded. */
static int add_low_rank(mq_device_pass *pass, const mq_linear *linear, const mq_device_linear *weights, void *out,
                        const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    int rc = MQ_OK;
    if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        rc = quantize(pass, &linear->input, pass->scratch->prepared, in, linear->cols, MQ_QUANT_PREPARE);
        in = pass->scratch->prepared;
    }
    if (rc == MQ_OK) rc = product(pass, pass->scratch->low, in, &weights->down, NULL, 0);
    return rc == MQ_OK ? product(pass, out, pass->scratch->low, &weights->up, NULL, 1) : rc;
}

static int multiply(mq_device_pass *pass, mq_role role, void *out, const void *in, int accumulate)
{
    const mq_linear *linear = &pass->layer->linears[role];
    const mq_device_linear *weights = &pass->device->linears[role];
    const void *rounded;
    int rc = quantized_input(pass, linear, in, &rounded);
    if (rc == MQ_OK) rc = product(pass, out, rounded, &weights->weight, weights->bias, accumulate);
    return rc == MQ_OK && weights->down.data != NULL ? add_low_rank(pass, linear, weights, out, in) : rc;
}

/* out (rows, O) = linear(in (rows, I)). */
static int run_linear(mq_device_pass *pass, mq_role role, void *out, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    int rc = collect_input(pass, linear, in);
    if (rc == MQ_OK) rc = multiply(pass, role, out, in, 0);
    return rc == MQ_OK ? pass_point(pass, &linear->output, out, linear->rows) : rc;
}

/* out = norm(in), part by part as wide as the norm is. */
static int norm(mq_device_pass *pass, mq_role role, void *out, const void *in, int64_t width)
{
    const mq_cuda_norm_job job = {
        .x = mq_device_matrix(pass, (void *)(uintptr_t)in, width), .y = mq_device_matrix(pass, out, width),
        .weight = pass->device->norms[role], .heads = width / pass->layer->widths[role],
        .eps = (float)mq_norm_eps(pass->context->config, role),
    };
    return pass->device->backend->rmsnorm(&job, pass->device->compute, pass->err);
}

int mq_device_normed(mq_device_pass *pass, mq_role role, void *out, const void **in)
{
    if (pass->device->norms[role] == NULL) return MQ_OK;
    const int rc = norm(pass, role, out, *in, pass->context->config->hidden_size);
    *in = out;
    return rc;
}

/* hidden += norm(linear(in)). The sum is part of the product unless something comes between. */
static int run_residual(mq_device_pass *pass, mq_role role, mq_role added, void *hidden, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    const void *made = pass->scratch->temporary;
    pass->applied = NULL;
    const int between = mq_point_is_watched(&linear->output) || acts(linear->output.quantizer);
    if (!between && pass->device->norms[added] == NULL) {
        const int rc = collect_input(pass, linear, in);
        return rc == MQ_OK ? multiply(pass, role, hidden, in, 1) : rc;
    }
    int rc = run_linear(pass, role, pass->scratch->temporary, in);
    if (rc == MQ_OK) rc = mq_device_normed(pass, added, pass->scratch->temporary, &made);
    const mq_cuda_add_job job = {.x = mq_device_matrix(pass, pass->scratch->temporary, linear->rows),
                                 .y = mq_device_matrix(pass, hidden, linear->rows), .accumulate = 1};
    return rc == MQ_OK ? pass->device->backend->add(&job, pass->device->compute, pass->err) : rc;
}

/* ---- attention ---- */

/* to (rows, width) = columns of what one linear made in the place of several. */
static int split(mq_device_pass *pass, void *to, int64_t first, int64_t width, int64_t joined)
{
    const size_t size = mq_dtype_size(pass->context->dtype);
    const mq_cuda_rows_job job = {
        .x = {(char *)pass->scratch->joined + (size_t)first * size, pass->context->dtype, pass->chunk->rows, width,
              joined},
        .y = mq_device_matrix(pass, to, width),
    };
    return pass->device->backend->rows(&job, pass->device->compute, pass->err);
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
        rc = run_linear(pass, MQ_ROLE_QKV, scratch->joined, in);
        if (rc == MQ_OK) rc = split(pass, scratch->q, 0, q, q + k + v);
        if (rc == MQ_OK) rc = split(pass, scratch->k, q, k, q + k + v);
        return rc == MQ_OK ? split(pass, scratch->v, q + k, v, q + k + v) : rc;
    }
    rc = run_linear(pass, MQ_ROLE_Q, scratch->q, in);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_K, scratch->k, in);
    return rc == MQ_OK ? run_linear(pass, MQ_ROLE_V, scratch->v, in) : rc;
}

static int attention_point(mq_device_pass *pass, mq_point *point, void *x, int64_t width)
{
    const mq_quantizer *quantizer = point->quantizer;
    int rc = MQ_OK;
    if (quantizer != NULL && mq_quantizer_prepares(quantizer))
        rc = quantize(pass, point, x, x, width, MQ_QUANT_PREPARE);
    if (rc == MQ_OK) rc = collect(pass, point, x, width);
    if (rc == MQ_OK && quantizer != NULL && quantizer->enabled)
        rc = quantize(pass, point, x, x, width, MQ_QUANT_PREPARED);
    return rc;
}

/* q or k: norm of each head or of all (where the family has it), rope, then its point. */
static int finish_heads(mq_device_pass *pass, mq_role role, mq_point *point, void *x, int64_t heads)
{
    const int64_t width = heads * pass->context->config->head_dim;
    const mq_rope_table *table = mq_ropes_of(pass->context->ropes, pass->layer->rope, pass->chunk->longest);
    int rc = MQ_OK;
    if (pass->device->norms[role] != NULL) rc = norm(pass, role, x, x, width);
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

static int attention_half(mq_device_pass *pass)
{
    const mq_config *config = pass->context->config;
    const mq_device_scratch *scratch = pass->scratch;
    mq_layer *layer = pass->layer;
    const void *in = pass->chunk->hidden;
    const int64_t kv_heads = mq_dim_of(config, &layer->kind, MQ_DIM_KV_HEADS);
    pass->applied = NULL;
    int rc = mq_device_normed(pass, MQ_ROLE_INPUT_NORM, scratch->normed, &in);
    if (rc == MQ_OK && layer->kind.attention == MQ_BLOCK_LINEAR)
        return run_residual(pass, MQ_ROLE_LINEAR_ATTENTION, MQ_ROLE_ATTENTION_NORM, pass->chunk->hidden, in);
    if (rc == MQ_OK) rc = project(pass, in);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_Q_NORM, &layer->q, scratch->q, config->num_attention_heads);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_K_NORM, &layer->k, scratch->k, kv_heads);
    if (rc == MQ_OK) rc = attention_point(pass, &layer->v, scratch->v, mq_dim_of(config, &layer->kind, MQ_DIM_V));
    if (rc == MQ_OK) rc = attend(pass);
    return rc == MQ_OK ? run_residual(pass, MQ_ROLE_O, MQ_ROLE_ATTENTION_NORM, pass->chunk->hidden, scratch->mixed)
                       : rc;
}

/* ---- the other half ---- */

static int swiglu(mq_device_pass *pass, int64_t width)
{
    const mq_cuda_swiglu_job job = {.gate = mq_device_matrix(pass, pass->scratch->gate, width),
                                    .up = mq_device_matrix(pass, pass->scratch->up, width)};
    return pass->device->backend->swiglu(&job, pass->device->compute, pass->err);
}

/* scratch->gate and up of in. */
static int project_gate(mq_device_pass *pass, const void *in)
{
    const mq_device_scratch *scratch = pass->scratch;
    const int64_t joined = pass->layer->linears[MQ_ROLE_GATE_UP].rows;
    int rc;
    if (joined > 0) {
        rc = run_linear(pass, MQ_ROLE_GATE_UP, scratch->joined, in);
        if (rc == MQ_OK) rc = split(pass, scratch->gate, 0, joined / 2, joined);
        return rc == MQ_OK ? split(pass, scratch->up, joined / 2, joined / 2, joined) : rc;
    }
    rc = run_linear(pass, MQ_ROLE_GATE, scratch->gate, in);
    return rc == MQ_OK ? run_linear(pass, MQ_ROLE_UP, scratch->up, in) : rc;
}

static int mlp_half(mq_device_pass *pass, const void *in)
{
    pass->applied = NULL;
    if (pass->layer->kind.mlp == MQ_BLOCK_LINEAR)
        return run_residual(pass, MQ_ROLE_LINEAR_MLP, MQ_ROLE_MLP_NORM, pass->chunk->hidden, in);
    int rc = project_gate(pass, in);
    if (rc == MQ_OK) rc = swiglu(pass, pass->layer->linears[MQ_ROLE_DOWN].cols);
    pass->applied = NULL;
    return rc == MQ_OK ? run_residual(pass, MQ_ROLE_DOWN, MQ_ROLE_MLP_NORM, pass->chunk->hidden, pass->scratch->gate)
                       : rc;
}

/* temporary = the loaded expert of the chunk's rows; gate's point serves up too. */
int mq_device_expert(mq_device_pass *pass)
{
    mq_linear *gate = &pass->layer->linears[MQ_ROLE_GATE];
    const mq_device_scratch *scratch = pass->scratch;
    const mq_device_linear *weights = pass->device->linears;
    const void *in = pass->chunk->hidden, *rounded;
    pass->applied = NULL;
    int rc = mq_device_normed(pass, MQ_ROLE_POST_NORM, scratch->normed, &in);
    if (rc == MQ_OK) rc = collect_input(pass, gate, in);
    if (rc == MQ_OK) rc = quantized_input(pass, gate, in, &rounded);
    if (rc == MQ_OK) rc = product(pass, scratch->gate, rounded, &weights[MQ_ROLE_GATE].weight,
                                     weights[MQ_ROLE_GATE].bias, 0);
    if (rc == MQ_OK) rc = product(pass, scratch->up, rounded, &weights[MQ_ROLE_UP].weight,
                                     weights[MQ_ROLE_UP].bias, 0);
    if (rc == MQ_OK) rc = swiglu(pass, gate->rows);
    pass->applied = NULL;
    return rc == MQ_OK ? run_linear(pass, MQ_ROLE_DOWN, scratch->temporary, scratch->gate) : rc;
}

/* What the device's kernel has no words for is chosen on the host. */
static int route_here(mq_device_pass *pass, const mq_route_sizes *sizes)
{
    const mq_backend *backend = pass->device->backend;
    const size_t nbytes = (size_t)(sizes->rows * sizes->experts) * mq_dtype_size(sizes->dtype);
    void *logits = mq_alloc(nbytes);
    if (logits == NULL) return mq_fail_memory(pass->err, "logits of experts", nbytes);
    int rc = backend->copy(logits, pass->scratch->router, nbytes, pass->device->compute, pass->err);
    if (rc == MQ_OK) rc = backend->stream_wait(pass->device->compute, pass->err);
    if (rc == MQ_OK) mq_route_forward(pass->context->routes, logits, sizes);
    mq_free(logits);
    return rc;
}

static int route_there(mq_device_pass *pass, const mq_route_sizes *sizes)
{
    const mq_device_scratch *scratch = pass->scratch;
    const mq_backend *backend = pass->device->backend;
    const mq_routes *routes = pass->context->routes;
    const int64_t first = sizes->first * routes->top_k, count = sizes->rows * routes->top_k;
    const mq_cuda_route_job job = {
        .logits = mq_device_matrix(pass, scratch->router, sizes->experts), .top_k = routes->top_k,
        .normalize = sizes->normalize, .rounded = sizes->rounded, .experts = scratch->experts,
        .shares = scratch->shares,
    };
    int rc = backend->route(&job, pass->device->compute, pass->err);
    if (rc == MQ_OK)
        rc = backend->copy(routes->experts + first, scratch->experts, (size_t)count * sizeof *routes->experts,
                           pass->device->compute, pass->err);
    if (rc == MQ_OK)
        rc = backend->copy(routes->shares + first, scratch->shares, (size_t)count * sizeof *routes->shares,
                           pass->device->compute, pass->err);
    return rc;
}

/* The experts of the chunk's rows, to the host. */
static int route(mq_device_pass *pass, const void *in)
{
    const mq_device_linear *router = &pass->device->linears[MQ_ROLE_ROUTER];
    const mq_routes *routes = pass->context->routes;
    mq_route_sizes sizes = mq_route_of(pass->context->config);
    sizes.rows = pass->chunk->rows;
    sizes.experts = pass->layer->experts;
    sizes.first = pass->chunk->first;
    sizes.dtype = pass->context->dtype;
    sizes.rounded = pass->context->round_routes;
    sizes.correction = pass->layer->norms[MQ_ROLE_CORRECTION];
    const int plain = !sizes.sigmoid && sizes.correction == NULL && sizes.groups <= 1 &&
                      (sizes.factor == 0.0f || sizes.factor == 1.0f) &&
                      (routes->kept == 0 || routes->kept == routes->top_k);
    const int rc = product(pass, pass->scratch->router, in, &router->weight, router->bias, 0);
    if (rc != MQ_OK) return rc;
    return plain ? route_there(pass, &sizes) : route_here(pass, &sizes);
}

int mq_device_run_chunk(mq_device_pass *pass)
{
    const mq_layer_kind *kind = &pass->layer->kind;
    const void *in = pass->chunk->hidden;
    int rc = kind->attention != MQ_BLOCK_NONE ? attention_half(pass) : MQ_OK;
    if (rc != MQ_OK || (pass->layer->experts == 0 && kind->mlp == MQ_BLOCK_NONE)) return rc;
    rc = mq_device_normed(pass, MQ_ROLE_POST_NORM, pass->scratch->normed, &in);
    if (rc != MQ_OK) return rc;
    return pass->layer->experts > 0 ? route(pass, in) : mlp_half(pass, in);
}
