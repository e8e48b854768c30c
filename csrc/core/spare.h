/* Memory that is used again. What the statistics of one layer need, those of the next need again; memory that goes back
 * to the system in between costs a page fault for every page, more than the copying that it is for. */
#ifndef MQ_SPARE_H
#define MQ_SPARE_H

#include <pthread.h>

#include "core/mq.h"

struct mq_spare_block;

typedef struct mq_spare {
    pthread_mutex_t mutex;
    struct mq_spare_block *blocks;       /* free ones */
    int ready;
} mq_spare;

int mq_spare_init(mq_spare *spare);      /* not 0: no lock could be made */
void mq_spare_free(mq_spare *spare);     /* everything taken from it was given back; a zeroed one is accepted */

/* 64-byte aligned; NULL on failure. From any thread. spare NULL: nothing is kept. */
void *mq_spare_take(mq_spare *spare, size_t nbytes);
void mq_spare_give(mq_spare *spare, void *memory);

#endif
