/* layer.c on a device: the same steps in the same order, each an operation of the CUDA library. */
#include "backend/device_pass.h"

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

int mq_device_quantize(mq_device_pass *pass, const mq_point *point, void *y, const void *x, int64_t width,
                       mq_quant_steps steps)
{
    mq_device *device = pass->device;
    const mq_device_rows rows = {.x = mq_device_matrix(pass, (void *)(uintptr_t)x, width),
                                 .y = mq_device_matrix(pass, y, width), .steps = steps};
    return mq_device_quantizer_apply(&device->quantizers[point_index(pass->layer, point)], device->backend,
                                     device->index, point->quantizer, &rows, device->compute, pass->err);
}

int mq_device_amax(mq_device_pass *pass, const mq_point *point, const float **out)
{
    mq_device *device = pass->device;
    return mq_device_quantizer_amax(&device->quantizers[point_index(pass->layer, point)], device->backend,
                                    device->index, point->quantizer, out, device->compute, pass->err);
}

int mq_device_watch(mq_device_pass *pass, mq_point *point, const void *x, int64_t width)
{
    const mq_cuda_matrix matrix = mq_device_matrix(pass, (void *)(uintptr_t)x, width);
    if (!mq_point_is_watched(point)) return MQ_OK;
    const int by_sequence = point_index(pass->layer, point) >= 2 * MQ_ROLE_COUNT;
    const mq_device_look look = {.x = matrix, .chunk = pass->chunk, .context = pass->context,
                                 .by_sequence = by_sequence, .by_batch = by_sequence || mq_point_by_group(point)};
    return mq_device_collect(pass->device, point, &look, pass->scratch->counted, pass->err);
}

/* What reaches x: statistics, then the quantizer, in place. */
static int pass_point(mq_device_pass *pass, mq_point *point, void *x, int64_t width)
{
    const int rc = mq_device_watch(pass, point, x, width);
    return rc == MQ_OK && acts(point->quantizer) ? mq_device_quantize(pass, point, x, x, width, MQ_QUANT_ALL) : rc;
}

/* Siblings with the same quantizer find the work done. */
int mq_device_quantized(mq_device_pass *pass, const mq_linear *linear, const void *in, const void **out)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    int rc = MQ_OK;
    *out = in;
    if (!acts(quantizer)) return rc;
    if (pass->applied == NULL || !mq_quantizer_same(pass->applied, quantizer))
        rc = mq_device_quantize(pass, &linear->input, pass->scratch->quantized, in, linear->cols, MQ_QUANT_ALL);
    pass->applied = quantizer;
    *out = pass->scratch->quantized;
    return rc;
}

int mq_device_watch_input(mq_device_pass *pass, mq_linear *linear, const void *in)
{
    const mq_quantizer *quantizer = linear->input.quantizer;
    int rc = MQ_OK;
    if (!mq_point_is_watched(&linear->input)) return rc;
    if (linear->input.watch_quantized) {
        rc = mq_device_quantized(pass, linear, in, &in);
    } else if (quantizer != NULL && mq_quantizer_prepares(quantizer)) {
        rc = mq_device_quantize(pass, &linear->input, pass->scratch->quantized, in, linear->cols, MQ_QUANT_PREPARE);
        pass->applied = NULL;
        in = pass->scratch->quantized;
    }
    return rc == MQ_OK ? mq_device_watch(pass, &linear->input, in, linear->cols) : rc;
}

/* ---- products ---- */

int mq_device_product(mq_device_pass *pass, void *out, const void *in, const mq_cuda_matrix *weight, const void *bias,
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
        rc = mq_device_quantize(pass, &linear->input, pass->scratch->prepared, in, linear->cols, MQ_QUANT_PREPARE);
        in = pass->scratch->prepared;
    }
    if (rc == MQ_OK) rc = mq_device_product(pass, pass->scratch->low, in, &weights->down, NULL, 0);
    return rc == MQ_OK ? mq_device_product(pass, out, pass->scratch->low, &weights->up, NULL, 1) : rc;
}

static int multiply(mq_device_pass *pass, mq_role role, void *out, const void *in, int accumulate)
{
    const mq_linear *linear = &pass->layer->linears[role];
    const mq_device_linear *weights = &pass->device->linears[role];
    const int rc = mq_device_multiply(pass, linear, weights, out, in, accumulate);
    return rc == MQ_OK && weights->down.data != NULL ? add_low_rank(pass, linear, weights, out, in) : rc;
}

int mq_device_linear_of(mq_device_pass *pass, mq_role role, void *out, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    int rc = mq_device_watch_input(pass, linear, in);
    if (rc == MQ_OK) rc = multiply(pass, role, out, in, 0);
    return rc == MQ_OK ? pass_point(pass, &linear->output, out, linear->rows) : rc;
}

int mq_device_norm(mq_device_pass *pass, mq_role role, void *out, const void *in, int64_t width)
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
    const int rc = mq_device_norm(pass, role, out, *in, pass->context->config->hidden_size);
    *in = out;
    return rc;
}

/* The sum is part of the product unless something comes between. */
int mq_device_residual(mq_device_pass *pass, mq_role role, mq_role added, void *hidden, const void *in)
{
    mq_linear *linear = &pass->layer->linears[role];
    const void *made = pass->scratch->temporary;
    pass->applied = NULL;
    const double factor = pass->context->config->residual_multiplier;
    const int between = mq_point_is_watched(&linear->output) || acts(linear->output.quantizer) || factor != 1.0;
    if (!between && pass->device->norms[added] == NULL) {
        const int rc = mq_device_watch_input(pass, linear, in);
        return rc == MQ_OK ? multiply(pass, role, hidden, in, 1) : rc;
    }
    int rc = mq_device_linear_of(pass, role, pass->scratch->temporary, in);
    if (rc == MQ_OK) rc = mq_device_normed(pass, added, pass->scratch->temporary, &made);
    const mq_cuda_add_job job = {.x = mq_device_matrix(pass, pass->scratch->temporary, linear->rows),
                                 .y = mq_device_matrix(pass, hidden, linear->rows), .accumulate = 1,
                                 .scale = (float)factor};
    return rc == MQ_OK ? pass->device->backend->add(&job, pass->device->compute, pass->err) : rc;
}

int mq_device_columns(mq_device_pass *pass, const mq_device_part *to, const mq_device_part *from, int64_t width,
                      int64_t repeat)
{
    const mq_dtype dtype = pass->context->dtype;
    const size_t size = mq_dtype_size(dtype);
    const int64_t rows = to->rows / repeat;
    const mq_cuda_rows_job job = {
        .x = {(char *)from->data + (size_t)from->first * size, dtype, rows, width, from->ld},
        .y = {(char *)to->data + (size_t)to->first * size, dtype, to->rows, width, to->ld}, .repeat = repeat,
    };
    return pass->device->backend->rows(&job, pass->device->compute, pass->err);
}

int mq_device_split(mq_device_pass *pass, void *to, int64_t first, int64_t width, int64_t joined)
{
    const mq_device_part whole = {.data = to, .rows = pass->chunk->rows, .ld = width};
    const mq_device_part part = {.data = pass->scratch->joined, .first = first, .ld = joined};
    return mq_device_columns(pass, &whole, &part, width, 1);
}

/* ---- the layer ---- */

int mq_device_run_chunk(mq_device_pass *pass)
{
    const mq_layer_kind *kind = &pass->layer->kind;
    const void *in = pass->chunk->hidden;
    int rc = kind->attention != MQ_BLOCK_NONE ? mq_device_attention_half(pass) : MQ_OK;
    if (rc != MQ_OK || (pass->layer->experts == 0 && kind->mlp == MQ_BLOCK_NONE)) return rc;
    rc = mq_device_normed(pass, MQ_ROLE_POST_NORM, pass->scratch->normed, &in);
    if (rc != MQ_OK) return rc;
    return pass->layer->experts > 0 ? mq_device_route_half(pass, in) : mq_device_mlp_half(pass, in);
}
