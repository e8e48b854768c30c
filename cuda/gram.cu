/* Gram matrices: products of cuBLASLt in float32, added up in float64. */
#include "gemm.cuh"
#include "convert.cuh"

/* As csrc/calib/gram.c: tokens whose products are summed in float32. */
enum { TOKENS = 8192, FLOAT32_TOKENS = 2048, COLUMNS = 64 };

/* ---- kernels ---- */

typedef struct keep_args {
    const void *x;
    uint16_t *out;             /* [rows, words] */
    const uint8_t *mask;
    int64_t rows, words, ld;   /* of 16 bits */
} keep_args;

static void describe(const keep_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld rows of %lld bytes at %p, mask at %p", (long long)a.rows, (long long)a.words * 2, a.x,
             (const void *)a.mask);
}

/* Rows that do not count become zeros, which add nothing. */
static __global__ void keep_rows(keep_args a)
{
    const int64_t index = mq_thread_index();
    if (index >= a.rows * a.words) return;
    const mq_place place = mq_place_of(index, a.words);
    a.out[index] = a.mask[place.row] ? ((const uint16_t *)a.x)[place.row * a.ld + place.group] : (uint16_t)0;
}

/* A product's upper part into the sums: of the whole matrix from column `column` on, or of blocks on the diagonal. */
typedef struct fold_args {
    const float *c;            /* [blocks, rows, cols] */
    double *sums;
    int64_t rows, cols, blocks;
    int64_t n, column;         /* of the triangle; */
    int64_t size;              /* or 0 and a block's, which is what rows and cols of sums are apart */
} fold_args;

static void describe(const fold_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld products [%lld, %lld] at %p into sums at %p", (long long)a.blocks, (long long)a.rows,
             (long long)a.cols, (const void *)a.c, (void *)a.sums);
}

static __global__ void fold_product(fold_args a)
{
    const int64_t index = mq_thread_index();
    if (index >= a.blocks * a.rows * a.cols) return;
    const mq_place place = mq_place_of(index, a.cols);
    if (a.size == 0) {
        const int64_t i = place.row, j = a.column + place.group;
        if (j >= i) a.sums[i * a.n - i * (i - 1) / 2 - i + j] += (double)a.c[index];
    } else {
        const mq_place in = mq_place_of(place.row, a.rows);
        if (place.group >= in.group) a.sums[(in.row * a.size + in.group) * a.size + place.group] += (double)a.c[index];
    }
}

/* ---- launchers ---- */

typedef struct gram_call {
    mq_cuda_gemm *gemm;
    const mq_cuda_gram_job *job;
    void *stream;
    mq_error *err;
    mq_cuda_workspace own, rest;
} gram_call;

static int too_small(const gram_call *call)
{
    char text[128];
    mq_cuda_describe_matrix(&call->job->x, text, sizeof text);
    return mq_fail(call->err, MQ_ERR_VALUE, "a workspace of %zu bytes is too small for the Gram matrix of %s",
                   call->job->workspace.nbytes, text);
}

/* c [blocks, rows, cols] = x[:, row ...]^T x[:, column ...], blocks `rows` columns apart */
static int multiply(const gram_call *call, const mq_cuda_matrix *x, fold_args *fold)
{
    const int64_t size = x->dtype == MQ_F32 ? 4 : 2;
    mq_cuda_gemm_job product = {};
    product.a = product.b = *x;
    product.transpose_a = 1;
    product.a.cols = fold->rows;
    product.b.cols = fold->cols;
    product.b.data = (char *)x->data + fold->column * size;
    product.out = {(void *)fold->c, MQ_F32, fold->rows, fold->cols, fold->cols};
    product.alpha = 1.0f;
    product.batch = fold->blocks;
    product.stride_a = product.stride_b = fold->size;
    product.stride_out = fold->rows * fold->cols;
    product.workspace = call->own;
    int rc = mq_gemm_run(call->gemm, &product, false, call->stream, call->err);
    const mq_launch launch = {"fold_product", mq_grid_for(fold->blocks * fold->rows * fold->cols), call->stream,
                              call->err};
    return rc == MQ_OK ? mq_launch_kernel(&launch, fold_product, *fold) : rc;
}

/* Strips of columns, each down to the diagonal. */
static int add_triangle(const gram_call *call, const mq_cuda_matrix *x, const mq_cuda_workspace *rest)
{
    const int64_t n = x->cols, room = (int64_t)(rest->nbytes / sizeof(float));
    const int64_t most = room / n >= n ? n : room / n >= COLUMNS ? room / n / COLUMNS * COLUMNS : room / n;
    int rc = most > 0 ? MQ_OK : too_small(call);
    for (int64_t column = 0; column < n && rc == MQ_OK; column += most) {
        const int64_t cols = MQ_MIN(most, n - column);
        fold_args fold = {(const float *)rest->data, call->job->sums, column + cols, cols, 1, n, column, 0};
        rc = multiply(call, x, &fold);
    }
    return rc;
}

/* Whole blocks as batches, then what is left of the last. */
static int add_blocks(const gram_call *call, const mq_cuda_matrix *x, const mq_cuda_workspace *rest)
{
    const int64_t size = call->job->block, whole = x->cols / size, last = x->cols % size;
    const int64_t most = (int64_t)(rest->nbytes / sizeof(float)) / (size * size);
    int rc = most > 0 ? MQ_OK : too_small(call);
    for (int64_t block = 0; block * size < x->cols && rc == MQ_OK;) {
        const int64_t blocks = block < whole ? MQ_MIN(most, whole - block) : 1, cols = block < whole ? size : last;
        mq_cuda_matrix from = *x;
        from.data = (char *)x->data + block * size * (x->dtype == MQ_F32 ? 4 : 2);
        fold_args fold = {(const float *)rest->data, call->job->sums + block * size * size, cols, cols, blocks, 0, 0,
                          size};
        rc = multiply(call, &from, &fold);
        block += blocks;
    }
    return rc;
}

/* Tokens x as they are, or in `out` without those that do not count. */
static int keep(const gram_call *call, const uint8_t *mask, mq_cuda_matrix *x, void *out)
{
    const int64_t words = x->dtype == MQ_F32 ? 2 : 1;
    const keep_args a = {x->data, (uint16_t *)out, mask, x->rows, x->cols * words, x->ld * words};
    const mq_launch launch = {"keep_rows", mq_grid_for(a.rows * a.words), call->stream, call->err};
    x->data = out;
    x->ld = x->cols;
    return mq_launch_kernel(&launch, keep_rows, a);
}

static int run(const gram_call *call)
{
    const mq_cuda_gram_job *job = call->job;
    const int64_t size = job->x.dtype == MQ_F32 ? 4 : 2;
    mq_cuda_workspace rest = call->rest;
    int64_t tokens = job->x.dtype == MQ_F32 ? FLOAT32_TOKENS : TOKENS;
    void *kept = NULL;
    while (job->mask != NULL && tokens > 1 && (size_t)(tokens * job->x.cols * size) > rest.nbytes / 2) tokens /= 2;
    if (job->mask != NULL) kept = mq_workspace_take(&rest, (size_t)(tokens * job->x.cols * size));
    if (job->mask != NULL && kept == NULL) return too_small(call);
    int rc = MQ_OK;
    for (int64_t first = 0; first < job->x.rows && rc == MQ_OK; first += tokens) {
        mq_cuda_matrix x = job->x;
        x.data = (char *)x.data + first * x.ld * size;
        x.rows = MQ_MIN(tokens, job->x.rows - first);
        if (job->mask != NULL) rc = keep(call, job->mask + first, &x, kept);
        if (rc == MQ_OK) rc = job->block > 0 ? add_blocks(call, &x, &rest) : add_triangle(call, &x, &rest);
    }
    return rc;
}

int mq_cuda_gram(mq_cuda_gemm *gemm, const mq_cuda_gram_job *job, void *stream, mq_error *err)
{
    gram_call call = {gemm, job, stream, err, {}, job->workspace};
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc != MQ_OK || job->x.rows == 0 || job->x.cols == 0) return rc;
    if (job->sums == NULL || job->block < 0)
        return mq_fail(err, MQ_ERR_VALUE, "a Gram matrix: blocks of %lld, sums at %p", (long long)job->block,
                       (void *)job->sums);
    if (job->workspace.data == NULL || (uintptr_t)job->workspace.data % MQ_LT_ALIGNMENT != 0)
        return mq_fail(err, MQ_ERR_VALUE, "a workspace at %p: expected an address that 256 divides",
                       job->workspace.data);
    call.own = mq_workspace_split(&call.rest);
    return run(&call);
}
