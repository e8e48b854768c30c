#include "kernels/row_ops.h"

#include <math.h>
#include <string.h>

/* Element i is read before it is written: out may be in, but not overlap it otherwise. */
#if defined(__GNUC__) && !defined(__clang__)
#define NO_CARRY _Pragma("GCC ivdep")
#else
#define NO_CARRY
#endif

/* A fixed number of partial sums, so that a reduction's bits do not depend on the vector length. */
enum { LANES = 16 };

/* Half of the partial sums as one value, as gcc 12 does not keep an array of them in registers (a norm took twice as
 * long), and splits wider values badly for AVX2. */
enum { HALF = LANES / 2 };
typedef float f32_lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u32_lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t u16_lanes __attribute__((vector_size(16), aligned(2), may_alias));

MQ_INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

MQ_INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

MQ_INLINE float bf16_to_float(uint16_t x)
{
    return float_of((uint32_t)x << 16);
}

/* To nearest, ties to even; a NaN stays a NaN. */
MQ_INLINE uint16_t float_to_bf16(float x)
{
    uint32_t bits = bits_of(x);
    uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    uint32_t chosen = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
    return (uint16_t)(chosen >> 16);
}

/* The same for results of arithmetic on bfloat16 values: their NaNs have no low bits that could carry into the sign. */
MQ_INLINE uint32_t round_to_bf16(float x)
{
    uint32_t bits = bits_of(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

#define TYPED_KERNEL(name, type) NAME_OF(name##_##type, ISA)
#define ROW_KERNELS(type) { \
    TYPED_KERNEL(amax, type), TYPED_KERNEL(amax_columns, type), TYPED_KERNEL(rmsnorm, type), TYPED_KERNEL(rope, type), \
    TYPED_KERNEL(silu_mul, type), TYPED_KERNEL(add, type), TYPED_KERNEL(from_f32, type), TYPED_KERNEL(to_f32, type), \
    TYPED_KERNEL(rmsnorm_backward, type), TYPED_KERNEL(rmsnorm_weight_backward, type), \
    TYPED_KERNEL(silu_mul_backward, type), TYPED_KERNEL(dot, type) }

#define ISA c
#define MULADD(a, b, c) ((a) * (b) + (c))
#include "kernels/row_ops.inc"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,f16c")
#define ISA avx2
#define MULADD(a, b, c) __builtin_fmaf(a, b, c)
#include "kernels/row_ops.inc"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#define ISA avx512
#define MULADD(a, b, c) __builtin_fmaf(a, b, c)
#include "kernels/row_ops.inc"
#pragma GCC pop_options

static const mq_row_ops *const tables[MQ_ISA_COUNT] = {&rows_c, &rows_avx2, &rows_avx512};
#else
static const mq_row_ops *const tables[MQ_ISA_COUNT] = {&rows_c, &rows_c, &rows_c};
#endif

const mq_row_ops *mq_row_ops_table_of(mq_isa isa)
{
    return tables[isa];
}

const mq_row_ops *mq_row_ops_table(void)
{
    return tables[mq_cpu_isa()];
}

const mq_typed_row_ops *mq_row_ops_of(mq_dtype dtype)
{
    return dtype == MQ_BF16 ? &mq_row_ops_table()->bf16 : &mq_row_ops_table()->f32;
}
