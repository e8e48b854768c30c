#define _DEFAULT_SOURCE     /* madvise */
#include "core/alloc.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

/* The tests' fault injector and leak counter: the one piece of mutable state beside the dispatch table. */
static _Atomic int64_t live_count;
static _Atomic uint64_t allocation_count;
static _Atomic uint64_t fail_from;
static _Atomic int fail_persistently;

static int should_fail(void)
{
    uint64_t at = atomic_load_explicit(&fail_from, memory_order_relaxed);
    if (at == 0) return 0;
    uint64_t n = atomic_fetch_add(&allocation_count, 1) + 1;
    return atomic_load(&fail_persistently) ? n >= at : n == at;
}

static void *allocate(size_t nbytes, size_t alignment)
{
    void *memory = NULL;
    if (should_fail() || nbytes > SIZE_MAX - alignment) return NULL;
    if (posix_memalign(&memory, alignment, MQ_ROUND_UP(MQ_MAX(nbytes, (size_t)1), alignment)) != 0) return NULL;
    atomic_fetch_add_explicit(&live_count, 1, memory_order_relaxed);
    return memory;
}

void *mq_alloc(size_t nbytes)
{
    return allocate(nbytes, MQ_ALIGNMENT);
}

/* Pages of 4 KB cost half of what a core can read: their translations are fetched from memory, too. */
void *mq_alloc_huge(size_t nbytes)
{
    if (nbytes < HUGE_PAGE) return mq_alloc(nbytes);
    void *memory = allocate(nbytes, HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    if (memory != NULL) (void)madvise(memory, nbytes, MADV_HUGEPAGE);      /* a wish */
#endif
    return memory;
}

void *mq_alloc_zeroed(size_t nbytes)
{
    void *memory = mq_alloc(nbytes);
    if (memory != NULL) memset(memory, 0, nbytes);
    return memory;
}

void *mq_alloc_array(size_t count, size_t size)
{
    if (size != 0 && count > SIZE_MAX / size) return NULL;
    return mq_alloc(count * size);
}

void mq_free(void *memory)
{
    if (memory != NULL) atomic_fetch_sub_explicit(&live_count, 1, memory_order_relaxed);
    free(memory);
}

uint64_t mq_alloc_fail_at(uint64_t n, int persistent)
{
    uint64_t seen = atomic_exchange(&allocation_count, 0);
    atomic_store(&fail_persistently, persistent);
    atomic_store(&fail_from, n);
    return seen;
}

int64_t mq_alloc_live(void)
{
    return atomic_load(&live_count);
}
