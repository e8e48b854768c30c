#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

/* An operation on pairs of rows, in place in the first. */
typedef struct pair_job {
    char *x;
    const char *y;
    size_t stride;
    int64_t width;
    const mq_typed_row_ops *kernels;
} pair_job;

static void swiglu_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const pair_job *job = argument;
    char *gate = job->x + (size_t)begin * job->stride;
    (void)worker;
    job->kernels->silu_mul(gate, gate, job->y + (size_t)begin * job->stride, (end - begin) * job->width);
}

static void add_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const pair_job *job = argument;
    size_t at = (size_t)begin * job->stride;
    (void)worker;
    job->kernels->add(job->x + at, job->y + at, (end - begin) * job->width);
}

static void run_pairs(void *x, const void *y, const mq_row_sizes *sizes, mq_range_fn fn)
{
    pair_job job = {.x = x, .y = y, .width = sizes->width, .kernels = mq_row_ops_of(sizes->dtype),
                    .stride = (size_t)sizes->width * mq_dtype_size(sizes->dtype)};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), fn, &job);
}

void mq_swiglu_forward(void *gate, const void *up, const mq_row_sizes *sizes)
{
    run_pairs(gate, up, sizes, swiglu_rows);
}

void mq_add_forward(void *x, const void *y, const mq_row_sizes *sizes)
{
    run_pairs(x, y, sizes, add_rows);
}

typedef struct swiglu_backward_job {
    float *d_gate, *d_up;
    const char *gate, *up;
    const mq_row_sizes *sizes;
} swiglu_backward_job;

static void swiglu_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const swiglu_backward_job *job = argument;
    const int64_t at = begin * job->sizes->width;
    const size_t bytes = (size_t)at * mq_dtype_size(job->sizes->dtype);
    (void)worker;
    mq_row_ops_of(job->sizes->dtype)->silu_mul_backward(job->d_gate + at, job->d_up + at, job->gate + bytes,
                                                        job->up + bytes, (end - begin) * job->sizes->width);
}

void mq_swiglu_backward(float *d_gate, float *d_up, const void *gate, const void *up, const mq_row_sizes *sizes)
{
    swiglu_backward_job job = {.d_gate = d_gate, .d_up = d_up, .gate = gate, .up = up, .sizes = sizes};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), swiglu_backward_rows, &job);
}
