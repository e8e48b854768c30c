/* Observers of gradients (model/observer.h) on a device: they are shown a copy on the host, some rows at a time. */
#include "backend/device_backward.h"
#include "core/alloc.h"

/* Rows of a copy. */
enum { OBSERVED_ROWS = 512 };

/* Rows first to first + count of an array of so many bytes a row, to memory of the host. */
static int fetch(const mq_device_back *it, void *to, const void *from, const int64_t *rows, size_t stride)
{
    const char *at = (const char *)from + (size_t)rows[0] * stride;
    return it->device->backend->copy(to, at, (size_t)rows[1] * stride, it->device->compute, it->err);
}

static int show(const mq_device_back *it, mq_observer *observer, const mq_observed *observed, char *memory)
{
    const size_t input = (size_t)observed->columns * mq_dtype_size(observed->dtype);
    const size_t output = (size_t)observed->width * mq_dtype_size(observed->output_dtype);
    const size_t gradient = (size_t)observed->width * sizeof(float);
    int rc = MQ_OK;
    for (int64_t done = 0; rc == MQ_OK && done < observed->rows; done += OBSERVED_ROWS) {
        const int64_t rows[2] = {done, MQ_MIN((int64_t)OBSERVED_ROWS, observed->rows - done)};
        char *const parts[3] = {memory, memory + OBSERVED_ROWS * gradient,
                                memory + OBSERVED_ROWS * (gradient + output)};
        mq_observed here = *observed;
        here.gradient = (const float *)(void *)parts[0];
        here.output = parts[1];
        here.input = parts[2];
        here.rows = rows[1];
        here.first += done;
        if (here.tokens != NULL) here.tokens += done;
        if (here.shares != NULL) here.shares += done;
        rc = fetch(it, parts[0], observed->gradient, rows, gradient);
        if (rc == MQ_OK) rc = fetch(it, parts[1], observed->output, rows, output);
        if (rc == MQ_OK) rc = fetch(it, parts[2], observed->input, rows, input);
        if (rc == MQ_OK) rc = it->device->backend->stream_wait(it->device->compute, it->err);
        if (rc == MQ_OK) rc = observer->see(observer, &here, it->err);
    }
    return rc;
}

int mq_device_observe(const mq_device_back *it, mq_observer *observer, const mq_observed *observed)
{
    const size_t row = (size_t)observed->columns * mq_dtype_size(observed->dtype) +
                       (size_t)observed->width * (mq_dtype_size(observed->output_dtype) + sizeof(float));
    char *memory = mq_alloc_array(OBSERVED_ROWS, row);
    if (memory == NULL) return mq_fail_memory(it->err, "gradients to look at", OBSERVED_ROWS * row);
    const int rc = show(it, observer, observed, memory);
    mq_free(memory);
    return rc;
}
