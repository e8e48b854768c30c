/* layer.c on a device: the same steps in the same order, each an operation of the CUDA library. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

/* ---- points ---- */

int mq_device_point_index(const mq_layer *layer, const mq_point *point)
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
    return mq_device_quantizer_apply(&device->quantizers[mq_device_point_index(pass->layer, point)], device->backend,
                                     device->index, point->quantizer, &rows, device->compute, pass->err);
}

static int collect(mq_device_pass *pass, mq_point *point, const void *x, int64_t width)
{
    const mq_cuda_matrix matrix = mq_device_matrix(pass, (void *)(uintptr_t)x, width);
    if (!mq_point_is_watched(point)) return MQ_OK;
    return mq_device_collect(pass->device, point, &matrix, pass->chunk, pass->context, pass->scratch->counted,
                             pass->err);
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

/* hidden += linear(in). The sum is part of the product unless somebody looks at the output before it. */
static int run_residual(mq_device_pass *pass, mq_role role, void *hidden, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    pass->applied = NULL;
    if (mq_point_is_watched(&linear->output) || acts(linear->output.quantizer)) {
        const int rc = run_linear(pass, role, pass->scratch->temporary, in);
        const mq_cuda_add_job job = {.x = mq_device_matrix(pass, pass->scratch->temporary, linear->rows),
                                     .y = mq_device_matrix(pass, hidden, linear->rows), .accumulate = 1};
        return rc == MQ_OK ? pass->device->backend->add(&job, pass->device->compute, pass->err) : rc;
    }
    const int rc = collect_input(pass, linear, in);
    return rc == MQ_OK ? multiply(pass, role, hidden, in, 1) : rc;
}

/* ---- attention ---- */

static int norm_heads(mq_device_pass *pass, void *out, const void *in, mq_role role, int64_t heads, int64_t width)
{
    const mq_cuda_norm_job job = {
        .x = mq_device_matrix(pass, (void *)(uintptr_t)in, width), .y = mq_device_matrix(pass, out, width),
        .weight = pass->device->norms[role], .heads = heads, .eps = (float)pass->context->config->rms_norm_eps,
    };
    return pass->device->backend->rmsnorm(&job, pass->device->compute, pass->err);
}

int mq_device_norm(mq_device_pass *pass, void *out, const void *in, mq_role role)
{
    return norm_heads(pass, out, in, role, 1, pass->context->config->hidden_size);
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

/* q or k: norm over each head (where the family has it), rope, then its point. */
static int finish_heads(mq_device_pass *pass, mq_role norm, mq_point *point, void *x, int64_t heads)
{
    const int64_t width = heads * pass->context->config->head_dim;
    const mq_device_scratch *scratch = pass->scratch;
    int rc = MQ_OK;
    if (pass->device->norms[norm] != NULL) rc = norm_heads(pass, x, x, norm, heads, width);
    const mq_cuda_rope_job job = {
        .x = mq_device_matrix(pass, x, width), .heads = heads, .cosine = scratch->cosine, .sine = scratch->sine,
        .rotary = pass->context->rope->rotary, .positions = pass->chunk->positions,
    };
    if (rc == MQ_OK) rc = pass->device->backend->rope(&job, pass->device->compute, pass->err);
    return rc == MQ_OK ? attention_point(pass, point, x, width) : rc;
}

static mq_cuda_attention_job attention_job(const mq_layer_context *context, int64_t window, int64_t rows,
                                           int64_t sequences, int64_t longest)
{
    const mq_attention_args args = mq_layer_attention(context, window, longest);
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
    mq_cuda_attention_job job = attention_job(pass->context, pass->layer->window, chunk->rows, chunk->sequences,
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
    pass->applied = NULL;
    int rc = mq_device_norm(pass, scratch->normed, pass->chunk->hidden, MQ_ROLE_INPUT_NORM);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_Q, scratch->q, scratch->normed);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_K, scratch->k, scratch->normed);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_V, scratch->v, scratch->normed);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_Q_NORM, &layer->q, scratch->q, config->num_attention_heads);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_K_NORM, &layer->k, scratch->k, config->num_key_value_heads);
    if (rc == MQ_OK)
        rc = attention_point(pass, &layer->v, scratch->v, config->num_key_value_heads * config->head_dim);
    if (rc == MQ_OK) rc = attend(pass);
    return rc == MQ_OK ? run_residual(pass, MQ_ROLE_O, pass->chunk->hidden, scratch->mixed) : rc;
}

/* ---- the other half ---- */

static int swiglu(mq_device_pass *pass, int64_t width)
{
    const mq_cuda_swiglu_job job = {.gate = mq_device_matrix(pass, pass->scratch->gate, width),
                                    .up = mq_device_matrix(pass, pass->scratch->up, width)};
    return pass->device->backend->swiglu(&job, pass->device->compute, pass->err);
}

/* out += mlp(in), or (is_expert) out = expert(in), where gate's point serves up too. */
int mq_device_mlp(mq_device_pass *pass, void *out, const void *in, int is_expert)
{
    mq_linear *gate = &pass->layer->linears[MQ_ROLE_GATE];
    const mq_device_scratch *scratch = pass->scratch;
    const mq_device_linear *weights = pass->device->linears;
    const void *rounded;
    int rc;
    pass->applied = NULL;
    if (is_expert) {
        rc = collect_input(pass, gate, in);
        if (rc == MQ_OK) rc = quantized_input(pass, gate, in, &rounded);
        if (rc == MQ_OK) rc = product(pass, scratch->gate, rounded, &weights[MQ_ROLE_GATE].weight, NULL, 0);
        if (rc == MQ_OK) rc = product(pass, scratch->up, rounded, &weights[MQ_ROLE_UP].weight, NULL, 0);
    } else {
        rc = run_linear(pass, MQ_ROLE_GATE, scratch->gate, in);
        if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_UP, scratch->up, in);
    }
    if (rc == MQ_OK) rc = swiglu(pass, gate->rows);
    pass->applied = NULL;
    if (rc != MQ_OK) return rc;
    return is_expert ? run_linear(pass, MQ_ROLE_DOWN, out, scratch->gate)
                     : run_residual(pass, MQ_ROLE_DOWN, out, scratch->gate);
}

/* The experts of the chunk's rows, to the host. */
static int route(mq_device_pass *pass)
{
    const mq_config *config = pass->context->config;
    const mq_device_scratch *scratch = pass->scratch;
    const mq_backend *backend = pass->device->backend;
    const mq_routes *routes = pass->context->routes;
    const int64_t first = pass->chunk->first * routes->top_k, count = pass->chunk->rows * routes->top_k;
    int rc = product(pass, scratch->router, scratch->normed, &pass->device->linears[MQ_ROLE_ROUTER].weight, NULL, 0);
    const mq_cuda_route_job job = {
        .logits = mq_device_matrix(pass, scratch->router, pass->layer->experts), .top_k = routes->top_k,
        .normalize = config->norm_topk_prob != 0, .rounded = pass->context->round_routes, .experts = scratch->experts,
        .shares = scratch->shares,
    };
    if (rc == MQ_OK) rc = backend->route(&job, pass->device->compute, pass->err);
    if (rc == MQ_OK)
        rc = backend->copy(routes->experts + first, scratch->experts, (size_t)count * sizeof *routes->experts,
                           pass->device->compute, pass->err);
    if (rc == MQ_OK)
        rc = backend->copy(routes->shares + first, scratch->shares, (size_t)count * sizeof *routes->shares,
                           pass->device->compute, pass->err);
    return rc;
}

static int run_chunk(mq_device_pass *pass)
{
    int rc = attention_half(pass);
    if (rc == MQ_OK) rc = mq_device_norm(pass, pass->scratch->normed, pass->chunk->hidden, MQ_ROLE_POST_NORM);
    if (rc != MQ_OK) return rc;
    return pass->layer->experts > 0 ? route(pass) : mq_device_mlp(pass, pass->chunk->hidden, pass->scratch->normed, 0);
}

/* ---- room ---- */

static size_t meta_nbytes(int64_t rows)
{
    return (size_t)(2 * rows + 1) * sizeof(int64_t) + (size_t)rows * (sizeof(int32_t) + 1);
}

/* Cuts the arena, which may only count, for chunks of `rows` rows. */
static size_t cut(mq_arena *arena, const mq_layer_context *context, int64_t rows, int64_t longest, int masked,
                  mq_device_scratch *out)
{
    const mq_config *config = context->config;
    const size_t size = mq_dtype_size(context->dtype), table = (size_t)(context->rope->positions * context->rope->rotary)
                                                               / 2 * sizeof(float);
    const int64_t hidden = config->hidden_size, q_width = config->num_attention_heads * config->head_dim;
    const int64_t inner = MQ_MAX(config->intermediate_size, config->num_experts > 0 ? config->moe_intermediate_size : 0);
    const int64_t kv_width = config->num_key_value_heads * config->head_dim;
    const int64_t widest = MQ_MAX(MQ_MAX(hidden, inner), q_width), prepared = context->rank > 0;
    const int64_t routes = config->num_experts > 0 ? rows * config->num_experts_per_tok : 0;
    const mq_cuda_attention_job job = attention_job(context, 0, rows, MQ_MAX(rows / MQ_MAX(longest, (int64_t)1),
                                                                             (int64_t)1), longest);
    (void)job;
    arena->used = 0;
    out->rows = rows;
    out->meta_nbytes = meta_nbytes(rows);
    for (int i = 0; i < 2; i++) {
        out->hidden[i] = mq_arena_take(arena, (size_t)(rows * hidden) * size);
        out->meta[i] = mq_arena_take(arena, out->meta_nbytes);
    }
    out->cosine = mq_arena_take(arena, table);
    out->sine = mq_arena_take(arena, table);
    out->normed = out->mixed = mq_arena_take(arena, (size_t)(rows * MQ_MAX(hidden, q_width)) * size);
    out->quantized = mq_arena_take(arena, (size_t)(rows * widest) * size);
    out->temporary = mq_arena_take(arena, (size_t)(rows * hidden) * size);
    out->prepared = mq_arena_take(arena, (size_t)(prepared * rows * widest) * size);
    out->low = mq_arena_take(arena, (size_t)(rows * context->rank) * size);
    out->counted = mq_arena_take(arena, masked ? (size_t)(rows * widest) * size : 0);
    out->router = mq_arena_take(arena, (size_t)(rows * config->num_experts) * size);
    out->experts = mq_arena_take(arena, (size_t)routes * sizeof *out->experts);
    out->shares = mq_arena_take(arena, (size_t)routes * sizeof *out->shares);
    const size_t halves = arena->used;
    out->q = mq_arena_take(arena, (size_t)(rows * q_width) * size);
    out->k = mq_arena_take(arena, (size_t)(rows * kv_width) * size);
    out->v = mq_arena_take(arena, (size_t)(rows * kv_width) * size);
    out->attention = mq_arena_take(arena, out->attention_nbytes);
    const size_t attention = arena->used;
    arena->used = halves;       /* the MLP's half in the place of the attention's */
    out->gate = mq_arena_take(arena, (size_t)(rows * inner) * size);
    out->up = mq_arena_take(arena, (size_t)(rows * inner) * size);
    return arena->used = MQ_MAX(arena->used, attention);
}

static size_t needed(const mq_device *device, const mq_run *run, int64_t rows, int64_t longest,
                     mq_device_scratch *out)
{
    const mq_layer_context context = mq_run_context(run);
    const mq_cuda_attention_job job = attention_job(&context, 0, rows, rows, longest);
    mq_arena none = {0};
    out->attention_nbytes = device->backend->attention_workspace(&job);
    return cut(&none, &context, rows, longest, run->mask != NULL && !run->count_padding, out);
}

static int too_long(const mq_device *device, const mq_run *run, int64_t longest, size_t room, mq_error *err)
{
    mq_device_scratch scratch = {0};
    int64_t fits = longest;
    while (fits > 0 && needed(device, run, fits, fits, &scratch) > room) fits = fits > 16 ? fits / 8 * 7 : fits - 1;
    return mq_fail(err, MQ_ERR_MEMORY,
                   "out of device memory: a sequence of %lld tokens needs %.1f MB beside the weights of a layer, but "
                   "only %.1f of %.1f MB are left for it; sequences of %lld tokens fit (batches of any size do: they "
                   "go through the device in pieces). Allow more by load(..., device_memory=) or MODELQ_CUDA_MEMORY",
                   (long long)longest, (double)needed(device, run, longest, longest, &scratch) / 1e6,
                   (double)room / 1e6, (double)device->budget / 1e6, (long long)fits);
}

int mq_device_reserve(mq_device *device, mq_run *run, int64_t rows, int64_t longest, mq_device_scratch *out,
                      mq_error *err)
{
    const mq_layer_context context = mq_run_context(run);
    const mq_rope_table *table = context.rope;
    const size_t room = mq_device_available(device, &device->work);
    const size_t table_nbytes = (size_t)(table->positions * table->rotary) / 2 * sizeof(float);
    int64_t fit = MQ_MIN(MQ_MAX(rows, longest), MQ_MAX((int64_t)MQ_CHUNK_ROWS, longest));
    size_t nbytes;
    while ((nbytes = needed(device, run, fit, longest, out)) > room && fit > longest)
        fit = MQ_MAX(fit / 4 * 3, longest);
    if (nbytes > room) return too_long(device, run, longest, room, err);
    int rc = mq_arena_reserve(device, &device->work, nbytes, "the rows of a layer", err);
    if (rc != MQ_OK) return rc;
    cut(&device->work, &context, fit, longest, run->mask != NULL && !run->count_padding, out);
    rc = device->backend->copy(out->cosine, table->cosine, table_nbytes, device->compute, err);
    return rc == MQ_OK ? device->backend->copy(out->sine, table->sine, table_nbytes, device->compute, err) : rc;
}

/* ---- chunks ---- */

/* As many whole sequences from `first_sequence` on as there is room for. */
static mq_device_chunk chunk_from(const mq_run *run, int64_t first_sequence, int64_t most)
{
    const mq_sequence *sequences = run->sequences;
    const uint8_t *mask = run->count_padding ? NULL : run->mask;
    mq_device_chunk chunk = {.first_sequence = first_sequence, .first = sequences[first_sequence].first};
    for (int64_t i = first_sequence; i < run->sequence_count && chunk.rows + sequences[i].tokens <= most; i++) {
        chunk.rows += sequences[i].tokens;
        chunk.sequences++;
        chunk.longest = MQ_MAX(chunk.longest, sequences[i].tokens);
    }
    chunk.position = chunk.first;
    chunk.mask = mask != NULL ? mask + chunk.first : NULL;
    return chunk;
}

/* Where the parts of a chunk's indices are, on the host or the device. */
static void place_meta(mq_device_chunk *chunk, void *memory)
{
    chunk->starts = memory;
    chunk->index = chunk->starts + chunk->sequences + 1;
    chunk->positions = (int32_t *)(void *)(chunk->index + chunk->rows);
    chunk->key_mask = (uint8_t *)(chunk->positions + chunk->rows);
}

static void fill_meta(const mq_run *run, mq_device_chunk *chunk, void *memory)
{
    mq_device_chunk here = *chunk;
    place_meta(&here, memory);
    int64_t row = 0;
    for (int64_t s = 0; s < chunk->sequences; s++) {
        here.starts[s] = row;
        for (int64_t t = 0; t < run->sequences[chunk->first_sequence + s].tokens; t++) here.positions[row++] = (int32_t)t;
    }
    here.starts[chunk->sequences] = row;
    chunk->counted = 0;
    for (int64_t i = 0; i < chunk->rows; i++)
        if (chunk->mask == NULL || chunk->mask[i]) here.index[chunk->counted++] = i;
    if (run->mask != NULL) memcpy(here.key_mask, run->mask + chunk->first, (size_t)chunk->rows);
    else memset(here.key_mask, 1, (size_t)chunk->rows);
}

/* Rows and indices of a chunk to their place, on the copy stream. */
static int send_chunk(mq_device *device, const mq_run *run, const mq_device_scratch *scratch, int slot,
                      mq_device_chunk *chunk, mq_error *err)
{
    const size_t stride = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    const size_t nbytes = meta_nbytes(chunk->rows);
    void *meta = mq_alloc(nbytes);
    if (meta == NULL) return mq_fail_memory(err, "indices of a chunk", nbytes);
    fill_meta(run, chunk, meta);
    place_meta(chunk, scratch->meta[slot]);
    if (run->mask == NULL) chunk->key_mask = NULL;
    chunk->hidden = scratch->hidden[slot];
    int rc = device->backend->copy(scratch->meta[slot], meta, nbytes, device->copies, err);
    if (rc == MQ_OK)
        rc = device->backend->copy(chunk->hidden, run->hidden + (size_t)chunk->first * stride,
                                   (size_t)chunk->rows * stride, device->copies, err);
    mq_free(meta);
    return rc;
}

/* The next chunk comes while this one is computed; then this one goes back. */
static int run_chunks(mq_device *device, mq_run *run, mq_layer *layer, mq_error *err)
{
    const mq_backend *backend = device->backend;
    const mq_layer_context context = mq_run_context(run);
    const size_t stride = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    mq_device_scratch scratch = {0};
    mq_device_chunk chunks[2];
    int rc = mq_device_reserve(device, run, run->rows, run->longest, &scratch, err);
    if (rc != MQ_OK) return rc;
    chunks[0] = chunk_from(run, 0, scratch.rows);
    rc = send_chunk(device, run, &scratch, 0, &chunks[0], err);
    for (int slot = 0; rc == MQ_OK && chunks[slot].rows > 0; slot = 1 - slot) {
        mq_device_chunk *chunk = &chunks[slot], *next = &chunks[1 - slot];
        const int64_t next_sequence = chunk->first_sequence + chunk->sequences;
        mq_device_pass pass = {.device = device, .layer = layer, .context = &context, .scratch = &scratch,
                               .chunk = chunk, .err = err};
        if (run->poll != NULL) rc = run->poll(run->poll_context);
        if (rc == MQ_OK) rc = backend->event_record(device->loaded, device->copies, err);
        if (rc == MQ_OK) rc = backend->event_after(device->loaded, device->compute, err);
        if (rc == MQ_OK) rc = run_chunk(&pass);
        if (rc == MQ_OK) rc = backend->event_record(device->loaded, device->compute, err);
        *next = (mq_device_chunk){0};
        if (rc == MQ_OK && next_sequence < run->sequence_count) {
            *next = chunk_from(run, next_sequence, scratch.rows);
            rc = send_chunk(device, run, &scratch, 1 - slot, next, err);
        }
        if (rc == MQ_OK) rc = backend->event_after(device->loaded, device->copies, err);
        if (rc == MQ_OK)
            rc = backend->copy(run->hidden + (size_t)chunk->first * stride, chunk->hidden, (size_t)chunk->rows * stride,
                               device->copies, err);
    }
    return rc;
}

/* ---- the layer ---- */

static int watched(mq_device *device, mq_run *run, mq_layer *layer, mq_error *err)
{
    mq_point *points[MQ_LAYER_MAX_POINTS];
    const size_t count = mq_layer_points(layer, points);
    int rc = mq_points_begin(points, count, &run->spare, err);
    if (rc != MQ_OK) return rc;
    rc = run_chunks(device, run, layer, err);
    const int taken = mq_findings_take(device, rc == MQ_OK ? err : NULL);
    if (rc == MQ_OK) rc = taken;
    const int ended = mq_points_end(points, count, rc == MQ_OK, err);
    return rc == MQ_OK ? ended : rc;
}

int mq_device_run_layer(mq_elsewhere *self, mq_run *run, int64_t index, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    int before;
    if (device->layer != index)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld is not loaded on the device", (long long)index);
    int rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    rc = watched(device, run, &run->runtime->layers[index], err);
    mq_device_leave(device, before);
    return rc;
}
