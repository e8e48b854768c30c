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

#endif
