/* Statistics of what passes on a device. Maxima are found there and brought over when a layer is done; what other kinds
 * of calibrators look at is copied to the host, where they look at it as they always do. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

#define INFINITY_BITS 0x7f800000u

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffffu;
}

static int give(const mq_finding *finding, const float *values, mq_error *err)
{
    if (finding->watch == NULL) {
        if (bits_of(values[0]) < INFINITY_BITS) return MQ_OK;
        return mq_fail(err, MQ_ERR_VALUE, "%s contains %s", finding->name,
                       bits_of(values[0]) > INFINITY_BITS ? "NaN" : "an infinity");
    }
    const mq_calib_rows row = {.x = values, .dtype = MQ_F32, .rows = 1, .width = finding->width,
                               .ld = finding->width};
    const int rc = mq_calib_collect(finding->watch, &row, err);
    if (rc == MQ_OK) finding->watch->count += finding->seen - 1;     /* it stands for so many rows */
    return rc;
}

int mq_findings_take(mq_device *device, mq_error *err)
{
    const mq_backend *backend = device->backend;
    const size_t nbytes = (size_t)device->maxima_used * sizeof(float);
    int rc = backend->stream_wait(device->copies, err);
    if (rc == MQ_OK) rc = backend->stream_wait(device->compute, err);
    float *values = rc == MQ_OK && nbytes > 0 ? mq_alloc(nbytes) : NULL;
    if (rc == MQ_OK && nbytes > 0 && values == NULL) rc = mq_fail_memory(err, "maxima", nbytes);
    if (rc == MQ_OK && nbytes > 0) rc = backend->copy(values, device->maxima, nbytes, device->compute, err);
    if (rc == MQ_OK && nbytes > 0) rc = backend->stream_wait(device->compute, err);
    for (int64_t i = 0; rc == MQ_OK && i < device->finding_count; i++)
        rc = give(&device->findings[i], values + device->findings[i].at, err);
    mq_free(values);
    device->finding_count = device->maxima_used = 0;
    return rc;
}

/* Room for `width` numbers more, which those before make by being taken, if need be. */
static int take_room(mq_device *device, int64_t width, mq_finding **out, mq_error *err)
{
    int rc = MQ_OK;
    if (device->finding_count == MQ_FINDINGS || device->maxima_used + width > MQ_MAXIMA)
        rc = mq_findings_take(device, err);
    if (rc != MQ_OK) return rc;
    *out = &device->findings[device->finding_count++];
    **out = (mq_finding){.at = device->maxima_used, .width = width};
    device->maxima_used += width;
    return MQ_OK;
}

int mq_finding_weight(mq_device *device, const mq_cuda_matrix *w, const char *name, mq_error *err)
{
    mq_finding *finding;
    int rc = take_room(device, 1, &finding, err);
    if (rc != MQ_OK) return rc;
    finding->name = name;
    const mq_cuda_amax_job job = {.x = *w, .out = device->maxima + finding->at};
    return device->backend->amax(&job, device->copies, err);
}

int mq_finding_rows(mq_device *device, mq_calib *watch, const mq_cuda_matrix *x, mq_error *err)
{
    const int by_channel = watch->axis == MQ_CALIB_LAST;
    const int64_t width = by_channel ? x->cols : 1;
    mq_finding *finding;
    int rc = take_room(device, width, &finding, err);
    if (rc != MQ_OK) return rc;
    finding->watch = watch;
    finding->seen = x->rows;
    const mq_cuda_amax_job job = {.x = *x, .block_cols = by_channel ? 1 : 0, .out = device->maxima + finding->at};
    return device->backend->amax(&job, device->compute, err);
}

/* ---- on the host ---- */

static int64_t batch_of(const mq_device_chunk *chunk, const mq_layer_context *context, int64_t i)
{
    const int64_t row = chunk->tokens != NULL ? chunk->tokens[i] : chunk->first + i;
    int64_t low = 0, high = context->sequence_count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (context->sequences[middle].first <= row) low = middle;
        else high = middle;
    }
    return context->sequences[low].batch;
}

/* The calibrators of other kinds, as layer.c's collect. */
static int collect_here(mq_point *point, const mq_calib_rows *rows, mq_error *err)
{
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < MQ_POINT_WATCHERS; i++) {
        mq_calib *watch = point->watchers[i].watch;
        if (watch != NULL && watch->kind != &mq_calib_max) rc = mq_calib_collect(watch, rows, err);
        if (rc == MQ_OK && watch != NULL) rc = mq_calib_settle(watch, 0, err);
    }
    return rc;
}

static int collect_copy(mq_point *point, const char *x, const mq_cuda_matrix *shape, const mq_device_chunk *chunk,
                        const mq_layer_context *context, mq_error *err)
{
    const size_t stride = (size_t)shape->cols * mq_dtype_size(shape->dtype);
    int rc = MQ_OK;
    for (int64_t begin = 0, end; rc == MQ_OK && begin < shape->rows; begin = end) {
        const int64_t batch = batch_of(chunk, context, begin);
        for (end = begin + 1; end < shape->rows && batch_of(chunk, context, end) == batch; end++) {
        }
        const mq_calib_rows rows = {
            .x = x + (size_t)begin * stride, .dtype = shape->dtype, .rows = end - begin, .width = shape->cols,
            .ld = shape->cols, .mask = chunk->mask ? chunk->mask + begin : NULL, .chunk = chunk->position + begin,
            .group = batch,
        };
        rc = collect_here(point, &rows, err);
    }
    return rc;
}

static int collect_on_host(mq_device *device, mq_point *point, const mq_cuda_matrix *x, const mq_device_chunk *chunk,
                           const mq_layer_context *context, mq_error *err)
{
    const size_t nbytes = (size_t)(x->rows * x->cols) * mq_dtype_size(x->dtype);
    char *copy = mq_alloc(nbytes);
    if (copy == NULL) return mq_fail_memory(err, "activations to look at", nbytes);
    int rc = device->backend->copy(copy, x->data, nbytes, device->compute, err);
    if (rc == MQ_OK) rc = device->backend->stream_wait(device->compute, err);
    if (rc == MQ_OK) rc = collect_copy(point, copy, x, chunk, context, err);
    mq_free(copy);
    return rc;
}

int mq_device_collect(mq_device *device, mq_point *point, const mq_cuda_matrix *x, const mq_device_chunk *chunk,
                      const mq_layer_context *context, void *room, mq_error *err)
{
    mq_cuda_matrix counted = *x;
    int others = 0, gathered = 0, rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < MQ_POINT_WATCHERS; i++) {
        mq_calib *watch = point->watchers[i].watch;
        if (watch == NULL || chunk->counted == 0) continue;
        if (watch->kind != &mq_calib_max) {
            others = 1;
            continue;
        }
        if (chunk->counted < x->rows && !gathered) {
            counted = (mq_cuda_matrix){room, x->dtype, chunk->counted, x->cols, x->cols};
            const mq_cuda_rows_job job = {.x = *x, .y = counted, .index = chunk->index};
            rc = device->backend->rows(&job, device->compute, err);
            gathered = 1;
        }
        if (rc == MQ_OK) rc = mq_finding_rows(device, watch, &counted, err);
    }
    return rc == MQ_OK && others ? collect_on_host(device, point, x, chunk, context, err) : rc;
}
