#include "kernels/softmax.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float lanes __attribute__((vector_size(4 * MQ_SOFTMAX_LANES)));
typedef int32_t bits __attribute__((vector_size(4 * MQ_SOFTMAX_LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * MQ_SOFTMAX_LANES)));

#define lane_numbers ((bits){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define all(value) ((lanes){0} + (value))
#define load(source) (*(const loose *)(source))
typedef float loose __attribute__((vector_size(4 * MQ_SOFTMAX_LANES), aligned(4), may_alias));

#define SUFFIX c
#define MULADD(a, b, c) ((a) * (b) + (c))
/* a where it is larger, b where not or where a is NaN. */
#define LARGER(a, b) ((lanes)(((bits)(a) & ((a) > (b))) | ((bits)(b) & ~((a) > (b)))))
/* y * 2^n, n being in the low bits of t; zero below the smallest x, NaN where x is. */
#define TIMES_POWER(y, t, n, x, smallest) \
    ((lanes)((((bits)(y) + ((bits)(t) << 23)) & ~((x) < (smallest))) | (((x) != (x)) & 0x7fc00000)))
/* To bfloat16, to nearest even; a NaN becomes the quiet one. */
#define ROUNDED(p) \
    __builtin_convertvector((NEAREST((bits)(p)) >> 16 & ((p) == (p))) | (((p) != (p)) & 0x7fc0), halves)
#define NEAREST(p) ((p) + 0x7fff + ((p) >> 16 & 1))
#include "kernels/softmax.inc"
#undef SUFFIX

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SUFFIX avx2
#include "kernels/softmax.inc"
#undef SUFFIX
#pragma GCC pop_options

#undef MULADD
#undef LARGER
#undef TIMES_POWER
#define MULADD(a, b, c) ((lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define LARGER(a, b) ((lanes)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define TIMES_POWER(y, t, n, x, smallest) \
    ((lanes)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)(x), (__m512)all(smallest), _CMP_NLT_UQ), \
                                   (__m512)(y), (__m512)(n)))

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define SUFFIX avx512
#include "kernels/softmax.inc"
#undef SUFFIX
#pragma GCC pop_options

#undef ROUNDED
#define ROUNDED(p) ((halves)_mm512_cvtneps_pbh((__m512)(p)))

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#define SUFFIX avx512_bf16
#include "kernels/softmax.inc"
#undef SUFFIX
#pragma GCC pop_options
#else
#define table_avx2 table_c
#define table_avx512 table_c
#define table_avx512_bf16 table_c
#endif

const mq_softmax_kernels *mq_softmax_table_of(mq_isa isa)
{
    static const mq_softmax_kernels *const tables[MQ_ISA_COUNT] = {&table_c, &table_avx2, &table_avx512};
    return tables[isa];
}

const mq_softmax_kernels *mq_softmax_table(void)
{
    if (mq_cpu_features() & MQ_CPU_AVX512_BF16) return &table_avx512_bf16;
    return mq_softmax_table_of(mq_cpu_isa());
}
