/* The gradient of a quantizer: straight through, but zero where rounding clipped (csrc/quant/straight_through.h). */
#include "rotate.cuh"

/* ---- kernel ---- */

typedef struct gradient_args {
    mq_view x, gradient, out;
    int64_t rows, cols, groups;
    mq_blocks blocks;
    const float *amax, *pre_scale, *bias;
    mq_rotation rotation;
} gradient_args;

static void describe(const gradient_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, blocks of [%lld, %lld], %s amax, blocks of %lld columns rotated",
             (long long)a.rows, (long long)a.cols, a.x.data, (long long)a.blocks.block_rows,
             (long long)a.blocks.block_cols, a.amax != NULL ? "with" : "without", (long long)a.rotation.size);
}

/* x as it was rounded: each step rounds to the dtype. */
template <mq_dtype D, bool Rotates>
MQ_DEVICE void prepare(const gradient_args &a, const mq_span &span, float *x)
{
    for (int i = 0; a.pre_scale != NULL && i < MQ_GROUP; i++)
        if (i < span.count) x[i] = mq_round_to<D>(x[i] * a.pre_scale[span.col + i]);
    if constexpr (Rotates) {
        MQ_SHARED(float, exchange, MQ_ROTATE_SHARED);
        mq_rotate(a.rotation, x, exchange);
        for (int i = 0; i < MQ_GROUP; i++) x[i] = mq_round_to<D>(x[i]);
    }
    for (int i = 0; a.bias != NULL && i < MQ_GROUP; i++)
        if (i < span.count) x[i] = mq_round_to<D>(x[i] - a.bias[span.col + i]);
}

/* What was beyond its block's amax has no gradient. */
MQ_DEVICE void mask(const gradient_args &a, const mq_span &span, const float *x, float *gradient)
{
    const int64_t first = mq_place_of(span.row, a.blocks.block_rows).row * a.blocks.cols;
    mq_walk walk = mq_walk_from(span.col, &a.blocks);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= span.count) continue;
        if (!(mq_float_of(mq_magnitude(x[i])) <= a.amax[first + walk.block])) gradient[i] = 0.0f;
        mq_walk_step(&walk, &a.blocks);
    }
}

template <mq_dtype D, bool Rotates>
static __global__ void straight_through(gradient_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float x[MQ_GROUP], gradient[MQ_GROUP];
    mq_load_span<D>(a.x, span, x);
    mq_load_span<D>(a.gradient, span, gradient);
    prepare<D, Rotates>(a, span, x);
    if (a.amax != NULL) mask(a, span, x, gradient);
    if constexpr (Rotates) {        /* Sylvester's matrix is its own transpose */
        MQ_SHARED(float, exchange, MQ_ROTATE_SHARED);
        mq_rotate(a.rotation, gradient, exchange);
    }
    for (int i = 0; a.pre_scale != NULL && i < MQ_GROUP; i++)
        if (i < span.count) gradient[i] *= a.pre_scale[span.col + i];
    mq_store_span<D>(a.out, span, gradient);
}

/* ---- launcher ---- */

typedef void (*gradient_kernel)(gradient_args);

#define OF_DTYPE(dtype) {straight_through<dtype, false>, straight_through<dtype, true>}
static const gradient_kernel kernels[MQ_FLOAT_DTYPES][2] = {OF_DTYPE(MQ_F32), OF_DTYPE(MQ_BF16), OF_DTYPE(MQ_F16)};

int mq_cuda_straight_through(const mq_cuda_gradient_job *job, void *stream, mq_error *err)
{
    gradient_args a = {};
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->gradient, "gradient", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->out, "out", err);
    if (rc == MQ_OK && (job->block_rows < 0 || job->block_cols < 0))
        rc = mq_fail(err, MQ_ERR_VALUE, "straight_through: blocks of negative size");
    if (rc == MQ_OK) rc = mq_cuda_rotation(job->rotate, job->x.cols, &a.rotation, err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    a.x = mq_view_of(&job->x);
    a.gradient = mq_view_of(&job->gradient);
    a.out = mq_view_of(&job->out);
    a.rows = job->x.rows;
    a.cols = job->x.cols;
    a.groups = mq_groups_of(a.cols);
    a.blocks = mq_blocks_of(&job->x, job->block_rows, job->block_cols);
    a.amax = job->amax;
    a.pre_scale = job->pre_scale;
    a.bias = job->bias;
    const mq_launch launch = {"straight_through", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, kernels[job->x.dtype][job->rotate > 1], a);
}
