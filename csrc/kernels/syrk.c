#include "kernels/syrk.h"

#include "core/pool.h"
#include "kernels/gemm_kernel.h"

static size_t rows_nbytes(const mq_gemm_kernel *kernel, int64_t n, int64_t k)
{
    return (size_t)(MQ_CEIL_DIV(n, (int64_t)kernel->nr) * mq_gemm_panel_size(kernel, k)) * sizeof(uint32_t);
}

size_t mq_syrk_nbytes(mq_gemm_kind kind, int64_t n, int64_t k)
{
    const size_t packed = mq_gemm_packed_size(kind, n, k);
    return MQ_ROUND_UP(packed, (size_t)64) + rows_nbytes(mq_gemm_kernel_of(kind), n, k);
}

typedef struct transpose_job {
    const uint32_t *packed;
    uint32_t *rows;
    const mq_gemm_kernel *kernel;
    int64_t panel_size, depth;   /* units; depth is the length of a row */
} transpose_job;

/* Panels [begin, end), which are [depth, nr], to rows [nr, depth]. */
static void transpose_panels(void *argument, int64_t begin, int64_t end, int worker)
{
    const transpose_job *job = argument;
    const int64_t nr = job->kernel->nr;
    (void)worker;
    for (int64_t panel = begin; panel < end; panel++)
        for (int64_t i = 0; i < nr; i += 16)
            for (int64_t t = 0; t < job->depth; t += 16)
                job->kernel->helpers->transpose(job->packed + panel * job->panel_size + t * nr + i, nr,
                                                job->rows + (panel * nr + i) * job->depth + t, job->depth);
}

void mq_syrk_pack(mq_gemm_kind kind, const void *x, mq_dtype dtype, int64_t n, int64_t k, int64_t ldx, void *memory,
                  mq_syrk *out)
{
    const mq_gemm_kernel *kernel = mq_gemm_kernel_of(kind);
    transpose_job job = {.packed = memory, .kernel = kernel, .panel_size = mq_gemm_panel_size(kernel, k)};
    job.depth = job.panel_size / kernel->nr;
    job.rows = (uint32_t *)(void *)((char *)memory + MQ_ROUND_UP(mq_gemm_packed_size(kind, n, k), (size_t)64));
    out->packed.data = memory;
    mq_gemm_pack_transposed(kind, x, dtype, n, k, ldx, &out->packed);
    mq_parallel_for(MQ_CEIL_DIV(n, (int64_t)kernel->nr), 1, transpose_panels, &job);
    /* What is packed is all units of the kernel, zeros beyond k: nothing is left to be converted or padded. */
    out->packed.k = out->ldr = job.depth * mq_gemm_unit_elements(kernel);
    out->packed.kind = kernel->unit == MQ_UNIT_PAIR ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    out->dtype = kernel->unit == MQ_UNIT_PAIR ? MQ_BF16 : MQ_F32;
    out->rows = job.rows;
}

void mq_syrk_run(const mq_syrk *x, const mq_syrk_part *part)
{
    const mq_gemm_kernel *kernel = x->packed.kernel;
    const size_t size = mq_dtype_size(x->dtype);
    mq_packed columns = x->packed;
    columns.data = (uint32_t *)columns.data + part->column / kernel->nr * mq_gemm_panel_size(kernel, columns.k);
    columns.n = part->columns;
    mq_gemm_args args = {
        /* Rows of sixteen: what is beyond n is zero. */
        .m = MQ_ROUND_UP(part->rows, (int64_t)16), .a = (const char *)x->rows + (size_t)(part->row * x->ldr) * size,
        .a_dtype = x->dtype, .lda = x->ldr, .b = &columns, .c = part->c, .c_dtype = MQ_F32, .ldc = part->ldc,
        .alpha = 1.0f, .upper = 1, .diagonal = part->column - part->row,
    };
    mq_gemm_run(&args);
}
