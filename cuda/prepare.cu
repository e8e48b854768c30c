/* What a quantizer does to activations besides rounding them, csrc/quant/prepare.c: pre_quant_scale, rotation, bias. */
#include "rotate.cuh"

/* ---- kernel ---- */

typedef struct prepare_args {
    mq_view x, y;
    int64_t rows, cols, groups;
    const float *pre_scale, *bias;
    mq_rotation rotation;
    float sign;
} prepare_args;

static void describe(const prepare_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, y at %p, blocks of %lld columns rotated", (long long)a.rows,
             (long long)a.cols, a.x.data, a.y.data, (long long)a.rotation.size);
}

/* Each step rounds to the dtype. */
template <mq_dtype D>
static __global__ void prepare(prepare_args a)
{
    MQ_SHARED(float, exchange, MQ_ROTATE_SHARED);
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float x[MQ_GROUP];
    mq_load_span<D>(a.x, span, x);
    for (int i = 0; a.pre_scale != NULL && i < MQ_GROUP; i++)
        if (i < span.count) x[i] = mq_round_to<D>(x[i] * a.pre_scale[span.col + i]);
    mq_rotate(a.rotation, x, exchange);
    for (int i = 0; a.rotation.size != 0 && i < MQ_GROUP; i++) x[i] = mq_round_to<D>(x[i]);
    for (int i = 0; a.bias != NULL && i < MQ_GROUP; i++)
        if (i < span.count) x[i] += a.sign * a.bias[span.col + i];
    mq_store_span<D>(a.y, span, x);
}

/* ---- launchers ---- */

typedef void (*prepare_kernel)(prepare_args);

static const prepare_kernel kernels[MQ_FLOAT_DTYPES] = {prepare<MQ_F32>, prepare<MQ_BF16>, prepare<MQ_F16>};

int mq_cuda_rotation(int64_t size, int64_t cols, mq_rotation *rotation, mq_error *err)
{
    rotation->size = size;
    rotation->norm = size > 0 ? (float)(1.0 / sqrt((double)size)) : 1.0f;
    const bool is_power = size >= 0 && (size & (size - 1)) == 0;
    if (is_power && size <= MQ_ROTATE_MOST && (size == 0 || cols % size == 0)) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "rotates blocks of %lld columns: expected a power of two up to %d that divides "
                   "%lld, or 0", (long long)size, (int)MQ_ROTATE_MOST, (long long)cols);
}

int mq_cuda_prepare(const mq_cuda_prepare_job *job, void *stream, mq_error *err)
{
    prepare_args a = {};
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->y, "y", err);
    if (rc == MQ_OK) rc = mq_cuda_rotation(job->rotate, job->x.cols, &a.rotation, err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    a.x = mq_view_of(&job->x);
    a.y = mq_view_of(&job->y);
    a.rows = job->x.rows;
    a.cols = job->x.cols;
    a.groups = mq_groups_of(a.cols);
    a.pre_scale = job->pre_scale;
    a.bias = job->bias;
    a.sign = job->sign;
    const mq_launch launch = {"prepare", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, kernels[job->x.dtype], a);
}
