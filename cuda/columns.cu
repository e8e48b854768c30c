/* A thread block adds up a strip of rows of some columns in float64, and a second kernel the strips, in order. How many
 * strips there are depends on the number of rows alone, so the bits of a sum do too. */
#include "columns.cuh"

enum { LINES = MQ_THREADS / MQ_WARP, TILE = MQ_WARP * MQ_GROUP, MOST_STRIPS = 64, LEAST_ROWS = 64 };

/* ---- kernels ---- */

typedef struct columns_args {
    mq_columns of;
    int64_t strips, strip_rows, tiles;
    double *sums;               /* [strips, cols] */
    float *lows, *highs;        /* [strips, cols] */
} columns_args;

static void describe(const columns_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, %lld strips", (long long)a.of.rows, (long long)a.of.cols, a.of.x.data,
             (long long)a.strips);
}

enum value { SUM, MAGNITUDES, NORM };

/* What x of a row counts as. */
template <value V, mq_dtype D>
MQ_DEVICE void load_values(const columns_args &a, const mq_span &span, float *x)
{
    const mq_place place = mq_place_of(span.row, a.of.heads);
    const int64_t at = place.row * a.of.x.ld + place.group * a.of.cols + span.col;
    mq_load_group<D>(a.of.x.data, at, span.count, a.of.x.aligned, x);
    if constexpr (V == MAGNITUDES)
        for (int i = 0; i < MQ_GROUP; i++) x[i] = mq_float_of(mq_magnitude(x[i]));
    if constexpr (V == NORM) {
        const int64_t from = span.row * a.of.cols + span.col;
        for (int i = 0; i < MQ_GROUP; i++)
            if (i < span.count) x[i] = a.of.d_out[from + i] * (x[i] * a.of.scales[span.row]);
    }
}

template <value V, mq_dtype D>
static __global__ void column_strips(columns_args a)
{
    MQ_SHARED(double, sums, LINES * TILE);
    MQ_SHARED(float, bounds, 2 * LINES * TILE);
    const mq_place place = mq_place_of((int64_t)blockIdx.x, a.tiles);
    const int line = (int)threadIdx.x / MQ_WARP, own = (int)threadIdx.x % MQ_WARP * MQ_GROUP;
    const int64_t first = place.row * a.strip_rows, end = MQ_MIN(first + a.strip_rows, a.of.rows);
    double sum[MQ_GROUP] = {};
    float low[MQ_GROUP], high[MQ_GROUP];
    for (int i = 0; i < MQ_GROUP; i++) low[i] = INFINITY, high[i] = -INFINITY;
    for (int64_t row = first + line; row < end; row += LINES) {
        const mq_span span = mq_span_at(row, place.group * TILE + own, a.of.cols);
        float x[MQ_GROUP];
        if (span.count == 0 || (a.of.mask != NULL && a.of.mask[row] == 0)) continue;
        load_values<V, D>(a, span, x);
        for (int i = 0; i < MQ_GROUP; i++) {
            sum[i] += (double)x[i];
            low[i] = x[i] < low[i] ? x[i] : low[i];
            high[i] = x[i] > high[i] ? x[i] : high[i];
        }
    }
    for (int i = 0; i < MQ_GROUP; i++) {
        sums[line * TILE + own + i] = sum[i];
        bounds[line * TILE + own + i] = low[i];
        bounds[(LINES + line) * TILE + own + i] = high[i];
    }
    __syncthreads();
    const int64_t col = place.group * TILE + threadIdx.x, at = place.row * a.of.cols + col;
    double total = 0.0;
    float lowest = INFINITY, highest = -INFINITY;
    for (int i = 0; i < LINES; i++) {
        total += sums[i * TILE + threadIdx.x];
        lowest = MQ_MIN(lowest, bounds[i * TILE + threadIdx.x]);
        highest = MQ_MAX(highest, bounds[(LINES + i) * TILE + threadIdx.x]);
    }
    if (col >= a.of.cols) return;
    a.sums[at] = total;
    if (a.lows == NULL) return;
    a.lows[at] = lowest;
    a.highs[at] = highest;
}

static __global__ void column_totals(columns_args a)
{
    const int64_t col = mq_thread_index();
    if (col >= a.of.cols) return;
    double total = 0.0;
    for (int64_t i = 0; i < a.strips; i++) total += a.sums[i * a.of.cols + col];
    if (a.of.sums_f32 != NULL) a.of.sums_f32[col] = (float)((double)a.of.sums_f32[col] + total);
    if (a.of.sums_f64 != NULL) a.of.sums_f64[col] += total;
    for (int64_t i = 0; a.lows != NULL && i < a.strips; i++) {
        a.of.lows[col] = MQ_MIN(a.of.lows[col], a.lows[i * a.of.cols + col]);
        a.of.highs[col] = MQ_MAX(a.of.highs[col], a.highs[i * a.of.cols + col]);
    }
}

/* ---- launchers ---- */

typedef void (*columns_kernel)(columns_args);

static const columns_kernel kernels[][MQ_ACTIVATION_DTYPES] = {
    {column_strips<SUM, MQ_F32>, column_strips<SUM, MQ_BF16>},
    {column_strips<MAGNITUDES, MQ_F32>, column_strips<MAGNITUDES, MQ_BF16>},
    {column_strips<NORM, MQ_F32>, column_strips<NORM, MQ_BF16>}};

static int64_t strip_rows(int64_t rows)
{
    return MQ_MAX(MQ_CEIL_DIV(rows, (int64_t)MOST_STRIPS), (int64_t)LEAST_ROWS);
}

size_t mq_columns_nbytes(int64_t rows, int64_t cols, bool has_bounds)
{
    const size_t count = (size_t)(MQ_CEIL_DIV(rows, strip_rows(rows)) * cols);
    return count * (sizeof(double) + (has_bounds ? 2 * sizeof(float) : 0));
}

int mq_cuda_columns_add(const mq_columns *of, void *stream, mq_error *err)
{
    columns_args a = {};
    a.of = *of;
    a.strip_rows = strip_rows(of->rows);
    a.strips = MQ_CEIL_DIV(of->rows, a.strip_rows);
    a.tiles = MQ_CEIL_DIV(of->cols, (int64_t)TILE);
    a.sums = (double *)of->workspace;
    if (of->lows != NULL) {
        a.lows = (float *)(a.sums + a.strips * of->cols);
        a.highs = a.lows + a.strips * of->cols;
    }
    const value what = of->scales != NULL ? NORM : of->what == MQ_CUDA_SUM ? SUM : MAGNITUDES;
    const mq_launch strips = {"column_strips", mq_grid_of_blocks(a.strips * a.tiles), stream, err};
    const mq_launch totals = {"column_totals", mq_grid_for(of->cols), stream, err};
    const int rc = mq_launch_kernel(&strips, kernels[what][of->dtype], a);
    return rc == MQ_OK ? mq_launch_kernel(&totals, column_totals, a) : rc;
}

size_t mq_cuda_columns_workspace(const mq_cuda_columns_job *job)
{
    return mq_columns_nbytes(job->x.rows, job->x.cols, job->lows != NULL);
}

int mq_cuda_column_sums(const mq_cuda_columns_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc == MQ_OK)
        rc = mq_cuda_check_workspace(job->workspace, job->workspace_nbytes, mq_cuda_columns_workspace(job),
                                     "column_sums", err);
    if (rc != MQ_OK) return rc;
    if ((job->sums_f32 == NULL) == (job->sums_f64 == NULL) || (job->lows == NULL) != (job->highs == NULL) ||
        (job->what != MQ_CUDA_SUM && job->what != MQ_CUDA_SUM_MAGNITUDES))
        return mq_fail(err, MQ_ERR_VALUE, "column_sums: needs one place for sums, and both lows and highs or neither");
    if (mq_is_empty(&job->x)) return MQ_OK;
    mq_columns of = {};
    of.x = mq_view_of(&job->x);
    of.dtype = job->x.dtype;
    of.rows = job->x.rows;
    of.heads = 1;
    of.cols = job->x.cols;
    of.what = job->what;
    of.mask = job->mask;
    of.sums_f32 = job->sums_f32;
    of.sums_f64 = job->sums_f64;
    of.lows = job->lows;
    of.highs = job->highs;
    of.workspace = job->workspace;
    return mq_cuda_columns_add(&of, stream, err);
}
