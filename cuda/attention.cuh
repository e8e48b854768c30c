/* What attention's kernels share. A warp has 16 rows (queries, or keys on the way back to them) against tiles of the
 * other side, which the thread block brings into shared memory, the next one while it works on this one. Scores are
 * where tensor cores leave them: lane l of a warp has rows l / 4 and l / 4 + 8, and columns 2 * (l % 4) + {0, 1} of
 * every eight. In float32 the same lanes do the same sums by ordinary arithmetic. */
#ifndef MODELQ_ATTENTION_CUH
#define MODELQ_ATTENTION_CUH

#include "tensor_core.cuh"

enum { MQ_WARP_ROWS = 16, MQ_BLOCK_ROWS = MQ_WARP_ROWS * (MQ_THREADS / MQ_WARP), MQ_MOST_HEAD_DIM = 256 };

/* ---- arguments ---- */

typedef struct mq_attention {
    mq_cuda_attention_job job;
    mq_cuda_attention_gradient gradient;
    int64_t blocks;                 /* of MQ_BLOCK_ROWS, in the longest sequence */
    bool aligned_q, aligned_k, aligned_v, aligned_out;
    const void *d_out;              /* [rows, heads, value_dim] of the job's dtype, of the backward */
    float *means;                   /* [heads, rows] */
} mq_attention;

static inline void describe(const mq_attention &a, char *out, size_t size)
{
    const mq_cuda_attention_job &job = a.job;
    snprintf(out, size, "%lld sequences of up to %lld of %lld rows, %lld of %lld heads of %lld and %lld, q at %p, k %p",
             (long long)job.sequences, (long long)job.longest, (long long)job.rows, (long long)job.heads,
             (long long)job.kv_heads, (long long)job.head_dim, (long long)job.value_dim, job.q, job.k);
}

/* One sequence: where its queries and keys lie, and how many there are. */
typedef struct mq_sequence {
    int64_t first, queries, first_key, keys, past, chunk_first;
} mq_sequence;

MQ_DEVICE mq_sequence mq_sequence_of(const mq_cuda_attention_job &job, int64_t index)
{
    mq_sequence sequence = {};
    sequence.first = job.starts[index];
    sequence.queries = job.starts[index + 1] - sequence.first;
    sequence.first_key = job.key_starts != NULL ? job.key_starts[index] : sequence.first;
    sequence.past = job.past != NULL ? job.past[index] : 0;
    sequence.keys = sequence.past + sequence.queries;
    sequence.chunk_first = job.chunk_first != NULL ? job.chunk_first[index] : 0;
    return sequence;
}

/* The first and one past the last key that a query of the sequence sees: neither is less for a later one. */
MQ_DEVICE int64_t mq_first_seen(const mq_cuda_attention_job &job, const mq_sequence &sequence, int64_t query)
{
    const int64_t position = sequence.past + query, behind = position - sequence.chunk_first;
    const int64_t window = job.window > 0 ? MQ_MAX(position - job.window + 1, (int64_t)0) : 0;
    return job.chunk > 0 && behind >= 0 ? MQ_MAX(window, position - behind % job.chunk) : window;
}

MQ_DEVICE int64_t mq_last_seen(const mq_sequence &sequence, int64_t query)
{
    return sequence.past + query + 1;
}

/* Where a head of keys begins, in elements. */
MQ_DEVICE int64_t mq_head_of(const mq_cuda_attention_job &job, int64_t kv_head, int64_t dim)
{
    return kv_head * (job.head_tokens != 0 ? job.head_tokens * dim : dim);
}

/* A product of a query and a key as it enters the softmax, and how much of the score's gradient reaches it. */
MQ_DEVICE float mq_score_of(const mq_cuda_attention_job &job, float product, float *slope)
{
    const float score = product * job.scale;
    *slope = 1.0f;
    if (job.softcap == 0.0f) return score;
    const float t = tanhf(score / job.softcap);
    *slope = 1.0f - t * t;
    return job.softcap * t;
}

/* A head of some tokens in memory: element (row, col) at base[(row) * ld + col], row < rows, col < dim. */
typedef struct mq_head {
    const void *base;
    int64_t ld, rows;
    int dim;
    bool aligned;
} mq_head;

template <mq_dtype D>
MQ_DEVICE mq_head mq_head_at(const void *base, int64_t offset, int64_t ld, int64_t rows, int64_t dim, bool aligned)
{
    const mq_head head = {(const typename mq_word<D>::type *)base + offset, ld, rows, (int)dim, aligned};
    return head;
}

/* ---- tiles in shared memory ---- */

/* Dim: head_dim and value_dim rounded up. A row is followed by 16 bytes, so that rows begin in different banks. */
template <mq_dtype D, int Dim>
struct mq_tile {
    typedef typename mq_word<D>::type word;
    static constexpr int rows = (D == MQ_BF16 ? 4096 : 2048) / Dim, vector = 16 / (int)sizeof(word);
    static constexpr int stride = Dim + vector, words = rows * stride, octets = rows / 8;
};

/* Rows from `first` on into a tile; what lies behind the head's end becomes zero. */
template <mq_dtype D, int Dim>
MQ_DEVICE void mq_stage(typename mq_word<D>::type *tile, const mq_head &head, int64_t first)
{
    typedef mq_tile<D, Dim> shape;
    enum { ACROSS = Dim / shape::vector };
    for (int i = (int)threadIdx.x; i < shape::rows * ACROSS; i += MQ_THREADS) {
        const int row = i / ACROSS, col = i % ACROSS * shape::vector;
        const int count = first + row < head.rows ? MQ_MAX(MQ_MIN(head.dim - col, (int)shape::vector), 0) : 0;
        const typename shape::word *from = (const typename shape::word *)head.base;
        typename shape::word *to = tile + row * shape::stride + col;
        if (count > 0) from += (first + row) * head.ld + col;
        if (head.aligned) {
            mq_copy_async(to, from, count * (int)sizeof *to);
        } else {
            for (int j = 0; j < shape::vector; j++) to[j] = j < count ? from[j] : (typename shape::word)0;
        }
    }
}

/* ---- rows of a warp ---- */

template <mq_dtype D>
MQ_DEVICE float mq_head_element(const mq_head &head, int64_t row, int col)
{
    if (row >= head.rows || col >= head.dim) return 0.0f;
    return mq_widen<D>(((const typename mq_word<D>::type *)head.base)[row * head.ld + col]);
}

/* The 16 rows from `first` on: in bfloat16 as tensor cores take them, in float32 where they are in memory. */
template <mq_dtype D, int Dim>
struct mq_rows {
    uint32_t parts[Dim / 16][4];
};

template <int Dim>
struct mq_rows<MQ_F32, Dim> {
    mq_head head;
    int64_t first;
};

template <mq_dtype D, int Dim>
MQ_DEVICE void mq_rows_load(mq_rows<D, Dim> *rows, const mq_head &head, int64_t first)
{
    if constexpr (D == MQ_F32) {
        rows->head = head;
        rows->first = first;
    } else {
        const int lane = (int)threadIdx.x % MQ_WARP;
        MQ_UNROLL
        for (int k = 0; k < Dim / 16; k++)
            MQ_UNROLL
            for (int i = 0; i < 4; i++) {
                const int64_t row = first + lane / 4 + i % 2 * 8;
                const int col = 16 * k + 2 * (lane % 4) + i / 2 * 8;
                const float x = mq_head_element<D>(head, row, col), y = mq_head_element<D>(head, row, col + 1);
                rows->parts[k][i] = mq_pair_of(x, y);
            }
    }
}

/* Four columns of a row in float32. */
MQ_DEVICE void mq_load_four(const mq_head &head, int64_t row, int col, float *x)
{
    if (head.aligned && row < head.rows && col + 4 <= head.dim) {
        const uint4 words = *(const uint4 *)((const float *)head.base + row * head.ld + col);
        x[0] = mq_float_of(words.x);
        x[1] = mq_float_of(words.y);
        x[2] = mq_float_of(words.z);
        x[3] = mq_float_of(words.w);
    } else {
        for (int i = 0; i < 4; i++) x[i] = mq_head_element<MQ_F32>(head, row, col + i);
    }
}

/* scores [octets of the tile's rows][4] = rows * tile^T. */
template <mq_dtype D, int Dim>
MQ_DEVICE void mq_times_rows(float (*scores)[4], const mq_rows<D, Dim> &rows, const typename mq_word<D>::type *tile)
{
    typedef mq_tile<D, Dim> shape;
    const int lane = (int)threadIdx.x % MQ_WARP;
    MQ_UNROLL
    for (int n = 0; n < shape::octets; n++)
        for (int i = 0; i < 4; i++) scores[n][i] = 0.0f;
    if constexpr (D == MQ_BF16) {
        const uint16_t *own = tile + (lane / 16 * 8 + lane % 8) * shape::stride + lane / 8 % 2 * 8;
        MQ_UNROLL
        for (int k = 0; k < Dim / 16; k++)
            MQ_UNROLL
            for (int n = 0; n < shape::octets; n += 2) {
                uint32_t parts[4];
                mq_load_matrices<false>(parts, own + n * 8 * shape::stride + 16 * k);
                mq_multiply_add(scores[n], rows.parts[k], parts);
                mq_multiply_add(scores[n + 1], rows.parts[k], parts + 2);
            }
    } else {
        const int64_t row = rows.first + lane / 4;
        MQ_UNROLL_BY(2)
        for (int col = 0; col < Dim; col += 4) {
            float x[2][4];
            mq_load_four(rows.head, row, col, x[0]);
            mq_load_four(rows.head, row + 8, col, x[1]);
            MQ_UNROLL
            for (int n = 0; n < shape::octets; n++)
                for (int i = 0; i < 2; i++) {
                    const float *y = (const float *)tile + (8 * n + 2 * (lane % 4) + i) * shape::stride + col;
                    for (int j = 0; j < 4; j++) {
                        scores[n][i] = fmaf(x[0][j], y[j], scores[n][i]);
                        scores[n][2 + i] = fmaf(x[1][j], y[j], scores[n][2 + i]);
                    }
                }
        }
    }
}

/* sums [Dim / 8][4] += weights * tile; weights [octets of the tile's rows][4], which in bfloat16 are rounded to it. */
template <mq_dtype D, int Dim>
MQ_DEVICE void mq_add_rows(float (*sums)[4], const float (*weights)[4], const typename mq_word<D>::type *tile)
{
    typedef mq_tile<D, Dim> shape;
    const int lane = (int)threadIdx.x % MQ_WARP;
    if constexpr (D == MQ_BF16) {
        const uint16_t *own = tile + (lane / 8 % 2 * 8 + lane % 8) * shape::stride + lane / 16 * 8;
        MQ_UNROLL
        for (int k = 0; k < shape::octets / 2; k++) {
            const float *low = weights[2 * k], *high = weights[2 * k + 1];
            const uint32_t pairs[4] = {mq_pair_of(low[0], low[1]), mq_pair_of(low[2], low[3]),
                                       mq_pair_of(high[0], high[1]), mq_pair_of(high[2], high[3])};
            MQ_UNROLL
            for (int n = 0; n < Dim / 8; n += 2) {
                uint32_t parts[4];
                mq_load_matrices<true>(parts, own + 16 * k * shape::stride + 8 * n);
                mq_multiply_add(sums[n], pairs, parts);
                mq_multiply_add(sums[n + 1], pairs, parts + 2);
            }
        }
    } else {
        MQ_UNROLL
        for (int k = 0; k < shape::octets; k++)
            for (int other = 0; other < 4; other++) {       /* the lanes of a row in turn */
                float w[4];
                for (int i = 0; i < 4; i++) w[i] = mq_exchange(weights[k][i], other);
                const int row = 8 * k + 2 * (lane % 4 ^ other);
                const float *first = (const float *)tile + row * shape::stride + 2 * (lane % 4);
                MQ_UNROLL
                for (int n = 0; n < Dim / 8; n++)
                    for (int i = 0; i < 4; i++) {
                        const float *x = first + 8 * n + i % 2;
                        sums[n][i] = fmaf(w[i / 2 * 2], x[0], sums[n][i]);
                        sums[n][i] = fmaf(w[i / 2 * 2 + 1], x[shape::stride], sums[n][i]);
                    }
            }
    }
}

/* ---- what a warp leaves ---- */

/* x [Dim / 8][4] * factor of the warp's rows, those below `rows`, from `first` on. */
template <mq_dtype D, int Dim>
MQ_DEVICE void mq_store_rows(const mq_head &head, int64_t first, const float (*x)[4], const float *factors)
{
    typedef typename mq_word<D>::type word;
    const int lane = (int)threadIdx.x % MQ_WARP;
    MQ_UNROLL
    for (int n = 0; n < Dim / 8; n++)
        MQ_UNROLL
        for (int i = 0; i < 2; i++) {
            const int64_t row = first + lane / 4 + 8 * i;
            const int col = 8 * n + 2 * (lane % 4);
            if (row >= head.rows) continue;
            word *to = (word *)(uintptr_t)head.base + row * head.ld + col;
            for (int j = 0; j < 2; j++)
                if (col + j < head.dim) to[j] = mq_narrow<D>(x[n][2 * i + j] * factors[i]);
        }
}

/* ---- launchers ---- */

int mq_cuda_check_attention(const mq_cuda_attention_job *job, mq_error *err);
mq_attention mq_attention_of(const mq_cuda_attention_job *job);
int mq_cuda_attention_step(const mq_attention *a, void *stream, mq_error *err);
size_t mq_attention_step_nbytes(const mq_cuda_attention_job *job);

/* 0, 1, 2 for heads of up to 64, 128 and 256. */
static inline int mq_attention_size(const mq_cuda_attention_job *job)
{
    const int64_t dim = MQ_MAX(job->head_dim, job->value_dim);
    return dim <= 64 ? 0 : dim <= 128 ? 1 : 2;
}

#endif
