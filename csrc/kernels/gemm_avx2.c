/* The matrix product's kernels for AVX2 and FMA: 6 rows x 2 vectors of sums, as BLIS has it for Haswell. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "kernels/gemm_kernel.h"

#include "core/cpu.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

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

/* ---- codes ---- */

typedef struct v16 {
    __m256 low, high;
} v16;

MQ_INLINE v16 v_load(const void *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps((const float *)p + 8)}; }
MQ_INLINE v16 v_splat(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MQ_INLINE v16 v_mul(v16 a, v16 b) { return (v16){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
MQ_INLINE v16 v_add(v16 a, v16 b) { return (v16){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }

MQ_INLINE __m256 half8(__m256 x)
{
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

MQ_INLINE v16 v_half(v16 a) { return (v16){half8(a.low), half8(a.high)}; }

/* Of finite numbers. */
MQ_INLINE __m256 bfloat8(__m256 x)
{
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32((int)0xffff0000u)));
}

MQ_INLINE v16 v_bfloat(v16 a) { return (v16){bfloat8(a.low), bfloat8(a.high)}; }

MQ_INLINE void v_of_four(v16 *out, const v16 *v, int bfloat)
{
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) out[j] = bfloat ? v_bfloat(v[j]) : v[j];
}

/* A permutation looks at three bits; the fourth chooses between entries 0 to 7 and 8 to 15. */
MQ_INLINE __m256 lookup8(v16 table, const uint8_t *words, int j)
{
    const __m256i codes = _mm256_srli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)words)), 4 * j);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes), _mm256_permutevar8x32_ps(table.high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

MQ_INLINE v16 v_nibbles(const uint8_t *chunk, int j, v16 table)
{
    return (v16){lookup8(table, chunk, j), lookup8(table, chunk + 16, j)};
}

/* Words that end with byte j. */
MQ_INLINE __m256i words8(const uint8_t *p, int j)
{
    return _mm256_loadu_si256((const void *)(p - 3 + j));
}

MQ_INLINE __m256 floats8(__m256i words, int shift)
{
    const __m256i mask = _mm256_set1_epi32((int)(0x80000000u | 0x7f000000u >> shift));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_srai_epi32(words, shift), mask));
}

MQ_INLINE v16 v_floats(const uint8_t *chunk, int j, int shift)
{
    return (v16){floats8(words8(chunk, j), shift), floats8(words8(chunk + 32, j), shift)};
}

MQ_INLINE __m256 ints8(__m256i words)
{
    return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xff000000u)));
}

MQ_INLINE v16 v_ints(const uint8_t *chunk, int j)
{
    return (v16){ints8(words8(chunk, j)), ints8(words8(chunk + 32, j))};
}

MQ_INLINE void v_store(void *p, v16 v)
{
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps((float *)p + 8, v.high);
}

MQ_INLINE v16 v_dot(v16 sum, v16 n, const void *x)
{
    const v16 values = v_load(x);
    return (v16){_mm256_fmadd_ps(n.low, values.low, sum.low), _mm256_fmadd_ps(n.high, values.high, sum.high)};
}

MQ_INLINE float v_total(v16 a)
{
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#define V16 v16
#define V_LOAD v_load
#define V_SPLAT v_splat
#define V_MUL v_mul
#define V_HALF v_half
#define V_FLOATS v_floats
#define V_INTS v_ints
#define NUM v16
#define N_BYTES ((int64_t)sizeof(v16))
#define N_STORE v_store
#define N_TABLE v_load
#define N_OF_TABLE(v, bfloat) ((bfloat) ? v_bfloat(v) : (v))
#define N_NIBBLES v_nibbles
#define N_OF_FOUR v_of_four
#define SUM v16
#define S_ZERO v_splat(0.0f)
#define S_ADD v_add
#define S_DOT v_dot
#define S_TOTAL v_total
#define FEW 2
#include "kernels/gemm_codes.inc"

static const mq_gemm_helpers helpers = {convert, transpose, interleave, store_tile, dot, decode};

#pragma GCC pop_options

const mq_gemm_kernel mq_gemm_kernel_avx2 = {
    .name = "avx2", .needs = MQ_CPU_AVX2, .unit = MQ_UNIT_F32, .mr = MR, .nr = NR,
    .row_multiple = 1, .k_multiple = 1, .k_block = 256, .tile = tile_avx2, .helpers = &helpers,
};
#endif
