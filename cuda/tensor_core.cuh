/* Products of small matrices by a warp's tensor cores, the loads that feed them, and copies into shared memory that run
 * while the thread goes on: each instruction in a function of its own (PTX ISA 8.7, sections 9.7.9.25 and 9.7.14). The
 * emulation does what the manual says of each lane's part. */
#ifndef MODELQ_TENSOR_CORE_CUH
#define MODELQ_TENSOR_CORE_CUH

#include "rows.cuh"

/* Lane l of a warp: group l / 4, and l % 4 within it. What lanes hold of a matrix, two neighbouring columns a register:
 *   A (16, 16): rows group and group + 8, columns 2 * within + {0, 1}; then the same with columns + 8;
 *   B (16, 8):  rows 2 * within + {0, 1}, column group; then the same with rows + 8;
 *   C (16, 8):  float32, row group, columns 2 * within + {0, 1}; then the same with row + 8. */
typedef struct mq_mma {
    float c[4];
    uint32_t a[4], b[2];
} mq_mma;

#if MQ_IS_EMULATED
MQ_DEVICE float mq_half_of(uint32_t pair, int which)
{
    return mq_float_of(which ? pair & 0xffff0000u : pair << 16);
}

static inline void mq_mma_lanes(void *const *lanes)
{
    float a[16][16], b[16][8];
    for (int lane = 0; lane < MQ_WARP; lane++) {
        const mq_mma *own = (const mq_mma *)lanes[lane];
        const int group = lane / 4, within = lane % 4;
        for (int i = 0; i < 8; i++)
            a[group + i / 2 % 2 * 8][2 * within + i % 2 + i / 4 * 8] = mq_half_of(own->a[i / 2], i % 2);
        for (int i = 0; i < 4; i++) b[2 * within + i % 2 + i / 2 * 8][group] = mq_half_of(own->b[i / 2], i % 2);
    }
    for (int lane = 0; lane < MQ_WARP; lane++) {
        mq_mma *own = (mq_mma *)lanes[lane];
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) own->c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][2 * (lane % 4) + i % 2];
    }
}

/* Four matrices of 8 rows of 16 bytes: lane l names row l % 8 of matrix l / 8, and gets of each matrix elements
 * 2 * (l % 4) + {0, 1} of row l / 4; transposed: of column l / 4. */
typedef struct mq_matrices {
    const void *row;
    uint32_t parts[4];
    bool is_transposed;
} mq_matrices;

static inline void mq_matrices_lanes(void *const *lanes)
{
    uint16_t rows[4][8][8];
    for (int lane = 0; lane < MQ_WARP; lane++)
        memcpy(rows[lane / 8][lane % 8], ((const mq_matrices *)lanes[lane])->row, 16);
    for (int lane = 0; lane < MQ_WARP; lane++) {
        mq_matrices *own = (mq_matrices *)lanes[lane];
        for (int i = 0; i < 4; i++) {
            const int first = 2 * (lane % 4), other = lane / 4;
            const uint16_t low = own->is_transposed ? rows[i][first][other] : rows[i][other][first];
            const uint16_t high = own->is_transposed ? rows[i][first + 1][other] : rows[i][other][first + 1];
            own->parts[i] = (uint32_t)high << 16 | low;
        }
    }
}
#endif

/* c += a * b. The whole warp calls. */
MQ_DEVICE void mq_multiply_add(float *c, const uint32_t *a, const uint32_t *b)
{
#if MQ_IS_EMULATED
    mq_mma own = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    mq_shim_warp(mq_mma_lanes, &own);
    for (int i = 0; i < 4; i++) c[i] = own.c[i];
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* row: in shared memory, aligned to 16 bytes. The whole warp calls. */
template <bool IsTransposed>
MQ_DEVICE void mq_load_matrices(uint32_t *parts, const void *row)
{
#if MQ_IS_EMULATED
    mq_matrices own = {row, {0, 0, 0, 0}, IsTransposed};
    mq_shim_warp(mq_matrices_lanes, &own);
    for (int i = 0; i < 4; i++) parts[i] = own.parts[i];
#else
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    if constexpr (IsTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3]) : "r"(at) : "memory");
#endif
}

/* Two bfloat16 in a register, the first one low. */
MQ_DEVICE uint32_t mq_pair_of(float first, float second)
{
#if MQ_IS_EMULATED
    return (uint32_t)mq_narrow<MQ_BF16>(second) << 16 | mq_narrow<MQ_BF16>(first);
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
    return pair;
#endif
}

/* ---- asynchronous copies ---- */

/* 16 bytes from memory, of which count are there and the rest become zeros. Both aligned to 16. */
MQ_DEVICE void mq_copy_async(void *to, const void *from, int count)
{
#if MQ_IS_EMULATED
    mq_shim_copy_async(to, from, count);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(count) : "memory");
#endif
}

/* What was copied since the last time is a group. */
MQ_DEVICE void mq_copy_close(void)
{
#if MQ_IS_EMULATED
    mq_shim_copy_close();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Until all groups are there that the thread closed. Others see them behind a barrier. */
MQ_DEVICE void mq_copy_wait(void)
{
#if MQ_IS_EMULATED
    mq_shim_copy_wait(0);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

#endif
