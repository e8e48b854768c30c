#include "calib/gram_loss.h"

#include <string.h>

#include "core/alloc.h"
#include "kernels/row_ops.h"
#include "kernels/search_ops.h"

static int64_t strips_of_block(int64_t block)
{
    return MQ_CEIL_DIV(block, (int64_t)MQ_GRAM_LOSS_STRIP);
}

/* Strips of all blocks; the last block may reach beyond n. */
static void lay_out(mq_gram_loss *loss)
{
    const int64_t per_block = strips_of_block(loss->block);
    for (int64_t i = 0; i < loss->strip_count; i++) {
        mq_gram_strip *strip = &loss->strips[i];
        strip->block = i / per_block;
        strip->first = strip->block * loss->block;
        strip->column = strip->first + i % per_block * MQ_GRAM_LOSS_STRIP;
        const int64_t end = MQ_MIN(strip->first + loss->block, loss->n);
        strip->columns = MQ_MAX(MQ_MIN(end - strip->column, (int64_t)MQ_GRAM_LOSS_STRIP), (int64_t)0);
    }
}

static int64_t depth_of(const mq_gram_strip *strip)
{
    return strip->column + strip->columns - strip->first;
}

static size_t packed_nbytes(const mq_gram_loss *loss, const mq_gram_strip *strip)
{
    if (strip->columns == 0) return 0;
    return MQ_ROUND_UP(mq_gemm_packed_size(loss->kind, strip->columns, depth_of(strip)), (size_t)MQ_ALIGNMENT);
}

/* rows [columns, depth]: column by column of U. gram: of the strip's block, ld elements between rows. */
static void write_strip(const mq_gram_strip *strip, const float *gram, int64_t ld, float *rows)
{
    const int64_t depth = depth_of(strip), at = strip->column - strip->first;
    for (int64_t j = 0; j < strip->columns; j++) {
        const float *from = gram + (at + j) * ld;
        float *to = rows + j * depth;
        for (int64_t k = 0; k < at + j; k++) to[k] = 2.0f * from[k];
        to[at + j] = from[at + j];
        memset(to + at + j + 1, 0, (size_t)(depth - at - j - 1) * sizeof *to);
    }
}

static void pack_strips(mq_gram_loss *loss, const float *gram, float *rows)
{
    const int64_t ld = loss->block;
    char *memory = loss->memory;
    for (int64_t i = 0; i < loss->strip_count; i++) {
        mq_gram_strip *strip = &loss->strips[i];
        if (strip->columns == 0) continue;
        write_strip(strip, gram + strip->block * ld * ld, ld, rows);
        strip->packed.data = memory;
        mq_gemm_pack(loss->kind, rows, MQ_F32, strip->columns, depth_of(strip), depth_of(strip), &strip->packed);
        memory += packed_nbytes(loss, strip);
    }
}

int mq_gram_loss_init(mq_gram_loss *loss, const float *gram, int64_t n, int64_t block, mq_gemm_kind kind,
                      mq_error *err)
{
    *loss = (mq_gram_loss){.kind = kind, .n = n, .block = block > 0 ? block : n};
    size_t nbytes = 0;
    loss->blocks = n > 0 ? MQ_CEIL_DIV(n, loss->block) : 0;
    loss->strip_count = loss->blocks * strips_of_block(MQ_MAX(loss->block, (int64_t)1));
    loss->strips = mq_alloc_zeroed((size_t)loss->strip_count * sizeof *loss->strips);
    if (loss->strips == NULL) return mq_fail_memory(err, "a Gram matrix", 0);
    lay_out(loss);
    for (int64_t i = 0; i < loss->strip_count; i++) nbytes += packed_nbytes(loss, &loss->strips[i]);
    loss->memory = mq_alloc(nbytes);
    float *rows = mq_alloc_array((size_t)loss->block * MQ_GRAM_LOSS_STRIP, sizeof *rows);
    int rc = MQ_OK;
    if (loss->memory == NULL || rows == NULL) {
        rc = mq_fail_memory(err, "a Gram matrix", nbytes);
        mq_gram_loss_free(loss);
    } else pack_strips(loss, gram, rows);
    mq_free(rows);
    return rc;
}

void mq_gram_loss_free(mq_gram_loss *loss)
{
    mq_free(loss->strips);
    mq_free(loss->memory);
    loss->strips = NULL;
    loss->memory = NULL;
}

mq_dtype mq_gram_loss_dtype(const mq_gram_loss *loss)
{
    return loss->kind == MQ_GEMM_BF16 ? MQ_BF16 : MQ_F32;
}

size_t mq_gram_loss_scratch(int64_t rows)
{
    return (size_t)((rows + 1) * MQ_GRAM_LOSS_STRIP) * sizeof(float);
}

void mq_gram_loss_rows(const mq_gram_loss *loss, const void *d, int64_t rows, void *scratch, double *out)
{
    const mq_dtype dtype = mq_gram_loss_dtype(loss);
    const mq_typed_row_ops *typed = mq_row_ops_of(dtype);
    const mq_search_ops *ops = mq_search_ops_get();
    const size_t size = mq_dtype_size(dtype);
    float *c = scratch, *part = c + rows * MQ_GRAM_LOSS_STRIP;
    memset(out, 0, (size_t)(rows * loss->blocks) * sizeof *out);
    for (int64_t i = 0; i < loss->strip_count; i++) {
        const mq_gram_strip *strip = &loss->strips[i];
        if (strip->columns == 0) continue;
        const mq_gemm_args args = {
            .m = rows, .a = (const char *)d + (size_t)strip->first * size, .a_dtype = dtype, .lda = loss->n,
            .b = &strip->packed, .c = c, .c_dtype = MQ_F32, .ldc = MQ_GRAM_LOSS_STRIP, .alpha = 1.0f,
        };
        mq_gemm_run(&args);
        for (int64_t r = 0; r < rows; r++) {
            typed->to_f32(part, (const char *)d + (size_t)(r * loss->n + strip->column) * size, strip->columns);
            out[r * loss->blocks + strip->block] +=
                (double)ops->dot(c + r * MQ_GRAM_LOSS_STRIP, part, strip->columns);
        }
    }
}
