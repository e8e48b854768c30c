/* The matrix product's kernels in plain C: the fallback, and what the others are compared with. */
#include "kernels/gemm_kernel.h"

#define HELPERS_NR 16
#include "kernels/gemm_helpers.inc"

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

MQ_INLINE vec4 splat(const void *source)
{
    float value;
    memcpy(&value, source, sizeof value);
    return (vec4){value, value, value, value};
}

#define TILE tile_c
#define MR 2
#define NV 4
#define LANES 4
#define VEC vec4
#define VZERO ((vec4){0, 0, 0, 0})
#define VLOAD(p) (*(const vec4 *)(p))
#define VSTORE(p, v) (*(vec4 *)(p) = (v))
#define VBROADCAST(p) splat(p)
#define VMULADD(sum, a, b) ((sum) + (a) * (b))
#include "kernels/gemm_tile.inc"

static void transpose(const uint32_t *MQ_RESTRICT in, int64_t ldi, uint32_t *MQ_RESTRICT out, int64_t ldo)
{
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < 16; i++) out[j * ldo + i] = in[i * ldi + j];
}

/* ---- codes ---- */

typedef struct v16 {
    float x[16];
} v16;

#define FOR_LANES(expression) \
    v16 out; \
    for (int i = 0; i < 16; i++) out.x[i] = (expression); \
    return out

MQ_INLINE v16 v_load(const void *p)
{
    v16 out;
    memcpy(&out, p, sizeof out);
    return out;
}

MQ_INLINE v16 v_splat(float x) { FOR_LANES(x); }
MQ_INLINE v16 v_mul(v16 a, v16 b) { FOR_LANES(a.x[i] * b.x[i]); }
MQ_INLINE v16 v_add(v16 a, v16 b) { FOR_LANES(a.x[i] + b.x[i]); }
MQ_INLINE v16 v_half(v16 a) { FOR_LANES(mq_decode(mq_encode(a.x[i], MQ_CODEC(FP16)), MQ_CODEC(FP16))); }
MQ_INLINE v16 v_bfloat(v16 a) { FOR_LANES(bits_float(round_bits(float_bits(a.x[i])) & 0xffff0000u)); }
MQ_INLINE v16 v_ints(const uint8_t *chunk, int j) { FOR_LANES((float)(int8_t)chunk[4 * i + j] * 0x1p24f); }
MQ_INLINE v16 v_nibbles(const uint8_t *chunk, int j, v16 table)
{
    FOR_LANES(table.x[(chunk[2 * i + j / 2] >> (j % 2 * 4)) & 15]);
}

MQ_INLINE v16 v_floats(const uint8_t *chunk, int j, int shift)
{
    FOR_LANES(bits_float((chunk[4 * i + j] & 0x80u) << 24 | (chunk[4 * i + j] & 0x7fu) << (24 - shift)));
}

MQ_INLINE void v_of_four(v16 *out, const v16 *v, int bfloat)
{
    for (int j = 0; j < 4; j++) out[j] = bfloat ? v_bfloat(v[j]) : v[j];
}

/* Halves are added until one is left, in the order of wide registers. */
MQ_INLINE float v_total(v16 a)
{
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) a.x[i] += a.x[i + half];
    return a.x[0];
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
#define N_STORE(p, n) memcpy(p, &(n), sizeof(v16))
#define N_TABLE v_load
#define N_OF_TABLE(v, bfloat) ((bfloat) ? v_bfloat(v) : (v))
#define N_NIBBLES v_nibbles
#define N_OF_FOUR v_of_four
#define SUM v16
#define S_ZERO v_splat(0.0f)
#define S_ADD v_add
#define S_DOT(sum, n, x) v_add(sum, v_mul(n, v_load(x)))
#define S_TOTAL v_total
#define FEW 1
#include "kernels/gemm_codes.inc"

static const mq_gemm_helpers helpers = {convert, transpose, interleave, store_tile, dot, decode};

const mq_gemm_kernel mq_gemm_kernel_c = {
    .name = "c", .unit = MQ_UNIT_F32, .mr = MR, .nr = NR, .row_multiple = 1, .k_multiple = 1, .k_block = 512,
    .tile = tile_c, .helpers = &helpers,
};
