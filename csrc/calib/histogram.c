#include "calib/histogram.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "format/format.h"
#include "kernels/row_ops.h"

#define INFINITY_BITS 0x7f800000u
#define BY_HAND (INT64_MAX - 1)
enum { FINER_BITS = 6 };

/* counts[i] are the values in [i, i + 1) * 2^exponent. */
typedef struct fine {
    int64_t exponent;
    int64_t first_key;      /* position of the data that first_amax is of */
    int64_t zeros;          /* exact ones, counted in counts[0] too */
    uint32_t worst;         /* bits of the largest magnitude, NaN and infinity too */
    uint32_t first_amax;    /* of the first data that were not all zero */
    int32_t inexact;        /* values may lie within a fine bin, not only at its lower edge */
    int32_t unused;
    int64_t counts[];
} fine;

static int64_t wanted_bins(const mq_calib *calib)
{
    return calib->option > 0 ? calib->option : MQ_HISTOGRAM_BINS;
}

/* 32 to 128 fine bins to a bin; half of them at least are below the largest value. */
int mq_histogram_bits(const mq_calib *calib)
{
    int bits = 0;
    while (((int64_t)1 << bits) < wanted_bins(calib)) bits++;
    return bits + FINER_BITS;
}

static size_t fine_nbytes(const mq_calib *calib)
{
    return sizeof(fine) + ((size_t)1 << mq_histogram_bits(calib)) * sizeof(int64_t);
}

static int64_t exponent_for(const mq_calib *calib, uint32_t amax)
{
    int exponent = 0;
    if (amax == 0) return MQ_HISTOGRAM_LOWEST;
    frexpf(mq_float_of(amax), &exponent);
    return MQ_MAX((int64_t)exponent - mq_histogram_bits(calib), (int64_t)MQ_HISTOGRAM_LOWEST);
}

/* Called with the mutex held. */
static int prepare(mq_calib *calib, mq_error *err)
{
    if (calib->state != NULL) return MQ_OK;
    fine *state = mq_alloc_zeroed(fine_nbytes(calib));
    if (state == NULL) return mq_fail_memory(err, "a histogram", fine_nbytes(calib));
    state->exponent = MQ_HISTOGRAM_LOWEST;
    state->first_key = INT64_MAX;
    calib->state = state;
    calib->channels = 1;
    return MQ_OK;
}

/* Makes bins wider, in place: whole numbers of them become one. */
static void widen(mq_calib *calib, int64_t exponent)
{
    fine *state = calib->state;
    const int64_t bins = (int64_t)1 << mq_histogram_bits(calib);
    const int64_t shift = MQ_MIN(exponent - state->exponent, (int64_t)62);
    if (shift <= 0) return;
    for (int64_t i = 0; i < bins; i++) {
        const int64_t count = state->counts[i];
        state->counts[i] = 0;
        state->counts[i >> shift] += count;
    }
    state->exponent = exponent;
}

/* ---- counting ---- */

typedef struct share {
    uint32_t *counts;       /* [2^mq_histogram_bits], of width 2^exponent */
    int64_t exponent, zeros;
    uint32_t amax;
} share;

static uint32_t amax_of(const mq_calib_rows *rows)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(rows->dtype);
    const size_t stride = (size_t)rows->ld * mq_dtype_size(rows->dtype);
    uint32_t best = 0;
    for (int64_t i = 0; i < rows->rows; i++) {
        if (rows->mask != NULL && !rows->mask[i]) continue;
        const uint32_t row = kernels->amax((const char *)rows->x + (size_t)i * stride, rows->width);
        best = MQ_MAX(best, row);
    }
    return best;
}

static int64_t count_f32(uint32_t *counts, const float *x, int64_t n, float scale)
{
    int64_t zeros = 0;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = fabsf(x[i]);
        zeros += magnitude == 0.0f;
        counts[(int32_t)(magnitude * scale)]++;
    }
    return zeros;
}

static int64_t count_bf16(uint32_t *counts, const uint16_t *x, int64_t n, float scale)
{
    int64_t zeros = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = (uint32_t)(x[i] & 0x7fffu) << 16;
        zeros += magnitude == 0;
        counts[(int32_t)(mq_float_of(magnitude) * scale)]++;
    }
    return zeros;
}

/* Multiplying by a power of two is exact; the cast rounds down. */
static void count_rows(share *part, const mq_calib_rows *rows)
{
    const float scale = ldexpf(1.0f, (int)-part->exponent);
    for (int64_t i = 0; i < rows->rows; i++) {
        if (rows->mask != NULL && !rows->mask[i]) continue;
        if (rows->dtype == MQ_F32)
            part->zeros += count_f32(part->counts, (const float *)rows->x + i * rows->ld, rows->width, scale);
        else part->zeros += count_bf16(part->counts, (const uint16_t *)rows->x + i * rows->ld, rows->width, scale);
    }
}

/* The first data may come in parts with one key, but for calls by hand, each of which is data of its own. */
static void note_first(fine *state, int64_t key, uint32_t amax)
{
    if (amax == 0 || amax >= INFINITY_BITS || key > state->first_key) return;
    if (key < state->first_key) state->first_amax = amax;
    else if (key != BY_HAND) state->first_amax = MQ_MAX(state->first_amax, amax);
    state->first_key = key;
}

/* Called with the mutex held. */
static void fold_share(mq_calib *calib, const share *part, const mq_calib_rows *rows)
{
    fine *state = calib->state;
    state->worst = MQ_MAX(state->worst, part->amax);
    note_first(state, rows->group < 0 ? BY_HAND : rows->chunk, part->amax);
    if (part->counts == NULL) return;
    widen(calib, part->exponent);
    const int64_t shift = state->exponent - part->exponent, bins = (int64_t)1 << mq_histogram_bits(calib);
    for (int64_t i = 0; i < bins; i++) state->counts[i >> MQ_MIN(shift, (int64_t)62)] += part->counts[i];
    state->zeros += part->zeros;
    state->inexact |= rows->dtype != MQ_BF16;
}

/* No more rows than fit uint32 counts. */
static int collect_some(mq_calib *calib, const mq_calib_rows *rows, uint32_t amax, mq_error *err)
{
    const int64_t counted = mq_calib_counted(rows);
    share part = {.amax = amax, .exponent = exponent_for(calib, amax < INFINITY_BITS ? amax : 0)};
    if (counted == 0) return MQ_OK;
    if (amax < INFINITY_BITS) {
        const size_t nbytes = ((size_t)1 << mq_histogram_bits(calib)) * sizeof *part.counts;
        part.counts = mq_alloc_zeroed(nbytes);
        if (part.counts == NULL) return mq_fail_memory(err, "a histogram", nbytes);
        count_rows(&part, rows);
    }
    pthread_mutex_lock(&calib->mutex);
    int rc = prepare(calib, err);
    if (rc == MQ_OK) {
        fold_share(calib, &part, rows);
        calib->count += counted;
    }
    pthread_mutex_unlock(&calib->mutex);
    mq_free(part.counts);
    return rc;
}

static int histogram_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    const int64_t step = MQ_MAX((int64_t)UINT32_MAX / rows->width, (int64_t)1);
    const uint32_t amax = amax_of(rows);
    int rc = MQ_OK;
    for (int64_t first = 0; rc == MQ_OK && first < rows->rows; first += step) {
        mq_calib_rows some = *rows;
        some.x = (const char *)rows->x + (size_t)(first * rows->ld) * mq_dtype_size(rows->dtype);
        some.mask = rows->mask ? rows->mask + first : NULL;
        some.rows = MQ_MIN(step, rows->rows - first);
        rc = collect_some(calib, &some, amax, err);
    }
    return rc;
}

/* Called with the mutex held. */
static void add_counts(mq_calib *calib, const int64_t *counts, int64_t exponent)
{
    fine *state = calib->state;
    widen(calib, exponent);
    const int64_t shift = MQ_MIN(state->exponent - exponent, (int64_t)62);
    for (int64_t i = 0; i < (int64_t)1 << mq_histogram_bits(calib); i++) state->counts[i >> shift] += counts[i];
}

int mq_histogram_add(mq_calib *calib, const mq_histogram_part *part, mq_error *err)
{
    pthread_mutex_lock(&calib->mutex);
    const int rc = prepare(calib, err);
    if (rc == MQ_OK) {
        fine *state = calib->state;
        add_counts(calib, part->counts, part->exponent);
        state->worst = MQ_MAX(state->worst, part->worst);
        note_first(state, part->first_chunk, part->first_amax);
        state->zeros += part->zeros;
        state->inexact |= part->dtype != MQ_BF16;
        calib->count += part->rows;
    }
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

/* ---- the rest of the interface ---- */

static int histogram_merge(mq_calib *calib, const mq_calib *other, mq_error *err)
{
    const fine *from = other->state;
    int rc = prepare(calib, err);
    if (rc != MQ_OK) return rc;
    fine *state = calib->state;
    add_counts(calib, from->counts, from->exponent);
    state->zeros += from->zeros;
    state->inexact |= from->inexact;
    state->worst = MQ_MAX(state->worst, from->worst);
    if (state->first_amax == 0) state->first_amax = from->first_amax;
    state->first_key = state->first_amax != 0 ? -1 : INT64_MAX;
    calib->count += other->count;
    return MQ_OK;
}

static int check(const fine *state, mq_error *err)
{
    if (state->worst < INFINITY_BITS) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "%s was seen in the activations",
                   state->worst > INFINITY_BITS ? "NaN" : "an infinity");
}

static int histogram_finish(mq_calib *calib, float *amax, mq_error *err)
{
    const fine *state = calib->state;
    *amax = mq_float_of(state->worst);
    return check(state, err);
}

static void histogram_reset(mq_calib *calib)
{
    mq_free(calib->state);
    calib->state = NULL;
    calib->channels = calib->count = 0;
}

static size_t histogram_state_nbytes(const mq_calib *calib)
{
    return calib->state == NULL ? 0 : fine_nbytes(calib);
}

static void histogram_save(const mq_calib *calib, void *out)
{
    if (calib->state != NULL) memcpy(out, calib->state, fine_nbytes(calib));
}

static int histogram_load(mq_calib *calib, const void *bytes, size_t nbytes, mq_error *err)
{
    const size_t expected = calib->channels == 0 ? 0 : fine_nbytes(calib);
    if (nbytes != expected)
        return mq_fail(err, MQ_ERR_VALUE, "load: the state of a histogram cannot have %zu bytes", nbytes);
    if (nbytes == 0) return MQ_OK;
    int rc = prepare(calib, err);
    if (rc != MQ_OK) return rc;
    fine *state = calib->state;
    memcpy(state, bytes, nbytes);
    int sound = state->exponent >= MQ_HISTOGRAM_LOWEST && state->exponent <= 128 && state->zeros >= 0;
    for (int64_t i = 0; sound && i < (int64_t)1 << mq_histogram_bits(calib); i++) sound = state->counts[i] >= 0;
    return sound ? MQ_OK : mq_fail(err, MQ_ERR_VALUE, "load: the state of a histogram is not sound");
}

const mq_calib_kind mq_calib_histogram = {
    .name = "histogram", .collect = histogram_collect, .merge = histogram_merge, .finish = histogram_finish,
    .reset = histogram_reset, .state_nbytes = histogram_state_nbytes, .save = histogram_save, .load = histogram_load,
};

/* ---- the bins that were asked for ---- */

static void choose_bins(const mq_calib *calib, mq_histogram *out)
{
    const fine *state = calib->state;
    const int64_t wanted = wanted_bins(calib), most = wanted * MQ_HISTOGRAM_GROWTH;
    const double amax = (double)mq_float_of(state->worst), first = (double)mq_float_of(state->first_amax);
    out->bins = wanted;
    out->width = (double)(float)(first / (double)wanted);
    if (amax <= first) return;
    double bins = ceil(amax / out->width);
    if (bins > (double)most) {
        out->width *= ceil(bins / (double)most);
        bins = ceil(amax / out->width);
    }
    out->bins = (int64_t)bins;
}

static void fill_bins(const mq_calib *calib, mq_histogram *out)
{
    const fine *state = calib->state;
    const double within = state->inexact ? 0.5 : 0.0, step = ldexp(1.0, (int)state->exponent);
    for (int64_t i = 0; i < (int64_t)1 << mq_histogram_bits(calib); i++) {
        if (state->counts[i] == 0) continue;
        const double at = out->width > 0.0 ? ((double)i + within) * step / out->width : 0.0;
        out->counts[at < (double)out->bins ? (int64_t)at : out->bins - 1] += state->counts[i];
    }
}

int mq_histogram_of(mq_calib *calib, int skip_zeros, mq_histogram *out, mq_error *err)
{
    *out = (mq_histogram){0};
    if (calib->kind != &mq_calib_histogram)
        return mq_fail(err, MQ_ERR_VALUE, "a calibrator of kind %s has no histogram", calib->kind->name);
    if (calib->channels == 0) return mq_fail(err, MQ_ERR_STATE, "the calibrator has seen no data");
    pthread_mutex_lock(&calib->mutex);
    int rc = check(calib->state, err);
    if (rc == MQ_OK) {
        choose_bins(calib, out);
        out->counts = mq_alloc_zeroed((size_t)out->bins * sizeof *out->counts);
        if (out->counts == NULL) rc = mq_fail_memory(err, "a histogram", (size_t)out->bins * sizeof *out->counts);
    }
    if (rc == MQ_OK) {
        fill_bins(calib, out);
        if (skip_zeros) out->counts[0] -= ((const fine *)calib->state)->zeros;
    }
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

int mq_histogram_range(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err)
{
    if (args->stride < 1 || args->start_bin < 1)
        return mq_fail(err, MQ_ERR_VALUE, "stride and start_bin must be at least 1, got %lld and %lld",
                       (long long)args->stride, (long long)args->start_bin);
    if (histogram->width <= 0.0) {     /* nothing but zeros */
        *amax = 0.0f;
        return MQ_OK;
    }
    switch (args->method) {
    case MQ_RANGE_ENTROPY: return mq_range_entropy(histogram, args, amax, err);
    case MQ_RANGE_MSE: return mq_range_mse(histogram, args, amax, err);
    case MQ_RANGE_PERCENTILE:
    default: return mq_range_percentile(histogram, args, amax, err);
    }
}
