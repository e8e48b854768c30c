/* Errors of launches, and what all entry points check. */
#include "rows.cuh"

int mq_cuda_interface(void)
{
    return MQ_CUDA_INTERFACE;
}

int mq_cuda_is_emulated(void)
{
    return MQ_IS_EMULATED;
}

static int code_of(cudaError_t status)
{
    if (status == cudaErrorMemoryAllocation) return MQ_ERR_MEMORY;
    return status == cudaErrorInvalidValue || status == cudaErrorInvalidConfiguration ? MQ_ERR_VALUE : MQ_ERR_STATE;
}

int mq_cuda_launch_failed(const mq_launch *launch, cudaError_t status, const char *arguments)
{
    return mq_fail(launch->err, code_of(status), "CUDA kernel %s, grid (%u, %u, %u), block (%d, 1, 1), %s: %s (%s)",
                   launch->kernel, launch->grid.x, launch->grid.y, launch->grid.z, (int)MQ_THREADS, arguments,
                   cudaGetErrorString(status), cudaGetErrorName(status));
}

void mq_cuda_describe_matrix(const mq_cuda_matrix *matrix, char *out, size_t size)
{
    static const char *const names[MQ_FLOAT_DTYPES] = {"float32", "bfloat16", "float16"};
    const char *name = (unsigned)matrix->dtype < (unsigned)MQ_FLOAT_DTYPES ? names[matrix->dtype] : "?";
    snprintf(out, size, "[%lld, %lld] %s at %p, %lld elements a row", (long long)matrix->rows, (long long)matrix->cols,
             name, matrix->data, (long long)matrix->ld);
}

int mq_cuda_check_matrix(const mq_cuda_matrix *matrix, const char *name, mq_error *err)
{
    char text[128];
    mq_cuda_describe_matrix(matrix, text, sizeof text);
    if ((unsigned)matrix->dtype >= (unsigned)MQ_FLOAT_DTYPES)
        return mq_fail(err, MQ_ERR_TYPE, "%s %s: expected float32, bfloat16 or float16", name, text);
    if (matrix->rows < 0 || matrix->cols < 0 || matrix->ld < matrix->cols)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: sizes are negative, or rows overlap", name, text);
    if (matrix->data == NULL && matrix->rows > 0 && matrix->cols > 0)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: no data", name, text);
    return MQ_OK;
}

int mq_cuda_check_same(const mq_cuda_matrix *a, const mq_cuda_matrix *b, const char *name, mq_error *err)
{
    char text[128], other[128];
    const int rc = mq_cuda_check_matrix(b, name, err);
    if (rc != MQ_OK) return rc;
    if (a->dtype == b->dtype && a->rows == b->rows && a->cols == b->cols) return MQ_OK;
    mq_cuda_describe_matrix(a, text, sizeof text);
    mq_cuda_describe_matrix(b, other, sizeof other);
    return mq_fail(err, MQ_ERR_VALUE, "%s %s: expected shape and dtype of x %s", name, other, text);
}

int mq_cuda_check_activations(const mq_cuda_matrix *matrix, const char *name, mq_error *err)
{
    char text[128];
    const int rc = mq_cuda_check_matrix(matrix, name, err);
    if (rc != MQ_OK || matrix->dtype == MQ_F32 || matrix->dtype == MQ_BF16) return rc;
    mq_cuda_describe_matrix(matrix, text, sizeof text);
    return mq_fail(err, MQ_ERR_TYPE, "%s %s: expected float32 or bfloat16", name, text);
}

int mq_cuda_check_shape(const mq_cuda_matrix *matrix, int64_t rows, int64_t cols, const char *name, mq_error *err)
{
    char text[128];
    const int rc = mq_cuda_check_activations(matrix, name, err);
    if (rc != MQ_OK || (matrix->rows == rows && matrix->cols == cols)) return rc;
    mq_cuda_describe_matrix(matrix, text, sizeof text);
    return mq_fail(err, MQ_ERR_VALUE, "%s %s: expected [%lld, %lld]", name, text, (long long)rows, (long long)cols);
}

int mq_cuda_check_workspace(const void *workspace, size_t nbytes, size_t needed, const char *name, mq_error *err)
{
    if (nbytes >= needed && (workspace != NULL || needed == 0) && (uintptr_t)workspace % 16 == 0) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "%s: needs a workspace of %zu bytes, aligned to 16; got %zu at %p", name, needed,
                   nbytes, workspace);
}
