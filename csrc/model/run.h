/* mq_run: recorded batches on their way through a model. Holds token ids and the hidden states at one
 * layer boundary. */
#ifndef MQ_RUN_H
#define MQ_RUN_H

#include "model/runtime.h"

/* Ends long work: called now and then on the thread that called into the run; not MQ_OK stops it. */
typedef int (*mq_poll_fn)(void *context);
/* Some work that can be done while a device computes; *more: whether there is any left. */
typedef int (*mq_meanwhile_fn)(void *context, int *more, mq_error *err);

typedef struct mq_batch {
    int64_t sequences, tokens;   /* B, T */
    int64_t first;               /* row of the run of its first token */
} mq_batch;

/* Between the attention half of a layer with experts and the last of these: which rows go to which expert. */
typedef struct mq_dispatch {
    int64_t layer;               /* -1: no experts are to come */
    int64_t next;                /* the expert that comes next */
    mq_routes routes;            /* of every row */
    int64_t *start;              /* (experts + 1): of each expert's rows in tokens and shares */
    int64_t *tokens;             /* (rows * top_k): rows of the run, ascending within an expert */
    float *shares;               /* (rows * top_k) */
    int64_t *counted;            /* (experts): rows that are no padding */
    void *sums;                  /* (rows, C) */
} mq_dispatch;

typedef struct mq_run {
    mq_runtime *runtime;         /* not owned */
    mq_batch *batches;
    mq_sequence *sequences;
    mq_unit *units;
    int64_t batch_count, sequence_count, unit_count, rows, longest, largest_unit;
    int32_t *ids;                /* (rows) */
    uint8_t *mask;               /* (rows), NULL = no padding */
    int count_padding;           /* padding counts in statistics too */
    int64_t onlooking;           /* so many experts at least see each row, for statistics; set before any layer */
    char *hidden;                /* (rows, C) of runtime->dtype */
    mq_dispatch dispatch;
    mq_cache *cache;             /* not owned; NULL = sequences are whole */
    mq_ropes ropes;              /* empty where the cache has some */
    mq_scratch *scratch;         /* one per worker */
    mq_spare spare;              /* for statistics, from layer to layer */
    int workers;
    int64_t next_layer;          /* the layer that comes next; -1 before embed and after a failure */
    mq_poll_fn poll;
    void *poll_context;
    mq_meanwhile_fn meanwhile;   /* NULL: there is nothing (more) to be done */
    void *meanwhile_context;
} mq_run;

/* Ids of one batch: (B, T) int64, contiguous; mask: (B, T) uint8 or NULL. */
typedef struct mq_batch_input {
    const int64_t *ids;
    const uint8_t *mask;
    int64_t sequences, tokens;
    int64_t slot;                /* of the cache, for a single sequence */
} mq_batch_input;

/* cache: what the sequences go on from, with room for them; the caller moves its lengths on. NULL: they are whole. */
int mq_run_init(mq_run *run, mq_runtime *runtime, const mq_batch_input *batches, int64_t count, int count_padding,
                mq_cache *cache, mq_error *err);
void mq_run_free(mq_run *run);
size_t mq_run_nbytes(const mq_run *run);

/* What embeddings are multiplied by. */
double mq_embedding_factor(const mq_runtime *runtime);

/* The hidden states of all rows where the run now is (mq_run_state_nbytes), and back to where a run over the same
 * batches had them: layer is the one that comes next. */
size_t mq_run_state_nbytes(const mq_run *run);
int mq_run_restore(mq_run *run, const void *state, int64_t layer, mq_error *err);

int mq_run_embed(mq_run *run, const mq_named_tensor *tensors, size_t count, mq_error *err);
/* A layer with experts is done when every expert that has rows (dispatch.start) came after it, in order. */
int mq_run_layer(mq_run *run, int64_t layer, mq_error *err);
/* All rows of one expert; tensors: its own. */
int mq_run_expert(mq_run *run, int64_t layer, int64_t expert, const mq_named_tensor *tensors, size_t count,
                  mq_error *err);
/* The same by weights that stay the caller's: MQ_EXPERT_LINEARS of them, as mq_runtime_load_expert leaves them. */
int mq_run_held_expert(mq_run *run, int64_t layer, int64_t expert, const mq_linear_weight *weights, mq_error *err);

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
/* Its two steps: what each row is to predict, < 0 = nothing, into targets (rows); and losses (rows) of these. */
void mq_run_targets(const mq_run *run, const int32_t *labels, int32_t *targets);
int mq_run_row_losses(mq_run *run, const int32_t *targets, const mq_named_tensor *tensors, size_t count,
                      mq_loss_row *losses, mq_error *err);

/* Scratch for every worker that the pool has now; release gives it back. */
int mq_run_reserve(mq_run *run, mq_error *err);
void mq_run_release(mq_run *run);

/* step for each of 0..count, with the layer's calibrators watching: every worker takes steps of its own as long as
 * there is one for each; the rest go one by one, each over all workers. Returns the first failure. */
typedef int (*mq_step_fn)(mq_run *run, void *context, int64_t index, const mq_scratch *scratch, mq_error *err);
typedef struct mq_steps {
    int64_t count, rows;         /* rows: of a step, at most */
    mq_step_fn step;
    void *context;
} mq_steps;
int mq_run_steps(mq_run *run, mq_layer *layer, const mq_steps *steps, mq_error *err);
mq_layer_context mq_run_context(const mq_run *run);
int mq_run_poll(const mq_run *run, mq_error *err);
int mq_run_meanwhile(mq_run *run, mq_error *err);    /* a piece of that work, if there is any */

/* run_experts.c: begin makes room, dispatch sorts the rows by expert. */
int64_t mq_run_experts_per_row(const mq_run *run);
int mq_dispatch_begin(mq_run *run, mq_error *err);
void mq_dispatch_rows(mq_run *run, int64_t layer);
void mq_dispatch_free(mq_dispatch *dispatch);
size_t mq_dispatch_nbytes(const mq_run *run);

#endif
