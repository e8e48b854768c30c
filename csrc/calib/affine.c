/* A bias per channel, and the largest magnitude of what is left when it is taken off: what an affine KV cache needs.
 *
 * As the reference does it (calib/bias.py and TensorQuantizer.collect): batch by batch, the mean over a batch's tokens
 * moves a running average that is rounded to the data's dtype, and the batch's amax is that of x - bias so far.
 * |round(x - bias)| is largest at the channel's largest or smallest x, so sums, minima and maxima of every batch are
 * all that has to be kept. They are kept by sequence and folded in the order of the data, which makes the result
 * independent of threads. */
#include "calib/calib.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/alloc.h"
#include "format/format.h"

/* The state: a header, then an entry per sequence: entry, sum double[width], low float[width], high float[width]. */
typedef struct affine {
    int64_t entries, room;
    int64_t dtype;
    int64_t next_group, next_chunk; /* beyond all seen, to put merged data behind */
} affine;

typedef struct entry {
    int64_t group, chunk, count;
} entry;

static size_t entry_size(int64_t width)
{
    return MQ_ROUND_UP(sizeof(entry) + (size_t)width * (sizeof(double) + 2 * sizeof(float)), sizeof(double));
}

static entry *entry_at(const mq_calib *calib, int64_t i)
{
    return (entry *)(void *)((char *)calib->state + sizeof(affine) + (size_t)i * entry_size(calib->width));
}

static double *sums_of(const entry *e)
{
    return (double *)(void *)((char *)(uintptr_t)e + sizeof *e);
}

static float *lows_of(const mq_calib *calib, const entry *e)
{
    return (float *)(void *)(sums_of(e) + calib->width);
}

static float *highs_of(const mq_calib *calib, const entry *e)
{
    return lows_of(calib, e) + calib->width;
}

/* Room for one entry more. Called with the mutex held. */
static int reserve(mq_calib *calib, int64_t width, mq_dtype dtype, mq_error *err)
{
    affine *state = calib->state;
    if (state != NULL && calib->width != width)
        return mq_fail(err, MQ_ERR_VALUE, "the calibrator has %lld channels, the data has %lld",
                       (long long)calib->width, (long long)width);
    if (state != NULL && state->entries < state->room) return MQ_OK;
    const int64_t room = state != NULL ? 2 * state->room : 8;
    const size_t nbytes = sizeof(affine) + (size_t)room * entry_size(width);
    affine *grown = mq_alloc(nbytes);
    if (grown == NULL) return mq_fail_memory(err, "a calibrator", nbytes);
    *grown = (affine){.dtype = (int64_t)dtype};
    if (state != NULL) memcpy(grown, state, sizeof(affine) + (size_t)state->entries * entry_size(width));
    grown->room = room;
    mq_free(state);
    calib->state = grown;
    calib->width = width;
    calib->channels = 1;
    return MQ_OK;
}

static float value_at(const mq_calib_rows *rows, int64_t row, int64_t channel)
{
    const int64_t at = row * rows->ld + channel;
    if (rows->dtype == MQ_F32) return ((const float *)rows->x)[at];
    return mq_float_of((uint32_t)((const uint16_t *)rows->x)[at] << 16);
}

static void scan(entry *e, const mq_calib_rows *rows)
{
    double *sum = sums_of(e);
    float *low = (float *)(void *)(sum + rows->width), *high = low + rows->width;
    for (int64_t c = 0; c < rows->width; c++) {
        sum[c] = 0.0;
        low[c] = INFINITY;
        high[c] = -INFINITY;
    }
    for (int64_t r = 0; r < rows->rows; r++) {
        if (rows->mask != NULL && !rows->mask[r]) continue;
        e->count++;
        for (int64_t c = 0; c < rows->width; c++) {
            const float x = value_at(rows, r, c);
            sum[c] += (double)x;
            low[c] = MQ_MIN(low[c], x);
            high[c] = MQ_MAX(high[c], x);
        }
    }
}

/* rows: that e is of, padding too. Called with the mutex held. */
static void append(mq_calib *calib, const entry *e, int64_t rows)
{
    affine *state = calib->state;
    entry *to = entry_at(calib, state->entries);
    memcpy(to, e, entry_size(calib->width));
    if (e->group < 0) {
        to->group = state->next_group;
        to->chunk = state->next_chunk;
    }
    state->entries++;
    state->next_group = MQ_MAX(state->next_group, to->group + 1);
    state->next_chunk = MQ_MAX(state->next_chunk, to->chunk + rows);
    calib->count += e->count;
}

static int add_entry(mq_calib *calib, const entry *e, int64_t rows, int64_t width, mq_dtype dtype, mq_error *err)
{
    if (e->count == 0) return MQ_OK;
    pthread_mutex_lock(&calib->mutex);
    const int rc = reserve(calib, width, dtype, err);
    if (rc == MQ_OK) append(calib, e, rows);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

static int affine_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    entry *e = mq_alloc(entry_size(rows->width));
    if (e == NULL) return mq_fail_memory(err, "a calibrator", entry_size(rows->width));
    *e = (entry){.group = rows->group, .chunk = rows->chunk};
    scan(e, rows);
    const int rc = add_entry(calib, e, rows->rows, rows->width, rows->dtype, err);
    mq_free(e);
    return rc;
}

static int affine_add(mq_calib *calib, const mq_calib_sums *from, mq_error *err)
{
    const size_t width = (size_t)from->width;
    entry *e = mq_alloc(entry_size(from->width));
    if (e == NULL) return mq_fail_memory(err, "a calibrator", entry_size(from->width));
    *e = (entry){.group = from->group, .chunk = from->chunk, .count = from->rows};
    float *low = (float *)(void *)(sums_of(e) + width);
    memcpy(sums_of(e), from->sums, width * sizeof *from->sums);
    memcpy(low, from->lows, width * sizeof *low);
    memcpy(low + width, from->highs, width * sizeof *low);
    const int rc = add_entry(calib, e, from->rows, from->width, from->dtype, err);
    mq_free(e);
    return rc;
}

/* Another's data counts as later batches. */
static int affine_merge(mq_calib *calib, const mq_calib *other, mq_error *err)
{
    const affine *from = other->state, *mine = calib->state;
    const int64_t groups = mine != NULL ? mine->next_group : 0, chunks = mine != NULL ? mine->next_chunk : 0;
    for (int64_t i = 0; i < from->entries; i++) {
        int rc = reserve(calib, other->width, (mq_dtype)from->dtype, err);
        if (rc != MQ_OK) return rc;
        affine *state = calib->state;
        entry *e = entry_at(calib, state->entries++);
        memcpy(e, entry_at(other, i), entry_size(other->width));
        e->group += groups;
        e->chunk += chunks;
        state->next_group = groups + from->next_group;
        state->next_chunk = chunks + from->next_chunk;
    }
    calib->count += other->count;
    return MQ_OK;
}

/* ---- from the entries to bias and amax ---- */

static int by_chunk(const void *a, const void *b)
{
    const entry *const *x = a, *const *y = b;
    return ((*x)->chunk > (*y)->chunk) - ((*x)->chunk < (*y)->chunk);
}

typedef struct fold {
    const mq_calib *calib;
    const entry **order;
    int64_t batches;
    float *bias, *low, *high; /* bias so far; minima and maxima of all batches so far */
    float amax;
} fold;

static float rounded(float x, mq_dtype dtype)
{
    return dtype == MQ_BF16 ? mq_float_of(mq_encode_float(x, MQ_CODEC(BF16)) << 16) : x;
}

/* Entries [begin, end) are one batch. */
static void fold_batch(fold *it, int64_t begin, int64_t end)
{
    const mq_calib *calib = it->calib;
    const mq_dtype dtype = (mq_dtype)((const affine *)calib->state)->dtype;
    const int by_mean = calib->kind == &mq_calib_affine;
    for (int64_t c = 0; c < calib->width; c++) {
        double sum = 0.0;
        int64_t count = 0;
        float low = INFINITY, high = -INFINITY;
        for (int64_t i = begin; i < end; i++) {
            const entry *e = it->order[i];
            sum += sums_of(e)[c];
            count += e->count;
            low = MQ_MIN(low, lows_of(calib, e)[c]);
            high = MQ_MAX(high, highs_of(calib, e)[c]);
        }
        it->low[c] = MQ_MIN(it->low[c], low);
        it->high[c] = MQ_MAX(it->high[c], high);
        const float mean = rounded((float)(sum / (double)count), dtype), n = (float)it->batches;
        if (!by_mean) it->bias[c] = rounded(rounded(it->high[c] + it->low[c], dtype) / 2.0f, dtype);
        else it->bias[c] = it->batches == 0 ? mean : rounded((it->bias[c] * n + mean) / (n + 1.0f), dtype);
        const float above = fabsf(rounded(high - it->bias[c], dtype)), below = fabsf(rounded(low - it->bias[c], dtype));
        it->amax = MQ_MAX(it->amax, MQ_MAX(above, below));
    }
    it->batches++;
}

static int check_entries(const mq_calib *calib, mq_error *err)
{
    for (int64_t i = 0; i < ((const affine *)calib->state)->entries; i++)
        for (int64_t c = 0; c < calib->width; c++)
            if (!isfinite(sums_of(entry_at(calib, i))[c]))
                return mq_fail(err, MQ_ERR_VALUE, "NaN or an infinity was seen in the activations");
    return MQ_OK;
}

/* bias [width] may be NULL. */
static int affine_fold(const mq_calib *calib, float *bias, float *amax, mq_error *err)
{
    const int64_t entries = ((const affine *)calib->state)->entries;
    fold it = {.calib = calib};
    int rc = check_entries(calib, err);
    if (rc != MQ_OK) return rc;
    it.order = mq_alloc_array((size_t)MQ_MAX(entries, (int64_t)1), sizeof *it.order);
    it.bias = mq_alloc_array((size_t)calib->width, 3 * sizeof *it.bias);
    if (it.order == NULL || it.bias == NULL) {
        rc = mq_fail_memory(err, "a bias", (size_t)calib->width * 3 * sizeof *it.bias);
        goto done;
    }
    it.low = it.bias + calib->width;
    it.high = it.low + calib->width;
    for (int64_t c = 0; c < calib->width; c++) {
        it.bias[c] = 0.0f;
        it.low[c] = INFINITY;
        it.high[c] = -INFINITY;
    }
    for (int64_t i = 0; i < entries; i++) it.order[i] = entry_at(calib, i);
    qsort(it.order, (size_t)entries, sizeof *it.order, by_chunk);
    for (int64_t begin = 0, end; begin < entries; begin = end) {
        for (end = begin + 1; end < entries && it.order[end]->group == it.order[begin]->group; end++) {
        }
        fold_batch(&it, begin, end);
    }
    if (bias != NULL) memcpy(bias, it.bias, (size_t)calib->width * sizeof *bias);
    if (amax != NULL) *amax = it.amax;
done:
    mq_free(it.order);
    mq_free(it.bias);
    return rc;
}

static int affine_finish(mq_calib *calib, float *amax, mq_error *err)
{
    return affine_fold(calib, NULL, amax, err);
}

static int affine_bias(mq_calib *calib, float *out, mq_error *err)
{
    return affine_fold(calib, out, NULL, err);
}

static void affine_reset(mq_calib *calib)
{
    mq_free(calib->state);
    calib->state = NULL;
    calib->channels = calib->width = calib->count = 0;
}

static size_t affine_state_nbytes(const mq_calib *calib)
{
    const affine *state = calib->state;
    return state == NULL ? 0 : sizeof calib->width + sizeof *state + (size_t)state->entries * entry_size(calib->width);
}

static void affine_save(const mq_calib *calib, void *out)
{
    if (calib->state == NULL) return;
    memcpy(out, &calib->width, sizeof calib->width);
    memcpy((char *)out + sizeof calib->width, calib->state, affine_state_nbytes(calib) - sizeof calib->width);
}

static int affine_load(mq_calib *calib, const void *bytes, size_t nbytes, mq_error *err)
{
    int64_t width;
    affine saved;
    if (calib->channels == 0 && nbytes == 0) return MQ_OK;
    if (nbytes < sizeof width + sizeof saved) return mq_fail(err, MQ_ERR_VALUE, "load: the state is cut short");
    memcpy(&width, bytes, sizeof width);
    memcpy(&saved, (const char *)bytes + sizeof width, sizeof saved);
    const size_t rest = nbytes - sizeof width - sizeof saved;
    if (width <= 0 || width > INT32_MAX || saved.entries < 0 || (size_t)saved.entries > rest / entry_size(width) ||
        rest != (size_t)saved.entries * entry_size(width) || (saved.dtype != MQ_F32 && saved.dtype != MQ_BF16))
        return mq_fail(err, MQ_ERR_VALUE, "load: the state of %lld channels cannot have %zu bytes", (long long)width,
                       nbytes);
    saved.room = MQ_MAX(saved.entries, (int64_t)1);
    calib->state = mq_alloc(sizeof saved + (size_t)saved.room * entry_size(width));
    if (calib->state == NULL) return mq_fail_memory(err, "a calibrator", nbytes);
    memcpy(calib->state, &saved, sizeof saved);
    memcpy((char *)calib->state + sizeof saved, (const char *)bytes + sizeof width + sizeof saved, rest);
    calib->width = width;
    calib->channels = 1;
    for (int64_t i = 0; i < saved.entries; i++)
        if (entry_at(calib, i)->count <= 0)
            return mq_fail(err, MQ_ERR_VALUE, "load: the state has a sequence without tokens");
    return MQ_OK;
}

#define AFFINE(kind_name) \
    .name = kind_name, .needs = MQ_NEEDS_SUMS_AND_BOUNDS, .add = affine_add, .collect = affine_collect, \
    .merge = affine_merge, .finish = affine_finish, .bias = affine_bias, \
    .reset = affine_reset, .state_nbytes = affine_state_nbytes, .save = affine_save, .load = affine_load

/* The bias is the average of the batches' means, or half-way between the smallest and the largest value so far. */
const mq_calib_kind mq_calib_affine = {AFFINE("affine")};
const mq_calib_kind mq_calib_affine_max_min = {AFFINE("affine_max_min")};
