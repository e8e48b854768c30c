/* X^T X of tokens X [k, n]: a symmetric product by the micro-kernels of the GEMM, of which only the tiles on and above
 * the diagonal are computed. Bits as the GEMM's: independent of threads, and of how the result is cut. */
#ifndef MQ_SYRK_H
#define MQ_SYRK_H

#include "kernels/gemm.h"

enum { MQ_SYRK_MULTIPLE = 32 };  /* what a first row or column of a part must be a multiple of */

/* X in both operands' layouts. */
typedef struct mq_syrk {
    mq_packed packed;            /* X as the operand B: columns become panels */
    const void *rows;            /* X^T, row-major: [n rounded up, ldr] */
    mq_dtype dtype;
    int64_t ldr;                 /* elements */
} mq_syrk;

/* Bytes of memory that mq_syrk_pack needs (64-byte aligned). bf16: the products take bfloat16, sums are float32. */
size_t mq_syrk_nbytes(mq_gemm_kind kind, int64_t n, int64_t k);

typedef struct mq_syrk_tokens {
    const void *const *x; mq_dtype dtype;   /* k tokens of n elements, MQ_F32 or MQ_BF16 */
    int64_t n, k;
} mq_syrk_tokens;

/* Runs on the pool. */
void mq_syrk_pack(mq_gemm_kind kind, const mq_syrk_tokens *x, void *memory, mq_syrk *out);

typedef struct mq_syrk_part {
    int64_t row, rows, column, columns;  /* of X^T X; row and column multiples of MQ_SYRK_MULTIPLE */
    float *c;                            /* [rows rounded up to MQ_SYRK_MULTIPLE, ldc] */
    int64_t ldc;
} mq_syrk_part;

/* Elements below the diagonal are not defined, but within a few of it. */
void mq_syrk_run(const mq_syrk *x, const mq_syrk_part *part);

#endif
