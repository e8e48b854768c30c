/* Counts of |x| in bins whose width is a power of two: integers, so exact in any order. The width is known to the
 * device alone, where bins become wider as larger values come: nothing waits for the host. Small bins are where almost
 * all values of a heavy-tailed tensor are, so a thread block counts those in shared memory first. */
#include "amax.cuh"
#include "rows.cuh"

#define INFINITY_BITS 0x7f800000u
enum { NEAR_BINS = 4096, ROUNDS = 8 };   /* of 16 KB; groups per thread */

/* ---- kernels ---- */

typedef struct histogram_args {
    mq_view x;
    int64_t rows, cols, groups;
    int64_t piece;
    int bits;
    mq_cuda_histogram *numbers;
    unsigned long long *counts;
} histogram_args;

static void describe(const histogram_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, 2^%d bins at %p", (long long)a.rows, (long long)a.cols, a.x.data,
             a.bits, (void *)a.counts);
}

/* By how much the bins become wider (a power of two) for what is to be counted now. */
MQ_DEVICE int note_latest(const histogram_args &a)
{
    mq_cuda_histogram *numbers = a.numbers;
    const uint32_t latest = numbers->latest, before = numbers->worst;
    numbers->worst = MQ_MAX(before, latest);
    if (latest == 0 || latest >= INFINITY_BITS) return 0;
    if (numbers->first_amax == 0) numbers->first_piece = a.piece;
    if (numbers->first_piece == a.piece) numbers->first_amax = MQ_MAX(numbers->first_amax, latest);
    /* |x| is below 2^(its exponent - 126) */
    const int above = (int)(latest >> 23) - 126 - a.bits - MQ_CUDA_LOWEST_EXPONENT, was = numbers->above;
    if (above <= was) return 0;
    numbers->above = above;
    return before == 0 ? 0 : MQ_MIN(above - was, a.bits);
}

/* One thread block makes the bins wider, where they lie: a tile of sums is read by all before any is written, and
 * later tiles read behind what earlier ones write. */
static __global__ void histogram_widen(histogram_args a)
{
    MQ_SHARED(int, shift, 1);
    if (threadIdx.x == 0) shift[0] = note_latest(a);
    __syncthreads();
    const int64_t bins = (int64_t)1 << a.bits, kept = bins >> shift[0], width = (int64_t)1 << shift[0];
    if (width == 1) return;
    for (int64_t tile = 0; tile < kept; tile += MQ_THREADS) {
        const int64_t to = tile + threadIdx.x;
        unsigned long long sum = 0;
        for (int64_t i = to * width; to < kept && i < (to + 1) * width; i++) sum += a.counts[i];
        __syncthreads();
        if (to < kept) a.counts[to] = sum;
    }
    for (int64_t i = kept + threadIdx.x; i < bins; i += MQ_THREADS) a.counts[i] = 0;
}

template <mq_dtype D>
static __global__ void histogram(histogram_args a)
{
    MQ_SHARED(unsigned int, near_counts, NEAR_BINS);
    const int64_t first = (int64_t)blockIdx.x * (MQ_THREADS * ROUNDS) + threadIdx.x;
    const int64_t bins = (int64_t)1 << a.bits;
    const int exponent = a.numbers->above + MQ_CUDA_LOWEST_EXPONENT;
    /* multiplying is exact, the cast rounds down */
    const float scale = mq_float_of((uint32_t)(127 - exponent) << 23);
    unsigned int zeros = 0;
    if (a.numbers->latest >= INFINITY_BITS) return;
    for (int i = (int)threadIdx.x; i < NEAR_BINS; i += MQ_THREADS) near_counts[i] = 0;
    __syncthreads();
    for (int64_t round = 0; round < ROUNDS; round++) {
        const int64_t index = first + round * MQ_THREADS;
        if (index >= a.rows * a.groups) continue;
        const mq_place place = mq_place_of(index, a.groups);
        const mq_span span = mq_span_at(place.row, place.group * MQ_GROUP, a.cols);
        float x[MQ_GROUP];
        mq_load_span<D>(a.x, span, x);
        for (int i = 0; i < MQ_GROUP; i++) {
            if (i >= span.count) continue;
            const float magnitude = mq_float_of(mq_magnitude(x[i]));
            const uint32_t bin = (uint32_t)(magnitude * scale);
            zeros += magnitude == 0.0f;
            if (bin < NEAR_BINS) atomicAdd(&near_counts[bin], 1u);
            else atomicAdd(&a.counts[bin], 1ull);
        }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < NEAR_BINS && i < bins; i += MQ_THREADS)
        if (near_counts[i] != 0) atomicAdd(&a.counts[i], (unsigned long long)near_counts[i]);
    if (zeros != 0) atomicAdd(&a.numbers->zeros, (unsigned long long)zeros);
}

/* ---- launcher ---- */

typedef void (*histogram_kernel)(histogram_args);

static const histogram_kernel kernels[MQ_FLOAT_DTYPES] = {histogram<MQ_F32>, histogram<MQ_BF16>, histogram<MQ_F16>};

int mq_cuda_histogram_add(const mq_cuda_histogram_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc != MQ_OK) return rc;
    if (job->bits < 1 || job->bits > 24 || job->numbers == NULL || job->counts == NULL)
        return mq_fail(err, MQ_ERR_VALUE, "histogram: 2^%d bins at %p, numbers at %p; expected 2^1 to 2^24", job->bits,
                       (void *)job->counts, (void *)job->numbers);
    if (mq_is_empty(&job->x)) return MQ_OK;
    const histogram_args a = {mq_view_of(&job->x), job->x.rows, job->x.cols, mq_groups_of(job->x.cols), job->piece,
                              job->bits, job->numbers, job->counts};
    const mq_blocks whole = mq_blocks_of(&job->x, 0, 0);
    const int64_t threads = MQ_CEIL_DIV(a.rows * a.groups, (int64_t)ROUNDS);
    const mq_launch widen = {"histogram_widen", dim3(1), stream, err};
    const mq_launch count = {"histogram", mq_grid_for(threads), stream, err};
    rc = mq_cuda_amax_blocks(&job->x, &whole, (float *)&job->numbers->latest, stream, err);
    if (rc == MQ_OK) rc = mq_launch_kernel(&widen, histogram_widen, a);
    return rc == MQ_OK ? mq_launch_kernel(&count, kernels[job->x.dtype], a) : rc;
}
