/* The thread pool: pthreads, created at first use, the caller works too.
 *
 * A range is cut into chunks of a fixed grain, whatever the number of threads; chunks are claimed dynamically, and a
 * chunk's work must not depend on which thread does it. A call from inside a job runs inline. After fork the child's
 * pool is "not started" and starts its own threads when needed. Size: MODELQ_NUM_THREADS, else the affinity mask. */
#ifndef MQ_POOL_H
#define MQ_POOL_H

#include "core/mq.h"

enum { MQ_POOL_LIMIT = 256 }; /* no job ever sees more workers, whatever is set meanwhile */

/* One chunk [begin, end) of the range. worker < mq_pool_max_threads() is an index for scratch memory, never for
 * results; inside a nested call it is 0, so scratch of an inner job must be its own. */
typedef void (*mq_range_fn)(void *arg, int64_t begin, int64_t end, int worker);

void mq_parallel_for(int64_t count, int64_t grain, mq_range_fn fn, void *arg);
int mq_pool_threads(void);       /* how many threads a job may use, the caller included; 1 inside a job */
int mq_pool_max_threads(void);   /* the same, outside a job: the bound on worker */
int mq_pool_set_threads(int n);  /* n >= 1, 0 = the default again; MQ_OK, or MQ_ERR_STATE inside a job */

#endif
