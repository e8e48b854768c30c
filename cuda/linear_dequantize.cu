/* Linears whose formats the device does not multiply: the weight is dequantized to the inputs' dtype, as many rows at a
 * time as fit in the workspace, and multiplied as such; inputs are fake-quantized before. No kernels. */
#include "linear.cuh"

enum { UNIT = 128 };           /* rows of a weight: whole blocks of two dimensions, and pairs */

/* ---- inputs ---- */

/* The inputs that are multiplied, rows first to first + rows of them: as they are, or in the workspace. */
typedef struct part {
    int64_t first, rows;
    mq_cuda_matrix x;
    void *scratch;             /* of whoever quantizes them */
    size_t scratch_nbytes;
} part;

static mq_cuda_scaled_job scaled_job(const mq_linear_call *call, const mq_cuda_matrix *x, const part *p)
{
    const mq_cuda_linear *linear = &call->job->linear;
    mq_cuda_scaled_job job = {};
    job.kind = linear->inputs == MQ_CUDA_INPUTS_GROUP ? MQ_KIND_FLOAT : linear->input_kind;
    job.bits = 8;
    job.x = *x;
    job.y = p->x;
    job.block_rows = linear->inputs == MQ_CUDA_INPUTS_TENSOR ? 0 : 1;
    job.block_cols = linear->inputs == MQ_CUDA_INPUTS_GROUP ? 128 : 0;
    job.amax = linear->inputs == MQ_CUDA_INPUTS_TENSOR ? call->amax : NULL;
    job.dynamic = job.amax == NULL;
    job.workspace = (float *)p->scratch;
    return job;
}

static size_t scratch_for(const mq_linear_call *call, const mq_cuda_matrix *x)
{
    const mq_cuda_linear *linear = &call->job->linear;
    if (linear->inputs == MQ_CUDA_INPUTS_SCHEME) {
        mq_cuda_block_job job = mq_linear_input_job(call, x);
        return mq_cuda_block_workspace(&job);
    }
    if (linear->inputs == MQ_CUDA_INPUTS_TENSOR) return 0;
    const int64_t blocks = linear->inputs == MQ_CUDA_INPUTS_GROUP ? MQ_CEIL_DIV(x->cols, (int64_t)128) : 1;
    return (size_t)(x->rows * blocks) * sizeof(float);
}

static int quantize_inputs(const mq_linear_call *call, const part *p)
{
    const mq_cuda_matrix x = mq_linear_rows_of(&call->job->in, p->first, p->rows);
    if (call->job->linear.inputs == MQ_CUDA_INPUTS_PLAIN) return MQ_OK;
    if (call->job->linear.inputs != MQ_CUDA_INPUTS_SCHEME) {
        const mq_cuda_scaled_job job = scaled_job(call, &x, p);
        return mq_cuda_scaled(&job, call->stream, call->err);
    }
    mq_cuda_block_job job = mq_linear_input_job(call, &x);
    job.y = p->x;
    job.workspace = p->scratch;
    job.workspace_nbytes = p->scratch_nbytes;
    return mq_cuda_block_fake_quantize(&job, call->stream, call->err);
}

/* Room for so many rows of quantized inputs in `rest`, which what is left is written to. */
static bool lay_out(const mq_linear_call *call, int64_t first, int64_t rows, part *p, mq_cuda_workspace *rest)
{
    const mq_cuda_matrix *in = &call->job->in;
    p->first = first;
    p->rows = rows;
    p->x = mq_linear_rows_of(in, first, rows);
    if (call->job->linear.inputs == MQ_CUDA_INPUTS_PLAIN) return true;
    p->scratch_nbytes = scratch_for(call, &p->x);
    p->scratch = mq_workspace_take(rest, p->scratch_nbytes);
    const int64_t ld = MQ_ROUND_UP(in->cols, (int64_t)MQ_GROUP);
    p->x.data = mq_workspace_take(rest, (size_t)(rows * ld * mq_linear_dtype_size(in->dtype)));
    p->x.ld = ld;
    return p->x.data != NULL && p->scratch != NULL;
}

/* ---- the weight ---- */

static size_t code_offset(const mq_scheme_row *scheme, int64_t row, int64_t cols)
{
    const int bits = mq_format_get(scheme->element)->codec.bits;
    if (scheme->packing == MQ_PACK_ROW_PAIRS) return (size_t)(row / 2 * cols);
    return (size_t)(row * (scheme->packing == MQ_PACK_ROW ? MQ_CEIL_DIV(cols * bits, (int64_t)8) : cols));
}

static size_t scale_offset(const mq_scheme_row *scheme, int64_t row, int64_t cols, int64_t block_cols)
{
    const int64_t across = block_cols > 0 ? MQ_CEIL_DIV(cols, block_cols) : 1;
    const size_t size = scheme->scale == MQ_FMT_FP32 ? sizeof(float) : 1;
    return scheme->block_rows == 0 ? 0 : (size_t)(row / scheme->block_rows * across) * size;
}

/* Whether what is dequantized goes through a dtype of its own, in memory behind the tile. */
static bool is_rounded(const mq_linear_call *call)
{
    const mq_dtype dtype = call->job->linear.dtype;
    return dtype != MQ_F32 && dtype != call->job->in.dtype;
}

/* Bytes of a row of a tile, and of what it is made of. */
static int64_t tile_row_nbytes(const mq_linear_call *call, int64_t ld)
{
    return ld * (mq_linear_dtype_size(call->job->in.dtype) + (is_rounded(call) ? 2 : 0));
}

/* Rows first to first + rows into tile [rows, I], of whatever dtype it has. */
static int dequantize_rows(const mq_linear_call *call, int64_t first, const mq_cuda_matrix *tile)
{
    const mq_cuda_linear *linear = &call->job->linear;
    const mq_scheme_row *scheme = mq_scheme_get(linear->scheme);
    const int64_t block_cols = linear->block_cols > 0 ? linear->block_cols : scheme->block_cols;
    mq_cuda_block_job job = {};
    job.scheme = linear->scheme;
    job.block_cols = linear->block_cols;
    job.codes = (uint8_t *)linear->codes + code_offset(scheme, first, linear->cols);
    job.scales = (char *)linear->scales + scale_offset(scheme, first, linear->cols, block_cols);
    job.scale_2 = (float *)linear->scale_2;
    job.y = *tile;
    int rc = mq_cuda_block_dequantize(&job, call->stream, call->err);
    if (rc != MQ_OK || linear->fp8_amax == NULL) return rc;
    mq_cuda_block_job again = {};
    again.scheme = MQ_SCHEME_FP8;
    again.x = again.y = *tile;
    again.amax = linear->fp8_amax;
    return mq_cuda_block_fake_quantize(&again, call->stream, call->err);
}

static int fill_tile(const mq_linear_call *call, int64_t first, const mq_cuda_matrix *tile)
{
    if (!is_rounded(call)) return dequantize_rows(call, first, tile);
    char *behind = (char *)tile->data + tile->rows * tile->ld * mq_linear_dtype_size(tile->dtype);
    mq_cuda_rows_job job = {};
    job.x = {behind, call->job->linear.dtype, tile->rows, tile->cols, tile->ld};
    job.y = *tile;
    const int rc = dequantize_rows(call, first, &job.x);
    return rc == MQ_OK ? mq_cuda_rows(&job, call->stream, call->err) : rc;
}

/* out's columns from first on = x * tile^T */
static int multiply(const mq_linear_call *call, const part *p, int64_t first, const mq_cuda_matrix *tile)
{
    const mq_cuda_linear_job *job = call->job;
    const int64_t offset = first * mq_linear_dtype_size(job->out.dtype);
    mq_cuda_gemm_job product = {};
    product.a = p->x;
    product.b = *tile;
    product.transpose_b = 1;
    product.out = mq_linear_rows_of(&job->out, p->first, p->rows);
    product.out.data = (char *)product.out.data + offset;
    product.out.cols = tile->rows;
    product.alpha = 1.0f;
    product.beta = job->accumulate ? 1.0f : 0.0f;
    product.bias = job->bias != NULL ? (const char *)job->bias + offset : NULL;
    product.workspace = call->own;
    return mq_cuda_gemm_run(call->gemm, &product, call->stream, call->err);
}

static int64_t tile_rows(const mq_cuda_linear *linear, int64_t row_nbytes, size_t nbytes)
{
    const int64_t fit = (int64_t)(nbytes / (size_t)row_nbytes);
    return fit >= linear->rows ? linear->rows : fit / UNIT * UNIT;
}

static int run_part(const mq_linear_call *call, const part *p, const mq_cuda_workspace *rest)
{
    const mq_cuda_linear *linear = &call->job->linear;
    const int64_t ld = MQ_ROUND_UP(linear->cols, (int64_t)MQ_GROUP);
    const int64_t step = tile_rows(linear, tile_row_nbytes(call, ld), rest->nbytes);
    int rc = quantize_inputs(call, p);
    if (step == 0) return mq_linear_too_small(call, MQ_MIN(linear->rows, (int64_t)UNIT));
    for (int64_t first = 0; first < linear->rows && rc == MQ_OK; first += step) {
        const mq_cuda_matrix tile = {rest->data, call->job->in.dtype, MQ_MIN(step, linear->rows - first), linear->cols,
                                     ld};
        rc = fill_tile(call, first, &tile);
        if (rc == MQ_OK) rc = multiply(call, p, first, &tile);
    }
    return rc;
}

/* Half of the workspace is for inputs, where they are quantized. */
int mq_linear_dequantize(mq_linear_call *call)
{
    const int64_t all = call->job->in.rows;
    mq_cuda_workspace rest = {call->rest.data, call->rest.nbytes / 2};
    int rc = MQ_OK;
    int64_t step = all;
    part p;
    while (step > 0 && !lay_out(call, 0, step, &p, &rest)) {
        step = step == 1 ? 0 : MQ_CEIL_DIV(step, (int64_t)2);
        rest = {call->rest.data, call->rest.nbytes / 2};
    }
    if (step == 0) return mq_linear_too_small(call, 1);
    for (int64_t first = 0; first < all && rc == MQ_OK; first += step) {
        rest = call->rest;
        lay_out(call, first, MQ_MIN(step, all - first), &p, &rest);
        rc = run_part(call, &p, &rest);
    }
    return rc;
}
