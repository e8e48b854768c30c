/* Inputs of a product in 8 bits, by the rules of activations' quantizers (scaled.cu, csrc/quant): the same codes. A
 * thread has eight neighbouring elements. */
#include "activations.cuh"

/* ---- kernels ---- */

typedef struct activations_args {
    mq_activations_job job;
    int64_t groups;            /* of MQ_GROUP columns, in a row */
    mq_blocks blocks;
    bool aligned;
} activations_args;

static void describe(const activations_args &a, char *out, size_t size)
{
    char text[128];
    mq_cuda_describe_matrix(&a.job.x, text, sizeof text);
    snprintf(out, size, "x %s, blocks of %lld columns, %s codes at %p, %lld rows", text,
             (long long)a.blocks.block_cols, a.job.is_int ? "int8" : "fp8_e4m3", (void *)a.job.codes,
             (long long)a.job.padded);
}

template <bool IsInt>
MQ_DEVICE mq_scaled_numbers numbers_of(float amax)
{
    if constexpr (IsInt) return mq_scaled_int_numbers(amax, -128.0f, 127.0f);
    else return mq_scaled_fp8_numbers(amax);
}

/* What a code is multiplied by: quantizers divide by an integer's multiplier (mq_scaled_numbers). */
template <bool IsInt>
MQ_DEVICE float scale_of(const mq_scaled_numbers &n)
{
    return IsInt ? 1.0f / n.back : n.back;
}

template <bool IsInt>
MQ_DEVICE uint32_t code_of(float x, const mq_scaled_numbers &n)
{
    if constexpr (IsInt) return mq_encode(x * n.multiplier, MQ_CODEC(INT8));
    else return mq_encode_as<MQ_FMT_FP8_E4M3>(x * n.multiplier);
}

template <bool IsInt, mq_dtype D>
static __global__ void quantize_activations(activations_args a)
{
    const mq_activations_job &job = a.job;
    const int64_t index = mq_thread_index();
    if (index >= job.padded * a.groups) return;
    const mq_place place = mq_place_of(index, a.groups);
    const int64_t col = place.group * MQ_GROUP;
    const bool is_row = place.row < job.x.rows;
    const int count = (int)MQ_MIN(job.x.cols - col, (int64_t)MQ_GROUP);
    mq_walk walk = mq_walk_from(col, &a.blocks);
    mq_scaled_numbers numbers = {};
    float x[MQ_GROUP] = {};
    uint64_t word = 0;
    if (is_row) mq_load_group<D>(job.x.data, place.row * job.x.ld + col, count, a.aligned, x);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= count) continue;
        if (i == 0 || walk.within == 0)
            numbers = numbers_of<IsInt>(is_row ? job.amax[job.one_amax ? 0 : place.row * a.blocks.cols + walk.block]
                                               : 1.0f);
        if (walk.within == 0) job.scales[walk.block * job.padded + place.row] = scale_of<IsInt>(numbers);
        word |= (uint64_t)code_of<IsInt>(x[i], numbers) << (8 * i);
        mq_walk_step(&walk, &a.blocks);
    }
    uint8_t *to = job.codes + place.row * job.x.cols + col;
    if (count == MQ_GROUP && (uintptr_t)to % MQ_GROUP == 0) *(uint64_t *)to = word;
    else for (int i = 0; i < count; i++) to[i] = (uint8_t)(word >> (8 * i));
}

/* ---- launcher ---- */

typedef void (*activations_kernel)(activations_args);

#define OF_DTYPES(is_int) \
    {quantize_activations<is_int, MQ_F32>, quantize_activations<is_int, MQ_BF16>, quantize_activations<is_int, MQ_F16>}
static const activations_kernel kernels[2][MQ_FLOAT_DTYPES] = {OF_DTYPES(false), OF_DTYPES(true)};

int mq_activations_quantize(const mq_activations_job *job, void *stream, mq_error *err)
{
    const activations_args a = {*job, MQ_CEIL_DIV(job->x.cols, (int64_t)MQ_GROUP),
                                mq_blocks_of(&job->x, 1, job->block_cols), mq_is_aligned(&job->x)};
    const mq_launch launch = {"quantize_activations", mq_grid_for(job->padded * a.groups), stream, err};
    return mq_launch_kernel(&launch, kernels[job->is_int][job->x.dtype], a);
}
