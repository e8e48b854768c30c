/* The gradients of attention (Dao et al. 2022, algorithm 4): with P = softmax(S), S = scale * Q K^T, O = P V:
 * dV = P^T dO, dP = dO V^T, dS = P * (dP - D), D = sum of dO * O per query, dQ = scale * dS K, dK = scale * dS^T Q.
 * Probabilities are computed again, tile by tile. One kernel has blocks of queries and adds up dQ; two have blocks of
 * keys, go over the heads and queries that read them, in order, and add up dK and dV: so there are no atomic sums.
 * A sink is a score with no value: of its probability p, the gradient is the sum of -p * D. */
#include "attention.cuh"

/* ---- kernels ---- */

/* means = D, and d_out as tensor cores take it. A warp has one head of one row. */
template <mq_dtype D>
static __global__ void attention_means(mq_attention a)
{
    const mq_cuda_attention_job &job = a.job;
    const int64_t index = (int64_t)blockIdx.x * (MQ_THREADS / MQ_WARP) + threadIdx.x / MQ_WARP;
    const mq_place place = mq_place_of(index, job.heads);
    if (place.row >= job.rows) return;
    const mq_head out = mq_head_at<D>(job.out, place.group * job.value_dim, job.ldo, job.rows, job.value_dim, false);
    float product = 0.0f;
    for (int col = (int)threadIdx.x % MQ_WARP; col < job.value_dim; col += MQ_WARP) {
        const float d_out = a.gradient.d_out[index * job.value_dim + col];
        product = fmaf(d_out, mq_head_element<D>(out, place.row, col), product);
        if constexpr (D == MQ_BF16)
            ((uint16_t *)(uintptr_t)a.d_out)[index * job.value_dim + col] = mq_narrow<D>(d_out);
    }
    product = mq_lanes_sum(product, MQ_WARP);
    if (threadIdx.x % MQ_WARP == 0) a.means[place.group * job.rows + place.row] = product;
}

/* What the softmax of a query was. */
typedef struct query_numbers {
    float max, factor, mean;
} query_numbers;

MQ_DEVICE query_numbers numbers_of(const mq_attention &a, int64_t at, bool exists)
{
    query_numbers numbers = {0.0f, 0.0f, 0.0f};
    if (!exists) return numbers;
    numbers.max = a.job.maxima[at];
    numbers.factor = a.job.factors[at];
    numbers.mean = a.means[at];
    return numbers;
}

MQ_DEVICE bool is_seen(const mq_cuda_attention_job &job, const mq_sequence &sequence, int64_t query, int64_t key)
{
    return query < sequence.queries && key >= mq_first_seen(job, sequence, query) &&
           key < mq_last_seen(sequence, query) && key < sequence.keys &&
           (job.key_mask == NULL || job.key_mask[sequence.first_key + key] != 0);
}

/* P of a product. */
MQ_DEVICE float probability(const mq_attention &a, const query_numbers &of, float product, bool seen, float *slope)
{
    const float score = mq_score_of(a.job, product, slope);
    return seen ? of.factor * mq_exp(score - of.max) : 0.0f;
}

/* The heads of one sequence that kernels read. */
typedef struct back_heads {
    mq_head q, k, v, d_out;
} back_heads;

template <mq_dtype D>
MQ_DEVICE back_heads heads_of(const mq_attention &a, const mq_sequence &sequence, int64_t head)
{
    const mq_cuda_attention_job &job = a.job;
    const int64_t kv_head = head / (job.heads / job.kv_heads), ld = job.heads * job.value_dim;
    back_heads heads;
    heads.q = mq_head_at<D>(job.q, sequence.first * job.ldq + head * job.head_dim, job.ldq, sequence.queries,
                            job.head_dim, a.aligned_q);
    heads.k = mq_head_at<D>(job.k, sequence.first_key * job.ldk + kv_head * job.head_dim, job.ldk, sequence.keys,
                            job.head_dim, a.aligned_k);
    heads.v = mq_head_at<D>(job.v, sequence.first_key * job.ldv + kv_head * job.value_dim, job.ldv, sequence.keys,
                            job.value_dim, a.aligned_v);
    heads.d_out = mq_head_at<D>(a.d_out, sequence.first * ld + head * job.value_dim, ld, sequence.queries,
                                job.value_dim, a.aligned_out);
    return heads;
}

template <mq_dtype D, int Dim>
static __global__ void attention_d_queries(mq_attention a)
{
    typedef mq_tile<D, Dim> shape;
    typedef typename shape::word word;
    MQ_SHARED(uint4, memory, 4 * shape::words * sizeof(word) / 16);
    word *const tiles = (word *)memory;                 /* keys and values, twice */
    const mq_cuda_attention_job &job = a.job;
    const mq_place of_sequence = mq_place_of((int64_t)blockIdx.x, job.heads * a.blocks);
    const mq_place of_block = mq_place_of(of_sequence.group, job.heads);
    const mq_sequence sequence = mq_sequence_of(job, of_sequence.row);
    const int64_t first = (a.blocks - 1 - of_block.row) * MQ_BLOCK_ROWS, head = of_block.group;
    if (first >= sequence.queries) return;
    const int lane = (int)threadIdx.x % MQ_WARP;
    const int64_t own = first + (int64_t)threadIdx.x / MQ_WARP * MQ_WARP_ROWS;
    const int64_t end = mq_last_seen(sequence, MQ_MIN(first + MQ_BLOCK_ROWS, sequence.queries) - 1);
    const back_heads heads = heads_of<D>(a, sequence, head);
    query_numbers numbers[2];
    for (int r = 0; r < 2; r++) {
        const int64_t query = own + lane / 4 + 8 * r;
        numbers[r] = numbers_of(a, head * job.rows + sequence.first + query, query < sequence.queries);
    }
    mq_rows<D, Dim> queries, changes;
    mq_rows_load<D, Dim>(&queries, heads.q, own);
    mq_rows_load<D, Dim>(&changes, heads.d_out, own);
    float sums[Dim / 8][4] = {}, p[shape::octets][4], d_p[shape::octets][4];
    int64_t start = mq_first_seen(job, sequence, first) / shape::rows * shape::rows;
    mq_stage<D, Dim>(tiles, heads.k, start);
    mq_stage<D, Dim>(tiles + shape::words, heads.v, start);
    mq_copy_close();
    for (int turn = 0; start < end; start += shape::rows, turn ^= 1) {
        const word *tile = tiles + turn * 2 * shape::words;
        word *const next = tiles + (turn ^ 1) * 2 * shape::words;
        mq_copy_wait();
        __syncthreads();        /* this tile is there, and nobody reads the one before it any more */
        if (start + shape::rows < end) {
            mq_stage<D, Dim>(next, heads.k, start + shape::rows);
            mq_stage<D, Dim>(next + shape::words, heads.v, start + shape::rows);
        }
        mq_copy_close();
        /* keys behind all of the warp's queries, or before all that they see */
        if (start >= own + MQ_WARP_ROWS || start + shape::rows <= mq_first_seen(job, sequence, own)) continue;
        mq_times_rows<D, Dim>(p, queries, tile);
        mq_times_rows<D, Dim>(d_p, changes, tile + shape::words);
        MQ_UNROLL
        for (int n = 0; n < shape::octets; n++)
            for (int i = 0; i < 4; i++) {
                const int64_t query = own + lane / 4 + i / 2 * 8, key = start + 8 * n + 2 * (lane % 4) + i % 2;
                const query_numbers &of = numbers[i / 2];
                float slope;
                p[n][i] = probability(a, of, p[n][i], is_seen(job, sequence, query, key), &slope);
                p[n][i] *= (d_p[n][i] - of.mean) * slope;
            }
        mq_add_rows<D, Dim>(sums, p, tile);
    }
    const int64_t ld = job.heads * job.head_dim;
    const float factors[2] = {job.scale, job.scale};
    const mq_head to = mq_head_at<MQ_F32>(a.gradient.d_q, sequence.first * ld + head * job.head_dim, ld,
                                          sequence.queries, job.head_dim, false);
    mq_store_rows<MQ_F32, Dim>(to, own, sums, factors);
}

/* dV, or dK. Scores are computed the other way round: rows are keys, columns are queries. */
template <mq_dtype D, int Dim, bool IsValues>
static __global__ void attention_d_keys(mq_attention a)
{
    typedef mq_tile<D, Dim> shape;
    typedef typename shape::word word;
    MQ_SHARED(uint4, memory, 4 * shape::words * sizeof(word) / 16);
    word *const tiles = (word *)memory;                 /* queries and d_out, twice */
    const mq_cuda_attention_job &job = a.job;
    const mq_place of_sequence = mq_place_of((int64_t)blockIdx.x, job.kv_heads * a.blocks);
    const mq_place of_block = mq_place_of(of_sequence.group, job.kv_heads);
    const mq_sequence sequence = mq_sequence_of(job, of_sequence.row);
    const int64_t first = of_block.row * MQ_BLOCK_ROWS, group = job.heads / job.kv_heads;
    if (first >= sequence.keys) return;
    const int lane = (int)threadIdx.x % MQ_WARP;
    const int64_t own = first + (int64_t)threadIdx.x / MQ_WARP * MQ_WARP_ROWS;
    /* The queries that see any of these keys, in whole tiles, for one head after the other. */
    const int64_t low = first / shape::rows * shape::rows;
    const int64_t high = job.window > 0 ? MQ_MIN(first + MQ_BLOCK_ROWS - 1 + job.window, sequence.queries)
                                        : sequence.queries;
    const int64_t per_head = MQ_CEIL_DIV(high - low, (int64_t)shape::rows), count = group * per_head;
    back_heads heads = heads_of<D>(a, sequence, of_block.group * group);
    mq_rows<D, Dim> keys, values;
    mq_rows_load<D, Dim>(&keys, heads.k, own);
    if constexpr (!IsValues) mq_rows_load<D, Dim>(&values, heads.v, own);
    float sums[Dim / 8][4] = {}, p[shape::octets][4], d_p[shape::octets][4];
    mq_stage<D, Dim>(tiles, heads.q, low);
    mq_stage<D, Dim>(tiles + shape::words, heads.d_out, low);
    mq_copy_close();
    for (int64_t i = 0; i < count; i++) {
        const mq_place place = mq_place_of(i, per_head), coming = mq_place_of(i + 1, per_head);
        const int64_t start = low + place.group * shape::rows, head = of_block.group * group + place.row;
        const word *tile = tiles + i % 2 * 2 * shape::words;
        word *const next = tiles + (i + 1) % 2 * 2 * shape::words;
        mq_copy_wait();
        __syncthreads();        /* this tile is there, and nobody reads the one before it any more */
        if (i + 1 < count) {
            heads = heads_of<D>(a, sequence, of_block.group * group + coming.row);
            mq_stage<D, Dim>(next, heads.q, low + coming.group * shape::rows);
            mq_stage<D, Dim>(next + shape::words, heads.d_out, low + coming.group * shape::rows);
        }
        mq_copy_close();
        /* queries before all of the warp's keys, or so far behind that they see none of them */
        if (start + shape::rows <= own || mq_first_seen(job, sequence, start) >= own + MQ_WARP_ROWS) continue;
        mq_times_rows<D, Dim>(p, keys, tile);
        if constexpr (!IsValues) mq_times_rows<D, Dim>(d_p, values, tile + shape::words);
        MQ_UNROLL
        for (int n = 0; n < shape::octets; n++)
            for (int j = 0; j < 2; j++) {
                const int64_t query = start + 8 * n + 2 * (lane % 4) + j, key = own + lane / 4;
                const query_numbers of = numbers_of(a, head * job.rows + sequence.first + query,
                                                    query < sequence.queries);
                for (int r = j; r < 4; r += 2) {
                    float slope;
                    p[n][r] = probability(a, of, p[n][r], is_seen(job, sequence, query, key + r / 2 * 8), &slope);
                    if constexpr (!IsValues) p[n][r] *= (d_p[n][r] - of.mean) * slope;
                }
            }
        mq_add_rows<D, Dim>(sums, p, IsValues ? tile + shape::words : tile);
    }
    const int64_t dim = IsValues ? job.value_dim : job.head_dim, ld = job.kv_heads * dim;
    const float factors[2] = {IsValues ? 1.0f : job.scale, IsValues ? 1.0f : job.scale};
    const mq_head to = mq_head_at<MQ_F32>(IsValues ? a.gradient.d_v : a.gradient.d_k,
                                          sequence.first_key * ld + of_block.group * dim, ld, sequence.keys, dim,
                                          false);
    mq_store_rows<MQ_F32, Dim>(to, own, sums, factors);
}

/* Thread block: one head. */
static __global__ void attention_d_sinks(mq_attention a)
{
    const float sink = a.job.sinks[blockIdx.x];
    double sum = 0.0;
    for (int64_t row = threadIdx.x; row < a.job.rows; row += MQ_THREADS) {
        const int64_t at = blockIdx.x * a.job.rows + row;
        sum -= (double)(mq_exp(sink - a.job.maxima[at]) * a.job.factors[at] * a.means[at]);
    }
    sum = mq_block_sum(sum, 0);
    if (threadIdx.x == 0) a.gradient.d_sinks[blockIdx.x] += (float)sum;
}

/* ---- launchers ---- */

typedef void (*attention_kernel)(mq_attention);

enum { D_QUERIES, D_VALUES, D_KEYS, KINDS };

#define OF_SIZE(dtype, dim) {attention_d_queries<dtype, dim>, attention_d_keys<dtype, dim, true>, \
                             attention_d_keys<dtype, dim, false>}
#define OF_SIZES(dtype) {OF_SIZE(dtype, 64), OF_SIZE(dtype, 128), OF_SIZE(dtype, 256)}
static const attention_kernel kernels[MQ_ACTIVATION_DTYPES][3][KINDS] = {OF_SIZES(MQ_F32), OF_SIZES(MQ_BF16)};

static size_t means_nbytes(const mq_cuda_attention_job *job)
{
    return MQ_ROUND_UP((size_t)(job->heads * job->rows) * sizeof(float), (size_t)16);
}

size_t mq_cuda_attention_backward_workspace(const mq_cuda_attention_job *job)
{
    const size_t copies = job->dtype == MQ_BF16 ? (size_t)(job->rows * job->heads * job->value_dim) * 2 : 0;
    return means_nbytes(job) + copies;
}

static int check(const mq_cuda_attention_job *job, const mq_cuda_attention_gradient *gradient, mq_error *err)
{
    int rc = mq_cuda_check_attention(job, err);
    if (rc == MQ_OK && (job->maxima == NULL || job->factors == NULL || job->past != NULL || job->key_starts != NULL ||
                        job->head_tokens != 0 || gradient->d_out == NULL || gradient->d_q == NULL ||
                        gradient->d_k == NULL || gradient->d_v == NULL))
        rc = mq_fail(err, MQ_ERR_VALUE, "attention_backward: needs the forward's maxima and factors and all gradients, "
                     "and has no past, key_starts or head_tokens");
    if (rc == MQ_OK && gradient->d_sinks != NULL && job->sinks == NULL)
        rc = mq_fail(err, MQ_ERR_VALUE, "attention_backward: d_sinks of an attention that has no sinks");
    if (rc != MQ_OK) return rc;
    return mq_cuda_check_workspace(job->workspace, job->workspace_nbytes, mq_cuda_attention_backward_workspace(job),
                                   "attention_backward", err);
}

int mq_cuda_attention_backward(const mq_cuda_attention_job *job, const mq_cuda_attention_gradient *gradient,
                               void *stream, mq_error *err)
{
    static const char *const names[KINDS] = {"attention_d_queries", "attention_d_values", "attention_d_keys"};
    int rc = check(job, gradient, err);
    if (rc != MQ_OK || job->rows == 0 || job->sequences == 0 || job->heads == 0) return rc;
    const bool is_f32 = job->dtype == MQ_F32;
    mq_attention a = mq_attention_of(job);
    a.gradient = *gradient;
    a.means = (float *)job->workspace;
    a.d_out = is_f32 ? (const void *)gradient->d_out : (const char *)job->workspace + means_nbytes(job);
    a.aligned_out = (uintptr_t)a.d_out % 16 == 0 && job->value_dim % (is_f32 ? 4 : 8) == 0;
    const int64_t warps = MQ_CEIL_DIV(job->rows * job->heads, (int64_t)(MQ_THREADS / MQ_WARP));
    const mq_launch means = {"attention_means", mq_grid_of_blocks(warps), stream, err};
    const mq_launch sinks = {"attention_d_sinks", mq_grid_of_blocks(job->heads), stream, err};
    rc = mq_launch_kernel(&means, is_f32 ? attention_means<MQ_F32> : attention_means<MQ_BF16>, a);
    if (rc == MQ_OK && gradient->d_sinks != NULL) rc = mq_launch_kernel(&sinks, attention_d_sinks, a);
    for (int kind = 0; rc == MQ_OK && kind < KINDS; kind++) {
        const int64_t heads = kind == D_QUERIES ? job->heads : job->kv_heads;
        const mq_launch launch = {names[kind], mq_grid_of_blocks(job->sequences * heads * a.blocks), stream, err};
        rc = mq_launch_kernel(&launch, kernels[job->dtype][mq_attention_size(job)][kind], a);
    }
    return rc;
}
