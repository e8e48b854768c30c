#include "model/cache.h"

#include <string.h>

#include "core/alloc.h"

enum { GROWTH = 256 };      /* positions: capacity is a multiple of it */

int mq_cache_init(mq_cache *cache, const mq_config *config, unsigned layer_ropes, mq_dtype dtype, int64_t slots,
                  mq_error *err)
{
    *cache = (mq_cache){.layers = config->num_hidden_layers, .slots = slots, .dtype = dtype,
                        .heads = config->num_key_value_heads, .head_dim = config->head_dim,
                        .value_dim = config->value_head_dim, .layer_ropes = layer_ropes};
    cache->lengths = mq_alloc_zeroed((size_t)slots * sizeof *cache->lengths);
    return cache->lengths ? MQ_OK : mq_fail_memory(err, "the cache", (size_t)slots * sizeof *cache->lengths);
}

void mq_cache_free(mq_cache *cache)
{
    mq_ropes_free(&cache->ropes);
    mq_free(cache->memory);
    mq_free(cache->lengths);
    memset(cache, 0, sizeof *cache);
}

/* Bytes of one head's numbers of width, and of keys and values of one slot in one layer. */
static size_t head_nbytes(const mq_cache *cache, int64_t width)
{
    return (size_t)(cache->capacity * width) * mq_dtype_size(cache->dtype);
}

static size_t slot_nbytes(const mq_cache *cache)
{
    return (size_t)cache->heads * head_nbytes(cache, cache->head_dim + cache->value_dim);
}

static size_t memory_nbytes(const mq_cache *cache)
{
    return (size_t)(cache->layers * cache->slots) * slot_nbytes(cache);
}

size_t mq_cache_nbytes(const mq_cache *cache)
{
    return memory_nbytes(cache) + mq_ropes_nbytes(&cache->ropes);
}

static void copy_heads(const mq_cache *to, const mq_cache *from, char *out, const char *in, int64_t slot, int64_t width)
{
    const size_t filled = (size_t)(from->lengths[slot] * width) * mq_dtype_size(from->dtype);
    for (int64_t head = 0; head < from->heads; head++)
        memcpy(out + (size_t)head * head_nbytes(to, width), in + (size_t)head * head_nbytes(from, width), filled);
}

static void copy_filled(const mq_cache *to, const mq_cache *from)
{
    for (int64_t layer = 0; layer < from->layers; layer++)
        for (int64_t slot = 0; slot < from->slots; slot++) {
            copy_heads(to, from, mq_cache_keys(to, layer, slot), mq_cache_keys(from, layer, slot), slot,
                       from->head_dim);
            copy_heads(to, from, mq_cache_values(to, layer, slot), mq_cache_values(from, layer, slot), slot,
                       from->value_dim);
        }
}

int mq_cache_reserve(mq_cache *cache, const mq_config *config, int64_t positions, mq_error *err)
{
    mq_cache larger = *cache;
    if (positions <= cache->capacity) return MQ_OK;
    larger.capacity = MQ_ROUND_UP(MQ_MAX(positions, cache->capacity * 3 / 2), (int64_t)GROWTH);
    larger.memory = mq_alloc_huge(memory_nbytes(&larger));
    if (larger.memory == NULL) return mq_fail_memory(err, "the cache", memory_nbytes(&larger));
    const int rc = mq_ropes_init(&larger.ropes, config, cache->layer_ropes, larger.capacity, err);
    if (rc != MQ_OK) {
        mq_free(larger.memory);
        return rc;
    }
    if (cache->memory != NULL) copy_filled(&larger, cache);
    mq_ropes_free(&cache->ropes);
    mq_free(cache->memory);
    *cache = larger;
    return MQ_OK;
}

void *mq_cache_keys(const mq_cache *cache, int64_t layer, int64_t slot)
{
    return cache->memory + (size_t)(layer * cache->slots + slot) * slot_nbytes(cache);
}

void *mq_cache_values(const mq_cache *cache, int64_t layer, int64_t slot)
{
    return (char *)mq_cache_keys(cache, layer, slot) + (size_t)cache->heads * head_nbytes(cache, cache->head_dim);
}

/* in (tokens, heads, width) to out [heads][capacity][width], from position first on. */
static void store(const mq_cache *cache, char *out, const char *in, int64_t first, const mq_cache_rows *rows,
                  int64_t width)
{
    const size_t nbytes = (size_t)width * mq_dtype_size(cache->dtype);
    for (int64_t i = 0; i < rows->tokens * rows->heads; i++) {
        const int64_t token = i / rows->heads, head = i % rows->heads;
        char *at = out + (size_t)head * head_nbytes(cache, width) + (size_t)(first + token) * nbytes;
        memcpy(at, in + (size_t)i * nbytes, nbytes);
    }
}

void mq_cache_store(const mq_cache *cache, int64_t layer, int64_t slot, const mq_cache_rows *rows)
{
    const int64_t first = cache->lengths[slot];
    store(cache, mq_cache_keys(cache, layer, slot), rows->k, first, rows, cache->head_dim);
    store(cache, mq_cache_values(cache, layer, slot), rows->v, first, rows, cache->value_dim);
}
