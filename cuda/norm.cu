/* RMS norm of rows or of the heads within them (Zhang and Sennrich 2019), and its gradients. A row is done by as many
 * threads as it has groups of columns: some lanes of a warp, or the whole thread block. */
#include "columns.cuh"

/* ---- kernels ---- */

typedef struct norm_args {
    mq_view x, y, d_out, d_in;
    int64_t rows, heads, width;        /* rows: of the matrix times heads */
    int lanes;                         /* threads of a row: a power of two up to a warp's, or all of the block */
    const float *weight;
    float eps;
    int accumulate;
    float *scales;                     /* [rows], or NULL: 1 / sqrt(mean(x^2) + eps) */
} norm_args;

static void describe(const norm_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld rows of %lld, x at %p, y at %p, d_out at %p, d_in at %p", (long long)a.rows,
             (long long)a.width, a.x.data, a.y.data, a.d_out.data, a.d_in.data);
}

/* Where a thread stands: its row in the matrix, the first of its columns, and how far it is to the next. */
typedef struct norm_place {
    bool exists;
    int64_t index, row, from, col, step;
} norm_place;

MQ_DEVICE norm_place norm_place_of(const norm_args &a)
{
    const int line = (int)threadIdx.x / a.lanes, lane = (int)threadIdx.x % a.lanes;
    norm_place place = {};
    place.index = (int64_t)blockIdx.x * (MQ_THREADS / a.lanes) + line;
    place.exists = place.index < a.rows;
    const mq_place at = mq_place_of(place.index, a.heads);
    place.row = at.row;
    place.from = at.group * a.width;
    place.col = place.exists ? lane * MQ_GROUP : a.width;
    place.step = a.lanes * MQ_GROUP;
    return place;
}

MQ_DEVICE mq_span norm_span(const norm_args &a, const norm_place &place, int64_t col)
{
    mq_span span = mq_span_at(place.row, col, a.width);
    span.col += place.from;
    return span;
}

MQ_DEVICE float weight_of(const norm_args &a, int64_t col)
{
    return a.weight != NULL ? a.weight[col] : 1.0f;
}

MQ_DEVICE float row_sum(const norm_args &a, float value, int slot)
{
    return a.lanes > MQ_WARP ? mq_block_sum(value, slot) : mq_lanes_sum(value, a.lanes);
}

template <mq_dtype D>
static __global__ void rmsnorm(norm_args a)
{
    const norm_place place = norm_place_of(a);
    float x[MQ_GROUP], sum = 0.0f;
    for (int64_t col = place.col; col < a.width; col += place.step) {
        mq_load_span<D>(a.x, norm_span(a, place, col), x);
        for (int i = 0; i < MQ_GROUP; i++) sum = fmaf(x[i], x[i], sum);
    }
    const float scale = 1.0f / sqrtf(row_sum(a, sum, 0) / (float)a.width + a.eps);
    for (int64_t col = place.col; col < a.width; col += place.step) {
        const mq_span span = norm_span(a, place, col);
        mq_load_span<D>(a.x, span, x);
        for (int i = 0; i < MQ_GROUP; i++)
            if (i < span.count) x[i] = weight_of(a, col + i) * mq_round_to<D>(x[i] * scale);
        mq_store_span<D>(a.y, span, x);
    }
}

/* With r = 1 / sqrt(mean(x^2) + eps): d_x (+)= r * (weight * d_out - x * r^2 * mean(weight * d_out * x)). */
template <mq_dtype D>
static __global__ void rmsnorm_backward(norm_args a)
{
    const norm_place place = norm_place_of(a);
    float x[MQ_GROUP], d_out[MQ_GROUP], d_in[MQ_GROUP], square = 0.0f, product = 0.0f;
    for (int64_t col = place.col; col < a.width; col += place.step) {
        const mq_span span = norm_span(a, place, col);
        mq_load_span<D>(a.x, span, x);
        mq_load_span<MQ_F32>(a.d_out, span, d_out);
        for (int i = 0; i < MQ_GROUP; i++) {
            square = fmaf(x[i], x[i], square);
            if (i < span.count) product = fmaf(weight_of(a, col + i) * d_out[i], x[i], product);
        }
    }
    const float n = (float)a.width, r = 1.0f / sqrtf(row_sum(a, square, 0) / n + a.eps);
    const float along = r * r * r * (row_sum(a, product, 1) / n);
    if (a.scales != NULL && place.exists && place.col == 0) a.scales[place.index] = r;
    for (int64_t col = place.col; a.d_in.data != NULL && col < a.width; col += place.step) {
        const mq_span span = norm_span(a, place, col);
        mq_load_span<D>(a.x, span, x);
        mq_load_span<MQ_F32>(a.d_out, span, d_out);
        if (a.accumulate) mq_load_span<MQ_F32>(a.d_in, span, d_in);
        for (int i = 0; i < MQ_GROUP; i++) {
            if (i >= span.count) continue;
            const float gradient = r * (weight_of(a, col + i) * d_out[i]) - along * x[i];
            d_in[i] = a.accumulate ? d_in[i] + gradient : gradient;
        }
        mq_store_span<MQ_F32>(a.d_in, span, d_in);
    }
}

/* ---- launchers ---- */

typedef void (*norm_kernel)(norm_args);

static int prepare(const mq_cuda_norm_job *job, norm_args *a, mq_error *err)
{
    const int64_t heads = MQ_MAX(job->heads, (int64_t)1);
    const int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc != MQ_OK) return rc;
    if (job->heads < 0 || job->x.cols % heads != 0)
        return mq_fail(err, MQ_ERR_VALUE, "rmsnorm: %lld columns in %lld heads", (long long)job->x.cols,
                       (long long)job->heads);
    *a = {};
    a->x = mq_view_of(&job->x);
    a->rows = job->x.rows * heads;
    a->heads = heads;
    a->width = job->x.cols / heads;
    a->x.aligned = a->x.aligned && a->width % MQ_GROUP == 0;
    a->weight = job->weight;
    a->eps = job->eps;
    a->accumulate = job->accumulate;
    a->lanes = 1;
    while (a->lanes < MQ_WARP && a->lanes * MQ_GROUP < a->width) a->lanes *= 2;
    if (a->width > 2 * MQ_WARP * MQ_GROUP) a->lanes = MQ_THREADS;
    return MQ_OK;
}

static int launch_rows(const norm_args *a, const char *name, norm_kernel kernel, void *stream, mq_error *err)
{
    const int64_t blocks = MQ_CEIL_DIV(a->rows, (int64_t)(MQ_THREADS / a->lanes));
    const mq_launch launch = {name, mq_grid_of_blocks(blocks), stream, err};
    return mq_launch_kernel(&launch, kernel, *a);
}

int mq_cuda_rmsnorm(const mq_cuda_norm_job *job, void *stream, mq_error *err)
{
    norm_args a;
    int rc = prepare(job, &a, err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->y, "y", err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    a.y = mq_view_of(&job->y);
    a.y.aligned = a.y.aligned && a.width % MQ_GROUP == 0;
    return launch_rows(&a, "rmsnorm", job->x.dtype == MQ_F32 ? rmsnorm<MQ_F32> : rmsnorm<MQ_BF16>, stream, err);
}

/* Of the rows' scales and, behind them, the columns' sums. */
static size_t scales_nbytes(const mq_cuda_norm_job *job)
{
    const int64_t rows = job->x.rows * MQ_MAX(job->heads, (int64_t)1);
    return MQ_ROUND_UP((size_t)rows * sizeof(float), (size_t)16);
}

size_t mq_cuda_rmsnorm_workspace(const mq_cuda_norm_job *job)
{
    const int64_t heads = MQ_MAX(job->heads, (int64_t)1);
    if (job->d_weight == NULL) return 0;
    return scales_nbytes(job) + mq_columns_nbytes(job->x.rows * heads, job->x.cols / heads, false);
}

static int weight_backward(const mq_cuda_norm_job *job, norm_args a, norm_kernel kernel, void *stream, mq_error *err)
{
    a.scales = (float *)job->workspace;
    a.d_in.data = NULL;
    const int rc = launch_rows(&a, "rmsnorm_scales", kernel, stream, err);
    if (rc != MQ_OK) return rc;
    mq_columns of = {};
    of.x = a.x;
    of.dtype = job->x.dtype;
    of.rows = a.rows;
    of.heads = a.heads;
    of.cols = a.width;
    of.d_out = job->d_out;
    of.scales = a.scales;
    of.sums_f32 = job->d_weight;
    of.workspace = (char *)job->workspace + scales_nbytes(job);
    return mq_cuda_columns_add(&of, stream, err);
}

int mq_cuda_rmsnorm_backward(const mq_cuda_norm_job *job, void *stream, mq_error *err)
{
    norm_args a;
    int rc = prepare(job, &a, err);
    if (rc == MQ_OK)
        rc = mq_cuda_check_workspace(job->workspace, job->workspace_nbytes, mq_cuda_rmsnorm_workspace(job),
                                     "rmsnorm_backward", err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    const norm_kernel kernel = job->x.dtype == MQ_F32 ? rmsnorm_backward<MQ_F32> : rmsnorm_backward<MQ_BF16>;
    a.d_out = mq_view_of_rows(job->d_out, job->x.cols);
    a.d_in = mq_view_of_rows(job->d_in, job->x.cols);
    a.d_out.aligned = a.d_out.aligned && a.width % MQ_GROUP == 0;
    a.d_in.aligned = a.d_in.aligned && a.width % MQ_GROUP == 0;
    if (job->d_weight != NULL) rc = weight_backward(job, a, kernel, stream, err);   /* first: d_in may be d_out */
    if (rc != MQ_OK || job->d_in == NULL) return rc;
    return launch_rows(&a, "rmsnorm_backward", kernel, stream, err);
}
