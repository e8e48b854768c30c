/* Calibrators: statistics of the activations that reach a quantizer, with one interface for every kind.
 *
 * init, collect any number of times from any thread, merge (statistics of different shares of the data, or of siblings
 * that see the same tensor), finish, reset, save and load. Adding a kind: one file with an mq_calib_kind, one line in
 * calib.c. The result may not depend on the order of collect calls; a kind that adds floating-point numbers must fold
 * its partial sums by mq_calib_rows.chunk. A row with mask 0 counts nowhere. */
#ifndef MQ_CALIB_H
#define MQ_CALIB_H

#include <pthread.h>

#include "core/spare.h"
#include "core/tensor.h"

typedef struct mq_calib mq_calib;

/* Rows of activations: x [rows, width], MQ_F32 or MQ_BF16, ld elements between rows. */
typedef struct mq_calib_rows {
    const void *x;
    mq_dtype dtype;
    int64_t rows, width, ld;
    const uint8_t *mask;    /* [rows], 0 = padding; NULL = every row counts */
    int64_t chunk;          /* position of these rows in the whole data, for kinds that add */
    int64_t group;          /* the recorded batch they are of, for kinds that average over batches; -1 = a new one */
} mq_calib_rows;

/* What was summed elsewhere (a device) over rows of one group. */
typedef struct mq_calib_sums {
    int64_t rows, width;        /* rows that count */
    mq_dtype dtype;             /* of the rows */
    int64_t chunk, group;       /* as in mq_calib_rows, of the first row */
    const double *sums;         /* [width], of x or its magnitudes */
    const float *lows, *highs;  /* [width], of kinds that need them */
} mq_calib_sums;

typedef enum mq_calib_needs { MQ_NEEDS_NO_SUMS, MQ_NEEDS_MAGNITUDES, MQ_NEEDS_SUMS_AND_BOUNDS } mq_calib_needs;

typedef struct mq_calib_kind {
    const char *name;
    int by_group;               /* option 1 of the kind needs rows group by group */
    mq_calib_needs needs;       /* of channels: all that it keeps of rows */
    int (*add)(mq_calib *calib, const mq_calib_sums *sums, mq_error *err);  /* of kinds that need sums */
    int (*collect)(mq_calib *calib, const mq_calib_rows *rows, mq_error *err);
    int (*merge)(mq_calib *calib, const mq_calib *other, mq_error *err);
    /* Folds what is kept aside until its order is known; NULL: the kind keeps nothing aside. all 0: what was collected
     * so far comes before all that follows. all 1: nothing may be left aside. Called with the mutex held. */
    int (*settle)(mq_calib *calib, int all, mq_error *err);
    int (*finish)(mq_calib *calib, float *amax, mq_error *err); /* amax has `channels` entries */
    int (*bias)(mq_calib *calib, float *out, mq_error *err);    /* out has `width` entries; NULL: the kind finds none */
    void (*reset)(mq_calib *calib);
    size_t (*state_nbytes)(const mq_calib *calib);
    void (*save)(const mq_calib *calib, void *out);
    int (*load)(mq_calib *calib, const void *state, size_t nbytes, mq_error *err);
} mq_calib_kind;

/* axis: amax per tensor, or one per entry of the last axis (channel). */
typedef enum mq_calib_axis { MQ_CALIB_TENSOR, MQ_CALIB_LAST } mq_calib_axis;

struct mq_calib {
    const mq_calib_kind *kind;
    mq_calib_axis axis;
    int64_t option;         /* the kind's own parameter: bins, block size (see each kind) */
    int64_t channels;       /* entries of amax: 1 per tensor; 0 until the first rows for MQ_CALIB_LAST */
    int64_t width;          /* entries of the bias, of kinds that find one; 0 until the first rows */
    int64_t count;          /* rows seen, padding left out */
    mq_spare *spare;        /* where memory that is needed for a while comes from; NULL = from the system */
    void *state;            /* the kind's own */
    pthread_mutex_t mutex;  /* held for the fold of a chunk's partial result, never while it is computed */
};

/* The kind of that name, or NULL; mq_calib_kinds() lists the names, ended by NULL. */
const mq_calib_kind *mq_calib_find(const char *name);
const char *const *mq_calib_kinds(void);

mq_calib *mq_calib_new(const mq_calib_kind *kind, mq_calib_axis axis, mq_error *err);
mq_calib *mq_calib_new_like(const mq_calib *calib, mq_error *err);  /* the same kind, axis and option; empty */
void mq_calib_free(mq_calib *calib);                          /* NULL is accepted */
int mq_calib_collect(mq_calib *calib, const mq_calib_rows *rows, mq_error *err);
int mq_calib_merge(mq_calib *calib, mq_calib *other, mq_error *err);
/* settle of the kind, if it has one. mq_calib_save must come after mq_calib_settle(calib, 1, err). */
int mq_calib_settle(mq_calib *calib, int all, mq_error *err);
int64_t mq_calib_counted(const mq_calib_rows *rows);           /* how many the mask lets through */
int mq_calib_same_kind(const mq_calib *a, const mq_calib *b); /* would they compute the same from the same rows */
/* amax [channels]; MQ_ERR_VALUE if a NaN or an infinity was seen; MQ_ERR_STATE if nothing was. */
int mq_calib_finish(mq_calib *calib, float *amax, mq_error *err);
/* The bias [width] that the kind takes off before it looks for amax; MQ_ERR_VALUE if it has none to offer. */
int mq_calib_bias(mq_calib *calib, float *bias, mq_error *err);
void mq_calib_reset(mq_calib *calib);
/* The state as bytes: a header (magic, kind, axis, option, channels, count) and the kind's own. */
size_t mq_calib_save_nbytes(const mq_calib *calib);
void mq_calib_save(const mq_calib *calib, uint8_t *out);
int mq_calib_load(mq_calib *calib, const uint8_t *bytes, size_t nbytes, mq_error *err);

extern const mq_calib_kind mq_calib_max, mq_calib_affine, mq_calib_affine_max_min, mq_calib_mean_abs;
extern const mq_calib_kind mq_calib_histogram, mq_calib_gram;

#endif
