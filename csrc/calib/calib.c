#include "calib/calib.h"

#include <string.h>

#include "core/alloc.h"

static const mq_calib_kind *const kinds[] = {&mq_calib_max, &mq_calib_affine, &mq_calib_affine_max_min,
                                             &mq_calib_mean_abs, &mq_calib_histogram, &mq_calib_gram};
static const char *const kind_names[] = {"max", "affine", "affine_max_min", "mean_abs", "histogram", "gram", NULL};

static const char magic[8] = "mqcalib2";

/* Saved state, little-endian as every machine this runs on. */
typedef struct saved_header {
    char magic[8], kind[16];
    int64_t axis, option, channels, count;
} saved_header;

const mq_calib_kind *mq_calib_find(const char *name)
{
    for (size_t i = 0; i < MQ_COUNT(kinds); i++)
        if (strcmp(kinds[i]->name, name) == 0) return kinds[i];
    return NULL;
}

const char *const *mq_calib_kinds(void)
{
    return kind_names;
}

mq_calib *mq_calib_new(const mq_calib_kind *kind, mq_calib_axis axis, mq_error *err)
{
    mq_calib *calib = mq_alloc_zeroed(sizeof *calib);
    if (calib == NULL || pthread_mutex_init(&calib->mutex, NULL) != 0) {
        mq_fail_memory(err, "a calibrator", sizeof *calib);
        mq_free(calib);
        return NULL;
    }
    calib->kind = kind;
    calib->axis = axis;
    return calib;
}

mq_calib *mq_calib_new_like(const mq_calib *calib, mq_error *err)
{
    mq_calib *made = mq_calib_new(calib->kind, calib->axis, err);
    if (made != NULL) made->option = calib->option;
    return made;
}

void mq_calib_free(mq_calib *calib)
{
    if (calib == NULL) return;
    calib->kind->reset(calib);
    pthread_mutex_destroy(&calib->mutex);
    mq_free(calib);
}

int64_t mq_calib_counted(const mq_calib_rows *rows)
{
    if (rows->mask == NULL) return rows->rows;
    int64_t count = 0;
    for (int64_t i = 0; i < rows->rows; i++) count += rows->mask[i] != 0;
    return count;
}

int mq_calib_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err)
{
    if (rows->rows <= 0 || rows->width <= 0) return MQ_OK;
    return calib->kind->collect(calib, rows, err);
}

int mq_calib_same_kind(const mq_calib *a, const mq_calib *b)
{
    return a->kind == b->kind && a->axis == b->axis && a->option == b->option;
}

int mq_calib_merge(mq_calib *calib, mq_calib *other, mq_error *err)
{
    if (calib == other) return MQ_OK;
    if (!mq_calib_same_kind(calib, other))
        return mq_fail(err, MQ_ERR_VALUE, "merge: calibrators of different kind, axis or option (%s and %s)",
                       calib->kind->name, other->kind->name);
    int rc = mq_calib_settle(calib, 1, err);
    if (rc == MQ_OK) rc = mq_calib_settle(other, 1, err);
    if (rc != MQ_OK || other->channels == 0) return rc;
    /* Always locked in the order of their addresses, so that two merges cannot wait for each other. */
    mq_calib *first = (uintptr_t)calib < (uintptr_t)other ? calib : other;
    mq_calib *second = first == calib ? other : calib;
    pthread_mutex_lock(&first->mutex);
    pthread_mutex_lock(&second->mutex);
    rc = calib->kind->merge(calib, other, err);
    pthread_mutex_unlock(&second->mutex);
    pthread_mutex_unlock(&first->mutex);
    return rc;
}

int mq_calib_settle(mq_calib *calib, int all, mq_error *err)
{
    if (calib->kind->settle == NULL) return MQ_OK;
    pthread_mutex_lock(&calib->mutex);
    int rc = calib->kind->settle(calib, all, err);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

int mq_calib_finish(mq_calib *calib, float *amax, mq_error *err)
{
    int settled = mq_calib_settle(calib, 1, err);
    if (settled != MQ_OK) return settled;
    if (calib->channels == 0) return mq_fail(err, MQ_ERR_STATE, "compute_amax: the calibrator has seen no data");
    pthread_mutex_lock(&calib->mutex);
    int rc = calib->kind->finish(calib, amax, err);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

int mq_calib_bias(mq_calib *calib, float *bias, mq_error *err)
{
    if (calib->kind->bias == NULL)
        return mq_fail(err, MQ_ERR_VALUE, "a calibrator of kind %s finds no bias", calib->kind->name);
    if (calib->channels == 0) return mq_fail(err, MQ_ERR_STATE, "compute_bias: the calibrator has seen no data");
    pthread_mutex_lock(&calib->mutex);
    int rc = calib->kind->bias(calib, bias, err);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}

void mq_calib_reset(mq_calib *calib)
{
    pthread_mutex_lock(&calib->mutex);
    calib->kind->reset(calib);
    pthread_mutex_unlock(&calib->mutex);
}

size_t mq_calib_save_nbytes(const mq_calib *calib)
{
    return sizeof(saved_header) + calib->kind->state_nbytes(calib);
}

void mq_calib_save(const mq_calib *calib, uint8_t *out)
{
    saved_header header = {.axis = calib->axis, .option = calib->option, .channels = calib->channels,
                           .count = calib->count};
    memcpy(header.magic, magic, sizeof magic);
    memcpy(header.kind, calib->kind->name, MQ_MIN(strlen(calib->kind->name), sizeof header.kind - 1));
    memcpy(out, &header, sizeof header);
    calib->kind->save(calib, out + sizeof header);
}

static int check_header(const mq_calib *calib, const saved_header *header, mq_error *err)
{
    if (memcmp(header->magic, magic, sizeof magic) != 0)
        return mq_fail(err, MQ_ERR_VALUE, "load: not the state of a calibrator");
    if (strncmp(header->kind, calib->kind->name, sizeof header->kind) != 0 || header->axis != (int64_t)calib->axis ||
        header->option != calib->option)
        return mq_fail(err, MQ_ERR_VALUE,
                       "load: the state is of kind %.15s, axis %lld, option %lld; this calibrator is %s, axis %d, "
                       "option %lld", header->kind, (long long)header->axis, (long long)header->option,
                       calib->kind->name, (int)calib->axis, (long long)calib->option);
    if (header->channels < 0 || header->channels > INT32_MAX || header->count < 0 ||
        (calib->axis == MQ_CALIB_TENSOR && header->channels > 1))
        return mq_fail(err, MQ_ERR_VALUE, "load: the state says %lld channels and %lld rows",
                       (long long)header->channels, (long long)header->count);
    return MQ_OK;
}

int mq_calib_load(mq_calib *calib, const uint8_t *bytes, size_t nbytes, mq_error *err)
{
    saved_header header;
    if (nbytes < sizeof header) return mq_fail(err, MQ_ERR_VALUE, "load: %zu bytes are too few for a state", nbytes);
    memcpy(&header, bytes, sizeof header);
    int rc = check_header(calib, &header, err);
    if (rc != MQ_OK) return rc;
    pthread_mutex_lock(&calib->mutex);
    calib->kind->reset(calib);
    calib->channels = header.channels;
    calib->count = header.count;
    rc = calib->kind->load(calib, bytes + sizeof header, nbytes - sizeof header, err);
    if (rc != MQ_OK) calib->kind->reset(calib);
    pthread_mutex_unlock(&calib->mutex);
    return rc;
}
