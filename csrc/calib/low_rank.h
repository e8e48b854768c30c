/* What is left of a weight when a product of low rank is taken off it (SVDQuant, Li et al. 2024). */
#ifndef MQ_LOW_RANK_H
#define MQ_LOW_RANK_H

#include "core/tensor.h"

/* out (like weight [rows, columns], contiguous) = weight - up * down, in float32, rounded once to weight's dtype.
 * up [rows, rank] and down [rank, columns] are contiguous float32. Runs on the pool; the bits never depend on that. */
int mq_subtract_product(const mq_tensor *weight, const float *up, const float *down, int64_t rank, mq_tensor *out,
                        mq_error *err);

#endif
