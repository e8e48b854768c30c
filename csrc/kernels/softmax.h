/* The rows of a blockwise softmax: maximum, exponentials and sum of one block, given those of the blocks before.
 *
 * * One generic source (softmax.inc) compiled per ISA. It adds in sixteen lanes everywhere; only AVX-512 fuses
 * multiply and add in exp, so c and avx2 give the same bits. exp is within 2 units in the last place, results below
 * 2^-126 become zero. */
#ifndef MQ_SOFTMAX_H
#define MQ_SOFTMAX_H

#include "core/cpu.h"
#include "core/tensor.h"

enum { MQ_SOFTMAX_LANES = 16 };

/* The softmax of a row as far as it has been seen: sum of exp(score - max). Starts as {-INFINITY, 0}. */
typedef struct mq_softmax {
    float max, sum;
} mq_softmax;

/* p = exp(scores - maximum of each row so far). */
typedef struct mq_softmax_block {
    const float *scores;     /* [rows, n]; masked scores are -INFINITY */
    int64_t lds, rows, n;    /* n is a multiple of 16 */
    void *p;                 /* [rows, n] */
    mq_dtype dtype;          /* of p: MQ_F32 or MQ_BF16 */
    int64_t ldp;
    float *factors;          /* [rows]: what makes sums over earlier p fit the new maximum */
} mq_softmax_block;

typedef struct mq_softmax_kernels {
    void (*update)(mq_softmax *states, const mq_softmax_block *block);
    /* out = factor * x as MQ_F32 or MQ_BF16; out may be x. */
    void (*scale)(const float *x, float factor, int64_t n, void *out, mq_dtype dtype);
    void (*exp)(const float *x, float *y, int64_t n);             /* x <= 0 or NaN; any n */
} mq_softmax_kernels;

const mq_softmax_kernels *mq_softmax_table(void);
const mq_softmax_kernels *mq_softmax_table_of(mq_isa isa);        /* for tests */

#endif
