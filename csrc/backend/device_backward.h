/* model/backward.h on a device, which the files device_backward*.c share. A chunk of whole sequences is computed again
 * from the hidden states before the layer, with what its way back needs kept, and then gradients go back through it:
 * the same steps in the same order as backward_*.c, each an operation of the CUDA library. Gradients are float32; where
 * activations are bfloat16 they are rounded to it as they enter products. Hidden states, their gradients and those of
 * weights are the host's between calls. */
#ifndef MQ_DEVICE_BACKWARD_H
#define MQ_DEVICE_BACKWARD_H

#include "backend/device_parts.h"
#include "model/backward.h"
#include "model/experts_score.h"
#include "model/score.h"

/* Weights of candidates: of one that is at work, or of all of them, which stay while chunks come and go. */
typedef struct mq_device_candidates {
    char *memory;
    size_t stride;                              /* from one to the next; 0 = they take each other's place */
    int64_t there;                              /* how many are there, the first ones; of those that stay */
} mq_device_candidates;

/* Room for what a candidate makes of a linear's input (model/score.h). */
typedef struct mq_device_scores {
    int64_t count;                              /* of candidates; 0 = there is no room */
    void *bias, *input, *output;                /* (O), (n, I), (n, O) */
    mq_device_candidates one, kept[MQ_ROLE_COUNT];      /* kept: of linears whose memory is not NULL */
    double *sums;                               /* (count, n) */
} mq_device_scores;

/* The same for an expert (model/experts_score.h). */
typedef struct mq_device_expert_scores {
    mq_device_candidates weights[MQ_SCORE_LINEARS];     /* memory NULL = there is no room */
    void *made, *gate, *up;                     /* (n, C), (n, F), (n, F) */
    float *change;                              /* (n, C) */
    int64_t *tokens;                            /* (n) */
    float *shares;                              /* (n) */
} mq_device_expert_scores;

/* The device's memory for one chunk, cut from mq_device.work. What only attention needs on its way back and what the
 * other half needs are in one place. n: rows; in dtype or (d_...) float32. */
typedef struct mq_device_back_scratch {
    int64_t rows;                               /* n */
    void *input[2], *indices[2];                /* (n, C): of the chunk at work and of the next */
    float *gradient[2], *d_experts[2], *d_choices[2];   /* (n, C), (n, C), (n, top_k); for experts also: */
    int32_t *choices[2];                        /* (n, top_k) */
    float *cosine, *sine;
    void *normed, *raw_q, *raw_k, *q, *k, *v, *joined, *mixed, *attended, *middle;
    void *q_a, *q_latent, *kv_a, *kv_raw, *kv_latent, *expanded;    /* of linears between which something is narrow */
    float *maxima, *factors;                    /* (heads, n) */
    void *rounded;                              /* a gradient as it enters a product; NULL = as it is */
    float *single;                              /* what a linear reads, in float32; NULL = no gradients of weights */
    float *piece;                               /* of a weight's gradient */
    int64_t piece_count;
    void *sums;                                 /* workspace of sums over rows */
    size_t sums_nbytes;
    mq_device_scores scores;
    mq_device_expert_scores expert_scores;
    void *attention;
    size_t attention_nbytes;
    float *d_normed, *d_q, *d_k, *d_v, *d_joined, *d_mixed, *d_attended;
    float *d_q_a, *d_kv_a, *d_kv_latent, *d_expanded;
    void *mlp_normed, *gate, *up, *mlp_joined, *product, *output, *router;
    float *d_mlp_normed, *d_gate, *d_up, *d_mlp_joined, *d_output, *d_shares, *d_router, *shares;
    int64_t *identity;                          /* (n): 0, 1, ...; where all tokens have an expert in common */
} mq_device_back_scratch;

/* One trip of a chunk back through a layer, or of rows of one expert. */
typedef struct mq_device_back {
    mq_device *device;
    mq_backward *back;
    mq_layer *layer;
    const mq_layer_context *context;
    mq_device_back_scratch *scratch;
    const mq_device_chunk *chunk;       /* hidden: what the layer, or the expert, reads */
    int slot;
    float *gradient;                    /* (rows, C): by the output, in the end by the input */
    int64_t expert;                     /* -1: none */
    float *fetched;                     /* a piece on the host; NULL = no gradients of weights */
    mq_error *err;
} mq_device_back;

/* ---- device_backward_parts.c: as their namesakes in backward.h; pointers are the device's ---- */

mq_cuda_matrix mq_device_back_matrix(const mq_device_back *it, const void *data, int64_t width);  /* of dtype */
mq_cuda_matrix mq_device_back_single(const mq_device_back *it, const float *data, int64_t width); /* float32 */
/* out = in, of so many numbers a row. */
int mq_device_back_copy(const mq_device_back *it, void *out, const void *in, int64_t width);
/* out (+)= linear(in), without its way back. */
int mq_device_back_forward(const mq_device_back *it, mq_role role, void *out, const void *in, int accumulate);
int mq_device_back_linear(const mq_device_back *it, mq_role role, const mq_back_linear *linear);
/* out = norm(in), part by part as wide as the norm is; and its way back. */
int mq_device_back_normed(const mq_device_back *it, mq_role role, void *out, const void *in, int64_t width);
int mq_device_back_norm(const mq_device_back *it, mq_role role, const mq_back_norm *norm);
int mq_device_back_enter(const mq_device_back *it, mq_role norm, void *out, const void *in);
int mq_device_back_leave(const mq_device_back *it, mq_role norm, const void *in, float *d_out, float *gradient);
/* *d_out becomes out if something lies between. */
int mq_device_back_added(const mq_device_back *it, mq_role norm, const void *made, const float **d_out, float *out);
int mq_device_back_is_added_plainly(const mq_device_back *it, mq_role norm);
int mq_device_back_add(const mq_device_back *it, mq_role norm, void *hidden, const void *made, void *changed);
/* x (rows, C), float32, *= factor. */
int mq_device_back_scale(const mq_device_back *it, float *x, double factor);
/* Columns first to first + width of `joined` (rows, whole) to part (rows, width), or back. */
typedef struct mq_device_columns {
    void *part, *joined;
    int64_t first, width, whole;
    mq_dtype dtype;
    int back;
} mq_device_columns;
int mq_device_back_columns(const mq_device_back *it, const mq_device_columns *columns);
/* A gradient (N, width) in the dtype of weights, as which it enters a product. */
int mq_device_back_narrow(const mq_device_back *it, const float *gradient, int64_t width, mq_cuda_matrix *out);
/* to (rows, width) on the host += what the piece holds. */
int mq_device_back_fetch(const mq_device_back *it, float *to, int64_t rows, int64_t width);
/* to (rows, columns) on the host += d_out (N, rows)^T * in (N, columns), in float32 whatever the activations are. */
int mq_device_back_weight(const mq_device_back *it, float *to, const float *d_out, int64_t rows, const void *in,
                          int64_t columns);

/* ---- device_observe.c, device_score.c ---- */

/* observed: pointers are the device's. The observer is shown it where it is, or a copy on the host. */
int mq_device_observe(const mq_device_back *it, mq_observer *observer, const mq_observed *observed);
/* What OutputScores look at is scored on the device, if there is room: for linears up to [outputs, columns] of which
 * nbytes are the largest weight. */
typedef struct mq_device_score_sizes {
    int64_t rows, columns, outputs, candidates;
    size_t nbytes, size, output_size;           /* sizes: of an element of inputs and weights, and of outputs */
} mq_device_score_sizes;
void mq_device_cut_scores(mq_arena *arena, const mq_device_score_sizes *sizes, mq_device_scores *out);
int mq_device_score(const mq_device_back *it, mq_output_score *score, const mq_observed *observed);
/* Room for weights of nbytes each: all of them if they stay, else one. */
void mq_device_cut_candidates(mq_arena *arena, int64_t count, int stay, size_t nbytes, mq_device_candidates *out);
/* *weight = what candidate `index` has, with its data: w of the host is sent there, after what still reads the one
 * before, if it is not there yet. Computing does not wait for it (mq_device_back_ready). */
int mq_device_load_candidate(const mq_device_back *it, mq_device_candidates *all, size_t index, const mq_tensor *w,
                             mq_cuda_matrix *weight);
/* in (rows, columns) as the quantizer leaves it: in `memory`, or as it is. place: of mq_device.quantizers, of the last
 * if there are fewer. */
int mq_device_as_candidate(const mq_device_back *it, const mq_quantizer *quantizer, size_t place, void *memory,
                           mq_cuda_matrix *in);

/* ---- device_score_experts.c ---- */

struct mq_device_back_room;
/* Whether what an ExpertsScore looks at is scored on the device, from the layer's first expert to its last. */
int mq_device_scores_experts(const struct mq_device_back_room *room);
void mq_device_cut_expert_scores(mq_arena *arena, const struct mq_device_back_room *room, int64_t rows,
                                 mq_device_expert_scores *out);
/* Rows of one expert. */
int mq_device_score_expert(const mq_device_back *it, mq_experts_score *score, const mq_observed *observed);
/* When there are no more: of the chunk's rows, whose gradient is there; and of all rows, to the score. */
int mq_device_score_changes(const mq_device_back *it);
int mq_device_take_changes(const mq_device_back *it);

/* ---- device_backward_latent.c: where keys and values come of one narrow vector ---- */

/* raw_q, raw_k and v of normed; and d_normed from d_q, d_k and d_v. */
int mq_device_latent_again(const mq_device_back *it);
int mq_device_latent_back(const mq_device_back *it);

/* ---- device_backward_attention.c, device_backward_mlp.c ---- */

int mq_device_attention_again(const mq_device_back *it);
int mq_device_attention_back(const mq_device_back *it);
int mq_device_mlp_again(const mq_device_back *it, const mq_mlp_roles *roles, int output);
int mq_device_mlp_back(const mq_device_back *it, const mq_mlp_roles *roles, const float *d_output);
/* The half behind attention: gradient becomes the one by middle. With experts, what comes before them. */
int mq_device_other_half(const mq_device_back *it);

/* ---- device_backward.c ---- */

/* Room for chunks; layer: whose observers need some, too, NULL = none; experts_only: of rows of one expert, without
 * attention. kept: a bit for each role of linears whose candidates' weights stay, any for an expert's. */
typedef struct mq_device_back_room {
    mq_device *device;
    const mq_backward *back;
    mq_layer *layer;
    int experts_only;
    uint64_t kept;
} mq_device_back_room;
int mq_device_back_reserve(const mq_device_back_room *room, int64_t rows, int64_t longest, mq_device_back *out);
size_t mq_device_back_nbytes(const mq_device_back_room *room, int64_t rows, int64_t longest);

/* Computing waits for weights. */
int mq_device_back_ready(mq_device *device, mq_error *err);

/* mq_elsewhere's. */
void mq_device_forget_backward(mq_elsewhere *self, const mq_backward *back);
int mq_device_back_layer(mq_elsewhere *self, mq_backward *back, int64_t layer, const void *input, mq_error *err);
int mq_device_back_expert(mq_elsewhere *self, mq_backward *back, const mq_back_expert_rows *rows, mq_error *err);
int mq_device_back_head(mq_elsewhere *self, mq_backward *back, const mq_back_head_request *request, mq_error *err);

#endif
