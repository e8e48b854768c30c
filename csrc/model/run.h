/* mq_run: recorded batches on their way through a model. Holds token ids and the hidden states at one
 * layer boundary. */
#ifndef MQ_RUN_H
#define MQ_RUN_H

#include "model/runtime.h"

/* Ends long work: called now and then on the thread that called into the run; not MQ_OK stops it. */
typedef int (*mq_poll_fn)(void *context);

typedef struct mq_batch {
    int64_t sequences, tokens;   /* B, T */
    int64_t first;               /* row of the run of its first token */
} mq_batch;

typedef struct mq_run {
    mq_runtime *runtime;         /* not owned */
    mq_batch *batches;
    mq_sequence *sequences;
    mq_unit *units;
    int64_t batch_count, sequence_count, unit_count, rows, longest, largest_unit;
    int32_t *ids;                /* (rows) */
    uint8_t *mask;               /* (rows), NULL = no padding */
    int count_padding;           /* padding counts in statistics too */
    char *hidden;                /* (rows, C) of runtime->dtype */
    mq_rope_table rope;
    mq_scratch *scratch;         /* one per worker */
    int workers;
    int64_t next_layer;          /* the layer that comes next; -1 before embed and after a failure */
    mq_poll_fn poll;
    void *poll_context;
} mq_run;

/* Ids of one batch: (B, T) int64, contiguous; mask: (B, T) uint8 or NULL. */
typedef struct mq_batch_input {
    const int64_t *ids;
    const uint8_t *mask;
    int64_t sequences, tokens;
} mq_batch_input;

int mq_run_init(mq_run *run, mq_runtime *runtime, const mq_batch_input *batches, int64_t count, int count_padding,
                mq_error *err);
void mq_run_free(mq_run *run);
size_t mq_run_nbytes(const mq_run *run);

int mq_run_embed(mq_run *run, const mq_named_tensor *tensors, size_t count, mq_error *err);
int mq_run_layer(mq_run *run, int64_t layer, mq_error *err);

/* Statistics of what reaches lm_head (final norm of the hidden states). */
int mq_run_finish(mq_run *run, const mq_named_tensor *tensors, size_t count, mq_error *err);

/* out (rows of the batch, C), float32. */
int mq_run_hidden(const mq_run *run, int64_t batch, float *out, mq_error *err);
/* out (rows of the batch, V), float32. */
int mq_run_logits(mq_run *run, int64_t batch, const mq_named_tensor *tensors, size_t count, float *out, mq_error *err);

/* Next-token negative log likelihood in nats: sums and counts of predicted tokens per sequence, in order of batches.
 * labels (rows): the token at each position, < 0 = not to be predicted; NULL = the ids, except padding and what
 * follows it. */
int mq_run_loss(mq_run *run, const int32_t *labels, const mq_named_tensor *tensors, size_t count, double *sums,
                int64_t *counts, mq_error *err);

/* Scratch for every worker that the pool has now. */
int mq_run_reserve(mq_run *run, mq_error *err);

#endif
