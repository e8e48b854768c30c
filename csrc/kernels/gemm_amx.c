/* The matrix product's kernel for AMX: 2 x 2 tiles of 16 x 16 sums (tiles 0 to 3), two tiles of A (4, 5), two of B
 * (6, 7); a step is 32 of K (Intel, Optimization Reference Manual, chapter 20). Rows come in sixteens, padded with
 * zeros. tdpbf16ps adds in its own order and flushes denormals: bits differ from AVX512-BF16's. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/gemm_kernel.h"

#include "core/cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")

enum { NR = 32, TILE_UNITS = 16, ROW_BYTES = NR * 4 };

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

static const tile_config config = {
    .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static void begin(void)
{
    _tile_loadconfig(&config);
}

static void end(void)
{
    _tile_release();
}

/* A streams past, hinted so that it does not push the panel of B out of L1: a third faster. */
static void tile_32x32(const mq_gemm_tile *tile)
{
    const char *a = tile->a, *b = tile->b;
    float *c = tile->c;
    if (tile->add) {
        _tile_loadd(0, c, ROW_BYTES);
        _tile_loadd(1, c + 16, ROW_BYTES);
        _tile_loadd(2, c + 16 * NR, ROW_BYTES);
        _tile_loadd(3, c + 16 * NR + 16, ROW_BYTES);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < tile->depth; k += TILE_UNITS, a += TILE_UNITS * 4, b += TILE_UNITS * ROW_BYTES) {
        _tile_loadd(6, b, ROW_BYTES);
        _tile_stream_loadd(4, a, tile->lda);
        _tile_loadd(7, b + 64, ROW_BYTES);
        _tile_stream_loadd(5, a + 16 * tile->lda, tile->lda);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ROW_BYTES);
    _tile_stored(1, c + 16, ROW_BYTES);
    _tile_stored(2, c + 16 * NR, ROW_BYTES);
    _tile_stored(3, c + 16 * NR + 16, ROW_BYTES);
}

static void tile_16x32(const mq_gemm_tile *tile)
{
    const char *a = tile->a, *b = tile->b;
    float *c = tile->c;
    if (tile->add) {
        _tile_loadd(0, c, ROW_BYTES);
        _tile_loadd(1, c + 16, ROW_BYTES);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t k = 0; k < tile->depth; k += TILE_UNITS, a += TILE_UNITS * 4, b += TILE_UNITS * ROW_BYTES) {
        _tile_stream_loadd(4, a, tile->lda);
        _tile_loadd(6, b, ROW_BYTES);
        _tile_loadd(7, b + 64, ROW_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, ROW_BYTES);
    _tile_stored(1, c + 16, ROW_BYTES);
}

static void tile_amx(const mq_gemm_tile *tile)
{
    if (tile->rows > 16) tile_32x32(tile);
    else tile_16x32(tile);
}

#pragma GCC pop_options

const mq_gemm_kernel mq_gemm_kernel_amx = {
    .name = "amx", .needs = MQ_CPU_AVX512_BF16 | MQ_CPU_AMX_BF16, .unit = MQ_UNIT_PAIR, .mr = 32, .nr = NR,
    .row_multiple = 16, .k_multiple = TILE_UNITS, .k_block = 288, .begin = begin, .end = end, .tile = tile_amx,
    .helpers = &mq_gemm_helpers_avx512_bf16,
};
#endif
