/* INT4 matrices from one checkpoint layout to another, without touching a value.
 *
 * Layouts of a [rows, cols] matrix of signed codes q in -8..7:
 *   ROW_PAIRS   uint8 [rows / 2, cols]: rows 2r (low nibble) and 2r + 1, two's complement (schemes.def's packing)
 *   INT32_ROW   int32 [rows, cols / 8]: column c at bit 4 * (c % 8), stored q + 8 (compressed-tensors)
 *   AWQ         int32 [cols, rows / 8]: bits 4k hold row {0, 2, 4, 6, 1, 3, 5, 7}[k] of eight, stored q + 8 (AutoAWQ)
 *   GPTQ        int32 [cols / 8, rows]: column c at bit 4 * (c % 8), stored q + 8 */
#ifndef MQ_REPACK_H
#define MQ_REPACK_H

#include "core/tensor.h"

typedef enum mq_int4_layout {
    MQ_INT4_ROW_PAIRS, MQ_INT4_INT32_ROW, MQ_INT4_AWQ, MQ_INT4_GPTQ, MQ_INT4_LAYOUTS
} mq_int4_layout;

int mq_int4_layout_find(const char *name, mq_int4_layout *out); /* MQ_OK or MQ_ERR_VALUE */

/* [rows, cols] of the matrix that a packed array of this shape holds. */
void mq_int4_matrix_shape(mq_int4_layout layout, const int64_t *packed, int64_t *shape);

/* dtype and shape of a matrix in the layout; MQ_ERR_VALUE where rows or cols do not fill its words. */
int mq_int4_packed(mq_int4_layout layout, int64_t rows, int64_t cols, mq_tensor *packed, mq_error *err);

/* Contiguous arrays, laid out as mq_int4_packed says. */
int mq_int4_repack(mq_int4_layout from, const mq_tensor *in, mq_int4_layout to, mq_tensor *out, mq_error *err);

#endif
