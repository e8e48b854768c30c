/* Linears as products of FP4, FP8 or INT8: inputs are quantized just before, as many rows at a time as fit in the
 * workspace. No kernels. */
#include "linear.cuh"
#include "activations.cuh"
#include "amax.cuh"
#include "lt_scales.cuh"
#include "sums.cuh"

/* Rows of the input, and where in the workspace they are as the product reads them. */
typedef struct part {
    int64_t first, rows, padded;
    uint8_t *codes;
    void *scales, *tiled;      /* tiled: in cuBLASLt's order, where that is another */
    float *amax;               /* of rows or groups */
    void *sums;                /* [padded, O]: where cuBLASLt cannot finish; else NULL */
} part;

static bool is_by_scheme(const mq_linear_call *call)
{
    return call->job->linear.inputs == MQ_CUDA_INPUTS_SCHEME;
}

/* ---- room ---- */

/* Whether cuBLASLt may write the result itself: columns and rows of whole 16 bytes, and a bias that it knows, which is
 * never float32 beside narrow types ("cublasLtMatmul()"). */
static bool is_direct(const mq_linear_call *call)
{
    const mq_cuda_matrix *out = &call->job->out;
    const int64_t size = mq_linear_dtype_size(out->dtype);
    return !call->way->sums && (uintptr_t)out->data % 16 == 0 && out->ld * size % 16 == 0 &&
           out->cols * size % 16 == 0 && (call->job->bias == NULL || out->dtype != MQ_F32);
}

/* Blocks along a row of the input: by a scheme, or of 128 columns. */
static int64_t blocks_of(const mq_linear_call *call)
{
    const mq_cuda_linear *linear = &call->job->linear;
    if (is_by_scheme(call)) return linear->cols / mq_scheme_get(linear->input_scheme)->block_cols;
    return linear->inputs == MQ_CUDA_INPUTS_GROUP ? MQ_CEIL_DIV(linear->cols, (int64_t)128) : 1;
}

typedef struct takes {
    mq_cuda_workspace rest;
    bool fits;
} takes;

static void *take(takes *from, int64_t nbytes)
{
    void *taken = mq_workspace_take(&from->rest, (size_t)nbytes);
    from->fits = from->fits && taken != NULL;
    return taken;
}

/* Places for so many rows; false where the workspace has not that much room. */
static bool lay_out(const mq_linear_call *call, int64_t rows, part *p)
{
    const mq_cuda_linear *linear = &call->job->linear;
    const int64_t blocks = blocks_of(call);
    takes from = {call->rest, true};
    memset(p, 0, sizeof *p);
    p->rows = rows;
    p->padded = MQ_ROUND_UP(rows, call->way->padding);
    p->codes = (uint8_t *)take(&from, call->way->type == lt::CUDA_R_4F_E2M1 ? rows * linear->cols / 2
                                                                            : p->padded * linear->cols);
    if (is_by_scheme(call)) {
        p->scales = take(&from, rows * blocks);
        p->tiled = take(&from, (int64_t)mq_lt_tiled_nbytes(rows, blocks));
    } else {
        p->scales = take(&from, p->padded * blocks * (int64_t)sizeof(float));
        if (linear->inputs != MQ_CUDA_INPUTS_TENSOR)
            p->amax = (float *)take(&from, rows * blocks * (int64_t)sizeof(float));
    }
    if (!is_direct(call) || p->padded != rows) p->sums = take(&from, p->padded * linear->rows * 4);
    return from.fits;
}

/* The most rows that fit: all, or a multiple of 128, or at least of 4. Where rows must be padded only the last few are,
 * which then go by themselves. */
static int64_t rows_at_a_time(const mq_linear_call *call)
{
    const int64_t padding = call->way->padding;
    int64_t rows = call->job->in.rows;
    part p;
    if (rows > padding) rows = rows / padding * padding;
    while (rows > 0 && !lay_out(call, rows, &p)) {
        const int64_t half = rows / 2;
        rows = half >= 128 ? MQ_ROUND_UP(half, (int64_t)128) : half / 4 * 4;
    }
    return rows;
}

/* ---- inputs ---- */

static int quantize_by_scheme(const mq_linear_call *call, const part *p)
{
    const mq_cuda_matrix x = mq_linear_rows_of(&call->job->in, p->first, p->rows);
    mq_cuda_block_job job = mq_linear_input_job(call, &x);
    job.codes = p->codes;
    job.scales = p->scales;
    job.workspace = call->numbers + MQ_LINEAR_NUMBERS / 2;      /* a few floats, as blocks find their own maxima */
    job.workspace_nbytes = MQ_LINEAR_NUMBERS / 2 * sizeof(float);
    int rc = mq_cuda_block_quantize(&job, call->stream, call->err);
    if (rc != MQ_OK) return rc;
    return mq_lt_tile((const uint8_t *)p->scales, p->rows, blocks_of(call), (uint8_t *)p->tiled, call->stream,
                      call->err);
}

static int quantize_by_rows(const mq_linear_call *call, const part *p)
{
    const mq_cuda_linear *linear = &call->job->linear;
    const int64_t block = linear->inputs == MQ_CUDA_INPUTS_GROUP ? 128 : 0;
    const mq_cuda_matrix x = mq_linear_rows_of(&call->job->in, p->first, p->rows);
    const mq_blocks blocks = mq_blocks_of(&x, 1, block);
    mq_activations_job job = {call->way->type == lt::CUDA_R_8I, x, block, call->amax, true, p->padded, p->codes,
                              (float *)p->scales};
    int rc = MQ_OK;
    if (p->amax != NULL) {
        job.amax = p->amax;
        job.one_amax = false;
        rc = mq_cuda_amax_blocks(&x, &blocks, p->amax, call->stream, call->err);
    }
    return rc == MQ_OK ? mq_activations_quantize(&job, call->stream, call->err) : rc;
}

/* ---- products ---- */

static const float one = 1.0f, zero = 0.0f;
static const int32_t int_one = 1, int_zero = 0;

static void set_factors(const mq_linear_call *call, const part *p, mq_lt_product *product)
{
    const bool adds = p->sums == NULL && call->job->accumulate;
    product->alpha = &one;
    product->beta = adds ? &one : &zero;
    if (call->way->type == lt::CUDA_R_8I) {
        product->alpha = &int_one;
        product->beta = &int_zero;
    }
    if (call->way->path != MQ_CUDA_PATH_NVFP4) return;
    product->alpha = call->numbers + MQ_LINEAR_ALPHA;           /* both tensors' scales */
    product->beta = call->numbers + MQ_LINEAR_BETA;
    product->on_device = true;
}

static mq_lt_product product_of(const mq_linear_call *call, const part *p)
{
    const mq_cuda_linear *linear = &call->job->linear;
    const mq_linear_way *way = call->way;
    const mq_cuda_matrix out = mq_linear_rows_of(&call->job->out, p->first, p->rows);
    const bool is_int = way->type == lt::CUDA_R_8I;
    const void *input_scales = p->tiled != NULL ? p->tiled : p->scales;
    mq_lt_product product = {};
    product.rows = p->padded;
    product.cols = linear->rows;
    product.depth = linear->cols;
    product.batch = 1;
    product.a = {p->codes, way->type, false, linear->cols, 0, way->input_mode, way->sums ? NULL : input_scales};
    product.b = {linear->codes, way->type, true, linear->cols, 0, way->weight_mode, way->sums ? NULL : call->scales};
    product.out = p->sums != NULL ? p->sums : out.data;
    product.out_type = is_int ? lt::CUDA_R_32I : p->sums != NULL ? lt::CUDA_R_32F : mq_lt_type_of(out.dtype);
    product.out_ld = p->sums != NULL ? linear->rows : out.ld;
    product.compute = is_int ? lt::CUBLAS_COMPUTE_32I : lt::CUBLAS_COMPUTE_32F;
    product.scale_type = is_int ? lt::CUDA_R_32I : lt::CUDA_R_32F;
    product.bias = p->sums != NULL ? NULL : call->job->bias;
    product.bias_type = product.bias != NULL ? mq_lt_type_of(out.dtype) : 0;
    set_factors(call, p, &product);
    return product;
}

/* What cuBLASLt left undone. */
static int finish(const mq_linear_call *call, const part *p)
{
    const mq_cuda_linear *linear = &call->job->linear;
    mq_sums_job job = {};
    job.sums = p->sums;
    job.is_int = call->way->type == lt::CUDA_R_8I;
    job.ld = linear->rows;
    if (call->way->sums) {
        job.row_scale = (const float *)p->scales;
        job.row_each = true;
        job.col_scale = (const float *)linear->scales;
        job.col_each = linear->scheme != MQ_SCHEME_FP8;
    }
    job.bias = call->job->bias;
    job.beta = call->job->accumulate ? 1.0f : 0.0f;
    job.out = mq_linear_rows_of(&call->job->out, p->first, p->rows);
    return mq_sums_finish(&job, call->stream, call->err);
}

static int multiply(const mq_linear_call *call, const part *p)
{
    const mq_lt_product product = product_of(call, p);
    int rc = is_by_scheme(call) ? quantize_by_scheme(call, p) : quantize_by_rows(call, p);
    if (rc == MQ_OK && product.on_device)
        rc = mq_lt_factors(call->numbers + MQ_LINEAR_SCALE_2, call->job->linear.scale_2,
                           p->sums == NULL && call->job->accumulate ? 1.0f : 0.0f, call->numbers + MQ_LINEAR_ALPHA,
                           call->stream, call->err);
    if (rc == MQ_OK) rc = mq_lt_run(call->gemm, &product, &call->own, call->stream, call->err);
    if (rc == MQ_LT_REFUSED)
        rc = mq_lt_failed(call->gemm, lt::CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul", &product, call->err);
    return rc == MQ_OK && p->sums != NULL ? finish(call, p) : rc;
}

/* Parts are asked for first, so that nothing is half done when one is refused. */
int mq_linear_narrow(mq_linear_call *call)
{
    const int64_t rows = call->job->in.rows, step = rows_at_a_time(call);
    int rc = MQ_OK;
    part p;
    if (step == 0) return mq_linear_too_small(call, MQ_MIN(rows, (int64_t)4));
    for (int asks = 1; asks >= 0; asks--)
        for (int64_t first = 0; first < rows && rc == MQ_OK; first += step) {
            lay_out(call, MQ_MIN(step, rows - first), &p);
            p.first = first;
            const mq_lt_product product = product_of(call, &p);
            rc = asks ? mq_lt_can(call->gemm, &product, &call->own, call->err) : multiply(call, &p);
        }
    return rc;
}
