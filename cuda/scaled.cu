/* Fake quantization of activations whose scales are float32 numbers, as mq_quantizer_apply has it (csrc/quant). */
#include "amax.cuh"
#include "rows.cuh"

/* ---- kernels ---- */

typedef struct scaled_args {
    mq_view x, y;
    int64_t rows, cols, groups;
    mq_blocks blocks;
    const float *amax;         /* [blocks]; NULL: a plain cast */
    float low, bound;          /* integers only */
} scaled_args;

static void describe(const scaled_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, blocks of [%lld, %lld], integers from %g to %g", (long long)a.rows,
             (long long)a.cols, a.x.data, (long long)a.blocks.block_rows, (long long)a.blocks.block_cols, (double)a.low,
             (double)a.bound);
}

template <mq_kind Kind>
MQ_DEVICE mq_scaled_numbers numbers_of(const scaled_args &a, int64_t block)
{
    const mq_scaled_numbers cast = {1.0f, 1.0f, 0.0f, 0.0f};
    if (a.amax == NULL) return cast;
    if constexpr (Kind == MQ_KIND_INT) return mq_scaled_int_numbers(a.amax[block], a.low, a.bound);
    else return mq_scaled_fp8_numbers(a.amax[block]);
}

template <mq_kind Kind>
MQ_DEVICE float scaled_element(float x, const mq_scaled_numbers &n)
{
    if constexpr (Kind == MQ_KIND_INT) return scaled_int_element(x, n.multiplier, n.back, n.low, n.high);
    else return mq_decode(mq_encode_as<MQ_FMT_FP8_E4M3>(x * n.multiplier), MQ_CODEC(FP8_E4M3)) * n.back;
}

template <mq_kind Kind, mq_dtype D>
static __global__ void scaled(scaled_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    if (span.count == 0) return;
    const int64_t first = mq_place_of(span.row, a.blocks.block_rows).row * a.blocks.cols;
    mq_walk walk = mq_walk_from(span.col, &a.blocks);
    mq_scaled_numbers numbers = numbers_of<Kind>(a, first + walk.block);
    float x[MQ_GROUP];
    mq_load_span<D>(a.x, span, x);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= span.count) continue;
        if (i > 0 && walk.within == 0) numbers = numbers_of<Kind>(a, first + walk.block);
        x[i] = scaled_element<Kind>(x[i], numbers);
        mq_walk_step(&walk, &a.blocks);
    }
    mq_store_span<D>(a.y, span, x);
}

/* ---- launcher ---- */

typedef void (*scaled_kernel)(scaled_args);

#define OF_DTYPES(kind) {scaled<kind, MQ_F32>, scaled<kind, MQ_BF16>, scaled<kind, MQ_F16>}
static const scaled_kernel kernels[2][MQ_FLOAT_DTYPES] = {OF_DTYPES(MQ_KIND_FLOAT), OF_DTYPES(MQ_KIND_INT)};

static int check(const mq_cuda_scaled_job *job, mq_error *err)
{
    const int is_int = job->kind == MQ_KIND_INT;
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->y, "y", err);
    if (rc != MQ_OK) return rc;
    if (job->kind != MQ_KIND_FLOAT && !is_int)
        return mq_fail(err, MQ_ERR_VALUE, "scaled: a kind of element that is neither float nor integer");
    if (is_int && (job->bits < 2 || job->bits > 8))
        return mq_fail(err, MQ_ERR_VALUE, "scaled: integers of %d bits; expected 2 to 8", job->bits);
    if (job->block_rows < 0 || job->block_cols < 0 || (is_int && job->amax == NULL && !job->dynamic) ||
        (job->dynamic && job->workspace == NULL))
        return mq_fail(err, MQ_ERR_VALUE, "scaled: needs an amax or, where it is dynamic, a workspace");
    return MQ_OK;
}

int mq_cuda_scaled(const mq_cuda_scaled_job *job, void *stream, mq_error *err)
{
    int rc = check(job, err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    scaled_args a = {};
    a.x = mq_view_of(&job->x);
    a.y = mq_view_of(&job->y);
    a.rows = job->x.rows;
    a.cols = job->x.cols;
    a.groups = mq_groups_of(a.cols);
    a.blocks = mq_blocks_of(&job->x, job->block_rows, job->block_cols);
    a.amax = job->dynamic ? job->workspace : job->amax;
    if (job->kind == MQ_KIND_INT) {
        a.bound = (float)((1 << (job->bits - 1 + (job->is_unsigned != 0))) - 1);
        a.low = job->is_unsigned ? 0.0f : job->narrow_range ? -a.bound : -a.bound - 1.0f;
    }
    if (job->dynamic) rc = mq_cuda_amax_blocks(&job->x, &a.blocks, job->workspace, stream, err);
    if (rc != MQ_OK) return rc;
    const mq_launch launch = {"scaled", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, kernels[job->kind == MQ_KIND_INT][job->x.dtype], a);
}
