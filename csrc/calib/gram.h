/* The Gram matrix H = X^T X of a linear's input, summed over tokens X [tokens, n]: what the searches of AWQ, GPTQ and
 * the local Hessian run on.
 *
 * Tokens are gathered in blocks of a fixed number, each block's product is summed in float32 (bfloat16 tokens are
 * multiplied as such), blocks in float64. The result depends on the order of tokens only: not on threads, nor on how
 * many came at a time; it merges to rounding. option: 0 for all of H, of which the half is kept (4 n^2 bytes), else the
 * size of the blocks on its diagonal, which are all that is computed and kept. */
#ifndef MQ_GRAM_H
#define MQ_GRAM_H

#include "calib/calib.h"

/* Elements of the result: n * n, or ceil(n / size) blocks of size * size, zero beyond n. */
int64_t mq_gram_count(const mq_calib *calib);
/* out [mq_gram_count], symmetric. MQ_ERR_VALUE if NaN or an infinity was seen, MQ_ERR_STATE if nothing was. */
int mq_gram_finish(mq_calib *calib, float *out, mq_error *err);

/* Adds what was summed elsewhere (a device) over `rows` tokens [rows, width]: sums as this kind saves them, the upper
 * triangle row by row or the blocks on the diagonal, mq_gram_sums(calib, width) of them. */
int64_t mq_gram_sums(const mq_calib *calib, int64_t width);
int mq_gram_add(mq_calib *calib, const double *sums, int64_t width, int64_t rows, mq_error *err);

#endif
