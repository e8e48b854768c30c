/* Steps of a layer's forward on the tensors between its operations: where quantizers and calibrators look on. */
#include "model/pass.h"

#include "core/pool.h"

mq_row_sizes mq_pass_sizes(const mq_pass *pass, int64_t width)
{
    return (mq_row_sizes){.rows = pass->rows, .width = width, .dtype = pass->context->dtype};
}

/* The recorded batch that row i of the pass is of. */
static int64_t batch_of(const mq_pass *pass, int64_t i)
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

static int collect(mq_pass *pass, mq_point *point, const void *x, int64_t width)
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

static void quantize_steps(mq_pass *pass, const mq_quantizer *quantizer, void *y, const void *x, int64_t width,
                           mq_quant_steps steps)
{
    quantize_job job = {
        .quantizer = quantizer,
        .rows = {.x = x, .y = y, .dtype = pass->context->dtype, .rows = pass->rows, .cols = width, .ldx = width,
                 .ldy = width, .steps = steps},
    };
    mq_parallel_for(pass->rows, mq_row_grain(width), quantize_rows, &job);
}

static void quantize(mq_pass *pass, const mq_quantizer *quantizer, void *y, const void *x, int64_t width)
{
    quantize_steps(pass, quantizer, y, x, width, MQ_QUANT_ALL);
}

/* What reaches x: statistics, then the quantizer, in place. */
static int pass_point(mq_pass *pass, mq_point *point, void *x, int64_t width)
{
    int rc = collect(pass, point, x, width);
    if (rc == MQ_OK && acts(point->quantizer)) quantize(pass, point->quantizer, x, x, width);
    return rc;
}

/* The input of a linear as its quantizer leaves it. Siblings with the same quantizer find the work done. */
const void *mq_pass_quantized(mq_pass *pass, const mq_linear *linear, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    if (!acts(quantizer)) return in;
    if (pass->applied == NULL || !mq_quantizer_same(pass->applied, quantizer))
        quantize(pass, quantizer, pass->quantized, in, linear->cols);
    pass->applied = quantizer;
    return pass->quantized;
}

/* Statistics of a linear's input as its quantizer leaves it, or as it is before it is rounded. */
int mq_pass_collect_input(mq_pass *pass, mq_linear *linear, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    if (!mq_point_is_watched(&linear->input)) return MQ_OK;
    if (linear->input.watch_quantized) {
        in = mq_pass_quantized(pass, linear, in);
    } else if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        quantize_steps(pass, quantizer, pass->quantized, in, linear->cols, MQ_QUANT_PREPARE);
        pass->applied = NULL;
        in = pass->quantized;
    }
    return collect(pass, &linear->input, in, linear->cols);
}

/* out (rows, O) += up(down(in)), of the input as it is before it is rounded. */
static void add_low_rank(mq_pass *pass, const mq_linear *linear, void *out, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    mq_row_sizes sizes = mq_pass_sizes(pass, linear->cols), narrow = mq_pass_sizes(pass, linear->down.packed.n);
    if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        quantize_steps(pass, quantizer, pass->prepared, in, linear->cols, MQ_QUANT_PREPARE);
        in = pass->prepared;
    }
    mq_linear_forward(pass->low, in, &linear->down, 0, &sizes);
    mq_linear_forward(out, pass->low, &linear->up, 1, &narrow);
}

/* out (rows, O) = linear(in (rows, I)), or += if accumulate. */
static void multiply(mq_pass *pass, const mq_linear *linear, void *out, const void *in, int accumulate)
{
    mq_row_sizes sizes = mq_pass_sizes(pass, linear->cols);
    mq_linear_forward(out, mq_pass_quantized(pass, linear, in), &linear->weight, accumulate, &sizes);
    if (linear->down.packed.data != NULL) add_low_rank(pass, linear, out, in);
}

/* out (rows, O) = linear(in (rows, I)). */
int mq_pass_linear(mq_pass *pass, mq_role role, void *out, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    int rc = mq_pass_collect_input(pass, linear, in);
    if (rc != MQ_OK) return rc;
    multiply(pass, linear, out, in, 0);
    return pass_point(pass, &linear->output, out, linear->rows);
}

void mq_pass_norm(const mq_pass *pass, mq_role role, void *out, const void *in, int64_t width)
{
    const mq_layer *layer = pass->layer;
    mq_row_sizes sizes = mq_pass_sizes(pass, layer->widths[role]);
    sizes.rows *= width / sizes.width;
    mq_rmsnorm_forward(out, in, layer->norms[role], mq_norm_eps(pass->context->config, role), &sizes);
}

const void *mq_pass_normed(const mq_pass *pass, mq_role role, void *out, const void *in)
{
    if (pass->layer->norms[role] == NULL) return in;
    mq_pass_norm(pass, role, out, in, pass->context->config->hidden_size);
    return out;
}

/* The sum is part of the product unless something comes between. */
int mq_pass_residual(mq_pass *pass, mq_role role, mq_role norm, void *hidden, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    const mq_row_sizes sizes = mq_pass_sizes(pass, linear->rows);
    const double factor = pass->context->config->residual_multiplier;
    pass->applied = NULL;
    if (mq_point_is_watched(&linear->output) || acts(linear->output.quantizer) || factor != 1.0 ||
        pass->layer->norms[norm] != NULL) {
        int rc = mq_pass_linear(pass, role, pass->temporary, in);
        if (rc != MQ_OK) return rc;
        const void *added = mq_pass_normed(pass, norm, pass->temporary, pass->temporary);
        mq_add_scaled_forward(hidden, added, factor, &sizes);
        return MQ_OK;
    }
    int rc = mq_pass_collect_input(pass, linear, in);
    if (rc == MQ_OK) multiply(pass, linear, hidden, in, 1);
    return rc;
}

/* q, k or v: rotated first, so that statistics are of what is rounded; sequence by sequence, since some kinds of
 * statistics go by recorded batch. */
int mq_pass_attention_point(mq_pass *pass, mq_point *point, void *x, int64_t width, const mq_unit *unit)
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
