/* H = U U^T with U upper triangular: column by column, what is lost of the columns before can be made up for by those
 * behind (GPTQ, Frantar et al. 2023; in this form LDLQ, Chee et al. 2023, which needs no inverse). */
#ifndef MQ_FACTOR_H
#define MQ_FACTOR_H

#include "core/error.h"

/* Replaces h [n, n] (symmetric, the order of columns being that of processing) by the strict upper triangle of U with a
 * diagonal of ones; diagonal [n] gets what each column's own squared rounding counts: H = U diag(diagonal) U^T. What
 * is below the diagonal becomes 0. MQ_ERR_VALUE if h is not positive definite to float32's precision: then h is of no
 * use any more. Runs on the pool. */
int mq_factor(float *h, int64_t n, float *diagonal, mq_error *err);

#endif
