/* Counts of |x| in bins whose width is a power of two: integers, so exact in any order. Small bins are where almost all
 * values of a heavy-tailed tensor are, so a thread block counts those in shared memory first. */
#include "convert.cuh"

enum { NEAR_BINS = 4096, ROUNDS = 16 };   /* of 16 KB; elements per thread */

/* ---- kernel ---- */

typedef struct histogram_args {
    const void *x;
    int64_t rows, cols, ld;
    const uint8_t *mask;
    float scale;                  /* 2^-exponent: multiplying is exact */
    int64_t bins;
    unsigned int *counts, *zeros;
} histogram_args;

static void describe(const histogram_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, %lld bins of width %g", (long long)a.rows, (long long)a.cols, a.x,
             (long long)a.bins, 1.0 / (double)a.scale);
}

template <mq_dtype D>
MQ_DEVICE void count_one(const histogram_args &a, int64_t index, unsigned int *near_counts, unsigned int *zeros)
{
    const mq_place place = mq_place_of(index, a.cols);
    if (a.mask != NULL && a.mask[place.row] == 0) return;
    const typename mq_word<D>::type *x = (const typename mq_word<D>::type *)a.x + place.row * a.ld;
    const float magnitude = mq_float_of(mq_magnitude(mq_widen<D>(x[place.group])));
    const float at = magnitude * a.scale;
    *zeros += magnitude == 0.0f;
    if (!(at < (float)a.bins)) return;        /* beyond the last bin, or NaN */
    const int64_t bin = (int64_t)at;
    atomicAdd(bin < NEAR_BINS ? &near_counts[bin] : &a.counts[bin], 1u);
}

template <mq_dtype D>
static __global__ void histogram(histogram_args a)
{
    MQ_SHARED(unsigned int, near_counts, NEAR_BINS);
    const int64_t first = (int64_t)blockIdx.x * (MQ_THREADS * ROUNDS) + threadIdx.x, total = a.rows * a.cols;
    unsigned int zeros = 0;
    for (int i = (int)threadIdx.x; i < NEAR_BINS; i += MQ_THREADS) near_counts[i] = 0;
    __syncthreads();
    for (int64_t i = 0; i < ROUNDS; i++)
        if (first + i * MQ_THREADS < total) count_one<D>(a, first + i * MQ_THREADS, near_counts, &zeros);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < NEAR_BINS && i < a.bins; i += MQ_THREADS)
        if (near_counts[i] != 0) atomicAdd(&a.counts[i], near_counts[i]);
    if (zeros != 0) atomicAdd(a.zeros, zeros);
}

/* ---- launcher ---- */

typedef void (*histogram_kernel)(histogram_args);

static const histogram_kernel kernels[MQ_FLOAT_DTYPES] = {histogram<MQ_F32>, histogram<MQ_BF16>, histogram<MQ_F16>};

int mq_cuda_histogram(const mq_cuda_histogram_job *job, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc != MQ_OK) return rc;
    if (job->exponent < -120 || job->exponent > 127 || job->bins < 1 || job->bins > 1 << 24)
        return mq_fail(err, MQ_ERR_VALUE, "histogram: %lld bins of width 2^%d; expected 1 to 2^24, and -120 to 127",
                       (long long)job->bins, job->exponent);
    if (job->x.rows == 0 || job->x.cols == 0) return MQ_OK;
    /* 2^-127 is a denormal, made by shifting its mantissa */
    const float scale = mq_float_of(job->exponent < 127 ? (uint32_t)(127 - job->exponent) << 23 : 0x400000u);
    const histogram_args a = {job->x.data, job->x.rows, job->x.cols, job->x.ld, job->mask, scale, job->bins,
                              job->counts, job->zeros};
    const mq_launch launch = {"histogram", mq_grid_for(MQ_CEIL_DIV(a.rows * a.cols, (int64_t)ROUNDS)), stream, err};
    return mq_launch_kernel(&launch, kernels[job->x.dtype], a);
}
