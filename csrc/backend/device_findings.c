/* Statistics of what passes on a device. Maxima and, where there is room, sums (device_sums.c) are made there and
 * brought over when a layer is done; where there is no room, what passes is copied to the host, where calibrators look
 * at it as they always do. */
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

void mq_findings_drop(mq_device *device)
{
    mq_sums_drop(device);
    device->finding_count = device->maxima_used = 0;
}

/* ---- to the host ---- */

static int take_maxima(mq_device *device, mq_error *err)
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

int mq_findings_take(mq_device *device, mq_error *err)
{
    int rc = take_maxima(device, err);
    if (rc == MQ_OK) rc = mq_sums_take(device, err);
    mq_findings_drop(device);
    return rc;
}

int mq_device_finish(mq_device *device, int rc, mq_error *err)
{
    if (rc == MQ_OK) rc = mq_findings_take(device, err);
    if (rc == MQ_OK) return rc;
    mq_device_settle(device);
    mq_findings_drop(device);
    mq_device_drop_changes(device);
    return rc;
}

/* Room for `width` numbers more, which those before make by being taken, if need be. */
static int take_room(mq_device *device, int64_t width, mq_finding **out, mq_error *err)
{
    int rc = MQ_OK;
    if (device->finding_count == MQ_FINDINGS || device->maxima_used + width > MQ_MAXIMA)
        rc = take_maxima(device, err);
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

/* The index of the last of count numbers, each `size` bytes behind the one before, that is at most row. */
static int64_t last_from(const void *first, size_t size, int64_t count, int64_t row)
{
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        int64_t value;
        memcpy(&value, (const char *)first + (size_t)middle * size, sizeof value);
        if (value <= row) low = middle;
        else high = middle;
    }
    return low;
}

int64_t mq_device_batch(const mq_device_look *look, int64_t i)
{
    const mq_sequence *all = look->context->sequences;
    const int64_t row = look->chunk->tokens != NULL ? look->chunk->tokens[i] : look->chunk->first + i;
    return all[last_from(&all->first, sizeof *all, look->context->sequence_count, row)].batch;
}

int64_t mq_device_piece(const mq_device_look *look, int64_t begin, int64_t *key)
{
    const mq_device_chunk *chunk = look->chunk;
    const int64_t row = chunk->position + begin;
    int64_t rows;
    if (look->by_sequence) {
        const mq_sequence *all = look->context->sequences;
        const mq_sequence *one = &all[last_from(&all->first, sizeof *all, look->context->sequence_count, row)];
        *key = one->first;
        rows = one->tokens;
    } else if (chunk->units != NULL) {
        const mq_unit *unit = &chunk->units[last_from(&chunk->units->first, sizeof *unit, chunk->unit_count, row)];
        *key = unit->first;
        rows = unit->rows;
    } else {
        *key = row - (row - chunk->piece_first) % chunk->piece_rows;
        rows = chunk->piece_rows;
    }
    return MQ_MIN(*key + rows - chunk->position, look->x.rows);
}

/* As layer.c's collect. */
static int collect_here(mq_calib *const *others, const mq_calib_rows *rows, mq_error *err)
{
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < MQ_POINT_WATCHERS; i++) {
        if (others[i] != NULL) rc = mq_calib_collect(others[i], rows, err);
        if (rc == MQ_OK && others[i] != NULL) rc = mq_calib_settle(others[i], 0, err);
    }
    return rc;
}

static int collect_copy(mq_calib *const *others, const char *x, const mq_device_look *look, mq_error *err)
{
    const mq_device_chunk *chunk = look->chunk;
    const size_t stride = (size_t)look->x.cols * mq_dtype_size(look->x.dtype);
    int rc = MQ_OK;
    for (int64_t begin = 0, end, key; rc == MQ_OK && begin < look->x.rows; begin = end) {
        const int64_t batch = look->by_batch ? mq_device_batch(look, begin) : 0;
        const int64_t whole = mq_device_piece(look, begin, &key);
        for (end = look->by_batch ? begin + 1 : whole; end < whole && mq_device_batch(look, end) == batch; end++) {
        }
        const mq_calib_rows rows = {
            .x = x + (size_t)begin * stride, .dtype = look->x.dtype, .rows = end - begin, .width = look->x.cols,
            .ld = look->x.cols, .mask = chunk->mask ? chunk->mask + begin : NULL,
            .chunk = look->by_batch ? chunk->position + begin : key, .group = batch,
        };
        rc = collect_here(others, &rows, err);
    }
    return rc;
}

static int collect_on_host(mq_device *device, mq_calib *const *others, const mq_device_look *look, mq_error *err)
{
    const size_t nbytes = (size_t)(look->x.rows * look->x.cols) * mq_dtype_size(look->x.dtype);
    char *copy = mq_alloc(nbytes);
    if (copy == NULL) return mq_fail_memory(err, "activations to look at", nbytes);
    int rc = device->backend->copy(copy, look->x.data, nbytes, device->compute, err);
    if (rc == MQ_OK) rc = device->backend->stream_wait(device->compute, err);
    if (rc == MQ_OK) rc = collect_copy(others, copy, look, err);
    device->copied++;
    mq_free(copy);
    return rc;
}

/* counted: x, or its rows that count, gathered in room. */
static int gather_counted(mq_device *device, const mq_device_look *look, void *room, mq_cuda_matrix *counted,
                          mq_error *err)
{
    const mq_device_chunk *chunk = look->chunk;
    *counted = look->x;
    if (chunk->counted == counted->rows) return MQ_OK;
    *counted = (mq_cuda_matrix){room, counted->dtype, chunk->counted, counted->cols, counted->cols};
    const mq_cuda_rows_job job = {.x = look->x, .y = *counted, .index = chunk->index};
    return device->backend->rows(&job, device->compute, err);
}

int mq_device_collect(mq_device *device, mq_point *point, const mq_device_look *look, void *room, mq_error *err)
{
    mq_calib *others[MQ_POINT_WATCHERS] = {NULL};
    mq_cuda_matrix counted;
    int any = 0;
    if (look->chunk->counted == 0) return MQ_OK;
    int rc = gather_counted(device, look, room, &counted, err);
    for (int i = 0; rc == MQ_OK && i < MQ_POINT_WATCHERS; i++) {
        mq_calib *watch = point->watchers[i].watch;
        int done = 1;
        if (watch == NULL) continue;
        if (watch->kind == &mq_calib_max) rc = mq_finding_rows(device, watch, &counted, err);
        else rc = mq_sums_collect(device, watch, look, &counted, &done, err);
        others[i] = done ? NULL : watch;
        any |= !done;
    }
    return rc != MQ_OK || !any ? rc : collect_on_host(device, others, look, err);
}

int64_t mq_device_copied(const mq_device *device)
{
    return device->copied;
}
