/* mq_tensor: a view of an n-dimensional array that somebody else owns. Strides are in elements and may be any
 * integer. */
#ifndef MQ_TENSOR_H
#define MQ_TENSOR_H

#include "core/error.h"

#define MQ_MAX_NDIM 8

/* The element types that a tensor in memory may have. Sub-byte formats are packed in MQ_U8. */
typedef enum mq_dtype {
    MQ_F32, MQ_BF16, MQ_F16, MQ_F64,
    MQ_F8_E4M3, MQ_F8_E5M2, MQ_F8_E8M0,
    MQ_I8, MQ_U8, MQ_I16, MQ_U16, MQ_I32, MQ_U32, MQ_I64, MQ_U64, MQ_BOOL,
    MQ_DTYPE_COUNT
} mq_dtype;

typedef struct mq_tensor {
    void *data;
    mq_dtype dtype;
    int ndim;
    int64_t shape[MQ_MAX_NDIM];
    int64_t stride[MQ_MAX_NDIM];
    int readonly;
} mq_tensor;

size_t mq_dtype_size(mq_dtype dtype);
const char *mq_dtype_name(mq_dtype dtype);              /* NumPy / ml_dtypes spelling: "bfloat16", "float8_e4m3fn" */
int mq_dtype_from_name(const char *name, mq_dtype *out); /* MQ_OK or MQ_ERR_VALUE */

mq_tensor mq_tensor_make(void *data, mq_dtype dtype, int ndim, const int64_t *shape); /* C-contiguous */
int64_t mq_tensor_count(const mq_tensor *tensor);       /* number of elements */
int mq_tensor_is_contiguous(const mq_tensor *tensor);
/* "[576, 1536] bfloat16" into out; returns out. */
const char *mq_tensor_describe(const mq_tensor *tensor, char *out, size_t size);

#endif
