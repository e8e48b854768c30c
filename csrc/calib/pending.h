/* Pieces of statistics that wait until their order is known: threads hand them in as they come, and they are folded in
 * the order of the data, which makes sums independent of threads. */
#ifndef MQ_PENDING_H
#define MQ_PENDING_H

#include "calib/calib.h"

typedef struct mq_piece {
    struct mq_piece *next;
    int64_t group, chunk;        /* as in mq_calib_rows */
    int64_t rows;                /* counted */
    mq_dtype dtype;
    _Alignas(64) char data[];
} mq_piece;

/* Zeroed: empty. */
typedef struct mq_pending {
    mq_piece *first;             /* the last that came */
    int64_t count;
} mq_pending;

/* A piece with room for nbytes; NULL with err set. */
mq_piece *mq_piece_new(const mq_calib *calib, const mq_calib_rows *rows, int64_t counted, size_t nbytes, mq_error *err);
void mq_piece_free(const mq_calib *calib, mq_piece *piece);
void mq_pending_add(mq_pending *pending, mq_piece *piece);
/* Takes the piece that comes first in the data out of the list, NULL if there is none; the caller frees it. */
mq_piece *mq_pending_take(mq_pending *pending);
void mq_pending_free(const mq_calib *calib, mq_pending *pending);

#endif
