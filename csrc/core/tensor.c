#include "core/tensor.h"

#include <stdio.h>
#include <string.h>

static const struct { const char *name; size_t size; } dtypes[MQ_DTYPE_COUNT] = {
    [MQ_F32] = {"float32", 4}, [MQ_BF16] = {"bfloat16", 2}, [MQ_F16] = {"float16", 2}, [MQ_F64] = {"float64", 8},
    [MQ_F8_E4M3] = {"float8_e4m3fn", 1}, [MQ_F8_E5M2] = {"float8_e5m2", 1}, [MQ_F8_E8M0] = {"float8_e8m0fnu", 1},
    [MQ_I8] = {"int8", 1}, [MQ_U8] = {"uint8", 1}, [MQ_I16] = {"int16", 2}, [MQ_U16] = {"uint16", 2},
    [MQ_I32] = {"int32", 4}, [MQ_U32] = {"uint32", 4}, [MQ_I64] = {"int64", 8}, [MQ_U64] = {"uint64", 8},
    [MQ_BOOL] = {"bool", 1},
};

size_t mq_dtype_size(mq_dtype dtype)
{
    return dtypes[dtype].size;
}

const char *mq_dtype_name(mq_dtype dtype)
{
    return dtypes[dtype].name;
}

int mq_dtype_from_name(const char *name, mq_dtype *out)
{
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) {
        if (strcmp(dtypes[i].name, name) != 0) continue;
        *out = (mq_dtype)i;
        return MQ_OK;
    }
    return MQ_ERR_VALUE;
}

mq_tensor mq_tensor_make(void *data, mq_dtype dtype, int ndim, const int64_t *shape)
{
    mq_tensor tensor = {.data = data, .dtype = dtype, .ndim = ndim};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        tensor.shape[i] = shape[i];
        tensor.stride[i] = stride;
        stride *= shape[i];
    }
    return tensor;
}

int64_t mq_tensor_count(const mq_tensor *tensor)
{
    int64_t count = 1;
    for (int i = 0; i < tensor->ndim; i++) count *= tensor->shape[i];
    return count;
}

int mq_tensor_is_contiguous(const mq_tensor *tensor)
{
    int64_t stride = 1;
    if (mq_tensor_count(tensor) == 0) return 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->stride[i] != stride) return 0;
        stride *= tensor->shape[i];
    }
    return 1;
}

const char *mq_tensor_describe(const mq_tensor *tensor, char *out, size_t size)
{
    size_t used = 0;
    int n = snprintf(out, size, "[");
    for (int i = 0; n > 0 && i <= tensor->ndim; i++) {
        used += (size_t)n;
        if (used >= size) return out;
        if (i < tensor->ndim)
            n = snprintf(out + used, size - used, "%s%lld", i ? ", " : "", (long long)tensor->shape[i]);
        else
            snprintf(out + used, size - used, "] %s", mq_dtype_name(tensor->dtype));
    }
    return out;
}
