/* The largest magnitude of every block of a matrix. Two shapes of work: tiles of wide blocks, reduced by a thread
 * block; and blocks of at most a warp's columns, where a thread walks down eight columns. Both end in an atomic
 * maximum, which is exact in any order. */
#include "amax.cuh"

enum { TILE_ROWS = 64, TILE_COLS = 4096, STRIP_ROWS = 64 };

/* ---- kernels ---- */

typedef struct amax_args {
    const void *x;
    int64_t rows, cols, ld;
    mq_blocks blocks;
    int64_t row_pieces, col_pieces;    /* of a block; narrow: col_pieces are groups of columns, of a row */
    int64_t piece_rows, piece_cols;
    int width;                         /* threads side by side along a row: a power of two; narrow: of a block, or 0 */
    bool aligned;                      /* groups of MQ_GROUP columns may be loaded as one */
    uint32_t *out;
} amax_args;

static void describe(const amax_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, blocks of [%lld, %lld]", (long long)a.rows, (long long)a.cols, a.x,
             (long long)a.blocks.block_rows, (long long)a.blocks.block_cols);
}

/* Thread block: one piece of one block of the matrix. */
template <mq_dtype D>
static __global__ void amax_tile(amax_args a)
{
    const mq_place of_row = mq_place_of((int64_t)blockIdx.x, a.blocks.cols * a.col_pieces);
    const mq_place down = mq_place_of(of_row.row, a.row_pieces), across = mq_place_of(of_row.group, a.col_pieces);
    const int64_t row = down.row * a.blocks.block_rows + down.group * a.piece_rows;
    const int64_t col = across.row * a.blocks.block_cols + across.group * a.piece_cols;
    const int64_t row_end = MQ_MIN(MQ_MIN(row + a.piece_rows, (down.row + 1) * a.blocks.block_rows), a.rows);
    const int64_t col_end = MQ_MIN(MQ_MIN(col + a.piece_cols, (across.row + 1) * a.blocks.block_cols), a.cols);
    const int column = (int)threadIdx.x & (a.width - 1), line = (int)threadIdx.x / a.width;
    uint32_t largest = 0;
    for (int64_t r = row + line; r < row_end; r += MQ_THREADS / a.width) {
        for (int64_t c = col + column * MQ_GROUP; c < col_end; c += a.width * MQ_GROUP) {
            float x[MQ_GROUP];
            mq_load_group<D>(a.x, r * a.ld + c, (int)MQ_MIN(col_end - c, (int64_t)MQ_GROUP), a.aligned, x);
            for (int i = 0; i < MQ_GROUP; i++) largest = MQ_MAX(largest, mq_magnitude(x[i]));
        }
    }
    largest = mq_block_max(largest);
    if (threadIdx.x == 0) atomicMax(&a.out[down.row * a.blocks.cols + across.row], largest);
}

/* The largest magnitude of each run of a thread's columns that lies in one block. */
MQ_DEVICE void amax_runs(const amax_args &a, const uint32_t *largest, int64_t above, int64_t col, int count)
{
    mq_walk walk = mq_walk_from(col, &a.blocks);
    uint32_t run = 0;
    for (int i = 0; i < MQ_GROUP; i++) {
        if (i >= count) continue;
        run = MQ_MAX(run, largest[i]);
        const int64_t block = walk.block;
        mq_walk_step(&walk, &a.blocks);
        if (walk.within != 0 && i + 1 < count) continue;
        atomicMax(&a.out[above + block], run);
        run = 0;
    }
}

/* Thread: eight neighbouring columns, some rows of them. Blocks of 8, 16 or 32 columns are `width` threads of a warp,
 * which merge them first. */
template <mq_dtype D>
static __global__ void amax_narrow(amax_args a)
{
    const mq_place place = mq_place_of(mq_thread_index(), a.col_pieces), down = mq_place_of(place.row, a.row_pieces);
    const int64_t row = down.row * a.blocks.block_rows + down.group * a.piece_rows, col = place.group * MQ_GROUP;
    const int64_t row_end = MQ_MIN(MQ_MIN(row + a.piece_rows, (down.row + 1) * a.blocks.block_rows), a.rows);
    const int count = down.row < a.blocks.rows ? (int)MQ_MIN(a.cols - col, (int64_t)MQ_GROUP) : 0;
    uint32_t largest[MQ_GROUP] = {}, all = 0;
    for (int64_t r = row; r < row_end && count > 0; r++) {
        float x[MQ_GROUP];
        mq_load_group<D>(a.x, r * a.ld + col, count, a.aligned, x);
        for (int i = 0; i < MQ_GROUP; i++) largest[i] = MQ_MAX(largest[i], mq_magnitude(x[i]));
    }
    if (a.width == 0) {
        amax_runs(a, largest, down.row * a.blocks.cols, col, count);
        return;
    }
    for (int i = 0; i < MQ_GROUP; i++) all = MQ_MAX(all, largest[i]);
    all = mq_lanes_max(all, a.width);
    if (threadIdx.x % (unsigned)a.width == 0 && count > 0)
        atomicMax(&a.out[down.row * a.blocks.cols + col / a.blocks.block_cols], all);
}

typedef struct fill_args {
    uint32_t *out;
    int64_t count;
} fill_args;

static void describe(const fill_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld maxima at %p", (long long)a.count, (void *)a.out);
}

static __global__ void amax_zero(fill_args a)
{
    const int64_t i = mq_thread_index();
    if (i < a.count) a.out[i] = 0;
}

/* ---- launchers ---- */

typedef void (*amax_kernel)(amax_args);

static const amax_kernel tile_kernels[MQ_FLOAT_DTYPES] = {amax_tile<MQ_F32>, amax_tile<MQ_BF16>, amax_tile<MQ_F16>};
static const amax_kernel narrow_kernels[MQ_FLOAT_DTYPES] = {amax_narrow<MQ_F32>, amax_narrow<MQ_BF16>,
                                                            amax_narrow<MQ_F16>};

static int launch_narrow(amax_args *a, mq_dtype dtype, void *stream, mq_error *err)
{
    const int64_t block = a->blocks.block_cols;
    a->piece_rows = MQ_MIN(a->blocks.block_rows, (int64_t)STRIP_ROWS);
    a->row_pieces = MQ_CEIL_DIV(a->blocks.block_rows, a->piece_rows);
    a->width = block % MQ_GROUP == 0 && (block & (block - 1)) == 0 ? (int)(block / MQ_GROUP) : 0;
    a->col_pieces = MQ_ROUND_UP(MQ_CEIL_DIV(a->cols, (int64_t)MQ_GROUP), MQ_MAX((int64_t)a->width, (int64_t)1));
    const int64_t count = a->blocks.rows * a->row_pieces * a->col_pieces;
    const mq_launch launch = {"amax_narrow", mq_grid_for(count), stream, err};
    return mq_launch_kernel(&launch, narrow_kernels[dtype], *a);
}

static int launch_tiles(amax_args *a, mq_dtype dtype, void *stream, mq_error *err)
{
    a->piece_rows = MQ_MIN(a->blocks.block_rows, (int64_t)TILE_ROWS);
    a->piece_cols = MQ_MIN(a->blocks.block_cols, (int64_t)TILE_COLS);
    a->row_pieces = MQ_CEIL_DIV(a->blocks.block_rows, a->piece_rows);
    a->col_pieces = MQ_CEIL_DIV(a->blocks.block_cols, a->piece_cols);
    a->width = 1;
    while (a->width < MQ_THREADS && a->width * MQ_GROUP < a->piece_cols) a->width *= 2;
    a->aligned = a->aligned && (a->blocks.cols == 1 || a->blocks.block_cols % MQ_GROUP == 0);
    const int64_t count = a->blocks.rows * a->row_pieces * a->blocks.cols * a->col_pieces;
    const mq_launch launch = {"amax_tile", dim3((unsigned)MQ_MIN(count, (int64_t)UINT32_MAX)), stream, err};
    return mq_launch_kernel(&launch, tile_kernels[dtype], *a);
}

int mq_cuda_amax_blocks(const mq_cuda_matrix *x, const mq_blocks *blocks, float *out, void *stream, mq_error *err)
{
    const fill_args fill = {(uint32_t *)out, blocks->rows * blocks->cols};
    const mq_launch launch = {"amax_zero", mq_grid_for(fill.count), stream, err};
    int rc = mq_launch_kernel(&launch, amax_zero, fill);
    if (rc != MQ_OK || x->rows == 0 || x->cols == 0) return rc;
    amax_args a = {x->data, x->rows, x->cols, x->ld, *blocks, 1, 1, 1, 1, 1, mq_is_aligned(x), (uint32_t *)out};
    return blocks->block_cols <= MQ_WARP ? launch_narrow(&a, x->dtype, stream, err)
                                         : launch_tiles(&a, x->dtype, stream, err);
}

int mq_cuda_amax(const mq_cuda_amax_job *job, void *stream, mq_error *err)
{
    const int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc != MQ_OK) return rc;
    if (job->block_rows < 0 || job->block_cols < 0)
        return mq_fail(err, MQ_ERR_VALUE, "amax: blocks of [%lld, %lld]", (long long)job->block_rows,
                       (long long)job->block_cols);
    const mq_blocks blocks = mq_blocks_of(&job->x, job->block_rows, job->block_cols);
    return mq_cuda_amax_blocks(&job->x, &blocks, job->out, stream, err);
}
