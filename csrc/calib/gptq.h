/* GPTQ (Frantar et al. 2023): a weight is rounded column by column, and what each loses goes to the columns behind it,
 * so that the outputs on the calibration data change least. With H = U diag U^T (calib/factor.h), column j is rounded
 * after the errors of all columns before it were added, times U; in blocks, whose columns take what comes from before
 * the block by one product. */
#ifndef MQ_GPTQ_H
#define MQ_GPTQ_H

#include "quant/quantizer.h"

typedef struct mq_gptq_job {
    const char *name;
    const mq_tensor *weight;        /* [rows, n] */
    const mq_quantizer *quantizer;  /* of a scheme whose scales are float32 numbers or static two levels; has amax */
    const float *factor;            /* [n, n], of mq_factor, in the order of processing */
    const float *curvature;         /* [n] */
    const int64_t *order;           /* [n]: the column that comes k-th; NULL = as they are */
    int64_t block_size;             /* columns, at most MQ_GPTQ_MAX_BLOCK; grown to a multiple of the scales' blocks */
    int regroup;                    /* a block of scales is made of the weights as they are when its turn comes */
} mq_gptq_job;

enum { MQ_GPTQ_MAX_BLOCK = 1024 };

/* out: rounded weights, like weight and contiguous; amax: of the quantizer's grain, what was used (regroup changes it);
 * loss: trace of D H D^T for the difference D. */
int mq_gptq(const mq_gptq_job *job, mq_tensor *out, float *amax, double *loss, mq_error *err);

#endif
