/* Observers of gradients (model/observer.h) on a device: they are shown a copy on the host, some rows at a time; scores
 * are made where the rows are, if there is room (device_score.c). */
#include "backend/device_backward.h"
#include "core/alloc.h"

/* Rows of a copy. */
enum { OBSERVED_ROWS = 512 };

static int show(const mq_device_back *it, mq_observer *observer, const mq_observed *observed, char *memory)
{
    const size_t input = (size_t)observed->columns * mq_dtype_size(observed->dtype);
    const size_t output = (size_t)observed->width * mq_dtype_size(observed->output_dtype);
    const size_t gradient = (size_t)observed->width * sizeof(float);
    int rc = MQ_OK;
    for (int64_t done = 0; rc == MQ_OK && done < observed->rows; done += OBSERVED_ROWS) {
        const size_t skipped = (size_t)done, rows = (size_t)MQ_MIN((int64_t)OBSERVED_ROWS, observed->rows - done);
        const void *const from[3] = {(const char *)observed->gradient + skipped * gradient,
                                     (const char *)observed->output + skipped * output,
                                     (const char *)observed->input + skipped * input};
        char *const to[3] = {memory, memory + rows * gradient, memory + rows * (gradient + output)};
        const size_t nbytes[3] = {rows * gradient, rows * output, rows * input};
        mq_observed here = *observed;
        here.gradient = (const float *)(void *)to[0];
        here.output = to[1];
        here.input = to[2];
        here.rows = (int64_t)rows;
        here.first += done;
        if (here.tokens != NULL) here.tokens += done;
        if (here.shares != NULL) here.shares += done;
        for (int i = 0; rc == MQ_OK && i < 3; i++)
            rc = it->device->backend->copy(to[i], from[i], nbytes[i], it->device->compute, it->err);
        if (rc == MQ_OK) rc = it->device->backend->stream_wait(it->device->compute, it->err);
        if (rc == MQ_OK) rc = observer->see(observer, &here, it->err);
    }
    return rc;
}

int mq_device_observe(const mq_device_back *it, mq_observer *observer, const mq_observed *observed)
{
    const size_t row = (size_t)observed->columns * mq_dtype_size(observed->dtype) +
                       (size_t)observed->width * (mq_dtype_size(observed->output_dtype) + sizeof(float));
    mq_output_score *score = mq_output_score_of(observer);
    mq_experts_score *experts = mq_experts_score_of(observer);
    if (score != NULL && observed->tokens == NULL && it->scratch->scores.count >= (int64_t)score->count)
        return mq_device_score(it, score, observed);
    if (experts != NULL && it->scratch->expert_scores.weights[0].memory != NULL)
        return mq_device_score_expert(it, experts, observed);
    if (score != NULL || experts != NULL) it->device->copied++;
    char *memory = mq_alloc_array(OBSERVED_ROWS, row);
    if (memory == NULL) return mq_fail_memory(it->err, "gradients to look at", OBSERVED_ROWS * row);
    const int rc = show(it, observer, observed, memory);
    mq_free(memory);
    return rc;
}
