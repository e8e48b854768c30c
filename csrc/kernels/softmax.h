/* The rows of a blockwise softmax: maximum, exponentials and sum of one block, given those of the blocks before.
 *
 * One generic source (softmax.inc) compiled per ISA. It adds in sixteen lanes and multiplies without fusing, so the bits are
 * the same on every ISA. exp is within 2 units in the last place and flushes results below 2^-126 to zero. */
#ifndef MQ_SOFTMAX_H
#define MQ_SOFTMAX_H

#include "core/cpu.h"
#include "core/tensor.h"

enum { MQ_SOFTMAX_LANES = 16 };

/* The softmax of a row as far as it has been seen: sum of exp(score - max). Starts as {-INFINITY, 0}. */
typedef struct mq_softmax {
    float max, sum;
} mq_softmax;

typedef struct mq_softmax_kernels {
    /* p = exp(scores - new maximum) as MQ_F32 or MQ_BF16; n is a multiple of 16; masked scores are -INFINITY. Returns the
     * factor that makes what was weighted by earlier p fit the new maximum. */
    float (*update)(mq_softmax *state, const float *scores, int64_t n, void *p, mq_dtype dtype);
    /* out = factor * x as MQ_F32 or MQ_BF16; out may be x. */
    void (*scale)(const float *x, float factor, int64_t n, void *out, mq_dtype dtype);
    void (*exp)(const float *x, float *y, int64_t n);             /* n any; for tests and for others */
} mq_softmax_kernels;

const mq_softmax_kernels *mq_softmax_table(void);
const mq_softmax_kernels *mq_softmax_table_of(mq_isa isa);        /* for tests */

#endif
