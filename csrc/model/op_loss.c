#include <math.h>

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
