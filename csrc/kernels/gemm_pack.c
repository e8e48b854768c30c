/* Packing of operand B into the layout of a micro-kernel (gemm_kernel.h): a transpose of 4-byte units, panel by
 * panel. */
#include "kernels/gemm_kernel.h"

#include "core/pool.h"

enum { STAGE_UNITS = 64, CHUNK_BYTES = 128 * 1024 };

typedef struct pack_job {
    const mq_gemm_kernel *kernel;
    mq_gemm_convert how;
    const char *w;
    int64_t ldw, element;        /* bytes */
    int64_t n, k;
    int transposed;
    uint32_t *out;
    int64_t panel_size;
} pack_job;

static size_t nbytes_for(const mq_gemm_kernel *kernel, int64_t n, int64_t k)
{
    int64_t panels = MQ_CEIL_DIV(n, (int64_t)kernel->nr);
    return (size_t)(panels * mq_gemm_panel_size(kernel, k)) * sizeof(uint32_t);
}

size_t mq_gemm_packed_size(mq_gemm_kind kind, int64_t n, int64_t k)
{
    return nbytes_for(mq_gemm_kernel_of(kind), n, k);
}

size_t mq_packed_nbytes(const mq_packed *packed)
{
    if (packed->coding.kind != MQ_NOT_CODED) return packed->coding.nbytes;
    return nbytes_for(packed->kernel, packed->n, packed->k);
}

/* Up to 16 rows of w, STAGE_UNITS units from unit first, as units; rows beyond n are zero. */
static void stage_rows(const pack_job *job, int64_t row, int64_t first, uint32_t *stage)
{
    int64_t per_unit = mq_gemm_unit_elements(job->kernel);
    int64_t column = first * per_unit, wanted = STAGE_UNITS * per_unit;
    int64_t count = MQ_MIN(wanted, job->k - column);
    for (int64_t i = 0; i < 16; i++) {
        int64_t present = row + i < job->n ? count : 0;
        const char *src = present ? job->w + (row + i) * job->ldw + column * job->element : job->w;
        job->kernel->helpers->convert(job->how, src, present, stage + i * STAGE_UNITS, wanted);
    }
}

/* Whether rows may be transposed where they lie: they hold units already, all 16 of them, STAGE_UNITS units each. */
static const uint32_t *rows_in_place(const pack_job *job, int64_t row, int64_t first)
{
    int64_t per_unit = mq_gemm_unit_elements(job->kernel);
    int copies = job->how == MQ_COPY_F32 || job->how == MQ_COPY_BF16;
    const char *start = job->w + row * job->ldw + first * 4;
    if (!copies || row + 16 > job->n || (first + STAGE_UNITS) * per_unit > job->k) return NULL;
    return ((uintptr_t)start | (uintptr_t)job->ldw) % 4 == 0 ? (const uint32_t *)(const void *)start : NULL;
}

static void pack_rows(const pack_job *job, int64_t row, uint32_t *out)
{
    _Alignas(64) uint32_t stage[16 * STAGE_UNITS];
    const int64_t nr = job->kernel->nr, depth = job->panel_size / nr;
    for (int64_t first = 0; first < depth; first += STAGE_UNITS) {
        const uint32_t *rows = rows_in_place(job, row, first);
        int64_t stride = rows ? job->ldw / 4 : STAGE_UNITS;
        if (rows == NULL) {
            stage_rows(job, row, first, stage);
            rows = stage;
        }
        for (int64_t t = 0; t < STAGE_UNITS && first + t < depth; t += 16)
            job->kernel->helpers->transpose(rows + t, stride, out + (first + t) * nr, nr);
    }
}

/* Row k of the transposed source, nr elements from column n0; zero beyond k and n. */
static void source_row(const pack_job *job, int64_t k, int64_t column, void *out)
{
    int64_t nr = job->kernel->nr;
    int64_t count = k < job->k ? MQ_MIN(nr, job->n - column) : 0;
    const char *src = count ? job->w + k * job->ldw + column * job->element : job->w;
    job->kernel->helpers->convert(job->how, src, count, out, nr);
}

static void pack_columns(const pack_job *job, int64_t column, uint32_t *out)
{
    const int64_t nr = job->kernel->nr, depth = job->panel_size / nr;
    uint16_t even[MQ_GEMM_MAX_NR], odd[MQ_GEMM_MAX_NR];
    for (int64_t unit = 0; unit < depth; unit++, out += nr) {
        if (job->kernel->unit == MQ_UNIT_F32) {
            source_row(job, unit, column, out);
            continue;
        }
        source_row(job, 2 * unit, column, even);
        source_row(job, 2 * unit + 1, column, odd);
        job->kernel->helpers->interleave(even, odd, (uint16_t *)(void *)out, nr);
    }
}

static void pack_panels(void *argument, int64_t begin, int64_t end, int worker)
{
    const pack_job *job = argument;
    const int64_t nr = job->kernel->nr;
    (void)worker;
    for (int64_t panel = begin; panel < end; panel++) {
        uint32_t *out = job->out + panel * job->panel_size;
        if (job->transposed) {
            pack_columns(job, panel * nr, out);
            continue;
        }
        for (int64_t row = 0; row < nr; row += 16) pack_rows(job, panel * nr + row, out + row);
    }
}

static void pack(pack_job *job, mq_gemm_kind kind, mq_dtype dtype, int64_t ldw, mq_packed *out)
{
    job->kernel = mq_gemm_kernel_of(kind);
    job->how = mq_gemm_conversion(job->kernel, kind, dtype);
    job->element = (int64_t)mq_dtype_size(dtype);
    job->ldw = ldw * job->element;
    job->out = out->data;
    job->panel_size = mq_gemm_panel_size(job->kernel, job->k);
    out->kind = kind;
    out->n = job->n;
    out->k = job->k;
    out->kernel = job->kernel;
    out->coding.kind = MQ_NOT_CODED;
    int64_t panels = MQ_CEIL_DIV(job->n, (int64_t)job->kernel->nr), bytes = MQ_MAX(job->panel_size * 4, (int64_t)1);
    mq_parallel_for(panels, MQ_CEIL_DIV((int64_t)CHUNK_BYTES, bytes), pack_panels, job);
}

void mq_gemm_pack(mq_gemm_kind kind, const void *w, mq_dtype dtype, int64_t n, int64_t k, int64_t ldw, mq_packed *out)
{
    pack_job job = {.w = w, .n = n, .k = k};
    pack(&job, kind, dtype, ldw, out);
}

void mq_gemm_pack_transposed(mq_gemm_kind kind, const void *w, mq_dtype dtype, int64_t n, int64_t k, int64_t ldw,
                             mq_packed *out)
{
    pack_job job = {.w = w, .n = n, .k = k, .transposed = 1};
    pack(&job, kind, dtype, ldw, out);
}
