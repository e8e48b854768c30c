#include "calib/gram.h"

#include <math.h>
#include <string.h>

#include "calib/pending.h"
#include "core/alloc.h"
#include "core/pool.h"
#include "core/spare.h"
#include "kernels/syrk.h"

enum {
    BLOCK_ROWS = 8192,       /* tokens whose products are summed in float32 before they are added in float64 */
    LEAST_ROWS = 2048,       /* where BLOCK_ELEMENTS are less; and of float32 tokens, for the sake of their precision */
    BLOCK_ELEMENTS = 6 << 20,
    STRIP = 1024,            /* columns of H computed at a time */
    TILE = 64                /* of the transpose at the end */
};

typedef struct gram {
    mq_pending pending;
    const void **block;      /* [held] tokens of dtype, in memory of pieces, that do not make a block yet */
    int64_t held, room;
    mq_piece *pieces;
    mq_dtype dtype;
    double *sums;            /* the upper triangle row by row, or the blocks */
} gram;

static int64_t block_rows(int64_t width, mq_dtype dtype)
{
    if (dtype != MQ_BF16) return LEAST_ROWS;
    return MQ_MAX(MQ_MIN((int64_t)BLOCK_ROWS, BLOCK_ELEMENTS / width / 1024 * 1024), (int64_t)LEAST_ROWS);
}

int64_t mq_gram_sums(const mq_calib *calib, int64_t n)
{
    const int64_t size = calib->option;
    return size == 0 ? n * (n + 1) / 2 : MQ_CEIL_DIV(n, size) * size * size;
}

static int64_t sums_count(const mq_calib *calib)
{
    return mq_gram_sums(calib, calib->channels);
}

int64_t mq_gram_count(const mq_calib *calib)
{
    return calib->option == 0 ? calib->channels * calib->channels : sums_count(calib);
}

/* Row i of the upper triangle, to be indexed by column. */
static double *triangle_row(double *sums, int64_t n, int64_t i)
{
    return sums + i * n - i * (i - 1) / 2 - i;
}

/* Called with the mutex held. */
static int prepare(mq_calib *calib, int64_t width, mq_error *err)
{
    if (calib->state != NULL && calib->channels != width)
        return mq_fail(err, MQ_ERR_VALUE, "the calibrator has %lld channels, the data has %lld",
                       (long long)calib->channels, (long long)width);
    if (calib->state != NULL) return MQ_OK;
    gram *state = mq_alloc_zeroed(sizeof *state);
    calib->channels = width;
    const size_t nbytes = (size_t)sums_count(calib) * sizeof(double);
    if (state != NULL) state->sums = mq_alloc_zeroed(nbytes);
    if (state == NULL || state->sums == NULL) {
        mq_free(state);
        calib->channels = 0;
        return mq_fail_memory(err, "a Gram matrix", nbytes);
    }
    calib->state = state;
    calib->width = width;
    return MQ_OK;
}

/* ---- a block's product ---- */

typedef struct product {
    const mq_calib *calib;
    double *sums;
    mq_syrk x;
    float *c;                /* a strip [n rounded up, STRIP]; or a square for each strip of diagonal blocks */
    int64_t column, columns; /* of the strip */
    int64_t strip;           /* diagonal blocks: columns, a multiple of their size */
} product;

static void fold_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const product *job = argument;
    const int64_t last = job->column + job->columns;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        double *MQ_RESTRICT to = triangle_row(job->sums, job->calib->channels, i);
        const float *MQ_RESTRICT from = job->c + i * STRIP - job->column;
        for (int64_t j = MQ_MAX(i, job->column); j < last; j++) to[j] += (double)from[j];
    }
}

static void add_triangle(product *job)
{
    const int64_t n = job->calib->channels;
    for (job->column = 0; job->column < n; job->column += STRIP) {
        job->columns = MQ_MIN((int64_t)STRIP, n - job->column);
        const int64_t rows = job->column + job->columns;
        mq_syrk_part part = {.rows = rows, .column = job->column, .columns = job->columns, .c = job->c, .ldc = STRIP};
        mq_syrk_run(&job->x, &part);
        mq_parallel_for(rows, 64, fold_rows, job);
    }
}

/* Square c [strip, strip] from channel first on: the blocks on its diagonal. */
static void fold_blocks(const product *job, const float *c, int64_t first, int64_t columns)
{
    const int64_t size = job->calib->option;
    for (int64_t i = 0; i < columns; i++) {
        const int64_t block = i / size, start = block * size;
        double *to = job->sums + ((first / size + block) * size + (i - start)) * size;
        for (int64_t j = i; j < MQ_MIN(start + size, columns); j++) to[j - start] += (double)c[i * job->strip + j];
    }
}

static void add_squares(void *argument, int64_t begin, int64_t end, int worker)
{
    const product *job = argument;
    const int64_t n = job->calib->channels;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = i * job->strip, columns = MQ_MIN(job->strip, n - first);
        float *c = job->c + i * job->strip * job->strip;
        mq_syrk_part part = {.row = first, .rows = columns, .column = first, .columns = columns, .c = c,
                             .ldc = job->strip};
        mq_syrk_run(&job->x, &part);
        fold_blocks(job, c, first, columns);
    }
}

/* The least multiple of a block's size that is one of the product's too. */
static int64_t square_of(int64_t size)
{
    int64_t strip = size;
    while (strip % MQ_SYRK_MULTIPLE != 0) strip += size;
    return strip;
}

/* Adds X^T X of the block's tokens. */
static int add_product(mq_calib *calib, mq_error *err)
{
    const gram *state = calib->state;
    const int64_t n = calib->channels, size = calib->option, rows = state->held;
    const mq_gemm_kind kind = state->dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    product job = {.calib = calib, .sums = state->sums, .strip = size ? square_of(size) : STRIP};
    const int64_t squares = MQ_CEIL_DIV(n, job.strip);
    const size_t count = size ? (size_t)(squares * job.strip * job.strip)
                              : (size_t)(MQ_ROUND_UP(n, (int64_t)MQ_SYRK_MULTIPLE) * STRIP);
    const size_t nbytes = MQ_ROUND_UP(mq_syrk_nbytes(kind, n, rows), (size_t)MQ_ALIGNMENT);
    char *memory = mq_spare_take(calib->spare, nbytes + count * sizeof(float));
    if (memory == NULL) return mq_fail_memory(err, "a Gram matrix's block", nbytes + count * sizeof(float));
    job.c = (float *)(void *)(memory + nbytes);
    const mq_syrk_tokens tokens = {.x = state->block, .dtype = state->dtype, .n = n, .k = rows};
    mq_syrk_pack(kind, &tokens, memory, &job.x);
    if (size) mq_parallel_for(squares, 1, add_squares, &job);
    else add_triangle(&job);
    mq_spare_give(calib->spare, memory);
    return MQ_OK;
}

/* ---- tokens to blocks ---- */

static void drop_pieces(const mq_calib *calib)
{
    gram *state = calib->state;
    for (mq_piece *piece; (piece = state->pieces) != NULL; mq_piece_free(calib, piece)) state->pieces = piece->next;
}

static int flush(mq_calib *calib, mq_error *err)
{
    gram *state = calib->state;
    if (state->held == 0) return MQ_OK;
    int rc = add_product(calib, err);
    if (rc == MQ_OK) {
        state->held = 0;
        drop_pieces(calib);
    }
    return rc;
}

/* Room for `rows` in all, at most a block. */
static int reserve(gram *state, int64_t rows, int64_t most, mq_error *err)
{
    if (rows <= state->room) return MQ_OK;
    const int64_t room = MQ_MIN(MQ_MAX(rows, 2 * state->room), most);
    const void **grown = mq_alloc_array((size_t)room, sizeof *grown);
    if (grown == NULL) return mq_fail_memory(err, "a Gram matrix's tokens", (size_t)room * sizeof *grown);
    if (state->held > 0) memcpy(grown, state->block, (size_t)state->held * sizeof *grown);
    mq_free(state->block);
    state->block = grown;
    state->room = room;
    return MQ_OK;
}

/* A block has tokens of one dtype. */
static int change_dtype(mq_calib *calib, mq_dtype dtype, mq_error *err)
{
    gram *state = calib->state;
    int rc = state->dtype == dtype ? MQ_OK : flush(calib, err);
    if (rc == MQ_OK) state->dtype = dtype;
    return rc;
}

/* Tokens x [rows, width], in order, without gaps, of the block's dtype. They are to stay where they are while a block
 * waits for more. Called with the mutex held. */
static int add_tokens(mq_calib *calib, const char *x, int64_t rows, mq_error *err)
{
    gram *state = calib->state;
    const int64_t whole = block_rows(calib->channels, state->dtype);
    const size_t stride = (size_t)calib->channels * mq_dtype_size(state->dtype);
    int rc = MQ_OK;
    while (rc == MQ_OK && rows > 0) {
        const int64_t n = MQ_MIN(rows, whole - state->held);
        rc = reserve(state, state->held + n, whole, err);
        for (int64_t i = 0; rc == MQ_OK && i < n; i++, x += stride) state->block[state->held++] = x;
        if (rc == MQ_OK && state->held == whole) rc = flush(calib, err);
        rows -= n;
    }
    return rc;
}

/* A piece goes to blocks, and is kept while one waits. */
static int add_piece(mq_calib *calib, mq_piece *piece, mq_error *err)
{
    gram *state = calib->state;
    int rc = change_dtype(calib, piece->dtype, err);
    if (rc == MQ_OK) rc = add_tokens(calib, piece->data, piece->rows, err);
    piece->next = state->pieces;
    state->pieces = piece;
    if (state->held == 0) drop_pieces(calib);
    return rc;
}

static int gram_settle(mq_calib *calib, int all, mq_error *err)
{
    gram *state = calib->state;
    int rc = MQ_OK;
    if (state == NULL) return MQ_OK;
    for (mq_piece *piece; rc == MQ_OK && (piece = mq_pending_take(&state->pending)) != NULL;)
        rc = add_piece(calib, piece, err);
    return rc == MQ_OK && all ? flush(calib, err) : rc;
}

/* The tokens that count, next to each other. */
static void gather(char *out, const mq_calib_rows *rows)
{
    const size_t size = mq_dtype_size(rows->dtype), stride = (size_t)rows->width * size;
    for (int64_t i = 0; i < rows->rows; i++) {
        if (rows->mask != NULL && !rows->mask[i]) continue;
        memcpy(out, (const char *)rows->x + (size_t)(i * rows->ld) * size, stride);
        out += stride;
    }
}

/* By hand and without gaps: whole blocks as they lie, and a copy of the rest. */
static int add_rows(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    const gram *state = calib->state;
    int rc = change_dtype(calib, rows->dtype, err);
    if (rc != MQ_OK) return rc;
    const int64_t whole = block_rows(calib->channels, state->dtype);
    const int64_t straight = MQ_MAX((state->held + rows->rows) / whole * whole - state->held, (int64_t)0);
    rc = add_tokens(calib, rows->x, straight, err);
    if (rc != MQ_OK || straight == rows->rows) return rc;
    const size_t stride = (size_t)calib->channels * mq_dtype_size(state->dtype);
    const size_t nbytes = (size_t)(rows->rows - straight) * stride;
    mq_piece *rest = mq_piece_new(calib, rows, rows->rows - straight, nbytes, err);
    if (rest == NULL) return MQ_ERR_MEMORY;
    memcpy(rest->data, (const char *)rows->x + (size_t)straight * stride, nbytes);
    return add_piece(calib, rest, err);
}

static int collect_at_once(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    pthread_mutex_lock(&calib->mutex);
    int rc = prepare(calib, rows->width, err);
    if (rc == MQ_OK) rc = add_rows(calib, rows, err);
    if (rc == MQ_OK) calib->count += rows->rows;
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

static int gram_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    const int64_t counted = mq_calib_counted(rows);
    if (counted == 0) return MQ_OK;
    if (rows->group < 0 && counted == rows->rows && rows->ld == rows->width) return collect_at_once(calib, rows, err);
    const size_t nbytes = (size_t)(counted * rows->width) * mq_dtype_size(rows->dtype);
    mq_piece *piece = mq_piece_new(calib, rows, counted, nbytes, err);
    if (piece == NULL) return MQ_ERR_MEMORY;
    gather(piece->data, rows);
    pthread_mutex_lock(&calib->mutex);
    int rc = prepare(calib, rows->width, err);
    if (rc == MQ_OK) {
        mq_pending_add(&((gram *)calib->state)->pending, piece);
        calib->count += counted;
        if (rows->group < 0) rc = gram_settle(calib, 0, err);
    } else mq_piece_free(calib, piece);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

int mq_gram_add(mq_calib *calib, const double *sums, int64_t width, int64_t rows, mq_error *err)
{
    pthread_mutex_lock(&calib->mutex);
    const int rc = prepare(calib, width, err);
    const int64_t count = rc == MQ_OK ? sums_count(calib) : 0;
    for (int64_t i = 0; i < count; i++) ((gram *)calib->state)->sums[i] += sums[i];
    if (rc == MQ_OK) calib->count += rows;
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

/* ---- the rest of the interface ---- */

static int gram_merge(mq_calib *calib, const mq_calib *other, mq_error *err)
{
    int rc = prepare(calib, other->channels, err);
    if (rc != MQ_OK) return rc;
    double *sums = ((gram *)calib->state)->sums;
    const double *from = ((const gram *)other->state)->sums;
    const int64_t count = sums_count(calib);
    for (int64_t i = 0; i < count; i++) sums[i] += from[i];
    calib->count += other->count;
    return MQ_OK;
}

static int gram_finish(mq_calib *calib, float *amax, mq_error *err)
{
    (void)amax;
    return mq_fail(err, MQ_ERR_VALUE, "a calibrator of kind %s finds no amax", calib->kind->name);
}

static void gram_reset(mq_calib *calib)
{
    gram *state = calib->state;
    if (state != NULL) {
        mq_pending_free(calib, &state->pending);
        drop_pieces(calib);
        mq_free(state->block);
        mq_free(state->sums);
    }
    mq_free(state);
    calib->state = NULL;
    calib->channels = calib->width = calib->count = 0;
}

static size_t gram_state_nbytes(const mq_calib *calib)
{
    return calib->state == NULL ? 0 : (size_t)sums_count(calib) * sizeof(double);
}

static void gram_save(const mq_calib *calib, void *out)
{
    if (calib->state != NULL) memcpy(out, ((const gram *)calib->state)->sums, gram_state_nbytes(calib));
}

static int gram_load(mq_calib *calib, const void *bytes, size_t nbytes, mq_error *err)
{
    const int64_t channels = calib->channels;
    if (nbytes % sizeof(double) != 0 || (size_t)sums_count(calib) != nbytes / sizeof(double))
        return mq_fail(err, MQ_ERR_VALUE, "load: the state of %lld channels cannot have %zu bytes", (long long)channels,
                       nbytes);
    if (channels == 0) return MQ_OK;
    int rc = prepare(calib, channels, err);
    if (rc == MQ_OK) memcpy(((gram *)calib->state)->sums, bytes, nbytes);
    return rc;
}

const mq_calib_kind mq_calib_gram = {
    .name = "gram", .collect = gram_collect, .merge = gram_merge, .settle = gram_settle, .finish = gram_finish,
    .reset = gram_reset, .state_nbytes = gram_state_nbytes, .save = gram_save, .load = gram_load,
};

/* ---- the result ---- */

typedef struct write_job {
    const mq_calib *calib;
    float *out;
} write_job;

static void write_tiles(void *argument, int64_t begin, int64_t end, int worker)
{
    const write_job *job = argument;
    const int64_t n = job->calib->channels;
    double *sums = ((const gram *)job->calib->state)->sums;
    (void)worker;
    for (int64_t row = begin * TILE; row < MQ_MIN(end * TILE, n); row += TILE)
        for (int64_t column = row; column < n; column += TILE)
            for (int64_t i = row; i < MQ_MIN(row + TILE, n); i++) {
                const double *from = triangle_row(sums, n, i);
                for (int64_t j = MQ_MAX(i, column); j < MQ_MIN(column + TILE, n); j++)
                    job->out[i * n + j] = job->out[j * n + i] = (float)from[j];
            }
}

static void write_triangle(const mq_calib *calib, float *out)
{
    write_job job = {.calib = calib, .out = out};
    mq_parallel_for(MQ_CEIL_DIV(calib->channels, (int64_t)TILE), 1, write_tiles, &job);
}

static void write_blocks(const mq_calib *calib, float *out)
{
    const int64_t size = calib->option, blocks = MQ_CEIL_DIV(calib->channels, size);
    const double *sums = ((const gram *)calib->state)->sums;
    for (int64_t block = 0; block < blocks; block++, out += size * size, sums += size * size)
        for (int64_t i = 0; i < size; i++)
            for (int64_t j = i; j < size; j++) out[i * size + j] = out[j * size + i] = (float)sums[i * size + j];
}

/* A channel that is not finite shows on the diagonal. */
static int64_t find_bad(const mq_calib *calib)
{
    const int64_t n = calib->channels, size = calib->option;
    double *sums = ((const gram *)calib->state)->sums;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(size ? sums[i * size + i % size] : triangle_row(sums, n, i)[i])) return i;
    return -1;
}

int mq_gram_finish(mq_calib *calib, float *out, mq_error *err)
{
    if (calib->kind != &mq_calib_gram)
        return mq_fail(err, MQ_ERR_VALUE, "a calibrator of kind %s has no Gram matrix", calib->kind->name);
    int rc = mq_calib_settle(calib, 1, err);
    if (rc != MQ_OK) return rc;
    if (calib->channels == 0) return mq_fail(err, MQ_ERR_STATE, "the calibrator has seen no data");
    pthread_mutex_lock(&calib->mutex);
    const int64_t bad = find_bad(calib);
    if (bad >= 0)
        rc = mq_fail(err, MQ_ERR_VALUE, "NaN or an infinity was seen in the activations of channel %lld",
                     (long long)bad);
    else if (calib->option == 0) write_triangle(calib, out);
    else write_blocks(calib, out);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}
