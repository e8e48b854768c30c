/* mq_quant_spec: what a quantizer does. mq_quantizer: a spec with its calibrated state, ready to simulate.
 *
 * mq_quantizer_apply may be called by many threads at once on one quantizer; it allocates nothing and cannot fail once
 * mq_quantizer_ready has said MQ_OK. Setters are not for use while others apply. */
#ifndef MQ_QUANTIZER_H
#define MQ_QUANTIZER_H

#include "core/tensor.h"
#include "format/format.h"
#include "quant/scale.h"

typedef struct mq_quant_spec {
    mq_kind kind;             /* MQ_KIND_FLOAT or MQ_KIND_INT */
    mq_format element;        /* of floats */
    int bits;                 /* of integers, 2 to 8, the sign included */
    int narrow_range;         /* integers: -max .. max instead of -max - 1 .. max */
    int is_unsigned;          /* integers: 0 .. 2 * max + 1 */
    int64_t block_rows;       /* 0: the whole extent. rows, columns = 0, 0 per tensor; 1, 0 per row; 0, 1 per column; */
    int64_t block_cols;       /* 1, 16 blocks along rows */
    mq_format scale;          /* MQ_FMT_FP32, MQ_FMT_FP8_E4M3 (with a second, fp32 scale per tensor), MQ_FMT_E8M0 */
    int dynamic;              /* (block) scales come from the data of each call */
    int scheme;               /* the row of schemes.def that these settings are, or -1 */
    float second_divisor;     /* of two-level scales: the tensor's amax over this is its scale */
} mq_quant_spec;

typedef struct mq_quantizer {
    mq_quant_spec spec;
    int enabled;
    float *amax;              /* owned; [amax_count], NULL if there is none */
    int64_t amax_count;       /* 1, rows, cols, or rows * blocks per row, as the spec's blocks say */
    float global_amax;        /* of the tensor, beside the amax of its blocks: static two-level scales only; 0 = the
                               * largest of those */
    float *block_amax;        /* owned; [amax_count] as the kernels take it, made of amax and global_amax; or NULL */
    int lent;                 /* amax and block_amax are not owned: they lie where mq_quantizer_lend put them */
    float *pre_scale;         /* owned; [pre_count] multiplies the columns first; NULL if there is none */
    int64_t pre_count;
    int64_t rotate;           /* then every so many columns are rotated by a Hadamard matrix; 0 = not */
    float *bias;              /* owned; [bias_count] is subtracted before rounding and added after; NULL if none */
    int64_t bias_count;
} mq_quantizer;

/* A disabled quantizer with no amax: what zeroed memory holds too, except for spec.scheme. */
void mq_quantizer_init(mq_quantizer *quantizer, const mq_quant_spec *spec);
void mq_quantizer_free(mq_quantizer *quantizer);

/* Copies count values; NULL takes them away. Negative or non-finite values are an MQ_ERR_VALUE. */
int mq_quantizer_set_amax(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err);
/* MQ_ERR_VALUE unless the spec has static blocks with a second level. */
int mq_quantizer_set_global_amax(mq_quantizer *quantizer, float value, mq_error *err);
/* Moves the amax of static blocks with a second level, and what is made of it, to memory [2 * amax_count] of the
 * caller's, who keeps it until another amax is set. MQ_ERR_VALUE if there is no such amax. */
int mq_quantizer_lend(mq_quantizer *quantizer, float *memory, mq_error *err);
int mq_quantizer_set_pre_scale(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err);
int mq_quantizer_set_bias(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err);
/* A power of two up to 1024, or 0 for none. */
int mq_quantizer_set_rotate(mq_quantizer *quantizer, int64_t columns, mq_error *err);

/* Whether it changes what passes even while it is disabled; whether it changes anything at all. */
MQ_INLINE int mq_quantizer_prepares(const mq_quantizer *quantizer)
{
    return quantizer->pre_scale != NULL || quantizer->rotate != 0;
}

MQ_INLINE int mq_quantizer_acts(const mq_quantizer *quantizer)
{
    return quantizer->enabled || mq_quantizer_prepares(quantizer);
}

/* Of two-level scales: the tensor's amax, as it was set or as its blocks have it. */
mq_second_level mq_quantizer_second(const mq_quantizer *quantizer);

/* Whether both turn the same rows into the same result. */
int mq_quantizer_same(const mq_quantizer *a, const mq_quantizer *b);

/* Whether activations of cols columns can be simulated: MQ_OK, or what is missing (an amax, a wrong count). name is
 * used in errors. Quantizers of whole matrices (rows or blocks of rows have an amax each) need rows too; -1 = any. */
int mq_quantizer_ready(const mq_quantizer *quantizer, int64_t rows, int64_t cols, const char *name, mq_error *err);

/* One row of a matrix by a spec alone. y may be x. */
typedef struct mq_quant_row {
    mq_dtype dtype;
    int64_t n;
    const void *x;
    void *y;
    const float *amax;        /* of the row's blocks; NULL = from x */
    float second;             /* the tensor's scale, where scales have two levels */
} mq_quant_row;

void mq_quant_row_apply(const mq_quant_spec *spec, const mq_quant_row *row);

typedef enum mq_quant_steps {
    MQ_QUANT_ALL,
    MQ_QUANT_PREPARE,   /* pre_scale and rotation only: what a calibrator is to see */
    MQ_QUANT_PREPARED   /* without them: they are done */
} mq_quant_steps;

/* y = fake_quantize(x): rows x cols of dtype (MQ_F32, MQ_BF16 or MQ_F16), ldx elements from row to row, y the same with
 * ldy; y may be x. A disabled quantizer copies (and still applies pre_scale and rotation). Rows are independent unless
 * the spec has blocks of rows: calls on slices of the rows give the same bits as one call, if amax is per tensor, per
 * column, per token or dynamic per block. NaN in gives NaN out where the format has NaN. */
typedef struct mq_quant_rows {
    const void *x;
    void *y;
    mq_dtype dtype;
    int64_t rows, cols, ldx, ldy;
    mq_quant_steps steps;
} mq_quant_rows;

void mq_quantizer_apply(const mq_quantizer *quantizer, const mq_quant_rows *rows);

#endif
