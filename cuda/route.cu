/* The experts of each row and their shares (Shazeer et al. 2017; DeepSeek-AI 2024), and the way back: a warp has a
 * row. */
#include <float.h>

#include "rows.cuh"

enum { MOST_EXPERTS = 4096, ROWS = MQ_THREADS / MQ_WARP };

/* ---- kernels ---- */

typedef struct route_args {
    mq_view logits;
    int64_t rows, experts, top_k, kept;
    int normalize, rounded, sigmoid;
    const float *correction;
    int64_t groups, groups_kept, groups_best, group_size;
    float factor;
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

/* A row's softmax, of which every lane has the two numbers. (A sigmoid needs none.) */
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
    if (a.sigmoid) return mq_sigmoid(logit_of<D>(a, row, expert));
    return mq_exp(logit_of<D>(a, row, expert) - of.largest) / of.sum;
}

template <mq_dtype D>
MQ_DEVICE softmax softmax_of(const route_args &a, int64_t row, int lane)
{
    softmax of = {-INFINITY, 0.0f};
    const mq_larger larger = {};
    if (a.sigmoid) return of;
    for (int64_t i = lane; i < a.experts; i += MQ_WARP) of.largest = larger(of.largest, logit_of<D>(a, row, i));
    for (int offset = 1; offset < MQ_WARP; offset <<= 1)
        of.largest = larger(of.largest, mq_exchange(of.largest, offset));
    for (int64_t i = lane; i < a.experts; i += MQ_WARP) of.sum += mq_exp(logit_of<D>(a, row, i) - of.largest);
    of.sum = mq_lanes_sum(of.sum, MQ_WARP);
    return of;
}

/* An expert (or a group of them), and what it is chosen by. */
typedef struct candidate {
    float value;
    int expert;
} candidate;

MQ_DEVICE bool comes_before(const candidate &a, const candidate &b)
{
    return a.value > b.value || (a.value == b.value && a.expert < b.expert);
}

/* The best of the lanes', in all of them. */
MQ_DEVICE candidate best_of_lanes(candidate best)
{
    for (int offset = 1; offset < MQ_WARP; offset <<= 1) {
        const candidate other = {mq_exchange(best.value, offset),
                                 (int)__shfl_xor_sync(0xffffffffu, (uint32_t)best.expert, offset)};
        if (comes_before(other, best)) best = other;
    }
    return best;
}

/* By what an expert is chosen. NaN comes last: some are chosen even then. */
template <mq_dtype D>
MQ_DEVICE float choice_of(const route_args &a, const softmax &of, int64_t row, int64_t expert)
{
    const float value = probability<D>(a, of, row, expert) + (a.correction != NULL ? a.correction[expert] : 0.0f);
    return value == value ? value : -FLT_MAX;
}

/* A bit for each group that is among the best, by its best expert or the sum of its two best. */
template <mq_dtype D>
MQ_DEVICE uint32_t groups_of(const route_args &a, const softmax &of, int64_t row, int lane)
{
    float first = -FLT_MAX, second = -FLT_MAX;
    uint32_t kept = 0;
    if (a.groups <= 1) return 0xffffffffu;
    for (int64_t i = 0; lane < a.groups && i < a.group_size; i++) {
        const float value = choice_of<D>(a, of, row, lane * a.group_size + i);
        second = value > first ? first : MQ_MAX(second, value);
        first = MQ_MAX(first, value);
    }
    const float sum = a.group_size > 1 && a.groups_best != 1 ? first + second : first;
    for (int64_t i = 0; i < a.groups_kept; i++) {
        const bool is_there = lane < a.groups && (kept >> lane & 1u) == 0;
        const candidate own = {is_there ? sum : -INFINITY, is_there ? lane : MQ_WARP};
        const int best = best_of_lanes(own).expert;
        if (best < MQ_WARP) kept |= 1u << best;
    }
    return kept;
}

/* The first that comes after `last` and is not among the row's first `taken` ones. */
template <mq_dtype D>
MQ_DEVICE candidate next_of(const route_args &a, const softmax &of, int64_t row, uint32_t groups, int64_t taken,
                            const candidate &last)
{
    candidate best = {-INFINITY, MOST_EXPERTS};
    for (int64_t i = threadIdx.x % MQ_WARP; i < a.experts; i += MQ_WARP) {
        const candidate one = {choice_of<D>(a, of, row, i), (int)i};
        bool is_free = a.groups <= 1 || (groups >> (i / a.group_size) & 1u) != 0;
        for (int64_t j = 0; j < taken; j++) is_free = is_free && a.chosen[row * a.top_k + j] != i;
        if (is_free && comes_before(last, one) && comes_before(one, best)) best = one;
    }
    return best_of_lanes(best);
}

template <mq_dtype D>
static __global__ void route(route_args a)
{
    const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / MQ_WARP;
    const int lane = (int)threadIdx.x % MQ_WARP;
    if (row >= a.rows) return;              /* a whole warp */
    const softmax of = softmax_of<D>(a, row, lane);
    const uint32_t groups = groups_of<D>(a, of, row, lane);
    const candidate none = {INFINITY, -1};
    candidate last = none;
    float sum = 0.0f;
    for (int64_t i = 0; i < a.top_k; i++) {
        const bool onlooks = i >= a.kept;           /* the next best of all groups, who has no share */
        if (i == a.kept) {
            last = none;
            mq_sync_warp();                         /* all see what lane 0 wrote */
        }
        last = next_of<D>(a, of, row, onlooks ? 0xffffffffu : groups, onlooks ? a.kept : 0, last);
        const float share = onlooks ? 0.0f : probability<D>(a, of, row, last.expert);
        sum += share;
        if (lane != 0) continue;
        a.chosen[row * a.top_k + i] = last.expert;
        a.shares[row * a.top_k + i] = share;
    }
    for (int64_t i = 0; lane == 0 && i < a.kept; i++) {
        float *share = &a.shares[row * a.top_k + i];
        if (a.normalize) *share /= sum;
        *share *= a.factor;
        if (a.rounded) *share = mq_round_to<D>(*share);
    }
}

/* Shares s of the chosen ones are p, or p over their sum P: then d_p = (d_s - sum of d_s * s) / P. Softmax:
 * d_logit = p * (d_p - sum of d_p * p). Sigmoid: d_logit = p * (1 - p) * d_p. */
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
        along += a.factor * (d_shares[i] - mean) / total * probability<D>(a, of, row, chosen[i]);
    for (int64_t expert = lane; expert < a.experts; expert += MQ_WARP) {
        const float p = probability<D>(a, of, row, expert);
        float d_p = 0.0f;
        for (int64_t i = 0; i < a.top_k; i++)
            if (chosen[i] == expert) d_p = a.factor * (d_shares[i] - mean) / total;
        a.d_logits[row * a.experts + expert] = a.sigmoid ? p * (1.0f - p) * d_p : p * (d_p - along);
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
    const int64_t kept = job->kept > 0 ? job->kept : job->top_k;
    if (job->kept < 0 || job->kept > job->top_k || job->groups < 0 || job->groups > MQ_WARP ||
        (job->groups > 1 && (job->logits.cols % job->groups != 0 || job->groups_kept < 1 ||
                             job->groups_kept > job->groups ||
                             job->groups_kept * (job->logits.cols / job->groups) < kept)))
        return mq_fail(err, MQ_ERR_VALUE, "%s: %lld of %lld groups of %lld experts, of which %lld of %lld are kept; "
                       "expected up to %d groups", name, (long long)job->groups_kept, (long long)job->groups,
                       (long long)job->logits.cols, (long long)kept, (long long)job->top_k, (int)MQ_WARP);
    route_args a = {};
    a.logits = mq_view_of(&job->logits);
    a.rows = job->logits.rows;
    a.experts = job->logits.cols;
    a.top_k = job->top_k;
    a.kept = kept;
    a.normalize = job->normalize;
    a.rounded = job->rounded;
    a.sigmoid = job->sigmoid;
    a.correction = job->correction;
    a.groups = job->groups;
    a.groups_kept = job->groups_kept;
    a.groups_best = job->groups_best;
    a.group_size = a.experts / MQ_MAX(job->groups, (int64_t)1);
    a.factor = job->factor != 0.0f ? job->factor : 1.0f;
    a.chosen = job->experts;
    a.shares = job->shares;
    a.d_shares = job->d_shares;
    a.d_logits = job->d_logits;
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
