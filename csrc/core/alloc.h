/* Aligned allocation through one hook, so that tests can make the n-th allocation fail.
 * Memory is aligned to 64 bytes (a cache line, a zmm register, an AMX tile row). */
#ifndef MQ_ALLOC_H
#define MQ_ALLOC_H

#include "core/mq.h"

#define MQ_ALIGNMENT 64

void *mq_alloc(size_t nbytes);        /* NULL on failure; nbytes 0 gives a pointer that may be freed */
void *mq_alloc_zeroed(size_t nbytes);
void *mq_alloc_array(size_t count, size_t size); /* NULL on overflow of count * size too */
void *mq_alloc_huge(size_t nbytes);   /* for much that is read again and again: in huge pages, where there are such */
void mq_free(void *memory);           /* NULL is accepted */

/* Tests only: fail the n-th allocation from now (1 = the next), once, or from then on if persistent; 0 ends it.
 * Returns how many allocations were asked for since the last call. */
uint64_t mq_alloc_fail_at(uint64_t n, int persistent);
int64_t mq_alloc_live(void); /* tests only: allocations that were not freed yet */

#endif
