/* Causal attention of many sequences at once, without their matrices of scores (Dao et al. 2022): a thread block has
 * 128 queries of one head and goes over the keys that they see. */
#include "attention.cuh"

/* ---- kernel ---- */

/* Of a lane's two rows. */
typedef struct softmax_rows {
    float max[2], sum[2];
} softmax_rows;

/* What a lane's two rows see, and what no row of its warp sees. */
typedef struct seen_rows {
    int64_t low[2], high[2], lowest, highest, all_low, all_high;
} seen_rows;

MQ_DEVICE seen_rows seen_of(const mq_cuda_attention_job &job, const mq_sequence &sequence, int64_t first)
{
    const int lane = (int)threadIdx.x % MQ_WARP;
    const int64_t last = MQ_MIN(first + MQ_WARP_ROWS, sequence.queries) - 1;
    seen_rows seen = {};
    for (int i = 0; i < 2; i++) {
        seen.low[i] = mq_first_seen(job, sequence, first + lane / 4 + 8 * i);
        seen.high[i] = mq_last_seen(sequence, first + lane / 4 + 8 * i);
    }
    seen.lowest = mq_first_seen(job, sequence, first);
    seen.highest = last >= first ? mq_last_seen(sequence, last) : 0;
    seen.all_low = mq_first_seen(job, sequence, MQ_MAX(last, first));
    seen.all_high = mq_last_seen(sequence, first);
    return seen;
}

/* scores, scaled and capped; what a query may not see becomes minus infinity. */
template <int Octets>
MQ_DEVICE void hide(const mq_cuda_attention_job &job, const mq_sequence &sequence, const seen_rows &seen, int64_t start,
                    float (*scores)[4])
{
    const int lane = (int)threadIdx.x % MQ_WARP;
    const bool inside = start >= seen.all_low && start + 8 * Octets <= seen.all_high && job.key_mask == NULL;
    MQ_UNROLL
    for (int n = 0; n < Octets; n++)
        for (int i = 0; i < 4; i++) {
            const int64_t key = start + 8 * n + 2 * (lane % 4) + i % 2;
            float slope;
            scores[n][i] = mq_score_of(job, scores[n][i], &slope);
            if (inside) continue;
            const bool is_seen = key >= seen.low[i / 2] && key < seen.high[i / 2] && key < sequence.keys &&
                                 (job.key_mask == NULL || job.key_mask[sequence.first_key + key] != 0);
            if (!is_seen) scores[n][i] = -INFINITY;
        }
}

/* scores to probabilities relative to the largest so far; what came before follows when that changes. */
template <int Octets, int Outputs>
MQ_DEVICE void weigh(softmax_rows *rows, float (*scores)[4], float (*out)[4])
{
    const mq_larger larger = {};
    for (int r = 0; r < 2; r++) {
        float max = rows->max[r];
        MQ_UNROLL
        for (int n = 0; n < Octets; n++) max = larger(larger(max, scores[n][2 * r]), scores[n][2 * r + 1]);
        for (int offset = 1; offset < 4; offset <<= 1) max = larger(max, mq_exchange(max, offset));
        const float shift = max == -INFINITY ? 0.0f : max;       /* nothing seen yet: p becomes zero */
        const float factor = max == rows->max[r] ? 1.0f : mq_exp(rows->max[r] - max);
        float sum = 0.0f;
        MQ_UNROLL
        for (int n = 0; n < Octets; n++)
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                scores[n][i] = mq_exp(scores[n][i] - shift);
                sum += scores[n][i];
            }
        rows->max[r] = max;
        rows->sum[r] = rows->sum[r] * factor + sum;
        MQ_UNROLL
        for (int n = 0; n < Outputs; n++)
            for (int i = 2 * r; i < 2 * r + 2; i++) out[n][i] *= factor;
    }
}

/* Sums of the lanes that share rows, and what the backward needs of them. */
MQ_DEVICE void finish(const mq_attention &a, softmax_rows *rows, int64_t at, int64_t first, int64_t queries,
                      float *factors)
{
    const int lane = (int)threadIdx.x % MQ_WARP;
    for (int r = 0; r < 2; r++) {
        const float sum = mq_lanes_sum(rows->sum[r], 4);
        const int64_t query = first + lane / 4 + 8 * r;
        factors[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (a.job.maxima == NULL || lane % 4 != 0 || query >= queries) continue;
        a.job.maxima[at + query] = sum == 0.0f ? 0.0f : rows->max[r];
        a.job.factors[at + query] = factors[r];
    }
}

template <mq_dtype D, int Dim>
static __global__ void attention(mq_attention a)
{
    typedef mq_tile<D, Dim> shape;
    typedef typename shape::word word;
    MQ_SHARED(uint4, memory, 4 * shape::words * sizeof(word) / 16);
    word *const tiles = (word *)memory;                 /* keys and values, twice */
    const mq_cuda_attention_job &job = a.job;
    /* Heads of one group follow each other, and late queries, which see most, come first. */
    const mq_place of_sequence = mq_place_of((int64_t)blockIdx.x, job.heads * a.blocks);
    const mq_place of_block = mq_place_of(of_sequence.group, job.heads);
    const mq_sequence sequence = mq_sequence_of(job, of_sequence.row);
    const int64_t head = of_block.group, kv_head = head / (job.heads / job.kv_heads);
    const int64_t first = (a.blocks - 1 - of_block.row) * MQ_BLOCK_ROWS;
    if (first >= sequence.queries) return;
    const int64_t own = first + (int64_t)threadIdx.x / MQ_WARP * MQ_WARP_ROWS;
    const int64_t last = MQ_MIN(first + MQ_BLOCK_ROWS, sequence.queries) - 1, end = mq_last_seen(sequence, last);
    const mq_head q = mq_head_at<D>(job.q, sequence.first * job.ldq + head * job.head_dim, job.ldq, sequence.queries,
                                    job.head_dim, a.aligned_q);
    const mq_head k = mq_head_at<D>(job.k, sequence.first_key * job.ldk + mq_head_of(job, kv_head, job.head_dim),
                                    job.ldk, sequence.keys, job.head_dim, a.aligned_k);
    const mq_head v = mq_head_at<D>(job.v, sequence.first_key * job.ldv + mq_head_of(job, kv_head, job.value_dim),
                                    job.ldv, sequence.keys, job.value_dim, a.aligned_v);
    const mq_head to = mq_head_at<D>(job.out, sequence.first * job.ldo + head * job.value_dim, job.ldo,
                                     sequence.queries, job.value_dim, a.aligned_out);
    const seen_rows seen = seen_of(job, sequence, own);
    softmax_rows rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    for (int r = 0; r < 2 && job.sinks != NULL; r++) {
        rows.max[r] = job.sinks[head];
        rows.sum[r] = threadIdx.x % 4 == 0 ? 1.0f : 0.0f;       /* once for the lanes that share a row */
    }
    float out[Dim / 8][4] = {}, scores[shape::octets][4], factors[2];
    mq_rows<D, Dim> queries;
    mq_rows_load<D, Dim>(&queries, q, own);
    int64_t start = mq_first_seen(job, sequence, first) / shape::rows * shape::rows;
    mq_stage<D, Dim>(tiles, k, start);
    mq_stage<D, Dim>(tiles + shape::words, v, start);
    mq_copy_close();
    for (int turn = 0; start < end; start += shape::rows, turn ^= 1) {
        const word *tile = tiles + turn * 2 * shape::words;
        word *const next = tiles + (turn ^ 1) * 2 * shape::words;
        mq_copy_wait();
        __syncthreads();        /* this tile is there, and nobody reads the one before it any more */
        if (start + shape::rows < end) {
            mq_stage<D, Dim>(next, k, start + shape::rows);
            mq_stage<D, Dim>(next + shape::words, v, start + shape::rows);
        }
        mq_copy_close();
        if (start >= seen.highest || start + shape::rows <= seen.lowest) continue;      /* a whole warp */
        mq_times_rows<D, Dim>(scores, queries, tile);
        hide<shape::octets>(job, sequence, seen, start, scores);
        weigh<shape::octets, Dim / 8>(&rows, scores, out);
        mq_add_rows<D, Dim>(out, scores, tile + shape::words);
    }
    finish(a, &rows, head * job.rows + sequence.first, own, sequence.queries, factors);
    mq_store_rows<D, Dim>(to, own, out, factors);
}

/* ---- launchers ---- */

typedef void (*attention_kernel)(mq_attention);

#define OF_SIZES(dtype) {attention<dtype, 64>, attention<dtype, 128>, attention<dtype, 256>}
static const attention_kernel kernels[MQ_ACTIVATION_DTYPES][3] = {OF_SIZES(MQ_F32), OF_SIZES(MQ_BF16)};

int mq_cuda_check_attention(const mq_cuda_attention_job *job, mq_error *err)
{
    if (job->dtype != MQ_F32 && job->dtype != MQ_BF16)
        return mq_fail(err, MQ_ERR_TYPE, "attention: expected float32 or bfloat16");
    if (job->kv_heads < 1 || job->heads % job->kv_heads != 0 || job->head_dim < 1 || job->value_dim < 1 ||
        MQ_MAX(job->head_dim, job->value_dim) > MQ_MOST_HEAD_DIM)
        return mq_fail(err, MQ_ERR_VALUE, "attention: %lld heads of %lld on %lld of %lld; expected whole groups, and "
                       "up to %d columns", (long long)job->heads, (long long)job->head_dim, (long long)job->kv_heads,
                       (long long)job->value_dim, (int)MQ_MOST_HEAD_DIM);
    if (job->rows < 0 || job->sequences < 0 || job->longest < 0 || job->window < 0 || job->chunk < 0 ||
        (job->starts == NULL && job->sequences > 0))
        return mq_fail(err, MQ_ERR_VALUE, "attention: %lld sequences of up to %lld rows, window %lld; needs starts",
                       (long long)job->sequences, (long long)job->longest, (long long)job->window);
    return MQ_OK;
}

/* Whether rows of a head begin at multiples of 16 bytes. */
static bool is_aligned(const mq_cuda_attention_job *job, const void *base, int64_t ld, int64_t head)
{
    const int64_t size = job->dtype == MQ_F32 ? 4 : 2;
    return (uintptr_t)base % 16 == 0 && ld * size % 16 == 0 && head * size % 16 == 0;
}

mq_attention mq_attention_of(const mq_cuda_attention_job *job)
{
    mq_attention a = {};
    const bool is_by_head = job->head_tokens != 0;
    a.job = *job;
    a.blocks = MQ_CEIL_DIV(job->longest, (int64_t)MQ_BLOCK_ROWS);
    a.aligned_q = is_aligned(job, job->q, job->ldq, job->head_dim);
    a.aligned_k = is_aligned(job, job->k, job->ldk, is_by_head ? job->head_tokens * job->head_dim : job->head_dim);
    a.aligned_v = is_aligned(job, job->v, job->ldv, is_by_head ? job->head_tokens * job->value_dim : job->value_dim);
    a.aligned_out = is_aligned(job, job->out, job->ldo, job->value_dim);
    return a;
}

static bool is_step(const mq_cuda_attention_job *job)
{
    return job->longest == 1 && job->maxima == NULL;
}

size_t mq_cuda_attention_workspace(const mq_cuda_attention_job *job)
{
    return is_step(job) ? mq_attention_step_nbytes(job) : 0;
}

int mq_cuda_attention(const mq_cuda_attention_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_attention(job, err);
    if (rc == MQ_OK)
        rc = mq_cuda_check_workspace(job->workspace, job->workspace_nbytes, mq_cuda_attention_workspace(job),
                                     "attention", err);
    if (rc != MQ_OK || job->rows == 0 || job->sequences == 0 || job->heads == 0) return rc;
    const mq_attention a = mq_attention_of(job);
    if (is_step(job)) return mq_cuda_attention_step(&a, stream, err);
    const mq_launch launch = {"attention", mq_grid_of_blocks(job->sequences * job->heads * a.blocks), stream, err};
    return mq_launch_kernel(&launch, kernels[job->dtype][mq_attention_size(job)], a);
}
