/* The largest magnitude, per tensor or per channel. Kept as the bits of a float32 without its sign, compared as
 * integers: exact, independent of order, and a NaN (larger than every number) or an infinity is remembered. */
#include "calib/calib.h"

#include <string.h>

#include "core/alloc.h"
#include "kernels/row_ops.h"

#define INFINITY_BITS 0x7f800000u
enum { COLUMNS = 256 }; /* channels done at a time, so that the partial result lives on the stack */

/* The state is uint32_t[channels]. Called with the mutex held. */
static int prepare(mq_calib *calib, int64_t channels, mq_error *err)
{
    if (calib->channels == 0) {
        calib->state = mq_alloc_zeroed((size_t)channels * sizeof(uint32_t));
        if (calib->state == NULL) return mq_fail_memory(err, "a calibrator", (size_t)channels * sizeof(uint32_t));
        calib->channels = channels;
    }
    if (calib->channels != channels)
        return mq_fail(err, MQ_ERR_VALUE, "the calibrator has %lld channels, the data has %lld",
                       (long long)calib->channels, (long long)channels);
    return MQ_OK;
}

static void fold(uint32_t *state, const uint32_t *part, int64_t n)
{
    for (int64_t i = 0; i < n; i++) state[i] = MQ_MAX(state[i], part[i]);
}

/* Folds part [n] into channels first..first+n; seen is added to the count of rows. */
static int add_part(mq_calib *calib, int64_t channels, const uint32_t *part, int64_t first, int64_t n, int64_t seen,
                    mq_error *err)
{
    pthread_mutex_lock(&calib->mutex);
    int rc = prepare(calib, channels, err);
    if (rc == MQ_OK) {
        fold((uint32_t *)calib->state + first, part, n);
        calib->count += seen;
    }
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

static int collect_tensor(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(rows->dtype);
    size_t stride = (size_t)rows->ld * mq_dtype_size(rows->dtype);
    const char *x = rows->x;
    int64_t seen = mq_calib_counted(rows);
    uint32_t best = 0;
    if (seen == 0) return MQ_OK;
    if (seen == rows->rows && rows->ld == rows->width) {
        best = kernels->amax(x, rows->rows * rows->width);
        return add_part(calib, 1, &best, 0, 1, seen, err);
    }
    for (int64_t i = 0; i < rows->rows; i++) {
        if (rows->mask != NULL && !rows->mask[i]) continue;
        uint32_t row = kernels->amax(x + (size_t)i * stride, rows->width);
        best = MQ_MAX(best, row);
    }
    return add_part(calib, 1, &best, 0, 1, seen, err);
}

static int collect_channels(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(rows->dtype);
    size_t size = mq_dtype_size(rows->dtype);
    int64_t seen = mq_calib_counted(rows);
    uint32_t part[COLUMNS];
    int rc = MQ_OK;
    for (int64_t first = 0; rc == MQ_OK && seen > 0 && first < rows->width; first += COLUMNS) {
        int64_t n = MQ_MIN((int64_t)COLUMNS, rows->width - first);
        memset(part, 0, sizeof part);
        for (int64_t i = 0; i < rows->rows; i++) {
            if (rows->mask != NULL && !rows->mask[i]) continue;
            kernels->amax_columns(part, (const char *)rows->x + (size_t)(i * rows->ld + first) * size, n);
        }
        rc = add_part(calib, rows->width, part, first, n, first == 0 ? seen : 0, err);
    }
    return rc;
}

static int max_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    return calib->axis == MQ_CALIB_TENSOR ? collect_tensor(calib, rows, err) : collect_channels(calib, rows, err);
}

static int max_merge(mq_calib *calib, const mq_calib *other, mq_error *err)
{
    int rc = prepare(calib, other->channels, err);
    if (rc != MQ_OK) return rc;
    fold(calib->state, other->state, other->channels);
    calib->count += other->count;
    return MQ_OK;
}

static int max_finish(mq_calib *calib, float *amax, mq_error *err)
{
    const uint32_t *state = calib->state;
    for (int64_t i = 0; i < calib->channels; i++)
        if (state[i] >= INFINITY_BITS)
            return mq_fail(err, MQ_ERR_VALUE, "%s was seen in the activations%s",
                           state[i] > INFINITY_BITS ? "NaN" : "an infinity",
                           calib->axis == MQ_CALIB_LAST ? " of at least one channel" : "");
    memcpy(amax, state, (size_t)calib->channels * sizeof *amax);
    return MQ_OK;
}

static void max_reset(mq_calib *calib)
{
    mq_free(calib->state);
    calib->state = NULL;
    calib->channels = calib->count = 0;
}

static size_t max_state_nbytes(const mq_calib *calib)
{
    return (size_t)calib->channels * sizeof(uint32_t);
}

static void max_save(const mq_calib *calib, void *out)
{
    if (calib->channels > 0) memcpy(out, calib->state, max_state_nbytes(calib));
}

static int max_load(mq_calib *calib, const void *state, size_t nbytes, mq_error *err)
{
    int64_t channels = calib->channels;
    if (nbytes != max_state_nbytes(calib))
        return mq_fail(err, MQ_ERR_VALUE, "load: the state of %lld channels cannot have %zu bytes", (long long)channels,
                       nbytes);
    if (channels == 0) return MQ_OK;
    calib->channels = 0;
    int rc = prepare(calib, channels, err);
    if (rc == MQ_OK) memcpy(calib->state, state, nbytes);
    return rc;
}

const mq_calib_kind mq_calib_max = {
    .name = "max", .collect = max_collect, .merge = max_merge, .finish = max_finish, .reset = max_reset,
    .state_nbytes = max_state_nbytes, .save = max_save, .load = max_load,
};
