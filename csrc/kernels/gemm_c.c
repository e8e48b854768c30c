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

static const mq_gemm_helpers helpers = {convert, transpose, interleave, store_tile};

const mq_gemm_kernel mq_gemm_kernel_c = {
    .name = "c", .unit = MQ_UNIT_F32, .mr = MR, .nr = NR, .row_multiple = 1, .k_multiple = 1, .k_block = 512,
    .tile = tile_c, .helpers = &helpers,
};
