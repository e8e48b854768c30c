/* The gradient of a quantizer: straight through (Bengio et al. 2013, "Estimating or propagating gradients through
 * stochastic neurons", section 4), but zero where rounding clipped. */
#ifndef MQ_STRAIGHT_THROUGH_H
#define MQ_STRAIGHT_THROUGH_H

#include "quant/quantizer.h"

typedef struct mq_gradient_rows {
    mq_dtype dtype;           /* of all three: MQ_F32, MQ_BF16 or MQ_F16 */
    int64_t rows, cols;
    const void *x;            /* [rows, cols], what the quantizer was given */
    const void *gradient;     /* of what it gave */
    void *out;                /* of x; may be gradient */
} mq_gradient_rows;

/* Rows begin to end of out. Magnitudes above the amax of their tensor, row, column or block were clipped; without an
 * amax nothing is. Allocates nothing; rows are independent. mq_quantizer_ready must have said MQ_OK. */
void mq_quantizer_gradient(const mq_quantizer *quantizer, const mq_gradient_rows *m, int64_t begin, int64_t end);

#endif
