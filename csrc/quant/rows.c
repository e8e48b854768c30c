#include "quant/rows.h"

#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"

int mq_row_buffers_init(mq_row_buffers *buffers, const size_t *nbytes, int count, mq_error *err)
{
    size_t part = 0;
    for (int i = 0; i < MQ_ROW_BUFFERS; i++) {
        buffers->offset[i] = part;
        if (i < count) part += MQ_ROUND_UP(nbytes[i], (size_t)MQ_ALIGNMENT);
    }
    buffers->offset[MQ_ROW_BUFFERS] = part;
    buffers->memory = mq_alloc_array(MQ_POOL_LIMIT, part);
    return buffers->memory != NULL ? MQ_OK : mq_fail_memory(err, "row buffers", part);
}

void mq_row_buffers_free(mq_row_buffers *buffers)
{
    mq_free(buffers->memory);
    buffers->memory = NULL;
}

void *mq_row_buffers_get(const mq_row_buffers *buffers, int worker, int index)
{
    return buffers->memory + (size_t)worker * buffers->offset[MQ_ROW_BUFFERS] + buffers->offset[index];
}

/* Tensors in a mapped file may start at any byte. */
static int is_direct(const mq_tensor *x)
{
    return (x->stride[1] == 1 || x->shape[1] <= 1) && (uintptr_t)x->data % mq_dtype_size(x->dtype) == 0;
}

size_t mq_row_scratch_bytes(const mq_tensor *x)
{
    return is_direct(x) ? 0 : (size_t)x->shape[1] * mq_dtype_size(x->dtype);
}

const void *mq_row_contiguous(const mq_tensor *x, int64_t row, void *scratch)
{
    const int64_t size = (int64_t)mq_dtype_size(x->dtype), step = x->stride[1] * size;
    const char *from = (const char *)x->data + row * x->stride[0] * size;
    char *to = scratch;
    if (is_direct(x)) return from;
    if (size == 2)
        for (int64_t i = 0; i < x->shape[1]; i++) memcpy(to + 2 * i, from + i * step, 2);
    else
        for (int64_t i = 0; i < x->shape[1]; i++) memcpy(to + 4 * i, from + i * step, 4);
    return scratch;
}

int64_t mq_rows_per_chunk(int64_t n)
{
    return MQ_MAX((int64_t)1, (1 << 16) / MQ_MAX(n, (int64_t)1));
}
