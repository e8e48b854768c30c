/* Who looks on while gradients pass: what a linear made of its input, and the gradient of the loss by it, some rows at
 * a time. Rows come in the order of the run, on one thread, which may use the pool. */
#ifndef MQ_OBSERVER_H
#define MQ_OBSERVER_H

#include "core/tensor.h"

typedef struct mq_observed {
    const void *input, *output;     /* (rows, columns) of dtype, (rows, width) of output_dtype, without gaps */
    const float *gradient;          /* (rows, width): of the loss by the output */
    mq_dtype dtype, output_dtype;
    int64_t rows, columns, width;
    int64_t first;                  /* row of the run of the first one */
    int64_t total;                  /* rows of the run */
    int64_t column, outputs;        /* of lm_head's, which comes a slice at a time: the first one, and of how many */
    /* Of a layer's experts: the rows of one expert after the other. output is that expert's alone, gradient the one by
     * the sum of all, of which it is a share. Then once expert = -1 with all rows' gradient, and neither input nor
     * output: there are no more. That gradient is the one by what they add to the hidden states: factor times it is
     * the one by their sum. */
    double factor;
    int64_t expert;                 /* -1: none */
    const int64_t *tokens;          /* (rows): rows of the run; NULL = from first on */
    const float *shares;            /* (rows) */
    const struct mq_gate *gate;     /* its activation (ops.h) */
    float *biases[3];               /* of gate, up and down; NULL = none */
} mq_observed;

typedef struct mq_observer {
    int (*see)(struct mq_observer *observer, const mq_observed *rows, mq_error *err);
} mq_observer;

#endif
