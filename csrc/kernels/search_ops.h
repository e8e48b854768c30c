/* Loops of the searches for scales and weights (csrc/calib), vectorised: float32, one generic source (search_ops.inc)
 * compiled per ISA, the table picked once. Every table gives the same bits: nothing is fused, sums have sixteen lanes
 * folded in a fixed order. */
#ifndef MQ_SEARCH_OPS_H
#define MQ_SEARCH_OPS_H

#include "kernels/kernels.h"

enum { MQ_LANES = 16 };

/* Columns of MQ_LANES rows on their way through GPTQ, one after the other: column j of what is to be rounded has, when
 * its turn comes, the feedback of all columns before it. */
typedef struct mq_feedback_tile {
    int64_t begin, end, count;   /* columns to do now; all columns of the tile */
    float *target;               /* [count][MQ_LANES]: weights plus feedback; rounded values take their place */
    float *error;                /* [count][MQ_LANES]: in: the weights; out: weights less rounded values */
    const float *scale;          /* [count][MQ_LANES]: what elements are divided by */
    const float *feedback;       /* [count][ld]: what row j's errors add to the columns behind it */
    int64_t ld;
    const float *curvature;      /* [count]: what the square of a column's rounding counts */
    float *loss;                 /* [MQ_LANES] += those squares */
} mq_feedback_tile;

/* Candidates for the scale of a block of MQ_LANES FP4 elements. */
typedef struct mq_sweep {
    const float *scale;          /* [count], ascending */
    int64_t count;
    const float *hessian;        /* [MQ_LANES][MQ_LANES] or NULL: plain squares */
} mq_sweep;

typedef struct mq_search_ops {
    void (*multiply)(float *out, const float *x, const float *y, int64_t n);
    /* out = w - q * scale; scale NULL is 1. */
    void (*residual)(float *out, const float *w, const float *q, const float *scale, int64_t n);
    float (*dot)(const float *x, const float *y, int64_t n);
    /* By dtype: sums[j] += |x[j]| / (the largest |x| of its block + the smallest normal number), rounded to dtype. */
    void (*add_normalized[MQ_FLOAT_DTYPES])(double *sums, const float *x, int64_t n, int64_t block);
    /* out[i] = sum of (x - y)^2 over each block, the last may be short. */
    void (*squared_errors)(const float *x, const float *y, int64_t n, int64_t block, float *out);
    /* One per scheme; those with E8M0 scales have none. */
    void (*feedback[MQ_SCHEME_COUNT])(const mq_feedback_tile *tile);
    /* The index of the candidate with the least error of x [MQ_LANES]; the first of equal ones. */
    int64_t (*sweep)(const float *x, const mq_sweep *sweep);
} mq_search_ops;

const mq_search_ops *mq_search_ops_get(void);
const mq_search_ops *mq_search_ops_of(mq_isa isa);   /* for tests */

#endif
