/* Several ways to quantize one weight, and what each of them loses: the searches of AWQ (Lin et al. 2024), for scales
 * of columns and for clipped maxima, and the search for the least squared error.
 *
 * A way is a scale for every column before quantization, and back after it, and a factor of the absolute maxima. What
 * is lost is ||X (W - Q(W))^T||^2, from the Gram matrix of the inputs X, or the squared difference of the weights. */
#ifndef MQ_TRIAL_H
#define MQ_TRIAL_H

#include "calib/gram_loss.h"
#include "quant/quantizer.h"

typedef struct mq_candidate {
    const float *scale, *back;      /* [columns] or NULL; rounded to the weight's dtype is what is quantized */
    float factor;                   /* of the maxima: 1 leaves them as they are */
} mq_candidate;

typedef struct mq_trial {
    const char *name;               /* of the weight, for errors */
    const mq_tensor *weight;        /* [rows, columns], float32, bfloat16 or float16, any strides */
    const mq_quant_spec *spec;
    const float *amax;              /* in the spec's grain; NULL = found, of scaled weights anew for each scale */
    float global_amax;              /* of static two-level scales */
    const mq_candidate *candidates;
    int64_t count;
    const mq_gram_loss *gram;       /* NULL: squared differences */
    mq_dtype amax_dtype;            /* products of maxima and factors are rounded to it; MQ_F32 leaves them */
} mq_trial;

/* How many maxima the spec has for the weight, and what they are. */
int64_t mq_trial_amax_count(const mq_trial *trial);

/* losses [count]: of the whole weight. */
int mq_trial_losses(const mq_trial *trial, double *losses, mq_error *err);

/* amax [mq_trial_amax_count]: for each, by the factor that loses least of what it governs; the first of equal ones.
 * Candidates may have no scales. The Gram matrix's blocks must not be wider than the amax's. */
int mq_trial_best_amax(const mq_trial *trial, float *amax, mq_error *err);

#endif
