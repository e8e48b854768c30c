/* mq_backward: gradients of the losses of a run's batches, on their way back through the layers.
 *
 * A run that went through all layers starts it: the head first, then every layer from the last to the first. A layer is
 * computed again from the hidden states before it, which the caller kept; so what is held is one gradient per hidden
 * state, one layer, and the activations of one unit of rows. Loss: of every batch the mean cross-entropy over its
 * labels, and of all the sum of these. Units go one by one, each over all workers, so that everything adds in one
 * order. */
#ifndef MQ_BACKWARD_H
#define MQ_BACKWARD_H

#include "model/run.h"

/* A tensor of weights of which the gradient is wanted: values, of its shape, are added to. */
typedef struct mq_weight_gradient {
    const char *name;
    float *values;
} mq_weight_gradient;

/* Memory for one unit, in dtype or (d_...) float32; n: rows of the largest unit, m: rows of a piece of the MLP. What
 * only the way back through attention needs takes the place of what only the MLP does. */
typedef struct mq_back_scratch {
    char *memory;
    size_t nbytes;
    int64_t piece;                                            /* m */
    void *normed, *raw_q, *raw_k, *q, *k, *v, *mixed, *middle; /* (n, ...); raw: before norm and rope */
    float *maxima, *factors;                                  /* (heads, n): of attention's softmax */
    void *attention, *attended;                               /* the operation's scratch; (n, C): o_proj's output */
    void *joined, *mlp_joined;                                /* of linears fused into one */
    void *q_a, *q_latent, *kv_a, *kv_raw, *kv_latent, *expanded;    /* of those between which something is narrow */
    float *d_q_a, *d_kv_a, *d_kv_latent, *d_expanded;
    float *d_normed, *d_q, *d_k, *d_v, *d_mixed, *d_joined, *d_attended;
    void *mlp_normed, *gate, *up, *product, *output, *router; /* (m, ...) */
    float *d_mlp_normed, *d_gate, *d_up, *d_output, *d_shares, *d_router, *d_mlp_joined, *shared;
} mq_back_scratch;

typedef struct mq_backward {
    mq_run *run;                         /* not owned */
    const mq_weight_gradient *wanted;    /* not owned */
    size_t wanted_count;
    float *gradient;                     /* (rows, C): by the hidden states where the way back now is */
    int64_t next;                        /* the layer that comes next; num_hidden_layers: the head; -1: none */
    int failed;
    mq_packed weights[MQ_ROLE_COUNT];    /* of the layer or expert at work, for the way back */
    float *d_weights[MQ_ROLE_COUNT], *d_biases[MQ_ROLE_COUNT];   /* of the same; NULL = not wanted */
    mq_back_scratch scratch;
    const void *input;                   /* (rows, C): before the layer whose experts are to come; not owned */
    float *d_experts;                    /* (rows, C): by what the experts read */
    float *d_shares;                     /* (rows, top_k) */
} mq_backward;

int mq_backward_init(mq_backward *back, mq_run *run, const mq_weight_gradient *wanted, size_t count, mq_error *err);
void mq_backward_free(mq_backward *back);
size_t mq_backward_nbytes(const mq_backward *back);

/* losses, counts: of each batch the mean over its labels (NaN: it has none) and how many there are. labels as in
 * mq_run_loss. */
typedef struct mq_batch_losses {
    double *losses;
    int64_t *counts;
} mq_batch_losses;
int mq_backward_head(mq_backward *back, const int32_t *labels, const mq_named_tensor *tensors, size_t count,
                     const mq_batch_losses *out, mq_error *err);

/* input (rows, C) of the run's dtype: the hidden states before the layer. It stays loaded. One with experts is done
 * when every expert that has rows (run->dispatch.start) came after it, in order; input must last until then. */
int mq_backward_layer(mq_backward *back, int64_t layer, const void *input, const mq_named_tensor *tensors,
                      size_t count, mq_error *err);
int mq_backward_expert(mq_backward *back, int64_t layer, int64_t expert, const mq_named_tensor *tensors, size_t count,
                       mq_error *err);

/* The gradient of the embedding, if it is wanted, once all layers are done. */
int mq_backward_embed(mq_backward *back, mq_error *err);

/* Parts that the files backward*.c share. ------------------------------------------------------------------------ */

float *mq_backward_wanted(const mq_backward *back, const char *name);     /* NULL = not wanted */
int mq_backward_poll(const mq_backward *back, mq_error *err);
int mq_backward_reserve(mq_backward *back, mq_error *err);

/* Packs the weights of a layer (expert -1) or of one of its experts for the way back. */
int mq_backward_load(mq_backward *back, int64_t layer, int64_t expert, const mq_named_tensor *tensors, size_t count,
                     mq_error *err);
void mq_backward_drop(mq_backward *back);

/* Rows at work: of the run from first on, or tokens of one expert. */
typedef struct mq_back_rows {
    mq_backward *back;
    mq_layer *layer;
    int64_t first, rows;
    int64_t expert;
    const int64_t *tokens;
    const float *shares;
    mq_error *err;
} mq_back_rows;

typedef struct mq_back_linear {
    const void *in, *out;       /* out: only an observer needs it */
    const float *d_out;
    float *d_in;
    int accumulate;             /* d_in += instead of = */
} mq_back_linear;
/* Observers look on, wanted gradients are added to, and d_in comes out. */
int mq_backward_linear(const mq_back_rows *rows, mq_role role, const mq_back_linear *linear);
/* d_in (+)= the gradient by the input of a norm, of rows of width numbers; norms that are narrower go part by part. */
typedef struct mq_back_norm {
    const void *in;
    const float *d_out;
    float *d_in;
    int accumulate;
    int64_t width;
} mq_back_norm;
void mq_backward_norm(const mq_back_rows *rows, mq_role role, const mq_back_norm *norm);
/* What a half of a layer reads: out = norm(in), or a copy where there is no such norm; and back: gradient += by in. */
void mq_backward_enter(const mq_back_rows *rows, mq_role norm, void *out, const void *in);
void mq_backward_leave(const mq_back_rows *rows, mq_role norm, const void *in, float *d_out, float *gradient);
/* The gradient by what a half puts out, made (rows, C), from the one by what it adds to the hidden states: that one
 * itself, or in `out` if a norm or a factor lies between. */
const float *mq_backward_added(const mq_back_rows *rows, mq_role norm, const void *made, const float *gradient,
                               float *out);
int mq_backward_is_added_plainly(const mq_back_rows *rows, mq_role norm);
/* hidden (rows, C) += what a half puts out, changed by norm and factor; changed: room for that. */
void mq_backward_add(const mq_back_rows *rows, mq_role norm, void *hidden, const void *made, void *changed);

/* What both an MLP and an expert are: product = activation(gate) * up of mlp_normed (rows, C). d_output (rows, C) is by
 * what down makes of it; d_mlp_normed comes out. */
int mq_backward_mlp(const mq_back_rows *rows, const mq_mlp_roles *roles, const float *d_output);
/* The forward of it, into scratch; output too if that is asked for. */
void mq_backward_mlp_again(const mq_back_rows *rows, const mq_mlp_roles *roles, int output);

/* Shows the observer of a layer's experts that they are done (observer.h). */
int mq_backward_observe_sum(const mq_backward *back, mq_observer *observer, mq_error *err);

/* The attention half of a unit again, from input (rows of the unit, C) into scratch; then its way back, on which
 * gradient (rows of the unit, C), by the half's output, becomes the one by its input. */
typedef struct mq_back_unit {
    mq_backward *back;
    mq_layer *layer;
    const mq_unit *unit;
    const void *input;
    float *gradient;
    mq_error *err;
} mq_back_unit;
void mq_backward_attention_again(const mq_back_unit *it);
int mq_backward_attention(const mq_back_unit *it);
/* What rows of an expert give back: d_normed (rows, C) by what it read, d_shares (rows). */
void mq_backward_take_expert(const mq_back_rows *rows, const float *d_normed, const float *d_shares);
/* Of a layer with experts, all that comes before the first of them. */
int mq_backward_to_experts(mq_backward *back, int64_t layer, const void *input, mq_error *err);

#endif
