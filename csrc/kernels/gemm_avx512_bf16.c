/* The matrix product's kernel for AVX512-BF16: vdpbf16ps takes a pair of products where AVX-512 takes one. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "kernels/gemm_kernel.h"

#include "core/cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")

MQ_INLINE void round_32(const void *src, uint16_t *dst)
{
    __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps((const char *)src + 64), _mm512_loadu_ps(src));
    _mm512_storeu_si512(dst, (__m512i)rounded);
}

MQ_INLINE __m512 widen_16(const void *src)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(src)), 16));
}

MQ_INLINE void store_row_32(const mq_gemm_store *store, const float *c, char *out)
{
    const __m512 alpha = _mm512_set1_ps(store->alpha);
    __m512 low = _mm512_mul_ps(alpha, _mm512_loadu_ps(c)), high = _mm512_mul_ps(alpha, _mm512_loadu_ps(c + 16));
    if (store->bias != NULL) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(store->bias));
        high = _mm512_add_ps(high, _mm512_loadu_ps(store->bias + 16));
    }
    if (store->accumulate) {
        low = _mm512_add_ps(low, widen_16(out));
        high = _mm512_add_ps(high, widen_16(out + 32));
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

#define HELPERS_NR 32
#define ROUND_32 round_32
#define STORE_ROW_32 store_row_32
#include "kernels/gemm_helpers.inc"

/* One pair of bfloat16 to every lane. */
MQ_INLINE __m512bh broadcast_pair(const void *pair)
{
    int bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

#define TILE tile_avx512_bf16
#define MR 14
#define NV 2
#define LANES 16
#define VEC __m512
#define VZERO _mm512_setzero_ps()
#define VLOAD(p) _mm512_loadu_ps(p)
#define VSTORE(p, v) _mm512_storeu_ps(p, v)
#define VBROADCAST(p) (__m512)broadcast_pair(p)
#define VMULADD(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#include "kernels/gemm_tile.inc"

/* ---- codes ---- */

#include "kernels/gemm_codes_avx512.inc"

MQ_INLINE void of_four(__m256i *out, const __m512 *v)
{
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v[j + 1], v[j]);
        out[j] = _mm512_castsi512_si256(both);
        out[j + 1] = _mm512_extracti64x4_epi64(both, 1);
    }
}

/* The permutation looks at the lowest four bits of a word. */
MQ_INLINE __m256i nibbles(const uint8_t *chunk, int j, __m256i table)
{
    const __m256i words = _mm256_loadu_si256((const void *)chunk);
    return _mm256_permutexvar_epi16(j == 0 ? words : _mm256_srli_epi16(words, 4 * j), table);
}

MQ_INLINE float total(__m256 eight)
{
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#define NUM __m256i
#define N_BYTES 32
#define N_STORE(p, n) _mm256_storeu_si256((void *)(p), n)
#define N_TABLE(p) _mm256_loadu_si256((const void *)(p))
#define N_OF_TABLE(v, bfloat) ((__m256i)_mm512_cvtneps_pbh(v))
#define N_NIBBLES nibbles
#define N_OF_FOUR(out, v, bfloat) of_four(out, v)
#define SUM __m256
#define S_ZERO _mm256_setzero_ps()
#define S_ADD(a, b) _mm256_add_ps(a, b)
#define S_DOT(sum, n, x) _mm256_dpbf16_ps(sum, (__m256bh)(n), (__m256bh)_mm256_loadu_si256((const void *)(x)))
#define S_TOTAL(a) total(a)
#include "kernels/gemm_codes.inc"

#pragma GCC pop_options

const mq_gemm_helpers mq_gemm_helpers_avx512_bf16 = {
    convert, mq_gemm_transpose_avx512, interleave, store_tile, dot, decode,
};

const mq_gemm_kernel mq_gemm_kernel_avx512_bf16 = {
    .name = "avx512_bf16", .needs = MQ_CPU_AVX512 | MQ_CPU_AVX512_BF16, .unit = MQ_UNIT_PAIR, .mr = MR, .nr = NR,
    .row_multiple = 1, .k_multiple = 1, .k_block = 256, .tile = tile_avx512_bf16,
    .helpers = &mq_gemm_helpers_avx512_bf16,
};
#endif
