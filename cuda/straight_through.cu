/* The gradient of a quantizer: straight through, but zero where rounding clipped (csrc/quant/straight_through.h). Not
 * here: rotations, which the CPU's has. */
#include "convert.cuh"

/* ---- kernel ---- */

typedef struct gradient_args {
    const void *x, *gradient;
    void *out;
    int64_t rows, cols, ldx, ldg, ldo;
    int64_t groups;             /* of MQ_GROUP columns, in a row */
    mq_blocks blocks;
    bool aligned_x, aligned_g, aligned_o;
    const float *amax, *pre_scale, *bias;
} gradient_args;

static void describe(const gradient_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, blocks of [%lld, %lld], %s amax", (long long)a.rows, (long long)a.cols,
             a.x, (long long)a.blocks.block_rows, (long long)a.blocks.block_cols, a.amax != NULL ? "with" : "without");
}

/* x of a column as it was rounded: each step rounds to the dtype. */
template <mq_dtype D>
MQ_DEVICE float prepared(const gradient_args &a, float x, int64_t col)
{
    if (a.pre_scale != NULL) x = mq_round_to<D>(x * a.pre_scale[col]);
    if (a.bias != NULL) x = mq_round_to<D>(x - a.bias[col]);
    return x;
}

template <mq_dtype D>
static __global__ void straight_through(gradient_args a)
{
    const int64_t index = mq_thread_index();
    if (index >= a.rows * a.groups) return;
    const mq_place place = mq_place_of(index, a.groups);
    const int64_t col = place.group * MQ_GROUP;
    const int count = (int)MQ_MIN(a.cols - col, (int64_t)MQ_GROUP);
    const int64_t first = mq_place_of(place.row, a.blocks.block_rows).row * a.blocks.cols;
    mq_walk walk = mq_walk_from(col, &a.blocks);
    float x[MQ_GROUP], gradient[MQ_GROUP];
    mq_load_group<D>(a.x, place.row * a.ldx + col, count, a.aligned_x, x);
    mq_load_group<D>(a.gradient, place.row * a.ldg + col, count, a.aligned_g, gradient);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= count) continue;
        const float magnitude = mq_float_of(mq_magnitude(prepared<D>(a, x[i], col + i)));
        if (a.amax != NULL && !(magnitude <= a.amax[first + walk.block])) gradient[i] = 0.0f;
        if (a.pre_scale != NULL) gradient[i] *= a.pre_scale[col + i];
        mq_walk_step(&walk, &a.blocks);
    }
    mq_store_group<D>(a.out, place.row * a.ldo + col, count, a.aligned_o, gradient);
}

/* ---- launcher ---- */

typedef void (*gradient_kernel)(gradient_args);

static const gradient_kernel kernels[MQ_FLOAT_DTYPES] = {straight_through<MQ_F32>, straight_through<MQ_BF16>,
                                                         straight_through<MQ_F16>};

int mq_cuda_straight_through(const mq_cuda_gradient_job *job, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->gradient, "gradient", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->out, "out", err);
    if (rc == MQ_OK && (job->block_rows < 0 || job->block_cols < 0))
        rc = mq_fail(err, MQ_ERR_VALUE, "straight_through: blocks of negative size");
    if (rc != MQ_OK || job->x.rows == 0 || job->x.cols == 0) return rc;
    gradient_args a = {};
    a.x = job->x.data;
    a.gradient = job->gradient.data;
    a.out = job->out.data;
    a.rows = job->x.rows;
    a.cols = job->x.cols;
    a.ldx = job->x.ld;
    a.ldg = job->gradient.ld;
    a.ldo = job->out.ld;
    a.groups = MQ_CEIL_DIV(a.cols, (int64_t)MQ_GROUP);
    a.blocks = mq_blocks_of(&job->x, job->block_rows, job->block_cols);
    a.aligned_x = mq_is_aligned(&job->x);
    a.aligned_g = mq_is_aligned(&job->gradient);
    a.aligned_o = mq_is_aligned(&job->out);
    a.amax = job->amax;
    a.pre_scale = job->pre_scale;
    a.bias = job->bias;
    const mq_launch launch = {"straight_through", mq_grid_for(a.rows * a.groups), stream, err};
    return mq_launch_kernel(&launch, kernels[job->x.dtype], a);
}
