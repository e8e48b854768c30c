#include "model/cache.h"

#include <string.h>

#include "core/alloc.h"

enum { GROWTH = 256 };      /* positions: capacity is a multiple of it */

int mq_cache_init(mq_cache *cache, const mq_config *config, mq_dtype dtype, int64_t slots, mq_error *err)
{
    *cache = (mq_cache){.layers = config->num_hidden_layers, .slots = slots, .dtype = dtype,
                        .heads = config->num_key_value_heads, .head_dim = config->head_dim};
    cache->lengths = mq_alloc_zeroed((size_t)slots * sizeof *cache->lengths);
    return cache->lengths ? MQ_OK : mq_fail_memory(err, "the cache", (size_t)slots * sizeof *cache->lengths);
}

void mq_cache_free(mq_cache *cache)
{
    mq_rope_table_free(&cache->rope);
    mq_free(cache->memory);
    mq_free(cache->lengths);
    memset(cache, 0, sizeof *cache);
}

/* Bytes of the keys, or of the values, of one head of one slot in one layer; and how many of these parts there are. */
static size_t part_nbytes(const mq_cache *cache)
{
    return (size_t)(cache->capacity * cache->head_dim) * mq_dtype_size(cache->dtype);
}

static size_t parts(const mq_cache *cache)
{
    return (size_t)(2 * cache->layers * cache->slots * cache->heads);
}

size_t mq_cache_nbytes(const mq_cache *cache)
{
    return parts(cache) * part_nbytes(cache) + mq_rope_table_nbytes(&cache->rope);
}

static void copy_filled(const mq_cache *to, const mq_cache *from)
{
    const size_t position = (size_t)from->head_dim * mq_dtype_size(from->dtype);
    for (size_t i = 0; i < parts(from); i++) {
        const size_t slot = i / (size_t)(2 * from->heads) % (size_t)from->slots;
        memcpy(to->memory + i * part_nbytes(to), from->memory + i * part_nbytes(from),
               (size_t)from->lengths[slot] * position);
    }
}

int mq_cache_reserve(mq_cache *cache, const mq_config *config, int64_t positions, mq_error *err)
{
    mq_cache larger = *cache;
    if (positions <= cache->capacity) return MQ_OK;
    larger.capacity = MQ_ROUND_UP(MQ_MAX(positions, cache->capacity * 3 / 2), (int64_t)GROWTH);
    larger.memory = mq_alloc_huge(parts(&larger) * part_nbytes(&larger));
    if (larger.memory == NULL) return mq_fail_memory(err, "the cache", parts(&larger) * part_nbytes(&larger));
    const int rc = mq_rope_table_init(&larger.rope, config, larger.capacity, err);
    if (rc != MQ_OK) {
        mq_free(larger.memory);
        return rc;
    }
    if (cache->memory != NULL) copy_filled(&larger, cache);
    mq_rope_table_free(&cache->rope);
    mq_free(cache->memory);
    *cache = larger;
    return MQ_OK;
}

void *mq_cache_keys(const mq_cache *cache, int64_t layer, int64_t slot)
{
    return cache->memory + (size_t)(2 * (layer * cache->slots + slot) * cache->heads) * part_nbytes(cache);
}

void *mq_cache_values(const mq_cache *cache, int64_t layer, int64_t slot)
{
    return (char *)mq_cache_keys(cache, layer, slot) + (size_t)cache->heads * part_nbytes(cache);
}

/* in (tokens, heads, head_dim) to out [heads][capacity][head_dim], from position first on. */
static void store(const mq_cache *cache, char *out, const char *in, int64_t first, int64_t tokens)
{
    const size_t nbytes = (size_t)cache->head_dim * mq_dtype_size(cache->dtype);
    for (int64_t i = 0; i < tokens * cache->heads; i++) {
        const int64_t token = i / cache->heads, head = i % cache->heads;
        char *at = out + (size_t)head * part_nbytes(cache) + (size_t)(first + token) * nbytes;
        memcpy(at, in + (size_t)i * nbytes, nbytes);
    }
}

void mq_cache_store(const mq_cache *cache, int64_t layer, int64_t slot, int64_t tokens, const void *k, const void *v)
{
    const int64_t first = cache->lengths[slot];
    store(cache, mq_cache_keys(cache, layer, slot), k, first, tokens);
    store(cache, mq_cache_values(cache, layer, slot), v, first, tokens);
}
