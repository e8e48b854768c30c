/* x += attention(norm(x)); x += mlp(norm(x)): the pre-norm decoder layer that the families of archs.def share; with
 * experts, the second half is a choice of experts for each row, and then each expert's part (run_experts.c). Every
 * step is an operation of ops.h; this file says in which order, and where quantizers and calibrators look on. */
#include "model/layer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"

/* Rows of the MLP half done at a time: few enough that the gate's and up's outputs stay in L2 (a fifth faster), but
 * many where the weights would have to come from memory again for each piece. Also bounds the scratch. */
enum { MLP_FEW_ROWS = 256, MLP_MANY_ROWS = 512, MLP_CACHED_BYTES = 4 << 20 };

static int64_t mlp_piece(const mq_config *config, mq_dtype dtype)
{
    int64_t nbytes = config->hidden_size * config->intermediate_size * (int64_t)mq_dtype_size(dtype);
    return nbytes <= MLP_CACHED_BYTES && config->num_experts == 0 ? MLP_FEW_ROWS : MLP_MANY_ROWS;
}

/* One trip of a unit through the layer. first and rows move: the whole unit for attention, pieces of it for the MLP. */
typedef struct pass {
    mq_layer *layer;
    const mq_layer_context *context;
    mq_error *err;
    int64_t first, rows;            /* rows of the run */
    const uint8_t *count_mask;      /* of these rows; NULL = all count */
    const int64_t *tokens;          /* rows of the run that these are, gathered for an expert; NULL = from first on */
    void *quantized, *temporary, *prepared, *low;
    const mq_quantizer *applied;    /* whose result quantized holds, of the input now in use */
} pass;

static mq_row_sizes sizes_of(const pass *pass, int64_t width)
{
    return (mq_row_sizes){.rows = pass->rows, .width = width, .dtype = pass->context->dtype};
}

/* The recorded batch that row i of the pass is of. */
static int64_t batch_of(const pass *pass, int64_t i)
{
    const int64_t row = pass->tokens != NULL ? pass->tokens[i] : pass->first + i;
    const mq_sequence *sequences = pass->context->sequences;
    int64_t low = 0, high = pass->context->sequence_count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (sequences[middle].first <= row) low = middle;
        else high = middle;
    }
    return sequences[low].batch;
}

static int collect(pass *pass, mq_point *point, const void *x, int64_t width)
{
    const int by_group = mq_point_by_group(point);
    const size_t stride = (size_t)width * mq_dtype_size(pass->context->dtype);
    int rc = MQ_OK;
    for (int64_t begin = 0, end; rc == MQ_OK && begin < pass->rows; begin = end) {
        const int64_t batch = by_group ? batch_of(pass, begin) : 0;
        for (end = by_group ? begin + 1 : pass->rows; end < pass->rows && batch_of(pass, end) == batch; end++) {
        }
        mq_calib_rows rows = {
            .x = (const char *)x + (size_t)begin * stride, .dtype = pass->context->dtype, .rows = end - begin,
            .width = width, .ld = width, .mask = pass->count_mask ? pass->count_mask + begin : NULL,
            .chunk = pass->first + begin, .group = batch,
        };
        rc = mq_point_collect(point, &rows, pass->err);
    }
    return rc;
}

static int acts(const mq_quantizer *quantizer)
{
    return quantizer != NULL && mq_quantizer_acts(quantizer);
}

typedef struct quantize_job {
    const mq_quantizer *quantizer;
    mq_quant_rows rows;
} quantize_job;

static void quantize_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const quantize_job *job = argument;
    mq_quant_rows rows = job->rows;
    size_t size = mq_dtype_size(rows.dtype);
    (void)worker;
    rows.x = (const char *)rows.x + (size_t)(begin * rows.ldx) * size;
    rows.y = (char *)rows.y + (size_t)(begin * rows.ldy) * size;
    rows.rows = end - begin;
    mq_quantizer_apply(job->quantizer, &rows);
}

static void quantize_steps(pass *pass, const mq_quantizer *quantizer, void *y, const void *x, int64_t width,
                           mq_quant_steps steps)
{
    quantize_job job = {
        .quantizer = quantizer,
        .rows = {.x = x, .y = y, .dtype = pass->context->dtype, .rows = pass->rows, .cols = width, .ldx = width,
                 .ldy = width, .steps = steps},
    };
    mq_parallel_for(pass->rows, mq_row_grain(width), quantize_rows, &job);
}

static void quantize(pass *pass, const mq_quantizer *quantizer, void *y, const void *x, int64_t width)
{
    quantize_steps(pass, quantizer, y, x, width, MQ_QUANT_ALL);
}

/* What reaches x: statistics, then the quantizer, in place. */
static int pass_point(pass *pass, mq_point *point, void *x, int64_t width)
{
    int rc = collect(pass, point, x, width);
    if (rc == MQ_OK && acts(point->quantizer)) quantize(pass, point->quantizer, x, x, width);
    return rc;
}

/* The input of a linear as its quantizer leaves it. Siblings with the same quantizer find the work done. */
static const void *quantized_input(pass *pass, const mq_linear *linear, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    if (!acts(quantizer)) return in;
    if (pass->applied == NULL || !mq_quantizer_same(pass->applied, quantizer))
        quantize(pass, quantizer, pass->quantized, in, linear->cols);
    pass->applied = quantizer;
    return pass->quantized;
}

/* Statistics of a linear's input as its quantizer leaves it, or as it is before it is rounded. */
static int collect_input(pass *pass, mq_linear *linear, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    if (!mq_point_is_watched(&linear->input)) return MQ_OK;
    if (linear->input.watch_quantized) {
        in = quantized_input(pass, linear, in);
    } else if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        quantize_steps(pass, quantizer, pass->quantized, in, linear->cols, MQ_QUANT_PREPARE);
        pass->applied = NULL;
        in = pass->quantized;
    }
    return collect(pass, &linear->input, in, linear->cols);
}

/* out (rows, O) += up(down(in)), of the input as it is before it is rounded. */
static void add_low_rank(pass *pass, const mq_linear *linear, void *out, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    mq_row_sizes sizes = sizes_of(pass, linear->cols), narrow = sizes_of(pass, linear->down.packed.n);
    if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        quantize_steps(pass, quantizer, pass->prepared, in, linear->cols, MQ_QUANT_PREPARE);
        in = pass->prepared;
    }
    mq_linear_forward(pass->low, in, &linear->down, 0, &sizes);
    mq_linear_forward(out, pass->low, &linear->up, 1, &narrow);
}

/* out (rows, O) = linear(in (rows, I)), or += if accumulate. */
static void multiply(pass *pass, const mq_linear *linear, void *out, const void *in, int accumulate)
{
    mq_row_sizes sizes = sizes_of(pass, linear->cols);
    mq_linear_forward(out, quantized_input(pass, linear, in), &linear->weight, accumulate, &sizes);
    if (linear->down.packed.data != NULL) add_low_rank(pass, linear, out, in);
}

/* out (rows, O) = linear(in (rows, I)). */
static int run_linear(pass *pass, mq_role role, void *out, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    int rc = collect_input(pass, linear, in);
    if (rc != MQ_OK) return rc;
    multiply(pass, linear, out, in, 0);
    return pass_point(pass, &linear->output, out, linear->rows);
}

/* hidden += linear(in). The sum is part of the product unless somebody looks at the output before it. */
static int run_residual(pass *pass, mq_role role, void *hidden, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    mq_row_sizes sizes = sizes_of(pass, linear->rows);
    pass->applied = NULL;
    if (mq_point_is_watched(&linear->output) || acts(linear->output.quantizer)) {
        int rc = run_linear(pass, role, pass->temporary, in);
        if (rc != MQ_OK) return rc;
        mq_add_forward(hidden, pass->temporary, &sizes);
        return MQ_OK;
    }
    int rc = collect_input(pass, linear, in);
    if (rc == MQ_OK) multiply(pass, linear, hidden, in, 1);
    return rc;
}

/* q, k or v: rotated first, so that statistics are of what is rounded; sequence by sequence, since some kinds of
 * statistics go by recorded batch. */
static int attention_point(pass *pass, mq_point *point, void *x, int64_t width, const mq_unit *unit)
{
    const mq_layer_context *context = pass->context;
    const mq_quantizer *quantizer = point->quantizer;
    int rc = MQ_OK;
    if (quantizer != NULL && mq_quantizer_prepares(quantizer))
        quantize_steps(pass, quantizer, x, x, width, MQ_QUANT_PREPARE);
    for (int64_t i = 0; rc == MQ_OK && mq_point_is_watched(point) && i < unit->sequences; i++) {
        const mq_sequence *sequence = &context->sequences[unit->first_sequence + i];
        const size_t row = (size_t)(sequence->first - unit->first);
        mq_calib_rows rows = {
            .x = (const char *)x + row * (size_t)width * mq_dtype_size(context->dtype), .dtype = context->dtype,
            .rows = sequence->tokens, .width = width, .ld = width, .chunk = sequence->first, .group = sequence->batch,
            .mask = context->count_mask ? context->count_mask + sequence->first : NULL,
        };
        rc = mq_point_collect(point, &rows, pass->err);
    }
    if (rc == MQ_OK && quantizer != NULL && quantizer->enabled)
        quantize_steps(pass, quantizer, x, x, width, MQ_QUANT_PREPARED);
    return rc;
}

/* Positions that the sequence has been through before. */
static int64_t past_of(const mq_layer_context *context, const mq_sequence *sequence)
{
    return context->cache != NULL ? context->cache->lengths[sequence->slot] : 0;
}

/* q or k: norm over each head (where the family has it), rope, then its point. */
static int finish_heads(pass *pass, mq_role norm, mq_point *point, void *x, int64_t heads, const mq_unit *unit)
{
    const mq_config *config = pass->context->config;
    const int64_t head_dim = config->head_dim;
    const float *weight = pass->layer->norms[norm];
    if (weight != NULL) {
        mq_row_sizes sizes = {.rows = pass->rows * heads, .width = head_dim, .dtype = pass->context->dtype};
        mq_rmsnorm_forward(x, x, weight, config->rms_norm_eps, &sizes);
    }
    for (int64_t i = 0; i < unit->sequences; i++) {
        const mq_sequence *sequence = &pass->context->sequences[unit->first_sequence + i];
        mq_rope_sizes sizes = {.tokens = sequence->tokens, .heads = heads, .head_dim = head_dim,
                               .first = past_of(pass->context, sequence), .dtype = pass->context->dtype};
        size_t at = (size_t)((sequence->first - unit->first) * heads * head_dim) * mq_dtype_size(sizes.dtype);
        mq_rope_forward((char *)x + at, pass->context->rope, &sizes);
    }
    return attention_point(pass, point, x, heads * head_dim, unit);
}

mq_attention_args mq_layer_attention(const mq_layer_context *context, int64_t window, int64_t tokens)
{
    const mq_config *config = context->config;
    int64_t width = config->num_attention_heads * config->head_dim;
    int64_t kv_width = config->num_key_value_heads * config->head_dim;
    return (mq_attention_args){
        .T = tokens, .T_kv = tokens, .heads = config->num_attention_heads, .kv_heads = config->num_key_value_heads,
        .head_dim = config->head_dim, .value_dim = config->head_dim, .dtype = context->dtype, .ldq = width,
        .ldk = kv_width, .ldv = kv_width, .ldo = width, .scale = (float)(1.0 / sqrt((double)config->head_dim)),
        .window = window,
    };
}

/* Keys and values of one sequence go into the cache, and attention reads them there with all that came before. */
static void attend_cached(const pass *pass, const mq_sequence *sequence, mq_attention_args *args, void *scratch)
{
    const mq_layer_context *context = pass->context;
    const int64_t layer = context->cache_layer, slot = sequence->slot;
    mq_cache_store(context->cache, layer, slot, sequence->tokens, args->k, args->v);
    args->past = past_of(context, sequence);
    args->T_kv = args->past + args->T;
    args->k = mq_cache_keys(context->cache, layer, slot);
    args->v = mq_cache_values(context->cache, layer, slot);
    args->ldk = args->ldv = args->head_dim;
    args->head_stride = context->cache->capacity * args->head_dim;
    if (args->T == 1) mq_attention_step(args, scratch);
    else mq_attention_forward(args, scratch);
}

static void attend(const pass *pass, const mq_unit *unit, const mq_scratch *scratch)
{
    const mq_layer_context *context = pass->context;
    size_t size = mq_dtype_size(context->dtype);
    for (int64_t i = 0; i < unit->sequences; i++) {
        const mq_sequence *sequence = &context->sequences[unit->first_sequence + i];
        mq_attention_args args = mq_layer_attention(context, pass->layer->window, sequence->tokens);
        size_t row = (size_t)(sequence->first - unit->first);
        args.q = (const char *)scratch->q + row * (size_t)args.ldq * size;
        args.k = (const char *)scratch->k + row * (size_t)args.ldk * size;
        args.v = (const char *)scratch->v + row * (size_t)args.ldv * size;
        args.out = (char *)scratch->mixed + row * (size_t)args.ldo * size;
        args.key_mask = context->key_mask ? context->key_mask + sequence->first : NULL;
        if (context->cache != NULL) attend_cached(pass, sequence, &args, scratch->attention);
        else mq_attention_forward(&args, scratch->attention);
    }
}

static int attention_half(pass *pass, const mq_unit *unit, void *hidden, const mq_scratch *scratch)
{
    const mq_config *config = pass->context->config;
    mq_layer *layer = pass->layer;
    mq_row_sizes sizes = sizes_of(pass, config->hidden_size);
    pass->quantized = scratch->quantized;
    pass->temporary = scratch->temporary;
    pass->prepared = scratch->prepared;
    pass->low = scratch->low;
    pass->applied = NULL;
    mq_rmsnorm_forward(scratch->normed, hidden, layer->norms[MQ_ROLE_INPUT_NORM], config->rms_norm_eps, &sizes);
    int rc = run_linear(pass, MQ_ROLE_Q, scratch->q, scratch->normed);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_K, scratch->k, scratch->normed);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_V, scratch->v, scratch->normed);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_Q_NORM, &layer->q, scratch->q, config->num_attention_heads, unit);
    if (rc == MQ_OK) rc = finish_heads(pass, MQ_ROLE_K_NORM, &layer->k, scratch->k, config->num_key_value_heads, unit);
    if (rc == MQ_OK)
        rc = attention_point(pass, &layer->v, scratch->v, config->num_key_value_heads * config->head_dim, unit);
    if (rc != MQ_OK) return rc;
    attend(pass, unit, scratch);
    return run_residual(pass, MQ_ROLE_O, hidden, scratch->mixed);
}

static int mlp_half(pass *pass, void *hidden, const mq_scratch *scratch)
{
    const mq_config *config = pass->context->config;
    mq_row_sizes sizes = sizes_of(pass, config->hidden_size), inner = sizes_of(pass, config->intermediate_size);
    pass->quantized = scratch->mlp_quantized;
    pass->temporary = scratch->mlp_temporary;
    pass->prepared = scratch->mlp_prepared;
    pass->low = scratch->mlp_low;
    pass->applied = NULL;
    mq_rmsnorm_forward(scratch->mlp_normed, hidden, pass->layer->norms[MQ_ROLE_POST_NORM], config->rms_norm_eps,
                       &sizes);
    int rc = run_linear(pass, MQ_ROLE_GATE, scratch->gate, scratch->mlp_normed);
    if (rc == MQ_OK) rc = run_linear(pass, MQ_ROLE_UP, scratch->up, scratch->mlp_normed);
    if (rc != MQ_OK) return rc;
    mq_swiglu_forward(scratch->gate, scratch->up, &inner);
    return run_residual(pass, MQ_ROLE_DOWN, hidden, scratch->gate);
}

static int route_half(pass *pass, const void *hidden, const mq_scratch *scratch)
{
    const mq_config *config = pass->context->config;
    mq_row_sizes sizes = sizes_of(pass, config->hidden_size);
    mq_route_sizes route = {
        .rows = pass->rows, .experts = pass->layer->experts, .first = pass->first, .dtype = pass->context->dtype,
        .normalize = config->norm_topk_prob != 0, .rounded = pass->context->round_routes,
    };
    mq_rmsnorm_forward(scratch->mlp_normed, hidden, pass->layer->norms[MQ_ROLE_POST_NORM], config->rms_norm_eps,
                       &sizes);
    mq_linear_forward(scratch->router, scratch->mlp_normed, &pass->layer->linears[MQ_ROLE_ROUTER].weight, 0, &sizes);
    mq_route_forward(pass->context->routes, scratch->router, &route);
    return MQ_OK;
}

static void enter_rows(pass *pass, int64_t first, int64_t rows)
{
    const uint8_t *mask = pass->context->count_mask;
    pass->first = first;
    pass->rows = rows;
    pass->count_mask = mask ? mask + first : NULL;
}

int mq_layer_forward(mq_layer *layer, const mq_layer_context *context, const mq_unit *unit, void *hidden,
                     const mq_scratch *scratch, mq_error *err)
{
    pass pass = {.layer = layer, .context = context, .err = err};
    size_t stride = (size_t)context->config->hidden_size * mq_dtype_size(context->dtype);
    enter_rows(&pass, unit->first, unit->rows);
    int rc = attention_half(&pass, unit, hidden, scratch);
    const int64_t most = mlp_piece(context->config, context->dtype);
    for (int64_t done = 0; rc == MQ_OK && done < unit->rows; done += most) {
        void *piece = (char *)hidden + (size_t)done * stride;
        enter_rows(&pass, unit->first + done, MQ_MIN(most, unit->rows - done));
        rc = layer->experts > 0 ? route_half(&pass, piece, scratch) : mlp_half(&pass, piece, scratch);
    }
    return rc;
}

/* temporary (rows, C) = the loaded expert of normed (rows, C). */
static int run_expert(pass *pass, const mq_scratch *scratch)
{
    mq_linear *gate = &pass->layer->linears[MQ_ROLE_GATE], *up = &pass->layer->linears[MQ_ROLE_UP];
    mq_row_sizes sizes = sizes_of(pass, gate->cols), inner = sizes_of(pass, gate->rows);
    int rc = collect_input(pass, gate, scratch->mlp_normed);
    if (rc != MQ_OK) return rc;
    const void *in = quantized_input(pass, gate, scratch->mlp_normed);
    mq_linear_forward(scratch->gate, in, &gate->weight, 0, &sizes);
    mq_linear_forward(scratch->up, in, &up->weight, 0, &sizes);
    mq_swiglu_forward(scratch->gate, scratch->up, &inner);
    pass->applied = NULL;
    return run_linear(pass, MQ_ROLE_DOWN, scratch->mlp_temporary, scratch->gate);
}

int mq_layer_expert(mq_layer *layer, const mq_layer_context *context, const mq_expert_rows *rows,
                    const mq_scratch *scratch, mq_error *err)
{
    pass pass = {.layer = layer, .context = context, .err = err, .first = rows->position, .rows = rows->count,
                 .tokens = rows->tokens, .quantized = scratch->mlp_quantized, .temporary = scratch->mlp_temporary};
    mq_row_sizes sizes = sizes_of(&pass, context->config->hidden_size);
    if (context->count_mask != NULL) {
        pass.count_mask = scratch->count_mask;
        for (int64_t i = 0; i < rows->count; i++) scratch->count_mask[i] = context->count_mask[rows->tokens[i]];
    }
    mq_gather_forward(scratch->mlp_normed, rows->hidden, rows->tokens, &sizes);
    mq_rmsnorm_forward(scratch->mlp_normed, scratch->mlp_normed, layer->norms[MQ_ROLE_POST_NORM],
                       context->config->rms_norm_eps, &sizes);
    int rc = run_expert(&pass, scratch);
    if (rc == MQ_OK) mq_scatter_forward(rows->sums, scratch->mlp_temporary, rows->tokens, rows->shares, &sizes);
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
    mq_attention_args args = mq_layer_attention(context, 0, tokens);
    if (context->cache == NULL) return mq_attention_scratch(&args);
    args.T_kv = context->cache->capacity;
    const size_t one = mq_attention_step_scratch(&args);
    return tokens == 1 ? one : MQ_MAX(one, mq_attention_scratch(&args));
}

size_t mq_scratch_init(mq_scratch *scratch, const mq_layer_context *context, int64_t rows, int64_t tokens)
{
    const mq_config *config = context->config;
    int64_t hidden = config->hidden_size, mlp_rows = MQ_MIN(rows, mlp_piece(config, context->dtype));
    int64_t inner = MQ_MAX(config->intermediate_size, config->num_experts > 0 ? config->moe_intermediate_size : 0);
    int64_t q_width = config->num_attention_heads * config->head_dim, widest = MQ_MAX(hidden, q_width);
    int64_t kv_width = config->num_key_value_heads * config->head_dim;
    size_t size = mq_dtype_size(context->dtype), attention = 0, mlp = 0;
    /* The attention's output takes the place of the norm's, which is read for the last time before. */
    scratch->normed = scratch->mixed = carve(scratch, &attention, rows * widest, size);
    scratch->q = carve(scratch, &attention, rows * q_width, size);
    scratch->k = carve(scratch, &attention, rows * kv_width, size);
    scratch->v = carve(scratch, &attention, rows * kv_width, size);
    scratch->attention = carve(scratch, &attention, (int64_t)attention_nbytes(context, tokens), 1);
    scratch->quantized = carve(scratch, &attention, rows * widest, size);
    scratch->temporary = carve(scratch, &attention, rows * hidden, size);
    scratch->mlp_normed = carve(scratch, &mlp, mlp_rows * hidden, size);
    scratch->gate = carve(scratch, &mlp, mlp_rows * inner, size);
    scratch->up = carve(scratch, &mlp, mlp_rows * inner, size);
    scratch->mlp_quantized = carve(scratch, &mlp, mlp_rows * MQ_MAX(hidden, inner), size);
    scratch->mlp_temporary = carve(scratch, &mlp, mlp_rows * hidden, size);
    const int64_t prepared = context->rank > 0;
    scratch->prepared = carve(scratch, &attention, prepared * rows * widest, size);
    scratch->low = carve(scratch, &attention, rows * context->rank, size);
    scratch->mlp_prepared = carve(scratch, &mlp, prepared * mlp_rows * MQ_MAX(hidden, inner), size);
    scratch->mlp_low = carve(scratch, &mlp, mlp_rows * context->rank, size);
    scratch->router = carve(scratch, &mlp, mlp_rows * config->num_experts, size);
    scratch->count_mask = carve(scratch, &mlp, config->num_experts > 0 ? mlp_rows : 0, 1);
    scratch->mlp_rows = mlp_rows;
    scratch->nbytes = MQ_MAX(attention, mlp);
    return scratch->nbytes;
}

static int check_point(const mq_point *point, int64_t width, const char *module, const char *what, mq_error *err)
{
    char name[256];
    if (!acts(point->quantizer)) return MQ_OK;
    snprintf(name, sizeof name, "%s.%s", module, what);
    return mq_quantizer_ready(point->quantizer, -1, width, name, err);
}

int mq_layer_check(const mq_layer *layer, const mq_config *config, mq_error *err)
{
    int64_t kv_width = config->num_key_value_heads * config->head_dim;
    int rc = MQ_OK;
    for (int role = 0; rc == MQ_OK && role < MQ_ROLE_COUNT; role++) {
        const mq_linear *linear = &layer->linears[role];
        if (linear->cols == 0 || role == MQ_ROLE_ROUTER) continue;
        rc = check_point(&linear->input, linear->cols, linear->name, "input_quantizer", err);
        if (rc == MQ_OK) rc = check_point(&linear->output, linear->rows, linear->name, "output_quantizer", err);
    }
    if (rc == MQ_OK)
        rc = check_point(&layer->q, config->num_attention_heads * config->head_dim, layer->attention_name,
                         "q_bmm_quantizer", err);
    if (rc == MQ_OK) rc = check_point(&layer->k, kv_width, layer->attention_name, "k_bmm_quantizer", err);
    if (rc == MQ_OK) rc = check_point(&layer->v, kv_width, layer->attention_name, "v_bmm_quantizer", err);
    return rc;
}

size_t mq_layer_points(mq_layer *layer, mq_point **out)
{
    size_t count = 0;
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        if (layer->linears[role].cols == 0 || role == MQ_ROLE_ROUTER) continue;
        out[count++] = &layer->linears[role].input;
        out[count++] = &layer->linears[role].output;
    }
    out[count++] = &layer->q;
    out[count++] = &layer->k;
    out[count++] = &layer->v;
    return count;
}
