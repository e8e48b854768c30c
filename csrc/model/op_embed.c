#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

int mq_tensor_is_float(const mq_tensor *tensor)
{
    return tensor->dtype == MQ_F32 || tensor->dtype == MQ_BF16 || tensor->dtype == MQ_F16;
}

/* IEEE 754 binary16 to binary32, exactly. */
static float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu, bits;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | mantissa << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float read_element(const char *at, mq_dtype dtype)
{
    uint16_t half;
    uint32_t bits;
    float value;
    if (dtype == MQ_F32) {
        memcpy(&value, at, sizeof value);
        return value;
    }
    memcpy(&half, at, sizeof half);
    if (dtype == MQ_F16) return half_to_float(half);
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Through a small buffer of float32, for float16 and for strides. */
static void read_slowly(void *out, mq_dtype dtype, const mq_tensor *tensor, const char *from, int64_t n, int64_t stride)
{
    enum { STEP = 256 };
    float buffer[STEP];
    const mq_typed_row_ops *to = mq_row_ops_of(dtype);
    int64_t size = (int64_t)mq_dtype_size(tensor->dtype);
    for (int64_t first = 0; first < n; first += STEP) {
        int64_t count = MQ_MIN((int64_t)STEP, n - first);
        for (int64_t i = 0; i < count; i++) buffer[i] = read_element(from + (first + i) * stride * size, tensor->dtype);
        to->from_f32((char *)out + (size_t)first * mq_dtype_size(dtype), buffer, count);
    }
}

void mq_read_row(void *out, mq_dtype dtype, const mq_tensor *tensor, int64_t row)
{
    int last = tensor->ndim - 1;
    int64_t n = tensor->shape[last], stride = tensor->stride[last];
    size_t size = mq_dtype_size(tensor->dtype);
    const char *from = (const char *)tensor->data + (last > 0 ? row * tensor->stride[0] : 0) * (int64_t)size;
    int plain = (stride == 1 || n == 1) && (uintptr_t)from % size == 0;
    if (plain && tensor->dtype == dtype)
        memcpy(out, from, (size_t)n * size);
    else if (plain && tensor->dtype == MQ_F32)
        mq_row_ops_of(dtype)->from_f32(out, (const float *)(const void *)from, n);
    else if (plain && tensor->dtype == MQ_BF16)
        mq_row_ops_of(MQ_BF16)->to_f32(out, from, n);
    else
        read_slowly(out, dtype, tensor, from, n, stride);
}

typedef struct embed_job {
    char *out;
    const int32_t *ids;
    const mq_tensor *weight;
    const mq_row_sizes *sizes;
} embed_job;

static void embed_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const embed_job *job = argument;
    size_t stride = (size_t)job->sizes->width * mq_dtype_size(job->sizes->dtype);
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        mq_read_row(job->out + (size_t)i * stride, job->sizes->dtype, job->weight, job->ids[i]);
}

void mq_embed_forward(void *out, const int32_t *ids, const mq_tensor *weight, const mq_row_sizes *sizes)
{
    embed_job job = {.out = out, .ids = ids, .weight = weight, .sizes = sizes};
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), embed_rows, &job);
}

void mq_embed_backward(float *d_weight, const float *d_out, const int32_t *ids, const mq_row_sizes *sizes)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(MQ_F32);
    for (int64_t i = 0; i < sizes->rows; i++)
        kernels->add(d_weight + ids[i] * sizes->width, d_out + i * sizes->width, sizes->width);
}
