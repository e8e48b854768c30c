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
