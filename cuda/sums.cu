/* The end of a product whose scales cuBLASLt does not take: integers, and FP8 by rows where there is no such mode. A
 * thread has eight neighbouring elements. */
#include "sums.cuh"

/* ---- kernels ---- */

typedef struct sums_args {
    mq_sums_job job;
    int64_t groups;            /* of MQ_GROUP columns, in a row */
    bool aligned;
} sums_args;

static void describe(const sums_args &a, char *out, size_t size)
{
    char text[128];
    mq_cuda_describe_matrix(&a.job.out, text, sizeof text);
    snprintf(out, size, "out %s, %s sums at %p", text, a.job.is_int ? "int32" : "float32", a.job.sums);
}

template <bool IsInt>
MQ_DEVICE float sum_at(const void *sums, int64_t at)
{
    if constexpr (IsInt) return (float)((const int32_t *)sums)[at];
    else return ((const float *)sums)[at];
}

template <bool IsInt, mq_dtype D>
static __global__ void finish(sums_args a)
{
    typedef typename mq_word<D>::type word;
    const mq_sums_job &job = a.job;
    const int64_t index = mq_thread_index();
    if (index >= job.out.rows * a.groups) return;
    const mq_place place = mq_place_of(index, a.groups);
    const int64_t col = place.group * MQ_GROUP;
    const int count = (int)MQ_MIN(job.out.cols - col, (int64_t)MQ_GROUP);
    const float of_row = job.row_scale != NULL ? job.row_scale[job.row_each ? place.row : 0] : 1.0f;
    float y[MQ_GROUP] = {};
    if (job.beta != 0.0f) mq_load_group<D>(job.out.data, place.row * job.out.ld + col, count, a.aligned, y);
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= count) continue;
        const float of_col = job.col_scale != NULL ? job.col_scale[job.col_each ? col + i : 0] : 1.0f;
        const float sum = job.sums != NULL ? sum_at<IsInt>(job.sums, place.row * job.ld + col + i) : 0.0f;
        float value = sum * (of_row * of_col);
        if (job.bias != NULL) value += mq_widen<D>(((const word *)job.bias)[col + i]);
        y[i] = job.beta != 0.0f ? value + job.beta * y[i] : value;
    }
    mq_store_group<D>(job.out.data, place.row * job.out.ld + col, count, a.aligned, y);
}

/* ---- launcher ---- */

typedef void (*finish_kernel)(sums_args);

#define OF_DTYPES(is_int) {finish<is_int, MQ_F32>, finish<is_int, MQ_BF16>, finish<is_int, MQ_F16>}
static const finish_kernel kernels[2][MQ_FLOAT_DTYPES] = {OF_DTYPES(false), OF_DTYPES(true)};

int mq_sums_finish(const mq_sums_job *job, void *stream, mq_error *err)
{
    if (job->out.rows == 0 || job->out.cols == 0) return MQ_OK;
    const sums_args a = {*job, MQ_CEIL_DIV(job->out.cols, (int64_t)MQ_GROUP), mq_is_aligned(&job->out)};
    const mq_launch launch = {"finish", mq_grid_for(job->out.rows * a.groups), stream, err};
    return mq_launch_kernel(&launch, kernels[job->is_int][job->out.dtype], a);
}
