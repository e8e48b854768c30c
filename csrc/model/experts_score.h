/* An observer of what a layer's experts add up to: mq_output_score for all of them together. */
#ifndef MQ_EXPERTS_SCORE_H
#define MQ_EXPERTS_SCORE_H

#include "kernels/gemm.h"
#include "model/observer.h"
#include "model/ops.h"
#include "quant/quantizer.h"

enum { MQ_SCORE_LINEARS = 3 };      /* gate, up, down */

/* What a candidate makes of the expert at work, and of all experts so far. */
typedef struct mq_experts_candidate {
    mq_tensor weights[MQ_SCORE_LINEARS];    /* not owned */
    mq_linear_weight linears[MQ_SCORE_LINEARS];     /* of these, where the host multiplies by them */
    const mq_quantizer *input, *product;    /* of what gate and up read, of what down reads; not owned; NULL = none */
    float *change;                          /* (rows of the run, C): how much the sum of the experts is another */
    double score;
} mq_experts_candidate;

typedef struct mq_experts_score {
    mq_observer observer;
    mq_experts_candidate *candidates;       /* owned */
    size_t count;
    int64_t expert;                         /* whose weights are there; -1: nobody's */
    mq_gemm_kind kind;                      /* which way they are packed, */
    int is_packed;                          /* once they are */
    int64_t rows, width;                    /* of change; 0: there is none yet */
    int64_t last;                           /* first row that was seen last; -1: none yet */
    char *memory;                           /* scratch for one call, and sums (rows of the run) */
    size_t nbytes;
} mq_experts_score;

int mq_experts_score_init(mq_experts_score *score, size_t count, mq_error *err);
void mq_experts_score_free(mq_experts_score *score);

/* The one that an observer is; NULL = it is something else. */
mq_experts_score *mq_experts_score_of(mq_observer *observer);
/* Whether the weights that are there are of the expert that is observed, and for its input. */
int mq_experts_score_check(const mq_experts_score *score, const mq_observed *rows, mq_error *err);

/* The weights (F, C), (F, C), (C, F) of one expert by every candidate, in place of another's. They and quantizers must
 * last until the next. */
typedef struct mq_expert_weights {
    mq_tensor linears[MQ_SCORE_LINEARS];
    const mq_quantizer *input, *product;
} mq_expert_weights;
int mq_experts_score_load(mq_experts_score *score, int64_t expert, mq_gemm_kind kind, const mq_expert_weights *weights,
                          mq_error *err);

#endif
