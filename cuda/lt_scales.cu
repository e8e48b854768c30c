/* Scales in the orders in which cuBLASLt reads them. */
#include "lt_scales.cuh"

enum { TILE_ROWS = 128, TILE_COLS = 4, TILE_WORDS = TILE_ROWS };   /* a word is a row's four scales */

/* ---- kernels ---- */

typedef struct tile_args {
    const uint8_t *in;
    uint32_t *out;
    int64_t rows, cols;
    int64_t tiles;             /* in a row of them */
    int64_t words;
} tile_args;

static void describe(const tile_args &a, char *out, size_t size)
{
    snprintf(out, size, "scales [%lld, %lld] at %p, tiles at %p", (long long)a.rows, (long long)a.cols,
             (const void *)a.in, (void *)a.out);
}

/* Word w of a tile, at byte 4 w = 16 (row % 32) + 4 (row / 32). */
static __global__ void tile_scales(tile_args a)
{
    const int64_t index = mq_thread_index();
    if (index >= a.words) return;
    const mq_place tile = mq_place_of(index / TILE_WORDS, a.tiles);
    const int word = (int)(index % TILE_WORDS);
    const int64_t row = tile.row * TILE_ROWS + word % 4 * 32 + word / 4, col = tile.group * TILE_COLS;
    uint32_t four = 0;
    for (int i = 0; i < TILE_COLS; i++)
        if (row < a.rows && col + i < a.cols) four |= (uint32_t)a.in[row * a.cols + col + i] << (8 * i);
    a.out[index] = four;
}

static void describe(const mq_lt_spread_job &a, char *out, size_t size)
{
    snprintf(out, size, "scales [%lld, %lld] at %p, %lld a row at %p", (long long)a.rows, (long long)a.cols,
             (const void *)a.in, (long long)a.ld, (void *)a.out);
}

static __global__ void spread_scales(mq_lt_spread_job a)
{
    const int64_t index = mq_thread_index();
    if (index >= a.rows * a.ld) return;
    const mq_place place = mq_place_of(index, a.ld);
    a.out[index] = place.group < a.cols ? a.in[(place.row * a.cols + place.group) * a.step] : 0.0f;
}

typedef struct factors_args {
    const float *a, *b;
    float beta;
    float *out;
} factors_args;

static void describe(const factors_args &a, char *out, size_t size)
{
    snprintf(out, size, "scales at %p and %p", (const void *)a.a, (const void *)a.b);
}

static __global__ void multiply_factors(factors_args a)
{
    if (mq_thread_index() != 0) return;
    a.out[0] = *a.a * *a.b;
    a.out[1] = a.beta;
}

/* ---- launchers ---- */

size_t mq_lt_tiled_nbytes(int64_t rows, int64_t cols)
{
    return (size_t)(MQ_ROUND_UP(rows, (int64_t)TILE_ROWS) * MQ_ROUND_UP(cols, (int64_t)TILE_COLS));
}

int mq_lt_tile(const uint8_t *in, int64_t rows, int64_t cols, uint8_t *out, void *stream, mq_error *err)
{
    const tile_args a = {in, (uint32_t *)out, rows, cols, MQ_CEIL_DIV(cols, (int64_t)TILE_COLS),
                         (int64_t)(mq_lt_tiled_nbytes(rows, cols) / 4)};
    const mq_launch launch = {"tile_scales", mq_grid_for(a.words), stream, err};
    return a.words == 0 ? MQ_OK : mq_launch_kernel(&launch, tile_scales, a);
}

int mq_lt_spread(const mq_lt_spread_job *job, void *stream, mq_error *err)
{
    const mq_launch launch = {"spread_scales", mq_grid_for(job->rows * job->ld), stream, err};
    return job->rows * job->ld == 0 ? MQ_OK : mq_launch_kernel(&launch, spread_scales, *job);
}

int mq_lt_factors(const float *a, const float *b, float beta, float *out, void *stream, mq_error *err)
{
    const factors_args args = {a, b, beta, out};
    const mq_launch launch = {"multiply_factors", dim3(1), stream, err};
    return mq_launch_kernel(&launch, multiply_factors, args);
}
