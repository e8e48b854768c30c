#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

enum { NOT_FINITE = 0x7f800000 };

/* A contiguous copy, or a scan, of the rows of w. A task's finding goes to its own place. */
typedef struct read_job {
    const mq_tensor *w;
    void *out;                /* NULL: w is read where it is */
    mq_dtype dtype;
    int64_t grain;
    uint32_t *amax;           /* one per task */
} read_job;

static void read_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const read_job *job = argument;
    const mq_typed_row_ops *kernels = mq_row_ops_of(job->dtype);
    int64_t columns = job->w->shape[1];
    size_t size = mq_dtype_size(job->dtype);
    uint32_t best = 0;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const char *row = (const char *)job->w->data + i * job->w->stride[0] * (int64_t)size;
        if (job->out != NULL) {
            char *copy = (char *)job->out + (size_t)(i * columns) * size;
            mq_read_row(copy, job->dtype, job->w, i);
            row = copy;
        }
        uint32_t amax = kernels->amax(row, columns);
        best = MQ_MAX(best, amax);
    }
    job->amax[begin / job->grain] = best;
}

/* Reads all of w, into copy if that is not NULL; an error if an element is not finite. */
static int read_weight(const mq_tensor *w, void *copy, mq_dtype dtype, const char *name, mq_error *err)
{
    int64_t grain = mq_row_grain(w->shape[1]), tasks = MQ_CEIL_DIV(w->shape[0], grain);
    read_job job = {.w = w, .out = copy, .dtype = dtype, .grain = grain};
    uint32_t best = 0;
    job.amax = mq_alloc_array((size_t)tasks, sizeof *job.amax);
    if (job.amax == NULL) return mq_fail_memory(err, name, (size_t)tasks * sizeof(uint32_t));
    mq_parallel_for(w->shape[0], grain, read_rows, &job);
    for (int64_t i = 0; i < tasks; i++) best = MQ_MAX(best, job.amax[i]);
    mq_free(job.amax);
    if (best < NOT_FINITE) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "%s contains %s", name, best > NOT_FINITE ? "NaN" : "an infinity");
}

int mq_linear_load(mq_linear_weight *weight, const mq_tensor *w, mq_gemm_kind kind, const char *name, mq_error *err)
{
    int64_t rows = w->shape[0], columns = w->shape[1], ld = w->stride[0];
    size_t packed_size = mq_gemm_packed_size(kind, rows, columns);
    mq_dtype dtype = w->dtype == MQ_F16 ? MQ_F32 : w->dtype;
    size_t size = mq_dtype_size(dtype);
    int in_place = dtype == w->dtype && w->stride[1] == 1 && ld >= columns && (uintptr_t)w->data % size == 0;
    void *copy = NULL;
    int rc = MQ_OK;
    if (!in_place) {
        copy = mq_alloc_array((size_t)(rows * columns), size);
        if (copy == NULL) return mq_fail_memory(err, name, (size_t)(rows * columns) * size);
        ld = columns;
    }
    rc = read_weight(w, copy, dtype, name, err);
    if (rc != MQ_OK) goto done;
    weight->packed.data = mq_alloc(packed_size);
    if (weight->packed.data == NULL) {
        rc = mq_fail_memory(err, name, packed_size);
        goto done;
    }
    mq_gemm_pack(kind, in_place ? w->data : copy, dtype, rows, columns, ld, &weight->packed);
done:
    mq_free(copy);
    return rc;
}

void mq_linear_free(mq_linear_weight *weight)
{
    mq_free(weight->packed.data);
    mq_free(weight->bias);
    memset(weight, 0, sizeof *weight);
}

void mq_linear_forward(void *out, const void *in, const mq_linear_weight *weight, int accumulate,
                       const mq_row_sizes *sizes)
{
    mq_gemm_args args = {
        .m = sizes->rows, .a = in, .a_dtype = sizes->dtype, .lda = weight->packed.k, .b = &weight->packed,
        .bias = weight->bias, .c = out, .c_dtype = sizes->dtype, .ldc = weight->packed.n, .accumulate = accumulate,
        .alpha = 1.0f,
    };
    mq_gemm_run(&args);
}
