/* Rows sorted by the experts that they chose (a counting sort, csrc/model/run_experts.c), and the way of an expert's
 * rows back to where they came from. */
#include "rows.cuh"

enum { CHUNK = 1024, MOST_EXPERTS = 4096 };

/* ---- sorting: kernels ---- */

typedef struct dispatch_args {
    const int32_t *chosen;
    const float *chosen_shares;
    const uint8_t *mask;
    int64_t choices, top_k, experts, chunks;
    int32_t *counts, *counted_parts;        /* [chunks, experts]: of a chunk's choices; then of all before it */
    int64_t *start, *tokens;
    float *shares;
    int64_t *counted;
} dispatch_args;

static void describe(const dispatch_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld choices at %p among %lld experts", (long long)a.choices, (const void *)a.chosen,
             (long long)a.experts);
}

/* Thread block: one chunk. */
static __global__ void dispatch_count(dispatch_args a)
{
    MQ_SHARED(int32_t, counts, MOST_EXPERTS);
    MQ_SHARED(int32_t, counted, MOST_EXPERTS);
    const int64_t first = (int64_t)blockIdx.x * CHUNK, end = MQ_MIN(first + CHUNK, a.choices);
    for (int64_t e = threadIdx.x; e < a.experts; e += MQ_THREADS) counts[e] = counted[e] = 0;
    __syncthreads();
    for (int64_t i = first + threadIdx.x; i < end; i += MQ_THREADS) {
        const int32_t expert = a.chosen[i];
        if (expert < 0 || expert >= a.experts) continue;
        atomicAdd(&counts[expert], 1);
        if (a.mask == NULL || a.mask[i / a.top_k] != 0) atomicAdd(&counted[expert], 1);
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < a.experts; e += MQ_THREADS) {
        a.counts[blockIdx.x * a.experts + e] = counts[e];
        a.counted_parts[blockIdx.x * a.experts + e] = counted[e];
    }
}

/* One thread block for all. */
static __global__ void dispatch_start(dispatch_args a)
{
    MQ_SHARED(int32_t, totals, MOST_EXPERTS);
    for (int64_t e = threadIdx.x; e < a.experts; e += MQ_THREADS) {
        int32_t total = 0, counted = 0;
        for (int64_t chunk = 0; chunk < a.chunks; chunk++) {
            const int32_t count = a.counts[chunk * a.experts + e];
            counted += a.counted_parts[chunk * a.experts + e];
            a.counts[chunk * a.experts + e] = total;
            total += count;
        }
        totals[e] = total;
        a.counted[e] = counted;
    }
    __syncthreads();
    int64_t start = 0;
    for (int64_t e = 0; threadIdx.x == 0 && e <= a.experts; e++) {
        a.start[e] = start;
        if (e < a.experts) start += totals[e];
    }
}

/* Thread block: one chunk, of which a thread takes the choices of its expert, in order. */
static __global__ void dispatch_place(dispatch_args a)
{
    MQ_SHARED(int32_t, chosen, CHUNK);
    const int64_t first = (int64_t)blockIdx.x * CHUNK;
    const int count = (int)MQ_MIN(a.choices - first, (int64_t)CHUNK);
    for (int i = (int)threadIdx.x; i < count; i += MQ_THREADS) chosen[i] = a.chosen[first + i];
    __syncthreads();
    for (int64_t e = threadIdx.x; e < a.experts; e += MQ_THREADS) {
        int64_t at = a.start[e] + a.counts[blockIdx.x * a.experts + e];
        for (int i = 0; i < count; i++) {
            if (chosen[i] != e) continue;
            a.tokens[at] = (first + i) / a.top_k;
            a.shares[at] = a.chosen_shares[first + i];
            at++;
        }
    }
}

/* ---- adding an expert's rows: kernels ---- */

typedef struct scatter_args {
    mq_view x, y, d_out, d_in;
    int64_t rows, cols, groups;
    const int64_t *index;
    const float *shares;
    float *d_shares;
} scatter_args;

static void describe(const scatter_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, y at %p, d_out at %p", (long long)a.rows, (long long)a.cols, a.x.data,
             a.y.data, a.d_out.data);
}

template <mq_dtype D>
static __global__ void scatter(scatter_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    mq_span to = span;
    float x[MQ_GROUP], y[MQ_GROUP];
    if (span.count == 0 || (a.shares != NULL && a.shares[span.row] == 0.0f)) return;
    to.row = a.index[span.row];
    mq_load_span<D>(a.x, span, x);
    mq_load_span<D>(a.y, to, y);
    for (int i = 0; i < MQ_GROUP; i++) y[i] += a.shares == NULL ? x[i] : mq_round_to<D>(x[i] * a.shares[span.row]);
    mq_store_span<D>(a.y, to, y);
}

/* Thread block: one row. */
template <mq_dtype D>
static __global__ void scatter_backward(scatter_args a)
{
    const int64_t row = blockIdx.x;
    const float share = a.shares[row];
    float product = 0.0f, x[MQ_GROUP], d_out[MQ_GROUP], d_in[MQ_GROUP];
    for (int64_t col = (int64_t)threadIdx.x * MQ_GROUP; col < a.cols; col += MQ_THREADS * MQ_GROUP) {
        const mq_span span = mq_span_at(row, col, a.cols), from = mq_span_at(a.index[row], col, a.cols);
        mq_load_span<D>(a.x, span, x);
        mq_load_span<MQ_F32>(a.d_out, from, d_out);
        for (int i = 0; i < MQ_GROUP; i++) {
            product = fmaf(d_out[i], x[i], product);
            d_in[i] = share * d_out[i];
        }
        mq_store_span<MQ_F32>(a.d_in, span, d_in);
    }
    product = mq_block_sum(product, 0);
    if (threadIdx.x == 0) a.d_shares[row] = product;
}

/* ---- launchers ---- */

static int64_t chunks_of(const mq_cuda_dispatch_job *job)
{
    return MQ_CEIL_DIV(job->rows * job->top_k, (int64_t)CHUNK);
}

size_t mq_cuda_dispatch_workspace(const mq_cuda_dispatch_job *job)
{
    return 2 * (size_t)(chunks_of(job) * job->experts) * sizeof(int32_t);
}

/* Where there are no rows every expert gets none. */
int mq_cuda_dispatch(const mq_cuda_dispatch_job *job, void *stream, mq_error *err)
{
    if (job->rows < 0 || job->top_k < 1 || job->experts < 1 || job->experts > MOST_EXPERTS ||
        job->rows > INT32_MAX / job->top_k)
        return mq_fail(err, MQ_ERR_VALUE, "dispatch: %lld rows of %lld choices among %lld experts; expected up to %d",
                       (long long)job->rows, (long long)job->top_k, (long long)job->experts, (int)MOST_EXPERTS);
    int rc = mq_cuda_check_workspace(job->workspace, job->workspace_nbytes, mq_cuda_dispatch_workspace(job), "dispatch",
                                     err);
    if (rc != MQ_OK) return rc;
    dispatch_args a = {job->chosen, job->chosen_shares, job->mask, job->rows * job->top_k, job->top_k, job->experts,
                       chunks_of(job), (int32_t *)job->workspace, NULL, job->start, job->tokens, job->shares,
                       job->counted};
    a.counted_parts = a.counts + a.chunks * a.experts;
    const mq_launch count = {"dispatch_count", mq_grid_of_blocks(a.chunks), stream, err};
    const mq_launch start = {"dispatch_start", dim3(1), stream, err};
    const mq_launch place = {"dispatch_place", mq_grid_of_blocks(a.chunks), stream, err};
    if (a.chunks > 0) rc = mq_launch_kernel(&count, dispatch_count, a);
    if (rc == MQ_OK) rc = mq_launch_kernel(&start, dispatch_start, a);
    if (rc == MQ_OK && a.chunks > 0) rc = mq_launch_kernel(&place, dispatch_place, a);
    return rc;
}

typedef void (*scatter_kernel)(scatter_args);

static scatter_args args_of(const mq_cuda_scatter_job *job)
{
    scatter_args a = {};
    a.x = mq_view_of(&job->x);
    a.y = mq_view_of(&job->y);
    a.d_out = mq_view_of_rows(job->d_out, job->x.cols);
    a.d_in = mq_view_of_rows(job->d_in, job->x.cols);
    a.rows = job->x.rows;
    a.cols = job->x.cols;
    a.groups = mq_groups_of(a.cols);
    a.index = job->index;
    a.shares = job->shares;
    a.d_shares = job->d_shares;
    return a;
}

int mq_cuda_scatter(const mq_cuda_scatter_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_shape(&job->y, job->y.rows, job->x.cols, "y", err);
    if (rc == MQ_OK && (job->y.dtype != job->x.dtype || job->index == NULL))
        rc = mq_fail(err, MQ_ERR_TYPE, "scatter: needs an index, and y of x's dtype");
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    const scatter_args a = args_of(job);
    const mq_launch launch = {"scatter", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, job->x.dtype == MQ_F32 ? scatter<MQ_F32> : scatter<MQ_BF16>, a);
}

int mq_cuda_scatter_backward(const mq_cuda_scatter_job *job, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc != MQ_OK || job->x.rows == 0) return rc;
    if (job->index == NULL || job->shares == NULL || job->d_in == NULL || job->d_shares == NULL)
        return mq_fail(err, MQ_ERR_VALUE, "scatter_backward: needs index, shares, d_in and d_shares");
    const scatter_args a = args_of(job);
    const mq_launch launch = {"scatter_backward", mq_grid_of_blocks(a.rows), stream, err};
    return mq_launch_kernel(&launch, job->x.dtype == MQ_F32 ? scatter_backward<MQ_F32> : scatter_backward<MQ_BF16>, a);
}
