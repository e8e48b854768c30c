/* Attention of one query a sequence over keys and values in a cache, which are read once: a thread block has 256 keys
 * and up to eight of the heads that read them; a second kernel puts together what the blocks found, in order (Dao et
 * al. 2023, "Flash-Decoding"). */
#include "attention.cuh"

enum { KEYS = 256, HEADS = MQ_THREADS / MQ_WARP, COLS = MQ_MOST_HEAD_DIM };

/* ---- kernels ---- */

typedef struct step_args {
    mq_attention of;
    int64_t parts, groups;          /* of the keys; of HEADS heads, on one head of keys */
    int key_lanes, value_lanes;     /* threads side by side along a row: powers of two up to a warp's */
    float *found;                   /* [sequences, heads, parts]: largest score, sum, output [value_dim] */
} step_args;

static void describe(const step_args &a, char *out, size_t size)
{
    describe(a.of, out, size);
}

MQ_DEVICE float *part_of(const step_args &a, int64_t sequence, int64_t head, int64_t part)
{
    return a.found + ((sequence * a.of.job.heads + head) * a.parts + part) * (2 + a.of.job.value_dim);
}

/* A group of columns of one of the sequence's keys or values; zeros for a row that is not there. */
template <mq_dtype D>
MQ_DEVICE void load_columns(const mq_head &head, bool exists, int64_t row, int col, float *x)
{
    const int count = exists ? MQ_MAX(MQ_MIN(head.dim - col, (int)MQ_GROUP), 0) : 0;
    mq_load_group<D>(head.base, count > 0 ? row * head.ld + col : 0, count, head.aligned, x);
}

/* scores [HEADS][KEYS] of n keys from `low` on, minus infinity behind them and where they are masked. */
template <mq_dtype D>
MQ_DEVICE void score_keys(const step_args &a, const mq_sequence &sequence, const mq_head &k, int64_t low, int n,
                          int heads, const float *queries, float *scores)
{
    const int lane = (int)threadIdx.x % a.key_lanes, across = MQ_THREADS / a.key_lanes;
    for (int j = (int)threadIdx.x / a.key_lanes; j < KEYS; j += across) {
        float x[MQ_GROUP];
        const uint8_t *mask = a.of.job.key_mask;
        const bool is_seen = j < n && (mask == NULL || mask[sequence.first_key + low + j] != 0);
        load_columns<D>(k, is_seen, low + j, lane * MQ_GROUP, x);
        for (int h = 0; h < heads; h++) {
            float product = 0.0f;
            for (int i = 0; i < MQ_GROUP; i++) product = fmaf(x[i], queries[h * COLS + lane * MQ_GROUP + i], product);
            product = mq_lanes_sum(product, a.key_lanes);
            float slope;
            if (lane == 0) scores[h * KEYS + j] = is_seen ? mq_score_of(a.of.job, product, &slope) : -INFINITY;
        }
    }
}

/* A warp's row of scores becomes probabilities. */
MQ_DEVICE void weigh(float *scores, float *found)
{
    const int lane = (int)threadIdx.x % MQ_WARP;
    const mq_larger larger = {};
    float own[KEYS / MQ_WARP], max = -INFINITY, sum = 0.0f;
    for (int i = 0; i < KEYS / MQ_WARP; i++) {
        own[i] = scores[i * MQ_WARP + lane];
        max = larger(max, own[i]);
    }
    for (int offset = 1; offset < MQ_WARP; offset <<= 1) max = larger(max, mq_exchange(max, offset));
    for (int i = 0; i < KEYS / MQ_WARP; i++) {
        own[i] = mq_exp(own[i] - (max == -INFINITY ? 0.0f : max));
        scores[i * MQ_WARP + lane] = own[i];
        sum += own[i];
    }
    sum = mq_lanes_sum(sum, MQ_WARP);
    if (lane != 0) return;
    found[0] = max;
    found[1] = sum;
}

template <mq_dtype D>
static __global__ void attention_step(step_args a)
{
    MQ_SHARED(float, queries, HEADS * COLS);
    MQ_SHARED(float, scores, HEADS * KEYS);
    MQ_SHARED(float, sums, 2 * HEADS * COLS);
    const mq_cuda_attention_job &job = a.of.job;
    const mq_place of_part = mq_place_of((int64_t)blockIdx.x, a.parts), of_group = mq_place_of(of_part.row, a.groups);
    const mq_place of_head = mq_place_of(of_group.row, job.kv_heads);
    const mq_sequence sequence = mq_sequence_of(job, of_head.row);
    const int64_t members = job.heads / job.kv_heads, first = of_head.group * members + of_group.group * HEADS;
    const int heads = (int)MQ_MIN(members - of_group.group * HEADS, (int64_t)HEADS);
    const int64_t low = MQ_MAX(mq_first_seen(job, sequence, 0), of_part.group * KEYS);
    const int n = (int)(MQ_MIN(sequence.keys, (of_part.group + 1) * KEYS) - low), warp = (int)threadIdx.x / MQ_WARP;
    if (sequence.queries < 1) return;
    if (n <= 0) {
        if ((int)threadIdx.x < heads) part_of(a, of_head.row, first + threadIdx.x, of_part.group)[1] = 0.0f;
        return;
    }
    const mq_head q = mq_head_at<D>(job.q, sequence.first * job.ldq, job.ldq, 1, job.heads * job.head_dim, false);
    const mq_head k = mq_head_at<D>(job.k, sequence.first_key * job.ldk + mq_head_of(job, of_head.group, job.head_dim),
                                    job.ldk, sequence.keys, job.head_dim, a.of.aligned_k);
    const mq_head v = mq_head_at<D>(job.v, sequence.first_key * job.ldv + mq_head_of(job, of_head.group, job.value_dim),
                                    job.ldv, sequence.keys, job.value_dim, a.of.aligned_v);
    for (int i = (int)threadIdx.x; i < heads * COLS; i += MQ_THREADS) {
        const int col = i % COLS, at = (int)((first + i / COLS) * job.head_dim) + col;
        queries[i] = col < job.head_dim ? mq_head_element<D>(q, 0, at) : 0.0f;
    }
    __syncthreads();
    score_keys<D>(a, sequence, k, low, n, heads, queries, scores);
    __syncthreads();
    if (warp < heads) weigh(scores + warp * KEYS, part_of(a, of_head.row, first + warp, of_part.group));
    __syncthreads();
    const int lane = (int)threadIdx.x % a.value_lanes, col = lane * MQ_GROUP;
    float out[HEADS][MQ_GROUP] = {};
    for (int j = (int)threadIdx.x / a.value_lanes; j < n; j += MQ_THREADS / a.value_lanes) {
        float x[MQ_GROUP];
        load_columns<D>(v, true, low + j, col, x);
        MQ_UNROLL
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < MQ_GROUP; i++)
                if (h < heads) out[h][i] = fmaf(scores[h * KEYS + j], x[i], out[h][i]);
    }
    MQ_UNROLL
    for (int h = 0; h < HEADS; h++) {
        float *const own = sums + h % 2 * HEADS * COLS;
        if (h >= heads) break;
        for (int i = 0; i < MQ_GROUP; i++) {
            for (int offset = a.value_lanes; offset < MQ_WARP; offset <<= 1)
                out[h][i] += mq_exchange(out[h][i], offset);
            if ((int)threadIdx.x % MQ_WARP < a.value_lanes) own[warp * COLS + col + i] = out[h][i];
        }
        __syncthreads();
        float total = 0.0f;
        for (int i = 0; (int)threadIdx.x < job.value_dim && i < HEADS; i++) total += own[i * COLS + threadIdx.x];
        if ((int)threadIdx.x < job.value_dim)
            part_of(a, of_head.row, first + h, of_part.group)[2 + threadIdx.x] = total;
    }
}

/* Thread block: one head of one sequence. */
template <mq_dtype D>
static __global__ void attention_fold(step_args a)
{
    const mq_cuda_attention_job &job = a.of.job;
    const mq_place place = mq_place_of((int64_t)blockIdx.x, job.heads);
    const mq_sequence sequence = mq_sequence_of(job, place.row);
    const bool has_sink = job.sinks != NULL;
    float max = has_sink ? job.sinks[place.group] : -INFINITY, sum = 0.0f, out = 0.0f;
    if (sequence.queries < 1 || (int)threadIdx.x >= job.value_dim) return;
    for (int64_t i = 0; i < a.parts; i++) {
        const float *found = part_of(a, place.row, place.group, i);
        if (found[1] != 0.0f) max = mq_larger()(max, found[0]);
    }
    for (int64_t i = 0; i < a.parts; i++) {
        const float *found = part_of(a, place.row, place.group, i);
        if (found[1] == 0.0f) continue;
        const float factor = found[0] == max ? 1.0f : mq_exp(found[0] - max);
        sum += factor * found[1];
        out = fmaf(factor, found[2 + threadIdx.x], out);
    }
    if (has_sink) sum += mq_exp(job.sinks[place.group] - max);
    const int64_t at = sequence.first * job.ldo + place.group * job.value_dim + threadIdx.x;
    ((typename mq_word<D>::type *)job.out)[at] = mq_narrow<D>(sum == 0.0f ? 0.0f : out / sum);
}

/* ---- launchers ---- */

static int64_t parts_of(const mq_cuda_attention_job *job)
{
    return MQ_CEIL_DIV(MQ_MAX(job->longest_keys, job->longest), (int64_t)KEYS);
}

size_t mq_attention_step_nbytes(const mq_cuda_attention_job *job)
{
    return (size_t)(job->sequences * job->heads * parts_of(job) * (2 + job->value_dim)) * sizeof(float);
}

static int lanes_of(int64_t dim)
{
    int lanes = 1;
    while (lanes * MQ_GROUP < dim) lanes *= 2;
    return lanes;
}

int mq_cuda_attention_step(const mq_attention *of, void *stream, mq_error *err)
{
    const mq_cuda_attention_job *job = &of->job;
    const bool is_f32 = job->dtype == MQ_F32;
    step_args a = {*of, parts_of(job), MQ_CEIL_DIV(job->heads / job->kv_heads, (int64_t)HEADS),
                   lanes_of(job->head_dim), lanes_of(job->value_dim), (float *)job->workspace};
    a.of.aligned_k = a.of.aligned_k && job->head_dim % MQ_GROUP == 0;
    a.of.aligned_v = a.of.aligned_v && job->value_dim % MQ_GROUP == 0;
    const int64_t blocks = job->sequences * job->kv_heads * a.groups * a.parts;
    const mq_launch step = {"attention_step", mq_grid_of_blocks(blocks), stream, err};
    const mq_launch fold = {"attention_fold", mq_grid_of_blocks(job->sequences * job->heads), stream, err};
    const int rc = mq_launch_kernel(&step, is_f32 ? attention_step<MQ_F32> : attention_step<MQ_BF16>, a);
    return rc == MQ_OK ? mq_launch_kernel(&fold, is_f32 ? attention_fold<MQ_F32> : attention_fold<MQ_BF16>, a) : rc;
}
