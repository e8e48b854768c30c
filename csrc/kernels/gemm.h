/* C[M, N] = A[M, K] * B[N, K]^T (+ bias) (+ C): the one matrix product of the runtime.
 *
 * B (weights, or keys and values) is packed first into the layout of the micro-kernel in use; A and C are row-major.
 * MQ_GEMM_F32 computes in float32. MQ_GEMM_BF16 takes bfloat16 inputs (float32 ones are rounded to bfloat16) and sums
 * in float32, by AMX, AVX512-BF16 or, where neither is there, by float32 on rounded inputs.
 * Bits do not depend on the number of threads, nor on how M is cut; they may differ between ISAs. */
#ifndef MQ_GEMM_H
#define MQ_GEMM_H

#include "core/tensor.h"

typedef enum mq_gemm_kind { MQ_GEMM_F32, MQ_GEMM_BF16 } mq_gemm_kind;

struct mq_gemm_kernel;

/* An operand B of N rows and K columns, packed in memory of mq_gemm_packed_size bytes (64-byte aligned). The caller
 * sets data, packing fills in the rest. */
typedef struct mq_packed {
    mq_gemm_kind kind;
    int64_t n, k;
    void *data;
    const struct mq_gemm_kernel *kernel;            /* the micro-kernel whose layout data has */
} mq_packed;

typedef struct mq_gemm_args {
    int64_t m;
    const void *a; mq_dtype a_dtype; int64_t lda;   /* MQ_F32 or MQ_BF16; lda in elements */
    const mq_packed *b;
    const float *bias;                              /* [N] or NULL */
    void *c; mq_dtype c_dtype; int64_t ldc;         /* MQ_F32 or MQ_BF16 */
    int accumulate;                                 /* C += instead of C = */
    float alpha;                                    /* scales A*B^T before bias; 1 for plain products */
    int upper;                                      /* of a symmetric result: tiles below the diagonal are left out */
    int64_t diagonal;                               /* for upper: C[i, j] is on the diagonal where i == j + diagonal */
} mq_gemm_args;

size_t mq_gemm_packed_size(mq_gemm_kind kind, int64_t n, int64_t k);
size_t mq_packed_nbytes(const mq_packed *packed);       /* of one that is packed */

/* Packs w [N, K] (row-major, MQ_F32 or MQ_BF16, ldw elements between rows) into out->data. Runs on the pool. */
void mq_gemm_pack(mq_gemm_kind kind, const void *w, mq_dtype dtype, int64_t n, int64_t k, int64_t ldw, mq_packed *out);

/* The same from the transpose: w is [K, N], row-major. */
void mq_gemm_pack_transposed(mq_gemm_kind kind, const void *w, mq_dtype dtype, int64_t n, int64_t k, int64_t ldw,
                             mq_packed *out);

/* Runs on the pool (inline inside a job). No allocation: scratch (about 230 KB) lives on the stack. */
void mq_gemm_run(const mq_gemm_args *args);

/* The dispatch table: "c", "avx2", "avx512", "avx512_bf16" or "amx" for a kind, the best one at first. Forcing one
 * is for tests and benchmarks, between products: NULL goes back to the best. MQ_ERR_VALUE if it cannot run here or
 * not serve kind. */
const char *mq_gemm_kernel_name(mq_gemm_kind kind);
int mq_gemm_force_kernel(mq_gemm_kind kind, const char *name);

#endif
