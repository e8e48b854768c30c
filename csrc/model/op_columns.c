/* What linears that were fused into one put out, taken apart, and put together on the way back. */
#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

static void copy_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const mq_columns *it = argument;
    const size_t size = mq_dtype_size(it->dtype);
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        char *to = (char *)it->to + (size_t)(i * it->ld_to) * size;
        memcpy(to, (const char *)it->from + (size_t)(i * it->ld_from) * size, (size_t)it->width * size);
    }
}

void mq_columns_copy(const mq_columns *columns)
{
    mq_columns job = *columns;
    mq_parallel_for(job.rows, mq_row_grain(job.width), copy_rows, &job);
}

static void add_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const mq_columns *it = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float *to = (float *)it->to + i * it->ld_to;
        mq_row_ops_of(MQ_F32)->add(to, (const float *)it->from + i * it->ld_from, it->width);
    }
}

void mq_columns_add(const mq_columns *columns)
{
    mq_columns job = *columns;
    mq_parallel_for(job.rows, mq_row_grain(job.width), add_rows, &job);
}
