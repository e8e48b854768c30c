/* Rows from one place and dtype to another, sums of rows, and keys and values into a cache. */
#include "rows.cuh"

/* ---- kernels ---- */

typedef struct rows_args {
    mq_view x, y;
    int64_t rows, cols, groups;
    const int64_t *index;
    const int32_t *ids;
    const float *bias;
    int accumulate;
    float scale;
    const float *row_scales;
    int64_t repeat;
} rows_args;

static void describe(const rows_args &a, char *out, size_t size)
{
    snprintf(out, size, "[%lld, %lld] from %p to %p", (long long)a.rows, (long long)a.cols, a.x.data, a.y.data);
}

template <mq_dtype From, mq_dtype To>
static __global__ void copy_rows(rows_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    mq_span from = span;
    float x[MQ_GROUP];
    if (span.count == 0) return;
    if (a.index != NULL) from.row = a.index[span.row];
    else if (a.ids != NULL) from.row = a.ids[span.row];
    else if (a.repeat > 1) from.row = mq_place_of(span.row, a.repeat).row;
    mq_load_span<From>(a.x, from, x);
    mq_store_span<To>(a.y, span, x);
}

template <mq_dtype From, mq_dtype To>
static __global__ void add_rows(rows_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float x[MQ_GROUP], y[MQ_GROUP];
    if (span.count == 0) return;
    mq_load_span<From>(a.x, span, x);
    if (a.accumulate) mq_load_span<To>(a.y, span, y);
    const float scale = a.scale * (a.row_scales != NULL ? a.row_scales[span.row] : 1.0f);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (scale != 1.0f) x[i] = mq_round_to<From>(x[i] * scale);
        if (a.bias != NULL && i < span.count) x[i] += a.bias[span.col + i];
        if (a.accumulate) x[i] += y[i];
    }
    mq_store_span<To>(a.y, span, x);
}

typedef struct sigmoid_args {
    const void *x;
    int64_t rows, ld;
    float *factors, *d_x;
    const float *d_factors;
} sigmoid_args;

static void describe(const sigmoid_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld rows of x at %p, factors at %p", (long long)a.rows, a.x, (void *)a.factors);
}

template <mq_dtype D>
static __global__ void sigmoid(sigmoid_args a)
{
    const int64_t row = mq_thread_index();
    if (row >= a.rows) return;
    a.factors[row] = mq_round_to<D>(mq_sigmoid(mq_widen<D>(((const typename mq_word<D>::type *)a.x)[row * a.ld])));
}

static __global__ void sigmoid_backward(sigmoid_args a)
{
    const int64_t row = mq_thread_index();
    if (row < a.rows) a.d_x[row] = a.d_factors[row] * a.factors[row] * (1.0f - a.factors[row]);
}

typedef struct cache_args {
    mq_view x;
    void *cache;
    int64_t rows, heads, head_dim, groups;      /* groups of a head */
    int64_t capacity, slot_stride;
    const int32_t *slots, *positions;
} cache_args;

static void describe(const cache_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld heads of %lld] at %p, cache at %p of %lld positions", (long long)a.rows,
             (long long)a.heads, (long long)a.head_dim, a.x.data, a.cache, (long long)a.capacity);
}

template <mq_dtype D>
static __global__ void store_cache(cache_args a)
{
    const mq_place place = mq_place_of(mq_thread_index(), a.heads * a.groups);
    if (place.row >= a.rows) return;
    const mq_place within = mq_place_of(place.group, a.groups);
    const mq_span head = mq_span_at(0, within.group * MQ_GROUP, a.head_dim);
    const int64_t position = within.row * a.capacity + a.positions[place.row];
    const int64_t to = a.slots[place.row] * a.slot_stride + position * a.head_dim + head.col;
    const bool aligned = a.x.aligned && a.head_dim % MQ_GROUP == 0;
    float x[MQ_GROUP];
    mq_load_group<D>(a.x.data, place.row * a.x.ld + within.row * a.head_dim + head.col, head.count, aligned, x);
    mq_store_group<D>(a.cache, to, head.count, aligned, x);
}

/* ---- launchers ---- */

typedef void (*rows_kernel)(rows_args);

#define OF_TARGETS(kernel, from) {kernel<from, MQ_F32>, kernel<from, MQ_BF16>}
static const rows_kernel copy_kernels[MQ_FLOAT_DTYPES][MQ_ACTIVATION_DTYPES] = {
    OF_TARGETS(copy_rows, MQ_F32), OF_TARGETS(copy_rows, MQ_BF16), OF_TARGETS(copy_rows, MQ_F16)};
static const rows_kernel add_kernels[MQ_ACTIVATION_DTYPES][MQ_ACTIVATION_DTYPES] = {OF_TARGETS(add_rows, MQ_F32),
                                                                                    OF_TARGETS(add_rows, MQ_BF16)};

int mq_cuda_rows(const mq_cuda_rows_job *job, void *stream, mq_error *err)
{
    const bool indexed = job->index != NULL || job->ids != NULL;
    const int64_t repeat = MQ_MAX(job->repeat, (int64_t)1), rows = indexed ? job->y.rows : job->x.rows * repeat;
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_shape(&job->y, rows, job->x.cols, "y", err);
    if (rc != MQ_OK || mq_is_empty(&job->y)) return rc;
    const rows_args a = {mq_view_of(&job->x), mq_view_of(&job->y), job->y.rows, job->y.cols,
                         mq_groups_of(job->y.cols), job->index, job->ids, NULL, 0, 1.0f, NULL, repeat};
    const mq_launch launch = {"copy_rows", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, copy_kernels[job->x.dtype][job->y.dtype], a);
}

int mq_cuda_add(const mq_cuda_add_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_shape(&job->y, job->x.rows, job->x.cols, "y", err);
    if (rc != MQ_OK || mq_is_empty(&job->y)) return rc;
    const rows_args a = {mq_view_of(&job->x), mq_view_of(&job->y), job->y.rows, job->y.cols,
                         mq_groups_of(job->y.cols), NULL, NULL, job->bias, job->accumulate,
                         job->scale != 0.0f ? job->scale : 1.0f, job->row_scales, 1};
    const mq_launch launch = {"add_rows", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, add_kernels[job->x.dtype][job->y.dtype], a);
}

int mq_cuda_sigmoid(const mq_cuda_sigmoid_job *job, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_shape(&job->x, job->x.rows, 1, "x", err);
    if (rc != MQ_OK || job->x.rows == 0) return rc;
    const sigmoid_args a = {job->x.data, job->x.rows, job->x.ld, job->factors, NULL, NULL};
    const mq_launch launch = {"sigmoid", mq_grid_for(a.rows), stream, err};
    return mq_launch_kernel(&launch, job->x.dtype == MQ_F32 ? sigmoid<MQ_F32> : sigmoid<MQ_BF16>, a);
}

int mq_cuda_sigmoid_backward(const mq_cuda_sigmoid_job *job, void *stream, mq_error *err)
{
    if (job->x.rows <= 0) return MQ_OK;
    if (job->factors == NULL || job->d_factors == NULL || job->d_x == NULL)
        return mq_fail(err, MQ_ERR_VALUE, "sigmoid_backward: needs factors, d_factors and d_x");
    const sigmoid_args a = {NULL, job->x.rows, 1, job->factors, job->d_x, job->d_factors};
    const mq_launch launch = {"sigmoid_backward", mq_grid_for(a.rows), stream, err};
    return mq_launch_kernel(&launch, sigmoid_backward, a);
}

int mq_cuda_cache_store(const mq_cuda_cache_job *job, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    if (job->heads < 1 || job->x.cols % job->heads != 0 || job->capacity < 1)
        return mq_fail(err, MQ_ERR_VALUE, "cache_store: %lld columns in %lld heads, %lld positions",
                       (long long)job->x.cols, (long long)job->heads, (long long)job->capacity);
    cache_args a = {mq_view_of(&job->x), job->cache, job->x.rows, job->heads, job->x.cols / job->heads, 0,
                    job->capacity, job->slot_stride, job->slots, job->positions};
    a.groups = mq_groups_of(a.head_dim);
    a.x.aligned = a.x.aligned && (uintptr_t)a.cache % 16 == 0 && a.slot_stride % MQ_GROUP == 0;
    const mq_launch launch = {"store_cache", mq_grid_for(a.rows * a.heads * a.groups), stream, err};
    return mq_launch_kernel(&launch, job->x.dtype == MQ_F32 ? store_cache<MQ_F32> : store_cache<MQ_BF16>, a);
}
