#include "kernels/syrk.h"

#include "core/pool.h"
#include "kernels/gemm_kernel.h"

enum { SLICE = 64 };             /* units of k packed at a time: their tokens stay in L2 */

/* Units between the rows of X^T. One cache line more than there are: at a power of two, sixteen rows of a tile would
 * fight for one set of the cache. */
static int64_t row_stride(const mq_gemm_kernel *kernel, int64_t k)
{
    return mq_gemm_panel_size(kernel, k) / kernel->nr + 16;
}

size_t mq_syrk_nbytes(mq_gemm_kind kind, int64_t n, int64_t k)
{
    const mq_gemm_kernel *kernel = mq_gemm_kernel_of(kind);
    const int64_t panels = MQ_CEIL_DIV(n, (int64_t)kernel->nr);
    return (size_t)(panels * (mq_gemm_panel_size(kernel, k) + kernel->nr * row_stride(kernel, k))) * sizeof(uint32_t);
}

typedef struct pack_job {
    const mq_gemm_kernel *kernel;
    mq_gemm_convert how;
    const void *const *x;
    int64_t element;             /* bytes */
    int64_t n, k;
    uint32_t *packed, *rows;
    int64_t depth, stride;       /* units: of a panel; between rows */
} pack_job;

/* Token t, nr channels from the first one of a panel, as the kernel's elements: where they lie, or else in stage; zero
 * beyond k and n. */
static const void *convert_token(const pack_job *job, int64_t t, int64_t channel, void *stage)
{
    const int64_t nr = job->kernel->nr, count = t < job->k ? MQ_MIN(nr, job->n - channel) : 0;
    const char *from = count ? (const char *)job->x[t] + channel * job->element : stage;
    if (count == nr && job->how == MQ_COPY_BF16 && (uintptr_t)from % sizeof(uint16_t) == 0) return from;
    job->kernel->helpers->convert(job->how, from, count, stage, nr);
    return stage;
}

/* Sixteen units from unit t of a panel: to the panel, and from there to rows. */
static void pack_tile(const pack_job *job, int64_t panel, int64_t t)
{
    const int64_t nr = job->kernel->nr;
    uint32_t *tile = job->packed + (panel * job->depth + t) * nr, *out = tile;
    uint16_t even[MQ_GEMM_MAX_NR], odd[MQ_GEMM_MAX_NR];
    for (int64_t unit = t; unit < t + 16; unit++, out += nr) {
        if (job->kernel->unit == MQ_UNIT_F32) {
            convert_token(job, unit, panel * nr, out);
            continue;
        }
        const uint16_t *first = convert_token(job, 2 * unit, panel * nr, even);
        const uint16_t *second = convert_token(job, 2 * unit + 1, panel * nr, odd);
        job->kernel->helpers->interleave(first, second, (uint16_t *)(void *)out, nr);
    }
    for (int64_t i = 0; i < nr; i += 16)
        job->kernel->helpers->transpose(tile + i, nr, job->rows + (panel * nr + i) * job->stride + t, job->stride);
}

/* Panels read their tokens a line at a time, far apart, which no hardware prefetcher follows. */
static void prefetch_slice(const pack_job *job, int64_t slice)
{
    const int64_t tokens = SLICE * mq_gemm_unit_elements(job->kernel), width = job->n * job->element;
    for (int64_t t = slice * tokens; t < MQ_MIN((slice + 1) * tokens, job->k); t++)
        for (int64_t at = 0; at < width; at += 64) __builtin_prefetch((const char *)job->x[t] + at);
}

static void pack_slices(void *argument, int64_t begin, int64_t end, int worker)
{
    const pack_job *job = argument;
    const int64_t panels = MQ_CEIL_DIV(job->n, (int64_t)job->kernel->nr);
    (void)worker;
    for (int64_t slice = begin; slice < end; slice++) {
        prefetch_slice(job, slice);
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t t = slice * SLICE; t < MQ_MIN((slice + 1) * SLICE, job->depth); t += 16)
                pack_tile(job, panel, t);
    }
}

void mq_syrk_pack(mq_gemm_kind kind, const mq_syrk_tokens *x, void *memory, mq_syrk *out)
{
    const mq_gemm_kernel *kernel = mq_gemm_kernel_of(kind);
    const int64_t panels = MQ_CEIL_DIV(x->n, (int64_t)kernel->nr), panel_size = mq_gemm_panel_size(kernel, x->k);
    const int64_t element = (int64_t)mq_dtype_size(x->dtype);
    const pack_job job = {
        .kernel = kernel, .how = mq_gemm_conversion(kernel, kind, x->dtype), .x = x->x, .element = element,
        .n = x->n, .k = x->k, .packed = memory, .rows = (uint32_t *)memory + panels * panel_size,
        .depth = panel_size / kernel->nr, .stride = row_stride(kernel, x->k),
    };
    mq_parallel_for(MQ_CEIL_DIV(job.depth, (int64_t)SLICE), 1, pack_slices, (void *)(uintptr_t)&job);
    /* What is packed is all units of the kernel, zeros beyond k: nothing is left to be converted or padded. */
    out->packed = (mq_packed){
        .kind = kernel->unit == MQ_UNIT_PAIR ? MQ_GEMM_BF16 : MQ_GEMM_F32, .n = x->n,
        .k = job.depth * mq_gemm_unit_elements(kernel), .data = memory, .kernel = kernel,
    };
    out->rows = job.rows;
    out->ldr = job.stride * mq_gemm_unit_elements(kernel);
    out->dtype = kernel->unit == MQ_UNIT_PAIR ? MQ_BF16 : MQ_F32;
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
