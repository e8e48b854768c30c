/* The experts of each row and their shares (Shazeer et al. 2017), and the way back: a warp has a row. */
#include "rows.cuh"

enum { MOST_EXPERTS = 4096, ROWS = MQ_THREADS / MQ_WARP };

/* ---- kernels ---- */

typedef struct route_args {
    mq_view logits;
    int64_t rows, experts, top_k;
    int normalize, rounded;
    int32_t *chosen;
    float *shares;
    const float *d_shares;
    float *d_logits;
} route_args;

static void describe(const route_args &a, char *out, size_t size)
{
    snprintf(out, size, "logits [%lld, %lld] at %p, the %lld largest", (long long)a.rows, (long long)a.experts,
             a.logits.data, (long long)a.top_k);
}

/* A row's softmax, of which every lane has the two numbers. */
typedef struct softmax {
    float largest, sum;
} softmax;

template <mq_dtype D>
MQ_DEVICE float logit_of(const route_args &a, int64_t row, int64_t expert)
{
    return mq_widen<D>(((const typename mq_word<D>::type *)a.logits.data)[row * a.logits.ld + expert]);
}

template <mq_dtype D>
MQ_DEVICE float probability(const route_args &a, const softmax &of, int64_t row, int64_t expert)
{
    return mq_exp(logit_of<D>(a, row, expert) - of.largest) / of.sum;
}

template <mq_dtype D>
MQ_DEVICE softmax softmax_of(const route_args &a, int64_t row, int lane)
{
    softmax of = {-INFINITY, 0.0f};
    const mq_larger larger = {};
    for (int64_t i = lane; i < a.experts; i += MQ_WARP) of.largest = larger(of.largest, logit_of<D>(a, row, i));
    for (int offset = 1; offset < MQ_WARP; offset <<= 1)
        of.largest = larger(of.largest, mq_exchange(of.largest, offset));
    for (int64_t i = lane; i < a.experts; i += MQ_WARP) of.sum += mq_exp(logit_of<D>(a, row, i) - of.largest);
    of.sum = mq_lanes_sum(of.sum, MQ_WARP);
    return of;
}

/* An expert, and what it is chosen by: its probability, or -1 where that is NaN, so that some are chosen even then. */
typedef struct candidate {
    float value;
    int expert;
} candidate;

MQ_DEVICE bool comes_before(const candidate &a, const candidate &b)
{
    return a.value > b.value || (a.value == b.value && a.expert < b.expert);
}

/* The first that comes after `last`. */
template <mq_dtype D>
MQ_DEVICE candidate next_of(const route_args &a, const softmax &of, int64_t row, int lane, const candidate &last)
{
    candidate best = {-2.0f, MOST_EXPERTS};
    for (int64_t i = lane; i < a.experts; i += MQ_WARP) {
        const float p = probability<D>(a, of, row, i);
        const candidate one = {p == p ? p : -1.0f, (int)i};
        if (comes_before(last, one) && comes_before(one, best)) best = one;
    }
    for (int offset = 1; offset < MQ_WARP; offset <<= 1) {
        const candidate other = {mq_exchange(best.value, offset),
                                 (int)__shfl_xor_sync(0xffffffffu, (uint32_t)best.expert, offset)};
        if (comes_before(other, best)) best = other;
    }
    return best;
}

template <mq_dtype D>
static __global__ void route(route_args a)
{
    const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / MQ_WARP;
    const int lane = (int)threadIdx.x % MQ_WARP;
    if (row >= a.rows) return;              /* a whole warp */
    const softmax of = softmax_of<D>(a, row, lane);
    candidate last = {3.0f, -1};
    float sum = 0.0f;
    for (int64_t i = 0; i < a.top_k; i++) {
        last = next_of<D>(a, of, row, lane, last);
        const float share = probability<D>(a, of, row, last.expert);
        sum += share;
        if (lane != 0) continue;
        a.chosen[row * a.top_k + i] = last.expert;
        a.shares[row * a.top_k + i] = share;
    }
    for (int64_t i = 0; lane == 0 && i < a.top_k; i++) {
        float *share = &a.shares[row * a.top_k + i];
        if (a.normalize) *share /= sum;
        if (a.rounded) *share = mq_round_to<D>(*share);
    }
}

/* Shares s of the chosen ones are p, or p over their sum P: then d_p = (d_s - sum of d_s * s) / P. Softmax:
 * d_logit = p * (d_p - sum of d_p * p). */
template <mq_dtype D>
static __global__ void route_backward(route_args a)
{
    const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / MQ_WARP;
    const int lane = (int)threadIdx.x % MQ_WARP;
    if (row >= a.rows) return;
    const softmax of = softmax_of<D>(a, row, lane);
    const int32_t *chosen = a.chosen + row * a.top_k;
    const float *d_shares = a.d_shares + row * a.top_k;
    float total = 0.0f, mean = 0.0f, along = 0.0f;
    for (int64_t i = 0; i < a.top_k; i++) total += probability<D>(a, of, row, chosen[i]);
    if (!a.normalize) total = 1.0f;
    for (int64_t i = 0; a.normalize && i < a.top_k; i++)
        mean += d_shares[i] * (probability<D>(a, of, row, chosen[i]) / total);
    for (int64_t i = 0; i < a.top_k; i++)
        along += (d_shares[i] - mean) / total * probability<D>(a, of, row, chosen[i]);
    for (int64_t expert = lane; expert < a.experts; expert += MQ_WARP) {
        float d_p = 0.0f;
        for (int64_t i = 0; i < a.top_k; i++)
            if (chosen[i] == expert) d_p = (d_shares[i] - mean) / total;
        a.d_logits[row * a.experts + expert] = probability<D>(a, of, row, expert) * (d_p - along);
    }
}

/* ---- launchers ---- */

typedef void (*route_kernel)(route_args);

static int run(const mq_cuda_route_job *job, const char *name, const route_kernel *kernels, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_activations(&job->logits, "logits", err);
    if (rc != MQ_OK || job->logits.rows == 0) return rc;
    if (job->logits.cols > MOST_EXPERTS || job->top_k < 1 || job->top_k > job->logits.cols)
        return mq_fail(err, MQ_ERR_VALUE, "%s: %lld of %lld experts; expected up to %d", name, (long long)job->top_k,
                       (long long)job->logits.cols, (int)MOST_EXPERTS);
    const route_args a = {mq_view_of(&job->logits), job->logits.rows, job->logits.cols, job->top_k, job->normalize,
                          job->rounded, job->experts, job->shares, job->d_shares, job->d_logits};
    const mq_launch launch = {name, mq_grid_of_blocks(MQ_CEIL_DIV(a.rows, (int64_t)ROWS)), stream, err};
    return mq_launch_kernel(&launch, kernels[job->logits.dtype], a);
}

int mq_cuda_route(const mq_cuda_route_job *job, void *stream, mq_error *err)
{
    static const route_kernel kernels[MQ_ACTIVATION_DTYPES] = {route<MQ_F32>, route<MQ_BF16>};
    return run(job, "route", kernels, stream, err);
}

int mq_cuda_route_backward(const mq_cuda_route_job *job, void *stream, mq_error *err)
{
    static const route_kernel kernels[MQ_ACTIVATION_DTYPES] = {route_backward<MQ_F32>, route_backward<MQ_BF16>};
    return run(job, "route_backward", kernels, stream, err);
}
