/* The mean of |x| per channel: over all tokens, or (option 1) as the reference's AWQ has it: every forward call's mean
 * is rounded to the data's dtype and counts once, however many tokens it had (awq_lite's act_scale in model_calib.py).
 *
 * Sums are float64, by chunk, folded in the order of the data. */
#include <math.h>
#include <string.h>

#include "calib/pending.h"
#include "core/alloc.h"
#include "format/format.h"

enum { BY_CALL = 1 };

typedef struct mean {
    mq_pending pending;
    int64_t next_group;        /* for calls by hand, each a forward call of its own */
    int64_t calls;             /* by call: closed ones */
    int64_t group, open_rows;  /* by call: the one that rows are still being added to */
    mq_dtype dtype;
    double *sums;              /* [width] of |x|, or of the calls' means */
    double *open;              /* [width], by call: sums of the open call */
} mean;

/* Called with the mutex held. */
static int prepare(mq_calib *calib, int64_t width, mq_error *err)
{
    if (calib->state != NULL && calib->channels != width)
        return mq_fail(err, MQ_ERR_VALUE, "the calibrator has %lld channels, the data has %lld",
                       (long long)calib->channels, (long long)width);
    if (calib->state != NULL) return MQ_OK;
    mean *state = mq_alloc_zeroed(sizeof *state);
    double *sums = mq_alloc_zeroed(2 * (size_t)width * sizeof *sums);
    if (state == NULL || sums == NULL) {
        mq_free(state);
        mq_free(sums);
        return mq_fail_memory(err, "a calibrator", 2 * (size_t)width * sizeof *sums);
    }
    state->sums = sums;
    state->open = sums + width;
    calib->state = state;
    calib->channels = calib->width = width;
    return MQ_OK;
}

static void add_row(double *MQ_RESTRICT sums, const mq_calib_rows *rows, int64_t row)
{
    const float *f32 = (const float *)rows->x + row * rows->ld;
    const uint16_t *bf16 = (const uint16_t *)rows->x + row * rows->ld;
    if (rows->dtype == MQ_F32)
        for (int64_t c = 0; c < rows->width; c++) sums[c] += (double)fabsf(f32[c]);
    else
        for (int64_t c = 0; c < rows->width; c++)
            sums[c] += (double)mq_float_of((uint32_t)(bf16[c] & 0x7fffu) << 16);
}

static void close_call(mq_calib *calib)
{
    mean *state = calib->state;
    if (state->open_rows == 0) return;
    for (int64_t c = 0; c < calib->channels; c++) {
        float value = (float)(state->open[c] / (double)state->open_rows);
        if (state->dtype == MQ_BF16) value = mq_float_of(mq_encode_float(value, MQ_CODEC(BF16)) << 16);
        state->sums[c] += (double)value;
        state->open[c] = 0.0;
    }
    state->open_rows = 0;
    state->calls++;
}

static void fold_piece(mq_calib *calib, const mq_piece *piece)
{
    mean *state = calib->state;
    const double *sums = (const double *)(const void *)piece->data;
    double *to = calib->option == BY_CALL ? state->open : state->sums;
    if (calib->option == BY_CALL && piece->group != state->group) close_call(calib);
    state->group = piece->group;
    state->dtype = piece->dtype;
    state->open_rows += piece->rows;
    for (int64_t c = 0; c < calib->channels; c++) to[c] += sums[c];
}

static int mean_settle(mq_calib *calib, int all, mq_error *err)
{
    mean *state = calib->state;
    (void)err;
    if (state == NULL) return MQ_OK;
    for (mq_piece *piece; (piece = mq_pending_take(&state->pending)) != NULL; mq_piece_free(calib, piece))
        fold_piece(calib, piece);
    if (all && calib->option == BY_CALL) close_call(calib);
    return MQ_OK;
}

/* Takes the piece. */
static int add_piece(mq_calib *calib, mq_piece *piece, int64_t width, mq_error *err)
{
    const int by_hand = piece->group < 0;
    pthread_mutex_lock(&calib->mutex);
    int rc = prepare(calib, width, err);
    if (rc == MQ_OK) {
        mean *state = calib->state;
        calib->count += piece->rows;
        if (by_hand) piece->group = state->next_group++;
        mq_pending_add(&state->pending, piece);
        if (by_hand) rc = mean_settle(calib, 1, err);
    } else mq_piece_free(calib, piece);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

static int mean_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    const int64_t counted = mq_calib_counted(rows);
    if (counted == 0) return MQ_OK;
    mq_piece *piece = mq_piece_new(calib, rows, counted, (size_t)rows->width * sizeof(double), err);
    if (piece == NULL) return MQ_ERR_MEMORY;
    double *sums = (double *)(void *)piece->data;
    memset(sums, 0, (size_t)rows->width * sizeof *sums);
    for (int64_t i = 0; i < rows->rows; i++)
        if (rows->mask == NULL || rows->mask[i]) add_row(sums, rows, i);
    return add_piece(calib, piece, rows->width, err);
}

static int mean_add(mq_calib *calib, const mq_calib_sums *from, mq_error *err)
{
    const size_t nbytes = (size_t)from->width * sizeof *from->sums;
    const mq_calib_rows rows = {.dtype = from->dtype, .chunk = from->chunk, .group = from->group};
    mq_piece *piece = mq_piece_new(calib, &rows, from->rows, nbytes, err);
    if (piece == NULL) return MQ_ERR_MEMORY;
    memcpy(piece->data, from->sums, nbytes);
    return add_piece(calib, piece, from->width, err);
}

static int mean_merge(mq_calib *calib, const mq_calib *other, mq_error *err)
{
    const mean *from = other->state;
    int rc = prepare(calib, other->channels, err);
    if (rc != MQ_OK) return rc;
    mean *state = calib->state;
    for (int64_t c = 0; c < calib->channels; c++) state->sums[c] += from->sums[c];
    state->calls += from->calls;
    calib->count += other->count;
    return MQ_OK;
}

static int mean_finish(mq_calib *calib, float *out, mq_error *err)
{
    const mean *state = calib->state;
    const double divisor = (double)(calib->option == BY_CALL ? state->calls : calib->count);
    for (int64_t c = 0; c < calib->channels; c++) {
        if (!isfinite(state->sums[c]))
            return mq_fail(err, MQ_ERR_VALUE, "NaN or an infinity was seen in the activations of channel %lld",
                           (long long)c);
        out[c] = (float)(state->sums[c] / divisor);
    }
    return MQ_OK;
}

static void mean_reset(mq_calib *calib)
{
    mean *state = calib->state;
    if (state != NULL) {
        mq_pending_free(calib, &state->pending);
        mq_free(state->sums);
    }
    mq_free(state);
    calib->state = NULL;
    calib->channels = calib->width = calib->count = 0;
}

/* Saved: calls, sums[width]. */
static size_t mean_state_nbytes(const mq_calib *calib)
{
    return calib->state == NULL ? 0 : sizeof(int64_t) + (size_t)calib->channels * sizeof(double);
}

static void mean_save(const mq_calib *calib, void *out)
{
    const mean *state = calib->state;
    if (state == NULL) return;
    memcpy(out, &state->calls, sizeof state->calls);
    memcpy((char *)out + sizeof state->calls, state->sums, (size_t)calib->channels * sizeof(double));
}

static int mean_load(mq_calib *calib, const void *bytes, size_t nbytes, mq_error *err)
{
    const int64_t channels = calib->channels;
    const size_t expected = channels == 0 ? 0 : sizeof(int64_t) + (size_t)channels * sizeof(double);
    if (nbytes != expected)
        return mq_fail(err, MQ_ERR_VALUE, "load: the state of %lld channels cannot have %zu bytes", (long long)channels,
                       nbytes);
    if (channels == 0) return MQ_OK;
    int rc = prepare(calib, channels, err);
    if (rc != MQ_OK) return rc;
    mean *state = calib->state;
    memcpy(&state->calls, bytes, sizeof state->calls);
    memcpy(state->sums, (const char *)bytes + sizeof state->calls, (size_t)channels * sizeof(double));
    return MQ_OK;
}

const mq_calib_kind mq_calib_mean_abs = {
    .name = "mean_abs", .by_group = 1, .needs = MQ_NEEDS_MAGNITUDES, .add = mean_add, .collect = mean_collect,
    .merge = mean_merge, .settle = mean_settle, .finish = mean_finish, .reset = mean_reset,
    .state_nbytes = mean_state_nbytes, .save = mean_save, .load = mean_load,
};
