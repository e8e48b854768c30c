/* Keys and values of the positions that sequences have been through, as attention reads them: behind rope and behind
 * the quantizers of k and v. A sequence has a slot of its own, so sequences of different lengths need no padding. */
#ifndef MQ_CACHE_H
#define MQ_CACHE_H

#include "model/ops.h"

typedef struct mq_cache {
    int64_t layers, slots, heads;       /* heads: at most */
    int64_t head_dim, value_dim;        /* of keys, of values */
    int64_t capacity;                   /* positions that every slot has room for */
    mq_dtype dtype;
    char *memory;                       /* [layers][slots][keys, values][heads][capacity][head_dim or value_dim] */
    int64_t *lengths;                   /* (slots): positions that are filled */
    mq_ropes ropes;                     /* of capacity positions */
    unsigned layer_ropes;               /* which of them layers have */
} mq_cache;

int mq_cache_init(mq_cache *cache, const mq_config *config, unsigned layer_ropes, mq_dtype dtype, int64_t slots,
                  mq_error *err);
void mq_cache_free(mq_cache *cache);
size_t mq_cache_nbytes(const mq_cache *cache);

/* Room for so many positions in every slot; what is filled stays. */
int mq_cache_reserve(mq_cache *cache, const mq_config *config, int64_t positions, mq_error *err);

/* Keys or values of a slot in a layer. */
void *mq_cache_keys(const mq_cache *cache, int64_t layer, int64_t slot);
void *mq_cache_values(const mq_cache *cache, int64_t layer, int64_t slot);

/* Puts keys (tokens, heads, head_dim) and values (tokens, heads, value_dim) behind those of the slot; its length stays,
 * since other layers follow. */
typedef struct mq_cache_rows {
    const void *k, *v;
    int64_t tokens, heads;
} mq_cache_rows;
void mq_cache_store(const mq_cache *cache, int64_t layer, int64_t slot, const mq_cache_rows *rows);

#endif
