/* mq_decoder: a model with all of its weights in memory, and the keys and values of what its sequences have been
 * through, so that each further token costs one pass over the weights.
 *
 * Weights are those that mq_linear_forward multiplies, numbers or codes. */
#ifndef MQ_DECODER_H
#define MQ_DECODER_H

#include "model/run.h"

typedef struct mq_decoder {
    mq_runtime *runtime;            /* not owned; its layers stay loaded */
    mq_linear_weight *experts;      /* [layers][experts][MQ_EXPERT_LINEARS], NULL = the model has none */
    mq_linear_weight head;
    float *norm;                    /* the final norm's weight */
    mq_named_tensor embedding;      /* (V, C): not owned */
    mq_cache cache;
    int gathered;                   /* weights lie in one memory */
    mq_poll_fn poll;                /* as mq_run's */
    void *poll_context;
} mq_decoder;

/* embedding must outlive the decoder; outer: the tensors of the final norm and of the head. */
int mq_decoder_init(mq_decoder *decoder, mq_runtime *runtime, const mq_named_tensor *embedding, size_t embeddings,
                    const mq_named_tensor *outer, size_t count, mq_error *err);
void mq_decoder_free(mq_decoder *decoder);
size_t mq_decoder_nbytes(const mq_decoder *decoder);

/* Exactly the tensors of one expert; they stay. */
int mq_decoder_load_expert(mq_decoder *decoder, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, mq_error *err);

/* So many sequences, none of which has been through anything. */
int mq_decoder_reset(mq_decoder *decoder, int64_t slots, mq_error *err);
/* Forgets what a sequence has been through from that position on. */
int mq_decoder_keep(mq_decoder *decoder, int64_t slot, int64_t length, mq_error *err);

/* Tokens of one sequence each (inputs[i].slot, no slot twice), which follow those before. logits (rows, V), float32, of
 * the token after the last of each, or after every one. After a failure the sequences are where they were. */
int mq_decoder_forward(mq_decoder *decoder, const mq_batch_input *inputs, int64_t count, int every, float *logits,
                       mq_error *err);

#endif
