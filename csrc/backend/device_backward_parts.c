/* What the way back through a layer on a device is made of: linears, norms and what is added, with gradients of weights
 * where they are wanted. */
#include <string.h>

#include "backend/device_backward.h"

/* ---- rows ---- */

mq_cuda_matrix mq_device_back_matrix(const mq_device_back *it, const void *data, int64_t width)
{
    return (mq_cuda_matrix){(void *)(uintptr_t)data, it->context->dtype, it->chunk->rows, width, width};
}

mq_cuda_matrix mq_device_back_single(const mq_device_back *it, const float *data, int64_t width)
{
    return (mq_cuda_matrix){(void *)(uintptr_t)data, MQ_F32, it->chunk->rows, width, width};
}

int mq_device_back_copy(const mq_device_back *it, void *out, const void *in, int64_t width)
{
    const size_t nbytes = (size_t)(it->chunk->rows * width) * mq_dtype_size(it->context->dtype);
    if (out == in) return MQ_OK;
    return it->device->backend->copy(out, in, nbytes, it->device->compute, it->err);
}

int mq_device_back_columns(const mq_device_back *it, const mq_device_columns *columns)
{
    void *at = (char *)columns->joined + (size_t)columns->first * mq_dtype_size(columns->dtype);
    const mq_cuda_matrix part = {columns->part, columns->dtype, it->chunk->rows, columns->width, columns->width};
    const mq_cuda_matrix joined = {at, columns->dtype, it->chunk->rows, columns->width, columns->whole};
    const mq_cuda_rows_job job = {.x = columns->back ? part : joined, .y = columns->back ? joined : part};
    return it->device->backend->rows(&job, it->device->compute, it->err);
}

int mq_device_back_scale(const mq_device_back *it, float *x, double factor)
{
    const mq_cuda_matrix rows = mq_device_back_single(it, x, it->context->config->hidden_size);
    const mq_cuda_add_job job = {.x = rows, .y = rows, .scale = (float)factor};
    if (factor == 1.0) return MQ_OK;
    return it->device->backend->add(&job, it->device->compute, it->err);
}

/* ---- gradients of weights ---- */

int mq_device_back_fetch(const mq_device_back *it, float *to, int64_t rows, int64_t width)
{
    const mq_row_sizes sizes = {.rows = rows, .width = width, .dtype = MQ_F32};
    const size_t nbytes = (size_t)(rows * width) * sizeof(float);
    const mq_backend *backend = it->device->backend;
    int rc = backend->copy(it->fetched, it->scratch->piece, nbytes, it->device->compute, it->err);
    if (rc == MQ_OK) rc = backend->stream_wait(it->device->compute, it->err);
    if (rc == MQ_OK) mq_add_forward(to, it->fetched, &sizes);
    return rc;
}

/* Some rows of a weight's gradient after the other. */
static int multiply(const mq_device_back *it, float *to, const mq_cuda_matrix *d_out, const mq_cuda_matrix *in)
{
    mq_device *device = it->device;
    const int64_t width = in->cols, step = it->scratch->piece_count / width;
    mq_cuda_gemm_job job = {.a = *d_out, .b = *in, .transpose_a = 1, .alpha = 1.0f, .workspace = device->workspace};
    int rc = MQ_OK;
    for (int64_t row = 0; rc == MQ_OK && row < d_out->cols; row += step) {
        const int64_t rows = MQ_MIN(step, d_out->cols - row);
        job.a.data = (float *)d_out->data + row;
        job.a.cols = rows;
        job.out = (mq_cuda_matrix){it->scratch->piece, MQ_F32, rows, width, width};
        rc = device->backend->gemm_run(device->gemm, &job, device->compute, it->err);
        if (rc == MQ_OK) rc = mq_device_back_fetch(it, to + row * width, rows, width);
    }
    return rc;
}

int mq_device_back_weight(const mq_device_back *it, float *to, const float *d_out, int64_t rows, const void *in,
                          int64_t columns)
{
    const mq_cuda_matrix out = mq_device_back_single(it, d_out, rows);
    mq_cuda_matrix read = mq_device_back_matrix(it, in, columns);
    int rc = MQ_OK;
    if (read.dtype != MQ_F32) {
        const mq_cuda_rows_job job = {.x = read, .y = mq_device_back_single(it, it->scratch->single, columns)};
        rc = it->device->backend->rows(&job, it->device->compute, it->err);
        read = job.y;
    }
    return rc == MQ_OK ? multiply(it, to, &out, &read) : rc;
}

static int bias_gradient(const mq_device_back *it, float *to, const float *d_out, int64_t width)
{
    const mq_backend *backend = it->device->backend;
    const mq_cuda_columns_job job = {
        .x = mq_device_back_single(it, d_out, width), .what = MQ_CUDA_SUM, .sums_f32 = it->scratch->piece,
        .workspace = it->scratch->sums, .workspace_nbytes = it->scratch->sums_nbytes,
    };
    int rc = backend->fill(job.sums_f32, 0, (size_t)width * sizeof(float), it->device->compute, it->err);
    if (rc == MQ_OK) rc = backend->column_sums(&job, it->device->compute, it->err);
    return rc == MQ_OK ? mq_device_back_fetch(it, to, 1, width) : rc;
}

/* ---- linears ---- */

int mq_device_back_forward(const mq_device_back *it, mq_role role, void *out, const void *in, int accumulate)
{
    mq_device *device = it->device;
    const mq_device_linear *linear = &device->linears[role];
    const mq_cuda_gemm_job job = {
        .a = mq_device_back_matrix(it, in, linear->weight.cols), .b = linear->weight, .transpose_b = 1,
        .out = mq_device_back_matrix(it, out, linear->weight.rows), .alpha = 1.0f, .beta = accumulate ? 1.0f : 0.0f,
        .bias = linear->bias, .workspace = device->workspace,
    };
    return device->backend->gemm_run(device->gemm, &job, device->compute, it->err);
}

int mq_device_back_narrow(const mq_device_back *it, const float *gradient, int64_t width, mq_cuda_matrix *out)
{
    const mq_cuda_rows_job job = {.x = mq_device_back_single(it, gradient, width),
                                  .y = mq_device_back_matrix(it, it->scratch->rounded, width)};
    *out = it->context->dtype == MQ_F32 ? job.x : job.y;
    if (it->context->dtype == MQ_F32) return MQ_OK;
    return it->device->backend->rows(&job, it->device->compute, it->err);
}

static int observe(const mq_device_back *it, const mq_linear *linear, const mq_back_linear *of)
{
    const mq_observed observed = {
        .input = of->in, .output = of->out, .gradient = of->d_out, .dtype = it->context->dtype,
        .output_dtype = it->context->dtype, .rows = it->chunk->rows, .columns = linear->cols, .width = linear->rows,
        .outputs = linear->rows, .first = it->chunk->first, .total = it->back->run->rows, .expert = -1,
    };
    return mq_device_observe(it, linear->observer, &observed);
}

int mq_device_back_linear(const mq_device_back *it, mq_role role, const mq_back_linear *of)
{
    mq_device *device = it->device;
    const mq_linear *linear = &it->layer->linears[role];
    const mq_backward *back = it->back;
    mq_cuda_gemm_job job = {
        .b = device->linears[role].weight, .out = mq_device_back_single(it, of->d_in, linear->cols), .alpha = 1.0f,
        .beta = of->accumulate ? 1.0f : 0.0f, .workspace = device->workspace,
    };
    int rc = MQ_OK;
    if (linear->observer != NULL && it->expert < 0) rc = observe(it, linear, of);
    if (rc == MQ_OK && back->d_weights[role] != NULL)
        rc = mq_device_back_weight(it, back->d_weights[role], of->d_out, linear->rows, of->in, linear->cols);
    if (rc == MQ_OK && back->d_biases[role] != NULL)
        rc = bias_gradient(it, back->d_biases[role], of->d_out, linear->rows);
    if (rc == MQ_OK) rc = mq_device_back_narrow(it, of->d_out, linear->rows, &job.a);
    return rc == MQ_OK ? device->backend->gemm_run(device->gemm, &job, device->compute, it->err) : rc;
}

/* ---- norms ---- */

static mq_cuda_norm_job norm_of(const mq_device_back *it, mq_role role, const void *in, int64_t width)
{
    return (mq_cuda_norm_job){
        .x = mq_device_back_matrix(it, in, width), .weight = it->device->norms[role],
        .heads = width / it->layer->widths[role], .eps = (float)mq_norm_eps(it->context->config, role),
    };
}

int mq_device_back_normed(const mq_device_back *it, mq_role role, void *out, const void *in, int64_t width)
{
    mq_cuda_norm_job job = norm_of(it, role, in, width);
    job.y = mq_device_back_matrix(it, out, width);
    return it->device->backend->rmsnorm(&job, it->device->compute, it->err);
}

int mq_device_back_norm(const mq_device_back *it, mq_role role, const mq_back_norm *norm)
{
    const mq_backend *backend = it->device->backend;
    const int64_t width = it->layer->widths[role];
    float *wanted = it->back->d_weights[role];
    mq_cuda_norm_job job = norm_of(it, role, norm->in, norm->width);
    int rc = MQ_OK;
    job.d_out = norm->d_out;
    job.d_in = norm->d_in;
    job.accumulate = norm->accumulate;
    if (wanted != NULL) {
        job.d_weight = it->scratch->piece;
        job.workspace = it->scratch->sums;
        job.workspace_nbytes = it->scratch->sums_nbytes;
        rc = backend->fill(job.d_weight, 0, (size_t)width * sizeof(float), it->device->compute, it->err);
    }
    if (rc == MQ_OK) rc = backend->rmsnorm_backward(&job, it->device->compute, it->err);
    return rc == MQ_OK && wanted != NULL ? mq_device_back_fetch(it, wanted, 1, width) : rc;
}

/* ---- what a half reads, and what it adds ---- */

int mq_device_back_enter(const mq_device_back *it, mq_role norm, void *out, const void *in)
{
    const int64_t width = it->context->config->hidden_size;
    if (it->layer->norms[norm] != NULL) return mq_device_back_normed(it, norm, out, in, width);
    return mq_device_back_copy(it, out, in, width);
}

static int add(const mq_device_back *it, const mq_cuda_matrix *x, const mq_cuda_matrix *y, double factor)
{
    const mq_cuda_add_job job = {.x = *x, .y = *y, .accumulate = 1, .scale = (float)factor};
    return it->device->backend->add(&job, it->device->compute, it->err);
}

int mq_device_back_leave(const mq_device_back *it, mq_role norm, const void *in, float *d_out, float *gradient)
{
    const int64_t width = it->context->config->hidden_size;
    const mq_back_norm back = {.in = in, .d_out = d_out, .d_in = gradient, .accumulate = 1, .width = width};
    const mq_cuda_matrix x = mq_device_back_single(it, d_out, width), y = mq_device_back_single(it, gradient, width);
    if (it->layer->norms[norm] != NULL) return mq_device_back_norm(it, norm, &back);
    return add(it, &x, &y, 1.0);
}

int mq_device_back_is_added_plainly(const mq_device_back *it, mq_role norm)
{
    return it->layer->norms[norm] == NULL && it->context->config->residual_multiplier == 1.0;
}

int mq_device_back_added(const mq_device_back *it, mq_role norm, const void *made, const float **d_out, float *out)
{
    const int64_t width = it->context->config->hidden_size;
    const mq_back_norm back = {.in = made, .d_out = out, .d_in = out, .width = width};
    const mq_cuda_add_job scale = {
        .x = mq_device_back_single(it, *d_out, width), .y = mq_device_back_single(it, out, width),
        .scale = (float)it->context->config->residual_multiplier,
    };
    if (mq_device_back_is_added_plainly(it, norm)) return MQ_OK;
    *d_out = out;
    const int rc = it->device->backend->add(&scale, it->device->compute, it->err);
    return rc == MQ_OK && it->layer->norms[norm] != NULL ? mq_device_back_norm(it, norm, &back) : rc;
}

int mq_device_back_add(const mq_device_back *it, mq_role norm, void *hidden, const void *made, void *changed)
{
    const int64_t width = it->context->config->hidden_size;
    const mq_cuda_matrix x = mq_device_back_matrix(it, changed, width), y = mq_device_back_matrix(it, hidden, width);
    const int rc = mq_device_back_enter(it, norm, changed, made);
    return rc == MQ_OK ? add(it, &x, &y, it->context->config->residual_multiplier) : rc;
}
