/* The matrix product's kernels for AVX2 and FMA: 6 rows x 2 vectors of sums, as BLIS has it for Haswell. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "kernels/gemm_kernel.h"

#include "core/cpu.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define HELPERS_NR 16
#include "kernels/gemm_helpers.inc"

#define TILE tile_avx2
#define MR 6
#define NV 2
#define LANES 8
#define VEC __m256
#define VZERO _mm256_setzero_ps()
#define VLOAD(p) _mm256_loadu_ps(p)
#define VSTORE(p, v) _mm256_storeu_ps(p, v)
#define VBROADCAST(p) _mm256_broadcast_ss((const float *)(const void *)(p))
#define VMULADD(sum, a, b) _mm256_fmadd_ps(a, b, sum)
#include "kernels/gemm_tile.inc"

/* 8 x 8: pairs of rows, then pairs of pairs, within the 128-bit halves; then the halves. */
MQ_INLINE void transpose8(const uint32_t *in, int64_t ldi, uint32_t *out, int64_t ldo)
{
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const void *)(in + i * ldi));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((void *)(out + i * ldo), _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
        _mm256_storeu_si256((void *)(out + (i + 4) * ldo), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
}

static void transpose(const uint32_t *in, int64_t ldi, uint32_t *out, int64_t ldo)
{
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 16; j += 8) transpose8(in + i * ldi + j, ldi, out + j * ldo + i, ldo);
}

static const mq_gemm_helpers helpers = {convert, transpose, interleave, store_tile};

#pragma GCC pop_options

const mq_gemm_kernel mq_gemm_kernel_avx2 = {
    .name = "avx2", .needs = MQ_CPU_AVX2, .unit = MQ_UNIT_F32, .mr = MR, .nr = NR,
    .row_multiple = 1, .k_multiple = 1, .k_block = 256, .tile = tile_avx2, .helpers = &helpers,
};
#endif
