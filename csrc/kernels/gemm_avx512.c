/* The matrix product's kernels for AVX-512: 14 rows x 2 vectors of sums fill 28 of the 32 registers. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "kernels/gemm_kernel.h"

#include "core/cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

#define HELPERS_NR 32
#include "kernels/gemm_helpers.inc"

#define TILE tile_avx512
#define MR 14
#define NV 2
#define LANES 16
#define VEC __m512
#define VZERO _mm512_setzero_ps()
#define VLOAD(p) _mm512_loadu_ps(p)
#define VSTORE(p, v) _mm512_storeu_ps(p, v)
#define VBROADCAST(p) _mm512_set1_ps(*(const float *)(const void *)(p))
#define VMULADD(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#include "kernels/gemm_tile.inc"

/* Afterwards lane l of row 4 g + c holds column 4 l + c of rows 4 g to 4 g + 3. */
MQ_INLINE void transpose_in_lanes(__m512i *a)
{
    __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
}

void mq_gemm_transpose_avx512(const uint32_t *in, int64_t ldi, uint32_t *out, int64_t ldo)
{
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * ldi);
    transpose_in_lanes(a);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i even0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i even1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        __m512i odd1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        _mm512_storeu_si512(out + c * ldo, _mm512_shuffle_i32x4(even0, even1, 0x88));
        _mm512_storeu_si512(out + (4 + c) * ldo, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
        _mm512_storeu_si512(out + (8 + c) * ldo, _mm512_shuffle_i32x4(even0, even1, 0xdd));
        _mm512_storeu_si512(out + (12 + c) * ldo, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
    }
}

/* ---- codes ---- */

#include "kernels/gemm_codes_avx512.inc"

/* Of finite numbers. */
MQ_INLINE __m512 bfloat16(__m512 x)
{
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000u)));
}

MQ_INLINE void of_four(__m512 *out, const __m512 *v, int bfloat)
{
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) out[j] = bfloat ? bfloat16(v[j]) : v[j];
}

/* The permutation looks at the lowest four bits of a word. */
MQ_INLINE __m512 nibbles(const uint8_t *chunk, int j, __m512 table)
{
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)chunk));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, (unsigned)(4 * j)), table);
}

#define NUM __m512
#define N_BYTES 64
#define N_STORE(p, n) _mm512_storeu_ps(p, n)
#define N_TABLE(p) _mm512_loadu_ps(p)
#define N_OF_TABLE(v, bfloat) ((bfloat) ? bfloat16(v) : (v))
#define N_NIBBLES nibbles
#define N_OF_FOUR of_four
#define SUM __m512
#define S_ZERO _mm512_setzero_ps()
#define S_ADD(a, b) _mm512_add_ps(a, b)
#define S_DOT(sum, n, x) _mm512_fmadd_ps(n, _mm512_loadu_ps(x), sum)
#define S_TOTAL(a) _mm512_reduce_add_ps(a)
#include "kernels/gemm_codes.inc"

#pragma GCC pop_options

static const mq_gemm_helpers helpers = {convert, mq_gemm_transpose_avx512, interleave, store_tile, dot, decode};

const mq_gemm_kernel mq_gemm_kernel_avx512 = {
    .name = "avx512", .needs = MQ_CPU_AVX512, .unit = MQ_UNIT_F32, .mr = MR, .nr = NR,
    .row_multiple = 1, .k_multiple = 1, .k_block = 256, .tile = tile_avx512, .helpers = &helpers,
};
#endif
