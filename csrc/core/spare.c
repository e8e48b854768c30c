#include "core/spare.h"

#include "core/alloc.h"

typedef struct mq_spare_block {
    struct mq_spare_block *next;
    size_t nbytes;
    _Alignas(MQ_ALIGNMENT) char memory[];
} block;

int mq_spare_init(mq_spare *spare)
{
    spare->blocks = NULL;
    spare->ready = pthread_mutex_init(&spare->mutex, NULL) == 0;
    return !spare->ready;
}

void mq_spare_free(mq_spare *spare)
{
    if (!spare->ready) return;
    for (block *b; (b = spare->blocks) != NULL; mq_free(b)) spare->blocks = b->next;
    pthread_mutex_destroy(&spare->mutex);
    spare->ready = 0;
}

/* The smallest that is large enough, unless more than half of it would lie idle. */
static block *find_block(mq_spare *spare, size_t nbytes)
{
    block **best = NULL;
    for (block **at = &spare->blocks; *at != NULL; at = &(*at)->next)
        if ((*at)->nbytes >= nbytes && (*at)->nbytes / 2 <= nbytes && (best == NULL || (*at)->nbytes < (*best)->nbytes))
            best = at;
    if (best == NULL) return NULL;
    block *found = *best;
    *best = found->next;
    return found;
}

void *mq_spare_take(mq_spare *spare, size_t nbytes)
{
    block *found = NULL;
    if (spare != NULL) {
        pthread_mutex_lock(&spare->mutex);
        found = find_block(spare, nbytes);
        pthread_mutex_unlock(&spare->mutex);
    }
    if (found == NULL) {
        found = mq_alloc(sizeof *found + nbytes);
        if (found == NULL) return NULL;
        found->nbytes = nbytes;
    }
    return found->memory;
}

void mq_spare_give(mq_spare *spare, void *memory)
{
    if (memory == NULL) return;
    block *given = (block *)(void *)((char *)memory - offsetof(block, memory));
    if (spare == NULL) {
        mq_free(given);
        return;
    }
    pthread_mutex_lock(&spare->mutex);
    given->next = spare->blocks;
    spare->blocks = given;
    pthread_mutex_unlock(&spare->mutex);
}
