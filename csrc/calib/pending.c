#include "calib/pending.h"

#include "core/spare.h"

mq_piece *mq_piece_new(const mq_calib *calib, const mq_calib_rows *rows, int64_t counted, size_t nbytes, mq_error *err)
{
    mq_piece *piece = mq_spare_take(calib->spare, sizeof *piece + nbytes);
    if (piece == NULL) {
        mq_fail_memory(err, "a calibrator", sizeof *piece + nbytes);
        return NULL;
    }
    piece->next = NULL;
    piece->group = rows->group;
    piece->chunk = rows->chunk;
    piece->rows = counted;
    piece->dtype = rows->dtype;
    return piece;
}

void mq_piece_free(const mq_calib *calib, mq_piece *piece)
{
    mq_spare_give(calib->spare, piece);
}

void mq_pending_add(mq_pending *pending, mq_piece *piece)
{
    piece->next = pending->first;
    pending->first = piece;
    pending->count++;
}

/* Lists are short: as many pieces as a run collects between two settlements. */
mq_piece *mq_pending_take(mq_pending *pending)
{
    mq_piece **best = &pending->first;
    if (*best == NULL) return NULL;
    for (mq_piece **at = best; *at != NULL; at = &(*at)->next)
        if ((*at)->chunk < (*best)->chunk) best = at;
    mq_piece *piece = *best;
    *best = piece->next;
    pending->count--;
    return piece;
}

void mq_pending_free(const mq_calib *calib, mq_pending *pending)
{
    while (pending->first != NULL) mq_piece_free(calib, mq_pending_take(pending));
}
