/* Quantize, dequantize and fake-quantize a whole matrix by a scheme. Rows are shared out over the pool.
 *
 * The parts of a quantized [O, I] matrix: weight, weight_scale, weight_scale_2 (two-level schemes only). */
#ifndef MQ_BLOCK_H
#define MQ_BLOCK_H

#include "core/tensor.h"
#include "format/format.h"
#include "kernels/gemm.h"

typedef struct mq_parts {
    mq_tensor weight, scale, scale_2; /* contiguous */
    int has_scale_2;
} mq_parts;

typedef struct mq_block_job {
    mq_scheme scheme;
    int64_t block_cols;     /* 0 = the scheme's */
    const char *name;       /* of the tensor, for errors */
    const float *amax;      /* NULL = from the weight; else what mq_block_amax_count says */
    int64_t amax_count;
    const float *block_amax;    /* of two-level schemes, as calibration chose them; NULL = from the weight */
    int64_t block_amax_count;
    float second_divisor;       /* of block_amax: the tensor's amax over this is its scale; 0 = the scheme's */
} mq_block_job;

/* How many amax values the scheme takes for [rows, cols]: the second level's one, one per block, or 0 (E8M0 scales). */
int64_t mq_block_amax_count(const mq_block_job *job, int64_t rows, int64_t cols);

/* dtypes and shapes of the parts of a [rows, cols] matrix (data pointers are left alone); MQ_ERR_VALUE where the shape
 * does not fit the scheme. */
int mq_block_shapes(const mq_block_job *job, int64_t rows, int64_t cols, mq_parts *parts, mq_error *err);

/* weight (2-D float32, bfloat16 or float16, any strides) into parts as mq_block_shapes laid them out. NaN or infinity
 * is MQ_ERR_VALUE. */
int mq_block_quantize(const mq_block_job *job, const mq_tensor *weight, mq_parts *parts, mq_error *err);

/* parts into out (contiguous float32, bfloat16 or float16): element * (scale * scale_2) in float32, rounded to out's
 * dtype. */
int mq_block_dequantize(const mq_block_job *job, const mq_parts *parts, mq_tensor *out, mq_error *err);

/* A weight [O, I] by its parts, and the dtype that its numbers are rounded to (MQ_F32, MQ_BF16 or MQ_F16); or by the
 * numbers that job is to make the parts of, as they are where products are computed. */
typedef struct mq_stored_weight {
    mq_block_job job;
    mq_parts parts;         /* without data where they are yet to be made of: */
    mq_tensor numbers;      /* float32 or of dtype, any strides; without data where there are parts */
    mq_dtype dtype;
    int64_t shape[2];
} mq_stored_weight;

/* Rows first to first + rows of it: where they begin and end, whole blocks and pairs do (mq_block_unit), or it does. */
mq_stored_weight mq_stored_rows(const mq_stored_weight *weight, int64_t first, int64_t rows);
/* Rows that share a scale, or bytes. */
int64_t mq_block_unit(mq_scheme scheme);

/* The same as an operand of products that stays codes (mq_gemm_can_code says whether it may). */
mq_coded_matrix mq_stored_codes(const mq_stored_weight *weight);

/* out (contiguous, weight's dtype) = what the exported parts would dequantize to, without making them. */
int mq_block_fake_quantize(const mq_block_job *job, const mq_tensor *weight, mq_tensor *out, mq_error *err);

#endif
