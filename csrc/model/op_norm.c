#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

typedef struct norm_job {
    char *out;
    const char *in;
    const float *weight;
    float eps;
    int64_t width;
    size_t stride;
    const mq_typed_row_ops *kernels;
} norm_job;

static void norm_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const norm_job *job = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        job->kernels->rmsnorm(job->out + (size_t)i * job->stride, job->in + (size_t)i * job->stride, job->weight,
                              job->width, job->eps);
}

void mq_rmsnorm_forward(void *out, const void *in, const float *weight, double eps, const mq_row_sizes *sizes)
{
    norm_job job = {
        .out = out, .in = in, .weight = weight, .eps = (float)eps, .width = sizes->width,
        .stride = (size_t)sizes->width * mq_dtype_size(sizes->dtype), .kernels = mq_row_ops_of(sizes->dtype),
    };
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), norm_rows, &job);
}

typedef struct norm_backward_job {
    float *d_in;
    const float *d_out;
    int accumulate;
    const norm_job *forward;
} norm_backward_job;

static void norm_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const norm_backward_job *job = argument;
    const norm_job *forward = job->forward;
    const int64_t width = forward->width;
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        forward->kernels->rmsnorm_backward(job->d_in + i * width, job->d_out + i * width,
                                           forward->in + (size_t)i * forward->stride, forward->weight, width,
                                           forward->eps, job->accumulate);
}

void mq_rmsnorm_backward(float *d_in, const float *d_out, const void *in, const float *weight, double eps,
                         int accumulate, const mq_row_sizes *sizes)
{
    norm_job forward = {
        .in = in, .weight = weight, .eps = (float)eps, .width = sizes->width,
        .stride = (size_t)sizes->width * mq_dtype_size(sizes->dtype), .kernels = mq_row_ops_of(sizes->dtype),
    };
    norm_backward_job job = {.d_in = d_in, .d_out = d_out, .accumulate = accumulate, .forward = &forward};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), norm_backward_rows, &job);
}

void mq_rmsnorm_weight_backward(float *d_weight, const float *d_out, const void *in, double eps,
                                const mq_row_sizes *sizes)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(sizes->dtype);
    const size_t stride = (size_t)sizes->width * mq_dtype_size(sizes->dtype);
    for (int64_t i = 0; i < sizes->rows; i++)
        kernels->rmsnorm_weight_backward(d_weight, d_out + i * sizes->width, (const char *)in + (size_t)i * stride,
                                         sizes->width, (float)eps);
}
