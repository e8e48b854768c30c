#include <float.h>
#include <math.h>
#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

enum { COLUMNS = 256 };      /* of a row scaled at a time */
static const float TAKEN = -FLT_MAX;   /* in the place of a score */

typedef struct route_job {
    const mq_routes *routes;
    const char *logits;
    const mq_route_sizes *sizes;
} route_job;

mq_route_sizes mq_route_of(const mq_config *config)
{
    return (mq_route_sizes){
        .normalize = config->norm_topk_prob != 0, .sigmoid = config->routing == MQ_ROUTING_SIGMOID,
        .groups = config->expert_groups, .groups_kept = config->expert_groups_kept,
        .groups_best = config->expert_groups_best, .factor = (float)config->routed_scaling_factor,
    };
}

/* scores (n): logits to probabilities. */
static void softmax(float *scores, int64_t n)
{
    float largest = mq_row_ops_table()->max(scores, n), sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        scores[i] = expf(scores[i] - largest);
        sum += scores[i];
    }
    for (int64_t i = 0; i < n; i++) scores[i] /= sum;
}

static void score(const mq_route_sizes *sizes, float *scores)
{
    if (!sizes->sigmoid) {
        softmax(scores, sizes->experts);
        return;
    }
    for (int64_t i = 0; i < sizes->experts; i++) scores[i] = 1.0f / (1.0f + expf(-scores[i]));
}

/* The largest that is not taken, the first of equals; with NaN among them, any that is not taken. */
static int64_t take_largest(float *scores, int64_t n)
{
    int64_t best = 0;
    while (scores[best] == TAKEN) best++;
    for (int64_t i = best + 1; i < n; i++)
        if (scores[i] > scores[best]) best = i;
    scores[best] = TAKEN;
    return best;
}

static float group_score(const float *scores, int64_t n, int64_t best)
{
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        second = scores[i] > first ? first : MQ_MAX(second, scores[i]);
        first = MQ_MAX(first, scores[i]);
    }
    return n > 1 && best > 1 ? first + second : first;
}

/* Scores of experts whose group is not among the best become those of experts that are not there. */
static void keep_groups(const mq_route_sizes *sizes, float *scores)
{
    const int64_t n = sizes->experts / sizes->groups;
    float groups[MQ_MAX_EXPERTS];
    for (int64_t g = 0; g < sizes->groups; g++) groups[g] = group_score(scores + g * n, n, sizes->groups_best);
    for (int64_t i = 0; i < sizes->groups_kept; i++) take_largest(groups, sizes->groups);
    for (int64_t i = 0; i < sizes->experts; i++)
        if (groups[i / n] != TAKEN) scores[i] = TAKEN;
}

/* choice (experts): the scores by which experts are chosen. */
static void correct(const mq_route_sizes *sizes, float *choice, const float *scores)
{
    for (int64_t i = 0; i < sizes->experts; i++)
        choice[i] = scores[i] + (sizes->correction ? sizes->correction[i] : 0.0f);
    if (sizes->groups > 1) keep_groups(sizes, choice);
}

/* Experts who see a row and have no share in what becomes of it: those behind the kept ones, whatever their group. */
static void choose_onlookers(const mq_route_sizes *sizes, int32_t *experts, float *shares, float *choice,
                             const float *scores, const mq_routes *routes)
{
    for (int64_t i = 0; i < sizes->experts; i++)
        choice[i] = scores[i] + (sizes->correction ? sizes->correction[i] : 0.0f);
    for (int64_t i = 0; i < routes->kept; i++) choice[experts[i]] = TAKEN;
    for (int64_t i = routes->kept; i < routes->top_k; i++) {
        experts[i] = (int32_t)take_largest(choice, sizes->experts);
        shares[i] = 0.0f;
    }
}

static void route_row(const route_job *job, int64_t row)
{
    const mq_route_sizes *sizes = job->sizes;
    const mq_routes *routes = job->routes;
    const mq_typed_row_ops *kernels = mq_row_ops_of(sizes->dtype);
    const int64_t top_k = routes->kept > 0 ? routes->kept : routes->top_k, at = (sizes->first + row) * routes->top_k;
    int32_t *experts = job->routes->experts + at;
    float *shares = job->routes->shares + at, scores[MQ_MAX_EXPERTS], choice[MQ_MAX_EXPERTS], sum = 0.0f;
    kernels->to_f32(scores, job->logits + (size_t)(row * sizes->experts) * mq_dtype_size(sizes->dtype), sizes->experts);
    score(sizes, scores);
    correct(sizes, choice, scores);
    for (int64_t i = 0; i < top_k; i++) {
        experts[i] = (int32_t)take_largest(choice, sizes->experts);
        shares[i] = scores[experts[i]];
        sum += shares[i];
    }
    for (int64_t i = 0; i < top_k && sizes->normalize; i++) shares[i] /= sum;
    for (int64_t i = 0; i < top_k && sizes->factor != 0.0f; i++) shares[i] *= sizes->factor;
    if (top_k < routes->top_k) choose_onlookers(sizes, experts, shares, choice, scores, routes);
    if (!sizes->rounded) return;
    kernels->from_f32(scores, shares, top_k);
    kernels->to_f32(shares, scores, top_k);
}

static void route_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    for (int64_t i = begin; i < end; i++) route_row(argument, i);
}

void mq_route_forward(const mq_routes *routes, const void *logits, const mq_route_sizes *sizes)
{
    route_job job = {.routes = routes, .logits = logits, .sizes = sizes};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->experts * routes->top_k), route_rows, &job);
}

/* Rows of one matrix that belong to rows `index` of another. */
typedef struct indexed_job {
    char *out;
    const char *in;
    const int64_t *index;
    const float *shares;
    size_t size, stride;
    int64_t width;
    const mq_typed_row_ops *kernels;
} indexed_job;

static void gather_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const indexed_job *job = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        memcpy(job->out + (size_t)i * job->stride, job->in + (size_t)job->index[i] * job->stride, job->stride);
}

static void scatter_row(const indexed_job *job, int64_t row)
{
    const char *in = job->in + (size_t)row * job->stride;
    char *out = job->out + (size_t)job->index[row] * job->stride;
    if (job->shares[row] == 0.0f) return;      /* an onlooker's */
    for (int64_t first = 0; first < job->width; first += COLUMNS) {
        const int64_t n = MQ_MIN((int64_t)COLUMNS, job->width - first);
        float values[COLUMNS], rounded[COLUMNS];
        job->kernels->to_f32(values, in + (size_t)first * job->size, n);
        for (int64_t j = 0; j < n; j++) values[j] *= job->shares[row];
        job->kernels->from_f32(rounded, values, n);
        job->kernels->add(out + (size_t)first * job->size, rounded, n);
    }
}

static void scatter_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    for (int64_t i = begin; i < end; i++) scatter_row(argument, i);
}

static void run_indexed(indexed_job *job, const mq_row_sizes *sizes, mq_range_fn fn)
{
    job->size = mq_dtype_size(sizes->dtype);
    job->stride = (size_t)sizes->width * job->size;
    job->width = sizes->width;
    job->kernels = mq_row_ops_of(sizes->dtype);
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), fn, job);
}

void mq_gather_forward(void *out, const void *in, const int64_t *index, const mq_row_sizes *sizes)
{
    indexed_job job = {.out = out, .in = in, .index = index};
    run_indexed(&job, sizes, gather_rows);
}

void mq_scatter_forward(void *out, const void *in, const int64_t *index, const float *shares,
                        const mq_row_sizes *sizes)
{
    indexed_job job = {.out = out, .in = in, .index = index, .shares = shares};
    run_indexed(&job, sizes, scatter_rows);
}

typedef struct route_backward_job {
    float *d_logits;
    const float *d_shares;
    const route_job *forward;
} route_backward_job;

/* Shares s of the chosen ones are p, or p over their sum P: then d_p = (d_s - sum of d_s * s) / P. Softmax:
 * d_logit = p * (d_p - sum of d_p * p). Sigmoid: d_logit = p * (1 - p) * d_p. */
static void route_backward_row(const route_backward_job *job, int64_t row)
{
    const mq_route_sizes *sizes = job->forward->sizes;
    const mq_typed_row_ops *kernels = mq_row_ops_of(sizes->dtype);
    const int64_t top_k = job->forward->routes->top_k, n = sizes->experts, at = (sizes->first + row) * top_k;
    const int32_t *chosen = job->forward->routes->experts + at;
    const float factor = sizes->factor != 0.0f ? sizes->factor : 1.0f;
    float *d_logits = job->d_logits + row * n, p[MQ_MAX_EXPERTS], total = 0.0f, mean = 0.0f;
    kernels->to_f32(p, job->forward->logits + (size_t)(row * n) * mq_dtype_size(sizes->dtype), n);
    score(sizes, p);
    for (int64_t i = 0; i < top_k; i++) total += p[chosen[i]];
    if (!sizes->normalize) total = 1.0f;
    for (int64_t i = 0; i < top_k && sizes->normalize; i++) mean += job->d_shares[at + i] * (p[chosen[i]] / total);
    memset(d_logits, 0, (size_t)n * sizeof *d_logits);
    for (int64_t i = 0; i < top_k; i++) d_logits[chosen[i]] = factor * (job->d_shares[at + i] - mean) / total;
    if (sizes->sigmoid) {
        for (int64_t i = 0; i < n; i++) d_logits[i] *= p[i] * (1.0f - p[i]);
        return;
    }
    mean = 0.0f;
    for (int64_t i = 0; i < top_k; i++) mean += d_logits[chosen[i]] * p[chosen[i]];
    mq_row_ops_table()->softmax_backward(d_logits, p, n, mean);
}

static void route_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    for (int64_t i = begin; i < end; i++) route_backward_row(argument, i);
}

void mq_route_backward(float *d_logits, const float *d_shares, const mq_routes *routes, const void *logits,
                       const mq_route_sizes *sizes)
{
    route_job forward = {.routes = routes, .logits = logits, .sizes = sizes};
    route_backward_job job = {.d_logits = d_logits, .d_shares = d_shares, .forward = &forward};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->experts * routes->top_k), route_backward_rows, &job);
}

/* Of the rows of one expert: index says where they are. */
typedef struct share_job {
    float *d_in, *d_shares;
    const float *d_out;
    const char *in;
    const int64_t *index;
    const float *shares;
    const mq_row_sizes *sizes;
} share_job;

static void share_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const share_job *job = argument;
    const int64_t width = job->sizes->width;
    const size_t stride = (size_t)width * mq_dtype_size(job->sizes->dtype);
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const float *d_out = job->d_out + job->index[i] * width;
        float *d_in = job->d_in + i * width;
        job->d_shares[i] = mq_row_ops_of(job->sizes->dtype)->dot(d_out, job->in + (size_t)i * stride, width);
        memset(d_in, 0, (size_t)width * sizeof *d_in);
        mq_row_ops_table()->add_scaled(d_in, d_out, width, job->shares[i]);
    }
}

void mq_scatter_backward(const mq_scatter_gradient *gradient, const float *d_out, const void *in, const int64_t *index,
                         const float *shares, const mq_row_sizes *sizes)
{
    share_job job = {.d_in = gradient->d_in, .d_shares = gradient->d_shares, .d_out = d_out, .in = in, .index = index,
                     .shares = shares, .sizes = sizes};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), share_rows, &job);
}

typedef struct gather_backward_job {
    float *d_in;
    const float *d_out;
    const int64_t *index;
    int64_t width;
} gather_backward_job;

static void gather_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const gather_backward_job *job = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        mq_row_ops_of(MQ_F32)->add(job->d_in + job->index[i] * job->width, job->d_out + i * job->width, job->width);
}

void mq_gather_backward(float *d_in, const float *d_out, const int64_t *index, const mq_row_sizes *sizes)
{
    gather_backward_job job = {.d_in = d_in, .d_out = d_out, .index = index, .width = sizes->width};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), gather_backward_rows, &job);
}
