/* What scores are made of. */
#ifndef MQ_SCORE_PARTS_H
#define MQ_SCORE_PARTS_H

#include "model/ops.h"
#include "quant/quantizer.h"

/* x as the quantizer leaves it: in out, or x itself where the quantizer is NULL or does nothing. */
const void *mq_score_quantized(const mq_quantizer *quantizer, void *out, const void *x, const mq_row_sizes *sizes);

/* sums (rows): of (gradient * (made - was))^2 over each row of width, the difference rounded to dtype, which made and
 * was are of; was NULL = made is the difference. Products beyond 1e10 count as 1e10, as in Model Optimizer. Returns the
 * sum over all rows. */
typedef struct mq_score_rows {
    const float *gradient;
    const void *made, *was;
    mq_dtype dtype;
    int64_t rows, width;
} mq_score_rows;
double mq_score_sum(double *sums, const mq_score_rows *rows);

#endif
