#include "calib/low_rank.h"

#include <stdatomic.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/gemm.h"
#include "kernels/kernels.h"
#include "quant/rows.h"

enum { ROWS = 64 };

typedef struct subtract_job {
    const mq_tensor *weight;
    const float *up;
    int64_t rank;
    mq_packed down;
    mq_tensor *out;
    _Atomic int rc;
} subtract_job;

static void subtract_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    subtract_job *job = argument;
    const mq_tensor *weight = job->weight;
    const int64_t n = weight->shape[1];
    const mq_kernels *kernels = mq_kernels_get();
    float *x = mq_alloc_array((size_t)((end - begin) * n), sizeof *x);
    void *contiguous = mq_alloc(mq_row_scratch_bytes(weight));
    (void)worker;
    if (x == NULL || contiguous == NULL) {
        atomic_store(&job->rc, MQ_ERR_MEMORY);
        goto done;
    }
    for (int64_t r = begin; r < end; r++)
        kernels->to_float[weight->dtype](mq_row_contiguous(weight, r, contiguous), n, x + (r - begin) * n);
    const mq_gemm_args args = {
        .m = end - begin, .a = job->up + begin * job->rank, .a_dtype = MQ_F32, .lda = job->rank, .b = &job->down,
        .c = x, .c_dtype = MQ_F32, .ldc = n, .accumulate = 1, .alpha = -1.0f,
    };
    mq_gemm_run(&args);
    char *to = (char *)job->out->data + (size_t)(begin * n) * mq_dtype_size(weight->dtype);
    kernels->from_float[weight->dtype](x, (end - begin) * n, to);
done:
    mq_free(x);
    mq_free(contiguous);
}

int mq_subtract_product(const mq_tensor *weight, const float *up, const float *down, int64_t rank, mq_tensor *out,
                        mq_error *err)
{
    const int64_t n = weight->shape[1];
    const size_t nbytes = mq_gemm_packed_size(MQ_GEMM_F32, n, rank);
    subtract_job job = {.weight = weight, .up = up, .rank = rank, .down.data = mq_alloc(nbytes), .out = out};
    if (job.down.data == NULL) return mq_fail_memory(err, "a product of low rank", nbytes);
    mq_gemm_pack_transposed(MQ_GEMM_F32, down, MQ_F32, n, rank, n, &job.down);
    mq_parallel_for(weight->shape[0], ROWS, subtract_rows, &job);
    mq_free(job.down.data);
    return atomic_load(&job.rc) == MQ_OK ? MQ_OK : mq_fail_memory(err, "a product of low rank", 0);
}
