#include <math.h>
#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

void mq_loss_begin(mq_loss_row *rows, int64_t count)
{
    for (int64_t i = 0; i < count; i++) rows[i] = (mq_loss_row){.max = -INFINITY};
}

void mq_loss_forward(mq_loss_row *rows, const float *logits, const int32_t *labels, const mq_loss_slice *slice)
{
    const mq_row_ops *kernels = mq_row_ops_table();
    for (int64_t i = 0; i < slice->rows; i++) {
        const float *logits_i = logits + i * slice->ld;
        mq_loss_row *row = &rows[i];
        int64_t label = labels[i] - slice->first;
        if (labels[i] < 0) continue;
        float max = kernels->max(logits_i, slice->columns);
        if (max > row->max) {
            row->sum *= exp((double)row->max - (double)max);
            row->max = max;
        }
        row->sum += kernels->sum_exp(logits_i, slice->columns, row->max);
        if (label >= 0 && label < slice->columns) row->target = logits_i[label];
    }
}

double mq_loss_of(const mq_loss_row *row)
{
    return log(row->sum) + (double)row->max - (double)row->target;
}

typedef struct loss_backward_job {
    float *logits;
    const mq_loss_row *rows;
    const int32_t *labels;
    const float *factors;
    const mq_loss_slice *slice;
} loss_backward_job;

static void loss_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const loss_backward_job *job = argument;
    const mq_loss_slice *slice = job->slice;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float *logits = job->logits + i * slice->ld;
        const int64_t label = job->labels[i] - slice->first;
        if (job->labels[i] < 0) {
            memset(logits, 0, (size_t)slice->columns * sizeof *logits);
            continue;
        }
        /* Not exp(x - log sum): what float32 leaves of a logarithm of 30 would be an error of all probabilities. */
        const float factor = (float)((double)job->factors[i] / job->rows[i].sum);
        mq_row_ops_table()->exp_shifted(logits, logits, slice->columns, job->rows[i].max, factor);
        if (label >= 0 && label < slice->columns) logits[label] -= job->factors[i];
    }
}

void mq_loss_backward(float *logits, const mq_loss_row *rows, const int32_t *labels, const float *factors,
                      const mq_loss_slice *slice)
{
    loss_backward_job job = {.logits = logits, .rows = rows, .labels = labels, .factors = factors, .slice = slice};
    mq_parallel_for(slice->rows, mq_row_grain(slice->columns), loss_backward_rows, &job);
}

int mq_logits_change(const mq_config *config)
{
    return config->logits_scaling != 1.0 || config->final_logit_softcapping > 0.0;
}

void mq_logits_forward(float *logits, const mq_config *config, const mq_logits_sizes *sizes)
{
    const float factor = (float)(1.0 / config->logits_scaling), cap = (float)config->final_logit_softcapping;
    for (int64_t i = 0; i < sizes->rows && mq_logits_change(config); i++) {
        float *row = logits + i * sizes->ld;
        for (int64_t j = 0; j < sizes->columns; j++) row[j] *= factor;
        if (cap > 0.0f) mq_softcap_forward(row, cap, sizes->columns);
    }
}

void mq_logits_backward(float *d_logits, const float *raw, const mq_config *config, const mq_logits_sizes *sizes)
{
    const float factor = (float)(1.0 / config->logits_scaling), cap = (float)config->final_logit_softcapping;
    for (int64_t i = 0; i < sizes->rows && mq_logits_change(config); i++) {
        float *d_row = d_logits + i * sizes->ld;
        const float *row = raw + i * sizes->ld;
        for (int64_t j = 0; j < sizes->columns; j++) {
            const float t = cap > 0.0f ? tanhf(row[j] * factor / cap) : 0.0f;
            d_row[j] *= factor * (1.0f - t * t);
        }
    }
}
