/* AWQ's scales for the columns of a weight (Lin et al. 2024, "AWQ: activation-aware weight quantization", section 3.2),
 * by the reference's formulas (awq_lite in model_calib.py), and SmoothQuant's (Xiao et al. 2023). */
#ifndef MQ_AWQ_H
#define MQ_AWQ_H

#include "core/tensor.h"

/* out [columns]: the mean over rows, one at least, of |w| / the largest |w| of its block (0: of its row), in the
 * weight's dtype. */
int mq_awq_weight_scale(const mq_tensor *weight, int64_t block, const char *name, float *out, mq_error *err);

/* out [n] = activations^alpha / weights^(1 - alpha), between 1e-4 and 1e4, over the geometric mean of the largest and
 * the smallest. activations [n]: means of |x|; weights [n]: of mq_awq_weight_scale; both finite, or MQ_ERR_VALUE. */
int mq_awq_scale(const float *activations, const float *weights, int64_t n, float alpha, float *out, mq_error *err);

/* out [n] = weights^(1 - alpha) / activations^alpha, between 1e-4 and 1e4; 1 for channels without activations. Both are
 * maxima, finite, or MQ_ERR_VALUE; the power of weights is rounded to their dtype. */
int mq_smoothquant_scale(const float *activations, const float *weights, mq_dtype dtype, int64_t n, float alpha,
                         float *out, mq_error *err);

#endif
