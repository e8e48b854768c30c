/* Observers that add up, or keep, what passes them. */
#ifndef MQ_SCORE_H
#define MQ_SCORE_H

#include "kernels/gemm.h"
#include "model/observer.h"
#include "quant/quantizer.h"

/* What quantizing a linear would do to the loss, to second order with squared gradients in the place of the curvature:
 * sum of (gradient * (y' - y))^2 over its outputs y, y' being those of the candidate. */
typedef struct mq_score_candidate {
    mq_tensor weight;               /* (width, columns) as it would be, not owned */
    const mq_quantizer *input;      /* of activations; not owned; NULL = none */
    mq_packed packed;               /* the columns of the output that are at work */
    double score;
} mq_score_candidate;

typedef struct mq_output_score {
    mq_observer observer;
    mq_score_candidate *candidates; /* owned */
    size_t count;
    mq_tensor bias;                 /* (width); data NULL = none */
    int64_t column;                 /* of what is packed; -1: nothing is */
    float *packed_bias;
    void *quantized, *output;       /* (rows, columns), (rows, width) */
    size_t input_nbytes, output_nbytes;
    double *sums;                   /* (capacity) */
    int64_t capacity;
} mq_output_score;

/* Candidates are copied; what they point to must last. */
int mq_output_score_init(mq_output_score *score, const mq_score_candidate *candidates, size_t count,
                         const mq_tensor *bias, mq_error *err);
void mq_output_score_free(mq_output_score *score);
/* The one that an observer is; NULL = it is something else. */
mq_output_score *mq_output_score_of(mq_observer *observer);
/* Whether the candidates are for what is observed, and their quantizers for its input. */
int mq_output_score_check(const mq_output_score *score, const mq_observed *rows, mq_error *err);

/* Copies every gradient that it sees to its row of values (rows, width). */
typedef struct mq_kept_gradient {
    mq_observer observer;
    float *values;                  /* not owned */
    int64_t rows, width;
} mq_kept_gradient;
void mq_kept_gradient_init(mq_kept_gradient *kept, float *values, int64_t rows, int64_t width);

#endif
