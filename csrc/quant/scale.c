#include "quant/scale.h"

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/kernels.h"
#include "kernels/scales.h"
#include "quant/rows.h"

mq_grid mq_grid_make(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols)
{
    mq_grid grid;
    grid.block_rows = MQ_MAX(block_rows > 0 ? block_rows : rows, (int64_t)1);
    grid.block_cols = MQ_MAX(block_cols > 0 ? block_cols : cols, (int64_t)1);
    grid.rows = MQ_MAX(MQ_CEIL_DIV(rows, grid.block_rows), (int64_t)1);
    grid.cols = MQ_MAX(MQ_CEIL_DIV(cols, grid.block_cols), (int64_t)1);
    return grid;
}

float mq_scale_second(const mq_scheme_row *scheme, float amax)
{
    const mq_second_level second = {.amax = amax, .divisor = scheme->second_divisor};
    return second.divisor == 0.0f ? 1.0f : mq_second_scale(&second, mq_format_max(scheme->element));
}

float mq_second_scale(const mq_second_level *second, float largest)
{
    return mq_second_scale_of(second->amax, second->divisor, largest);
}

/* A code's value times the kernels' denominator, over that denominator, is within two roundings of the value: it is
 * encoded as that code again. */
void mq_static_amax(const mq_second_level *second, float largest, const float *amax, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = mq_static_amax_of(amax[i], second->amax, second->divisor, largest);
}

/* Strips of whole block rows, or for tall blocks pieces of at most PIECE rows whose maxima are merged afterwards. */
enum { PIECE = 64 };

typedef struct amax_job {
    const mq_tensor *x;
    const mq_grid *grid;
    const mq_kernels *kernels;
    int64_t piece_rows, pieces_per_block, row_pieces;
    float *partial; /* [row_pieces, grid->cols] */
    mq_row_buffers buffers;
} amax_job;

/* Magnitudes are compared as integers, so that NaN wins. */
static void merge_amax(float *into, const float *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (mq_bits_of(from[i]) > mq_bits_of(into[i])) into[i] = from[i];
}

static void amax_pieces(void *arg, int64_t begin, int64_t end, int worker)
{
    amax_job *job = arg;
    const mq_grid *grid = job->grid;
    const int64_t rows = job->x->shape[0], cols = job->x->shape[1];
    float *row_amax = mq_row_buffers_get(&job->buffers, worker, 1);
    for (int64_t piece = begin; piece < end; piece++) {
        const int64_t block = piece / job->pieces_per_block, part = piece % job->pieces_per_block;
        const int64_t first = block * grid->block_rows + part * job->piece_rows;
        const int64_t last = MQ_MIN(MQ_MIN(first + job->piece_rows, (block + 1) * grid->block_rows), rows);
        float *out = job->partial + piece * grid->cols;
        memset(out, 0, (size_t)grid->cols * sizeof(float));
        for (int64_t r = first; r < last; r++) {
            const void *x = mq_row_contiguous(job->x, r, mq_row_buffers_get(&job->buffers, worker, 0));
            job->kernels->amax_blocks[job->x->dtype](x, cols, grid->block_cols, row_amax);
            merge_amax(out, row_amax, cols > 0 ? grid->cols : 0);
        }
    }
}

int mq_amax(const mq_tensor *x, const mq_grid *grid, float *out, mq_error *err)
{
    amax_job job = {.x = x, .grid = grid, .kernels = mq_kernels_get()};
    job.piece_rows = MQ_MIN(grid->block_rows, (int64_t)PIECE);
    job.pieces_per_block = MQ_CEIL_DIV(grid->block_rows, job.piece_rows);
    job.row_pieces = grid->rows * job.pieces_per_block;
    const size_t row_bytes[2] = {mq_row_scratch_bytes(x), (size_t)grid->cols * sizeof(float)};
    int rc = mq_row_buffers_init(&job.buffers, row_bytes, 2, err);
    if (rc != MQ_OK) return rc;
    const size_t nbytes = (size_t)job.row_pieces * (size_t)grid->cols * sizeof(float);
    job.partial = mq_alloc(nbytes);
    if (job.partial == NULL) {
        rc = mq_fail_memory(err, "block maxima", nbytes);
        goto done;
    }
    mq_parallel_for(job.row_pieces, mq_rows_per_chunk(x->shape[1] * job.piece_rows), amax_pieces, &job);
    for (int64_t block = 0; block < grid->rows; block++) {
        const float *partial = job.partial + block * job.pieces_per_block * grid->cols;
        memcpy(out + block * grid->cols, partial, (size_t)grid->cols * sizeof(float));
        for (int64_t part = 1; part < job.pieces_per_block; part++)
            merge_amax(out + block * grid->cols, partial + part * grid->cols, grid->cols);
    }
done:
    mq_free(job.partial);
    mq_row_buffers_free(&job.buffers);
    return rc;
}
