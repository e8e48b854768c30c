/* What a quantizer does to a row of activations besides rounding it: it multiplies the columns (pre_quant_scale),
 * rotates blocks of columns by a normalised Hadamard matrix, and takes a bias off that it adds back afterwards. */
#ifndef MQ_PREPARE_H
#define MQ_PREPARE_H

#include "kernels/kernels.h"
#include "quant/quantizer.h"

enum { MQ_ROTATE_MAX = 1024 };

/* x [count] = x * H / sqrt(count), H the Hadamard matrix of Sylvester's construction; count a power of two. */
void mq_hadamard(float *x, int64_t count);

/* y = rotate(x * pre_scale), each step rounded to dtype; y may be x, which is copied where there is nothing to do. */
void mq_prepare_row(const mq_quantizer *quantizer, const mq_kernels *kernels, mq_dtype dtype, int64_t cols,
                    const void *x, void *y);

/* y += sign * bias, rounded to dtype. */
void mq_shift_row(const mq_quantizer *quantizer, const mq_kernels *kernels, mq_dtype dtype, int64_t cols,
                  float sign, void *y);

#endif
