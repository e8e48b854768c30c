/* Cross-entropy over a vocabulary that comes in slices (Milakov and Gimelshein 2018), its gradient, and the scores of
 * AutoQuantize: a thread block has a row. */
#include "rows.cuh"

/* ---- kernels ---- */

typedef struct loss_args {
    mq_view logits, gradient;
    int64_t rows, cols, first;
    const int32_t *labels;
    mq_cuda_loss_row *state;
    const float *factors;
    double *losses;
} loss_args;

static void describe(const loss_args &a, char *out, size_t size)
{
    snprintf(out, size, "logits [%lld, %lld] at %p, columns from %lld on, gradient at %p", (long long)a.rows,
             (long long)a.cols, a.logits.data, (long long)a.first, a.gradient.data);
}

/* The sum of exp(x - max) of what has been seen; as a thread's, a row's of one slice, or a row's. */
typedef struct log_sum {
    float max;
    double sum;
} log_sum;

/* What a sum relative to `from` is multiplied with to be relative to `to`. */
MQ_DEVICE float change_of_max(float from, float to)
{
    return from == to ? 1.0f : mq_exp(from - to);
}

MQ_DEVICE void add_group(log_sum *total, const float *x, int count)
{
    const mq_larger larger = {};
    float most = total->max, sum = 0.0f;
    for (int i = 0; i < MQ_GROUP; i++)
        if (i < count) most = larger(most, x[i]);
    const float shift = most == -INFINITY ? 0.0f : most;    /* nothing but -infinity so far */
    for (int i = 0; i < MQ_GROUP; i++)
        if (i < count) sum += mq_exp(x[i] - shift);
    total->sum = total->sum * (double)change_of_max(total->max, most) + (double)sum;
    total->max = most;
}

static __global__ void loss(loss_args a)
{
    const int64_t row = blockIdx.x;
    const int32_t label = a.labels[row];
    const mq_cuda_loss_row before = a.first == 0 ? mq_cuda_loss_row{-INFINITY, 0.0, 0.0f} : a.state[row];
    log_sum own = {-INFINITY, 0.0};
    float x[MQ_GROUP];
    for (int64_t col = (int64_t)threadIdx.x * MQ_GROUP; label >= 0 && col < a.cols; col += MQ_THREADS * MQ_GROUP) {
        const mq_span span = mq_span_at(row, col, a.cols);
        mq_load_span<MQ_F32>(a.logits, span, x);
        add_group(&own, x, span.count);
    }
    const float max = mq_larger()(mq_block_fold(own.max, 0, mq_larger()), before.max);
    const double sum = mq_block_sum(own.sum * (double)change_of_max(own.max, max), 0);
    if (threadIdx.x != 0) return;
    const int64_t at = label - a.first;
    mq_cuda_loss_row after = {max, before.sum * exp((double)before.max - (double)max) + sum, before.target};
    if (before.max == max) after.sum = before.sum + sum;
    if (label >= 0 && at >= 0 && at < a.cols) after.target = ((const float *)a.logits.data)[row * a.logits.ld + at];
    a.state[row] = after;
}

static __global__ void loss_finish(loss_args a)
{
    const int64_t row = mq_thread_index();
    if (row >= a.rows) return;
    const mq_cuda_loss_row state = a.state[row];
    a.losses[row] = a.labels[row] < 0 ? 0.0 : log(state.sum) + (double)state.max - (double)state.target;
}

template <mq_dtype D>
static __global__ void loss_backward(loss_args a)
{
    const int64_t row = blockIdx.x;
    const int32_t label = a.labels[row];
    /* Not exp(x - log sum): what float32 leaves of a logarithm of 30 would be an error of all probabilities. */
    const float given = label < 0 ? 0.0f : a.factors[row], max = a.state[row].max;
    const float factor = label < 0 ? 0.0f : (float)((double)given / a.state[row].sum);
    for (int64_t col = (int64_t)threadIdx.x * MQ_GROUP; col < a.cols; col += MQ_THREADS * MQ_GROUP) {
        const mq_span span = mq_span_at(row, col, a.cols);
        float x[MQ_GROUP];
        mq_load_span<MQ_F32>(a.logits, span, x);
        for (int i = 0; i < MQ_GROUP; i++) {
            x[i] = label < 0 ? 0.0f : factor * mq_exp(x[i] - max);
            if (a.first + col + i == label) x[i] -= given;
        }
        mq_store_span<D>(a.gradient, span, x);
    }
}

typedef struct score_args {
    mq_view gradient, made, was;
    int64_t rows, cols;
    double *sums;
} score_args;

static void describe(const score_args &a, char *out, size_t size)
{
    snprintf(out, size, "[%lld, %lld], gradient at %p, made at %p, was at %p", (long long)a.rows, (long long)a.cols,
             a.gradient.data, a.made.data, a.was.data);
}

template <mq_dtype D>
static __global__ void score(score_args a)
{
    const double largest = 1e10;
    double sum = 0.0;
    for (int64_t col = (int64_t)threadIdx.x * MQ_GROUP; col < a.cols; col += MQ_THREADS * MQ_GROUP) {
        const mq_span span = mq_span_at(blockIdx.x, col, a.cols);
        float change[MQ_GROUP], was[MQ_GROUP], gradient[MQ_GROUP];
        mq_load_span<D>(a.made, span, change);
        if (a.was.data != NULL) mq_load_span<D>(a.was, span, was);
        mq_load_span<MQ_F32>(a.gradient, span, gradient);
        for (int i = 0; i < MQ_GROUP; i++) {
            if (a.was.data != NULL) change[i] = mq_round_to<D>(change[i] - was[i]);
            double product = (double)(change[i] * gradient[i]);
            product = product > largest ? largest : product < -largest ? -largest : product;
            sum += product * product;
        }
    }
    sum = mq_block_sum(sum, 0);
    if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

/* ---- launchers ---- */

static int check(const mq_cuda_loss_job *job, mq_error *err)
{
    const int rc = mq_cuda_check_activations(&job->logits, "logits", err);
    if (rc != MQ_OK || job->logits.dtype == MQ_F32) return rc;
    return mq_fail(err, MQ_ERR_TYPE, "logits: expected float32");
}

static loss_args args_of(const mq_cuda_loss_job *job)
{
    const loss_args a = {mq_view_of(&job->logits), mq_view_of(&job->gradient), job->logits.rows, job->logits.cols,
                         job->first, job->labels, job->state, job->factors, job->losses};
    return a;
}

int mq_cuda_loss(const mq_cuda_loss_job *job, void *stream, mq_error *err)
{
    const int rc = check(job, err);
    if (rc != MQ_OK || mq_is_empty(&job->logits)) return rc;
    const mq_launch launch = {"loss", mq_grid_of_blocks(job->logits.rows), stream, err};
    return mq_launch_kernel(&launch, loss, args_of(job));
}

int mq_cuda_loss_finish(const mq_cuda_loss_job *job, void *stream, mq_error *err)
{
    const int rc = check(job, err);
    if (rc != MQ_OK || job->logits.rows == 0) return rc;
    const mq_launch launch = {"loss_finish", mq_grid_for(job->logits.rows), stream, err};
    return mq_launch_kernel(&launch, loss_finish, args_of(job));
}

int mq_cuda_loss_backward(const mq_cuda_loss_job *job, void *stream, mq_error *err)
{
    int rc = check(job, err);
    if (rc == MQ_OK)
        rc = mq_cuda_check_shape(&job->gradient, job->logits.rows, job->logits.cols, "gradient", err);
    if (rc != MQ_OK || mq_is_empty(&job->logits)) return rc;
    const mq_launch launch = {"loss_backward", mq_grid_of_blocks(job->logits.rows), stream, err};
    const bool is_f32 = job->gradient.dtype == MQ_F32;
    return mq_launch_kernel(&launch, is_f32 ? loss_backward<MQ_F32> : loss_backward<MQ_BF16>, args_of(job));
}

int mq_cuda_score(const mq_cuda_score_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_activations(&job->made, "made", err);
    if (rc == MQ_OK && job->was.data != NULL) rc = mq_cuda_check_same(&job->made, &job->was, "was", err);
    if (rc != MQ_OK || job->made.rows == 0) return rc;
    const score_args a = {mq_view_of_rows(job->gradient, job->made.cols), mq_view_of(&job->made), mq_view_of(&job->was),
                          job->made.rows, job->made.cols, job->sums};
    const mq_launch launch = {"score", mq_grid_of_blocks(a.rows), stream, err};
    return mq_launch_kernel(&launch, job->made.dtype == MQ_F32 ? score<MQ_F32> : score<MQ_BF16>, a);
}
