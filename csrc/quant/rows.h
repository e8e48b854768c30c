/* Rows of a matrix with any strides, one after the other, and scratch memory per worker of the pool. */
#ifndef MQ_ROWS_H
#define MQ_ROWS_H

#include "core/tensor.h"

enum { MQ_ROW_BUFFERS = 4 };

typedef struct mq_row_buffers {
    char *memory;
    size_t offset[MQ_ROW_BUFFERS + 1]; /* of each buffer in a worker's part; the last is the size of a part */
} mq_row_buffers;

/* count buffers of nbytes[i] for every worker that there may be (another thread may change the pool before the job
 * starts; what is not used is never touched). free accepts what init left. */
int mq_row_buffers_init(mq_row_buffers *buffers, const size_t *nbytes, int count, mq_error *err);
void mq_row_buffers_free(mq_row_buffers *buffers);
void *mq_row_buffers_get(const mq_row_buffers *buffers, int worker, int index);

/* What a row of x (2 or 4 bytes an element) needs in order to be made contiguous and aligned: 0 if it is. */
size_t mq_row_scratch_bytes(const mq_tensor *x);
const void *mq_row_contiguous(const mq_tensor *x, int64_t row, void *scratch);

/* How many rows of n elements make a chunk that is worth a thread's while. */
int64_t mq_rows_per_chunk(int64_t n);

#endif
