#include "quant/repack.h"

#include <string.h>

#include "core/pool.h"
#include "quant/rows.h"

/* Rows that are unpacked together: in AWQ's layout they are 64 bytes side by side, one cache line. */
enum { STRIP = 128 };

/* Rows [first, first + count) of the matrix, as bytes q + 8: codes[r * cols + c]. */
typedef struct strip {
    int64_t rows, cols, first, count;
    uint8_t *codes;
} strip;

static void unpack_row_pairs(const strip *s, const void *packed)
{
    for (int64_t r = 0; r < s->count; r += 2) {
        const uint8_t *from = (const uint8_t *)packed + (s->first + r) / 2 * s->cols;
        uint8_t *even = s->codes + r * s->cols, *odd = even + s->cols;
        for (int64_t c = 0; c < s->cols; c++) {
            even[c] = (from[c] & 15) ^ 8;
            odd[c] = (uint8_t)(from[c] >> 4) ^ 8;
        }
    }
}

static void pack_row_pairs(const strip *s, void *packed)
{
    for (int64_t r = 0; r < s->count; r += 2) {
        uint8_t *to = (uint8_t *)packed + (s->first + r) / 2 * s->cols;
        const uint8_t *even = s->codes + r * s->cols, *odd = even + s->cols;
        for (int64_t c = 0; c < s->cols; c++) to[c] = (uint8_t)((even[c] ^ 8) | (odd[c] ^ 8) << 4);
    }
}

/* A little-endian word of nibbles along a row is bytes of pairs. */
static void unpack_int32_row(const strip *s, const void *packed)
{
    const uint8_t *from = (const uint8_t *)packed + s->first * s->cols / 2;
    for (int64_t i = 0; i < s->count * s->cols / 2; i++) {
        s->codes[2 * i] = from[i] & 15;
        s->codes[2 * i + 1] = from[i] >> 4;
    }
}

static void pack_int32_row(const strip *s, void *packed)
{
    uint8_t *to = (uint8_t *)packed + s->first * s->cols / 2;
    for (int64_t i = 0; i < s->count * s->cols / 2; i++) to[i] = (uint8_t)(s->codes[2 * i] | s->codes[2 * i + 1] << 4);
}

/* Tensors in a mapped file may start at any byte. */
static uint32_t word_at(const void *packed, int64_t index)
{
    uint32_t word;
    memcpy(&word, (const char *)packed + index * 4, sizeof word);
    return word;
}

static const int awq_bit[8] = {0, 16, 4, 20, 8, 24, 12, 28}; /* of row r % 8 */

static void unpack_awq(const strip *s, const void *packed)
{
    const int64_t words = s->rows / 8, first = s->first / 8;
    for (int64_t c = 0; c < s->cols; c++)
        for (int64_t r = 0; r < s->count; r++)
            s->codes[r * s->cols + c] = (word_at(packed, c * words + first + r / 8) >> awq_bit[r % 8]) & 15;
}

static void pack_awq(const strip *s, void *packed)
{
    const int64_t words = s->rows / 8, first = s->first / 8;
    for (int64_t c = 0; c < s->cols; c++) {
        uint32_t *to = (uint32_t *)packed + c * words + first;
        for (int64_t w = 0; w < s->count / 8; w++) {
            uint32_t word = 0;
            for (int r = 0; r < 8; r++) word |= (uint32_t)s->codes[(8 * w + r) * s->cols + c] << awq_bit[r];
            to[w] = word;
        }
    }
}

static void unpack_gptq(const strip *s, const void *packed)
{
    for (int64_t w = 0; w < s->cols / 8; w++)
        for (int64_t r = 0; r < s->count; r++) {
            const uint32_t word = word_at(packed, w * s->rows + s->first + r);
            for (int k = 0; k < 8; k++) s->codes[r * s->cols + 8 * w + k] = (word >> (4 * k)) & 15;
        }
}

static void pack_gptq(const strip *s, void *packed)
{
    for (int64_t w = 0; w < s->cols / 8; w++) {
        uint32_t *to = (uint32_t *)packed + w * s->rows + s->first;
        for (int64_t r = 0; r < s->count; r++) {
            uint32_t word = 0;
            for (int k = 0; k < 8; k++) word |= (uint32_t)s->codes[r * s->cols + 8 * w + k] << (4 * k);
            to[r] = word;
        }
    }
}

/* rows_per, cols_per: how many rows or columns of the matrix one element of the packed array's axis stands for. */
typedef struct layout_row {
    const char *name;
    mq_dtype dtype;
    int rows_per, cols_per, transposed;
    void (*unpack)(const strip *s, const void *packed);
    void (*pack)(const strip *s, void *packed);
} layout_row;

static const layout_row layouts[MQ_INT4_LAYOUTS] = {
    [MQ_INT4_ROW_PAIRS] = {"row_pairs", MQ_U8, 2, 1, 0, unpack_row_pairs, pack_row_pairs},
    [MQ_INT4_INT32_ROW] = {"int32_row", MQ_I32, 1, 8, 0, unpack_int32_row, pack_int32_row},
    [MQ_INT4_AWQ] = {"awq", MQ_I32, 8, 1, 1, unpack_awq, pack_awq},
    [MQ_INT4_GPTQ] = {"gptq", MQ_I32, 1, 8, 1, unpack_gptq, pack_gptq},
};

int mq_int4_layout_find(const char *name, mq_int4_layout *out)
{
    for (int i = 0; i < MQ_INT4_LAYOUTS; i++) {
        if (strcmp(layouts[i].name, name) != 0) continue;
        *out = (mq_int4_layout)i;
        return MQ_OK;
    }
    return MQ_ERR_VALUE;
}

void mq_int4_matrix_shape(mq_int4_layout layout, const int64_t *packed, int64_t *shape)
{
    const layout_row *row = &layouts[layout];
    shape[0] = packed[row->transposed] * row->rows_per;
    shape[1] = packed[1 - row->transposed] * row->cols_per;
}

int mq_int4_packed(mq_int4_layout layout, int64_t rows, int64_t cols, mq_tensor *packed, mq_error *err)
{
    const layout_row *row = &layouts[layout];
    if (rows % row->rows_per != 0 || cols % row->cols_per != 0)
        return mq_fail(err, MQ_ERR_VALUE, "[%lld, %lld]: layout %s needs a multiple of %d rows and of %d columns",
                       (long long)rows, (long long)cols, row->name, row->rows_per, row->cols_per);
    int64_t shape[2];
    shape[row->transposed] = rows / row->rows_per;
    shape[1 - row->transposed] = cols / row->cols_per;
    *packed = mq_tensor_make(NULL, row->dtype, 2, shape);
    return MQ_OK;
}

typedef struct repack_job {
    const layout_row *from, *to;
    const mq_tensor *in;
    mq_tensor *out;
    int64_t rows, cols;
    mq_row_buffers buffers;
} repack_job;

static void repack_strips(void *arg, int64_t begin, int64_t end, int worker)
{
    const repack_job *job = arg;
    strip s = {.rows = job->rows, .cols = job->cols, .codes = mq_row_buffers_get(&job->buffers, worker, 0)};
    for (int64_t i = begin; i < end; i++) {
        s.first = i * STRIP;
        s.count = MQ_MIN((int64_t)STRIP, job->rows - s.first);
        job->from->unpack(&s, job->in->data);
        job->to->pack(&s, job->out->data);
    }
}

int mq_int4_repack(mq_int4_layout from, const mq_tensor *in, mq_int4_layout to, mq_tensor *out, mq_error *err)
{
    int64_t shape[2];
    mq_int4_matrix_shape(from, in->shape, shape);
    repack_job job = {.from = &layouts[from], .to = &layouts[to], .in = in, .out = out, .rows = shape[0],
                      .cols = shape[1]};
    const size_t nbytes = (size_t)MQ_MIN((int64_t)STRIP, job.rows) * (size_t)job.cols;
    int rc = mq_row_buffers_init(&job.buffers, &nbytes, 1, err);
    if (rc == MQ_OK && mq_tensor_count(in) > 0)
        mq_parallel_for(MQ_CEIL_DIV(job.rows, (int64_t)STRIP), 1, repack_strips, &job);
    mq_row_buffers_free(&job.buffers);
    return rc;
}
