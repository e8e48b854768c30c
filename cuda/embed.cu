/* The gradient of an embedding: rows of one token are added in their order, by the thread block of the first of them,
 * which goes through all that follow. So no sum depends on who comes first. */
#include "rows.cuh"

/* ---- kernel ---- */

typedef struct embed_args {
    mq_view d_weight, d_out;
    const int32_t *ids;
    int64_t rows, width;
} embed_args;

static void describe(const embed_args &a, char *out, size_t size)
{
    snprintf(out, size, "d_out [%lld, %lld] at %p, d_weight at %p", (long long)a.rows, (long long)a.width, a.d_out.data,
             a.d_weight.data);
}

MQ_DEVICE void add_row(const embed_args &a, int64_t row, int64_t to)
{
    float x[MQ_GROUP], sum[MQ_GROUP];
    for (int64_t col = (int64_t)threadIdx.x * MQ_GROUP; col < a.width; col += MQ_THREADS * MQ_GROUP) {
        const mq_span from = mq_span_at(row, col, a.width), span = mq_span_at(to, col, a.width);
        mq_load_span<MQ_F32>(a.d_out, from, x);
        mq_load_span<MQ_F32>(a.d_weight, span, sum);
        for (int i = 0; i < MQ_GROUP; i++) sum[i] += x[i];
        mq_store_span<MQ_F32>(a.d_weight, span, sum);
    }
}

/* A bit for each lane of the warp. */
MQ_DEVICE uint32_t bits_of_lanes(bool is_set)
{
    uint32_t bits = is_set ? 1u << (threadIdx.x % MQ_WARP) : 0u;
    for (int offset = 1; offset < MQ_WARP; offset <<= 1) bits |= __shfl_xor_sync(0xffffffffu, bits, offset);
    return bits;
}

static __global__ void embed_backward(embed_args a)
{
    enum { WORDS = MQ_THREADS / MQ_WARP };
    MQ_SHARED(uint32_t, matches, 2 * WORDS);
    const int64_t own = blockIdx.x;
    const int32_t id = a.ids[own];
    float earlier = 0.0f;
    for (int64_t i = threadIdx.x; i < own && earlier == 0.0f; i += MQ_THREADS) earlier = a.ids[i] == id ? 1.0f : 0.0f;
    if (mq_block_sum(earlier, 0) != 0.0f) return;
    uint32_t *words = matches;
    for (int64_t first = own; first < a.rows; first += MQ_THREADS) {
        const int64_t row = first + threadIdx.x;
        const uint32_t bits = bits_of_lanes(row < a.rows && a.ids[row] == id);
        if (threadIdx.x % MQ_WARP == 0) words[threadIdx.x / MQ_WARP] = bits;
        __syncthreads();
        for (int i = 0; i < WORDS; i++)
            for (int bit = 0; words[i] != 0 && bit < MQ_WARP; bit++)
                if (words[i] >> bit & 1u) add_row(a, first + i * MQ_WARP + bit, id);
        words = words == matches ? matches + WORDS : matches;      /* the next ones while others still read these */
    }
}

/* ---- launcher ---- */

int mq_cuda_embed_backward(const mq_cuda_embed_job *job, void *stream, mq_error *err)
{
    if (job->rows < 0 || job->width < 0)
        return mq_fail(err, MQ_ERR_VALUE, "embed_backward: [%lld, %lld]", (long long)job->rows, (long long)job->width);
    if (job->rows == 0 || job->width == 0) return MQ_OK;
    const embed_args a = {mq_view_of_rows(job->d_weight, job->width), mq_view_of_rows(job->d_out, job->width), job->ids,
                          job->rows, job->width};
    const mq_launch launch = {"embed_backward", mq_grid_of_blocks(a.rows), stream, err};
    return mq_launch_kernel(&launch, embed_backward, a);
}
