/* From a tensor to the absolute maxima that a scheme's scales are made of. */
#ifndef MQ_SCALE_H
#define MQ_SCALE_H

#include "core/tensor.h"
#include "format/format.h"

/* The grid of blocks over a [rows, cols] matrix. Blocks at the right and lower edge may be partial. */
typedef struct mq_grid {
    int64_t block_rows, block_cols; /* actual extents, at least 1 */
    int64_t rows, cols;             /* number of blocks each way */
} mq_grid;

/* block_rows, block_cols: 0 = the whole extent. */
mq_grid mq_grid_make(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols);

/* The absolute maximum of every block of x (2-D, any strides; float32, bfloat16 or float16) as float32 [grid.rows,
 * grid.cols]. NaN wins over everything. Runs on the pool. */
int mq_amax(const mq_tensor *x, const mq_grid *grid, float *out, mq_error *err);

/* The fp32 scale of the whole tensor of a two-level scheme, amax / second_divisor; a zero amax counts as the largest
 * element, as the reference does. */
float mq_scale_second(const mq_scheme_row *scheme, float amax);

/* Blocks of a two-level scheme whose maxima calibration chose. Their scales are made in another order of operations
 * than those of maxima taken from the data (the reference's get_weights_scaling_factor_from_quantizer). divisor: the
 * largest element times the largest block scale; the tensor's scale is amax / divisor. */
enum { MQ_FOUR_OVER_SIX_DIVISOR = 6 * 256 };

typedef struct mq_second_level {
    float amax, divisor;
} mq_second_level;

float mq_second_scale(const mq_second_level *second, float largest);

/* out [count]: maxima from which the kernels make exactly those scales. out may be amax. */
void mq_static_amax(const mq_second_level *second, float largest, const float *amax, int64_t count, float *out);

#endif
