/* Rotary embedding of the two halves of each head (Su et al. 2021), or of pairs that become two halves. The way back is
 * the rotation by minus the angle. */
#include "rows.cuh"

/* ---- kernel ---- */

typedef struct rope_args {
    mq_view x;
    int64_t rows, heads, head_dim, half, groups;        /* groups of a half */
    const float *cosine, *sine;
    const int32_t *positions;
    int64_t first, offset;
    float sign;
} rope_args;

static void describe(const rope_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld heads of %lld] at %p, %lld columns rotated", (long long)a.rows,
             (long long)a.heads, (long long)a.head_dim, a.x.data, (long long)(2 * a.half));
}

template <mq_dtype D>
static __global__ void rope(rope_args a)
{
    const mq_place place = mq_place_of(mq_thread_index(), a.heads * a.groups);
    if (place.row >= a.rows) return;
    const mq_place within = mq_place_of(place.group, a.groups);
    const mq_span span = mq_span_at(place.row, within.group * MQ_GROUP, a.half);
    const int64_t position = a.positions != NULL ? a.positions[place.row] : a.first + place.row;
    const int64_t at = place.row * a.x.ld + within.row * a.head_dim + a.offset + span.col;
    const int64_t angle = position * a.half + span.col;
    float low[MQ_GROUP], high[MQ_GROUP];
    mq_load_group<D>(a.x.data, at, span.count, a.x.aligned, low);
    mq_load_group<D>(a.x.data, at + a.half, span.count, a.x.aligned, high);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= span.count) continue;
        const float c = a.cosine[angle + i], s = a.sign * a.sine[angle + i], x = low[i], y = high[i];
        low[i] = x * c - y * s;
        high[i] = y * c + x * s;
    }
    mq_store_group<D>(a.x.data, at, span.count, a.x.aligned, low);
    mq_store_group<D>(a.x.data, at + a.half, span.count, a.x.aligned, high);
}

enum { MOST_PAIRS = 8 };        /* of a lane */

/* Pairs to halves; with sign -1, the way back, halves to pairs. A warp has a head, all of which it reads before it
 * writes. */
template <mq_dtype D>
static __global__ void rope_pairs(rope_args a)
{
    typedef typename mq_word<D>::type word;
    const int64_t index = (int64_t)blockIdx.x * (MQ_THREADS / MQ_WARP) + threadIdx.x / MQ_WARP;
    const mq_place place = mq_place_of(index, a.heads);
    const int lane = (int)threadIdx.x % MQ_WARP;
    if (place.row >= a.rows) return;            /* a whole warp */
    const int64_t position = a.positions != NULL ? a.positions[place.row] : a.first + place.row;
    word *const x = (word *)a.x.data + place.row * a.x.ld + place.group * a.head_dim + a.offset;
    float low[MOST_PAIRS] = {}, high[MOST_PAIRS] = {};
    for (int k = 0; k < MOST_PAIRS; k++) {
        const int64_t i = k * MQ_WARP + lane;
        if (i >= a.half) continue;
        const float c = a.cosine[position * a.half + i], s = a.sign * a.sine[position * a.half + i];
        const float first = mq_widen<D>(x[a.sign > 0.0f ? 2 * i : i]);
        const float second = mq_widen<D>(x[a.sign > 0.0f ? 2 * i + 1 : i + a.half]);
        low[k] = first * c - second * s;
        high[k] = second * c + first * s;
    }
    mq_sync_warp();
    for (int k = 0; k < MOST_PAIRS; k++) {
        const int64_t i = k * MQ_WARP + lane;
        if (i >= a.half) continue;
        x[a.sign > 0.0f ? i : 2 * i] = mq_narrow<D>(low[k]);
        x[a.sign > 0.0f ? i + a.half : 2 * i + 1] = mq_narrow<D>(high[k]);
    }
}

/* ---- launchers ---- */

static int run(const mq_cuda_rope_job *job, float sign, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    if (job->heads < 1 || job->x.cols % job->heads != 0 || job->rotary < 0 || job->rotary % 2 != 0 ||
        job->offset < 0 || job->offset + job->rotary > job->x.cols / job->heads ||
        (job->interleaved && job->rotary > 2 * MOST_PAIRS * MQ_WARP))
        return mq_fail(err, MQ_ERR_VALUE, "rope: %lld columns in %lld heads, of which %lld are rotated from %lld on",
                       (long long)job->x.cols, (long long)job->heads, (long long)job->rotary, (long long)job->offset);
    if (job->rotary == 0) return MQ_OK;
    rope_args a = {mq_view_of(&job->x), job->x.rows, job->heads, job->x.cols / job->heads, job->rotary / 2, 0,
                   job->cosine, job->sine, job->positions, job->first, job->offset, sign};
    a.groups = mq_groups_of(a.half);
    a.x.aligned = a.x.aligned && a.head_dim % MQ_GROUP == 0 && a.half % MQ_GROUP == 0 && a.offset % MQ_GROUP == 0;
    const bool is_f32 = job->x.dtype == MQ_F32;
    const int64_t warps = MQ_CEIL_DIV(a.rows * a.heads, (int64_t)(MQ_THREADS / MQ_WARP));
    const mq_launch pairs = {"rope_pairs", mq_grid_of_blocks(warps), stream, err};
    if (job->interleaved) return mq_launch_kernel(&pairs, is_f32 ? rope_pairs<MQ_F32> : rope_pairs<MQ_BF16>, a);
    const mq_launch launch = {"rope", mq_grid_for(a.rows * a.heads * a.groups), stream, err};
    return mq_launch_kernel(&launch, is_f32 ? rope<MQ_F32> : rope<MQ_BF16>, a);
}

int mq_cuda_rope(const mq_cuda_rope_job *job, void *stream, mq_error *err)
{
    return run(job, 1.0f, stream, err);
}

int mq_cuda_rope_backward(const mq_cuda_rope_job *job, void *stream, mq_error *err)
{
    if (job->x.dtype != MQ_F32) return mq_fail(err, MQ_ERR_TYPE, "rope_backward: gradients are float32");
    return run(job, -1.0f, stream, err);
}
