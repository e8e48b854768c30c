/* The runtime's operations (csrc/model/ops.h, attention.h) on a device: a part of modelq_cuda.h, which includes it.
 *
 * Shape letters as in ops.h. Activations are MQ_F32 or MQ_BF16, arithmetic is float32, gradients are float32 without
 * gaps, and those of weights are added to. Nothing depends on the order in which blocks of threads run: sums are added
 * in an order that only sizes decide. Indices, lengths and tables are device memory, so that a run makes them once and
 * no call waits for the host. Nothing is done where there are no rows. */
#ifndef MODELQ_CUDA_OPS_H
#define MODELQ_CUDA_OPS_H

/* ---- rows and elements ---- */

/* y [row] = x [row], of any of the three dtypes into MQ_F32 or MQ_BF16: conversion, and embedding and gathering rows.
 * y has as many rows as are done. */
typedef struct mq_cuda_rows_job {
    mq_cuda_matrix x, y;
    const int64_t *index;      /* [y.rows] rows of x; NULL: */
    const int32_t *ids;        /* the same, as token ids; both NULL: in order, */
    int64_t repeat;            /* each so many times on end; 0 = 1 */
} mq_cuda_rows_job;

int mq_cuda_rows(const mq_cuda_rows_job *job, void *stream, mq_error *err);

/* y = x + bias, or y += : what a product leaves in float32 is rounded once. x and y MQ_F32 or MQ_BF16; y may be x. */
typedef struct mq_cuda_add_job {
    mq_cuda_matrix x, y;
    const float *bias;         /* [cols], or NULL */
    int accumulate;
    float scale;               /* of x, which is then rounded to its dtype before all else; 0 = 1 */
    const float *row_scales;   /* [rows], the same; NULL: 1 */
} mq_cuda_add_job;

int mq_cuda_add(const mq_cuda_add_job *job, void *stream, mq_error *err);

/* In the order of mq_activation (csrc/model/config.h). */
typedef enum mq_cuda_activation {
    MQ_CUDA_SILU,
    MQ_CUDA_GELU_TANH,         /* by its tanh approximation */
    MQ_CUDA_SWIGLU_CLAMPED     /* gpt-oss's */
} mq_cuda_activation;

/* gate = silu(gate) * up, or with another activation (mq_gate_forward). */
typedef struct mq_cuda_swiglu_job {
    mq_cuda_matrix gate, up;
    float *d_gate, *d_up;      /* of the backward: d_gate is d_out at first, gate as it was before the forward */
    mq_cuda_activation activation;
    float limit;               /* of MQ_CUDA_SWIGLU_CLAMPED */
} mq_cuda_swiglu_job;

int mq_cuda_swiglu(const mq_cuda_swiglu_job *job, void *stream, mq_error *err);
int mq_cuda_swiglu_backward(const mq_cuda_swiglu_job *job, void *stream, mq_error *err);

/* factors [rows] = sigmoid(x [rows, 1]), rounded to x's dtype; d_x [rows] = d_factors * factors * (1 - factors). */
typedef struct mq_cuda_sigmoid_job {
    mq_cuda_matrix x;          /* of the backward: only its rows are read */
    float *factors;
    const float *d_factors;
    float *d_x;
} mq_cuda_sigmoid_job;

int mq_cuda_sigmoid(const mq_cuda_sigmoid_job *job, void *stream, mq_error *err);
int mq_cuda_sigmoid_backward(const mq_cuda_sigmoid_job *job, void *stream, mq_error *err);

/* x = cap * tanh(x / divisor / cap) in place, MQ_F32: what some models make of logits (mq_logits_forward). The backward
 * multiplies gradient by the derivative at x, which are the numbers as they were before. */
typedef struct mq_cuda_softcap_job {
    mq_cuda_matrix x, gradient;
    float divisor, cap;        /* 0: is left out */
} mq_cuda_softcap_job;

int mq_cuda_softcap(const mq_cuda_softcap_job *job, void *stream, mq_error *err);
int mq_cuda_softcap_backward(const mq_cuda_softcap_job *job, void *stream, mq_error *err);

/* y = weight * x / sqrt(mean(x^2) + eps) over each of `heads` parts of a row (0 = 1: the whole row); y may be x. */
typedef struct mq_cuda_norm_job {
    mq_cuda_matrix x, y;       /* the backward reads no y */
    const float *weight;       /* [cols / heads]; NULL: ones */
    int64_t heads;
    float eps;
    const float *d_out;        /* [rows, cols], of the backward */
    float *d_in;               /* the same; may be d_out; NULL = not wanted */
    int accumulate;            /* d_in += */
    float *d_weight;           /* [cols / heads], added to; NULL = not wanted; needs a workspace */
    void *workspace;
    size_t workspace_nbytes;
} mq_cuda_norm_job;

int mq_cuda_rmsnorm(const mq_cuda_norm_job *job, void *stream, mq_error *err);
size_t mq_cuda_rmsnorm_workspace(const mq_cuda_norm_job *job);
int mq_cuda_rmsnorm_backward(const mq_cuda_norm_job *job, void *stream, mq_error *err);

/* Rotates x [tokens, heads * head_dim] in place; the backward's x is a gradient, in float32. */
typedef struct mq_cuda_rope_job {
    mq_cuda_matrix x;
    int64_t heads;
    const float *cosine, *sine;     /* [positions of the table, rotary / 2] */
    int64_t rotary;
    const int32_t *positions;       /* [tokens]; NULL: first, first + 1, ... */
    int64_t first;
    int64_t offset;                 /* of each head, the columns from here on are turned */
    int interleaved;                /* pairs lie side by side before, and as two halves behind; up to 512 columns */
} mq_cuda_rope_job;

int mq_cuda_rope(const mq_cuda_rope_job *job, void *stream, mq_error *err);
int mq_cuda_rope_backward(const mq_cuda_rope_job *job, void *stream, mq_error *err);

/* d_weight [V, C] [ids] += d_out, row after row. */
typedef struct mq_cuda_embed_job {
    float *d_weight;
    const float *d_out;
    const int32_t *ids;
    int64_t rows, width;
} mq_cuda_embed_job;

int mq_cuda_embed_backward(const mq_cuda_embed_job *job, void *stream, mq_error *err);

/* ---- columns ---- */

typedef enum mq_cuda_columns {
    MQ_CUDA_SUM,               /* of x: a bias's gradient */
    MQ_CUDA_SUM_MAGNITUDES     /* of |x|: csrc/calib/mean.c */
} mq_cuda_columns;

/* sums [cols] += over the rows that count; lows and highs become smaller and larger (csrc/calib/affine.c). */
typedef struct mq_cuda_columns_job {
    mq_cuda_matrix x;
    mq_cuda_columns what;
    const uint8_t *mask;       /* [rows]: rows that count; NULL: all */
    float *sums_f32;           /* [cols], one of both is given */
    double *sums_f64;
    float *lows, *highs;       /* [cols], or NULL. A NaN of x passes by: it shows in the sum; one that is there
                                * stands for nothing yet */
    void *workspace;           /* mq_cuda_columns_workspace */
    size_t workspace_nbytes;
} mq_cuda_columns_job;

size_t mq_cuda_columns_workspace(const mq_cuda_columns_job *job);
int mq_cuda_column_sums(const mq_cuda_columns_job *job, void *stream, mq_error *err);

/* ---- attention ---- */

/* softmax(scale * Q K^T) V of several sequences. Queries attend to keys at their own position and before; query i of
 * sequence s stands at past[s] + i, and the sequence has past[s] + (its queries) keys. One that sees no key gets
 * zeros. */
typedef struct mq_cuda_attention_job {
    mq_dtype dtype;                       /* MQ_F32 or MQ_BF16, of q, k, v and out */
    int64_t heads, kv_heads;              /* head h reads key and value head h / (heads / kv_heads) */
    int64_t head_dim, value_dim;          /* up to 256 */
    const void *q, *k, *v;
    void *out;                            /* [rows, heads, value_dim] */
    int64_t ldq, ldk, ldv, ldo;           /* elements from token to token */
    int64_t head_tokens;                  /* k and v lie head by head, of so many tokens each; 0 = token by token */
    int64_t rows;                         /* of q and out */
    int64_t sequences, longest;           /* longest: queries of the longest sequence; host numbers bound the grid */
    int64_t longest_keys;                 /* keys of the one that has most; 0 = longest */
    const int64_t *starts;                /* [sequences + 1] rows of q and out where each begins; the last is rows */
    const int64_t *key_starts;            /* [sequences] rows of k and v; NULL: starts */
    const int64_t *past;                  /* [sequences]; NULL: 0 */
    const uint8_t *key_mask;              /* by row of k, nonzero = may be attended to; NULL: all */
    float scale;
    int64_t window;                       /* positions a query sees, its own included; 0: all before it */
    int64_t chunk;                        /* a query sees its own chunk of so many positions; 0: all */
    const int64_t *chunk_first;           /* [sequences]: where chunks are counted from; NULL: 0 */
    float softcap;                        /* scores are softcap * tanh(score / softcap); 0: they are not capped */
    const float *sinks;                   /* [heads]: one more score of every query, with no value; NULL: none */
    float *maxima, *factors;              /* [heads, rows], NULL or what the backward needs (attention.h) */
    void *workspace;                      /* mq_cuda_attention_workspace, mq_cuda_attention_backward_workspace */
    size_t workspace_nbytes;
} mq_cuda_attention_job;

/* One query a sequence (longest = 1) is a step over a cache: its keys are cut into blocks that run side by side. */
size_t mq_cuda_attention_workspace(const mq_cuda_attention_job *job);
int mq_cuda_attention(const mq_cuda_attention_job *job, void *stream, mq_error *err);

/* Of the same job, with its out, maxima and factors; no past, and token by token. */
typedef struct mq_cuda_attention_gradient {
    const float *d_out;                   /* [rows, heads, value_dim] */
    float *d_q, *d_k, *d_v;               /* [rows, heads, head_dim], [rows, kv_heads, ...] */
    float *d_sinks;                       /* [heads], added to; NULL = not wanted */
} mq_cuda_attention_gradient;

size_t mq_cuda_attention_backward_workspace(const mq_cuda_attention_job *job);
int mq_cuda_attention_backward(const mq_cuda_attention_job *job, const mq_cuda_attention_gradient *gradient,
                               void *stream, mq_error *err);

/* Keys or values x [tokens, heads * head_dim] into a cache [slots][heads][capacity][head_dim] of x's dtype. */
typedef struct mq_cuda_cache_job {
    mq_cuda_matrix x;
    void *cache;
    int64_t heads, capacity;
    int64_t slot_stride;                  /* elements from slot to slot */
    const int32_t *slots, *positions;     /* [tokens] */
} mq_cuda_cache_job;

int mq_cuda_cache_store(const mq_cuda_cache_job *job, void *stream, mq_error *err);

/* ---- experts ---- */

/* The top_k experts of each row and their shares, as mq_route_forward; at most 4096 experts. */
typedef struct mq_cuda_route_job {
    mq_cuda_matrix logits;                /* [rows, experts] */
    int64_t top_k;
    int64_t kept;                         /* so many are chosen; the others see the row and have no share; 0: all */
    int normalize, rounded;
    int sigmoid;                          /* of each logit, in the place of the softmax */
    const float *correction;              /* [experts], added where experts are chosen; NULL: none */
    int64_t groups, groups_kept;          /* only experts of the best groups are chosen; up to 32; 0: all */
    int64_t groups_best;                  /* by the sum of so many of a group's best: 1, or 2 (0) */
    float factor;                         /* of the shares, in the end; 0 = 1 */
    int32_t *experts;                     /* [rows, top_k] */
    float *shares;                        /* the same */
    const float *d_shares;                /* of the backward: the same */
    float *d_logits;                      /* [rows, experts] */
} mq_cuda_route_job;

int mq_cuda_route(const mq_cuda_route_job *job, void *stream, mq_error *err);
int mq_cuda_route_backward(const mq_cuda_route_job *job, void *stream, mq_error *err);

/* Rows by expert, as mq_dispatch_rows: ascending within an expert. */
typedef struct mq_cuda_dispatch_job {
    const int32_t *chosen;                /* [rows, top_k] */
    const float *chosen_shares;
    const uint8_t *mask;                  /* [rows]: what counted counts; NULL: all */
    int64_t rows, top_k, experts;
    int64_t *start;                       /* [experts + 1] */
    int64_t *tokens;                      /* [rows * top_k] */
    float *shares;                        /* [rows * top_k] */
    int64_t *counted;                     /* [experts] */
    void *workspace;                      /* mq_cuda_dispatch_workspace */
    size_t workspace_nbytes;
} mq_cuda_dispatch_job;

size_t mq_cuda_dispatch_workspace(const mq_cuda_dispatch_job *job);
int mq_cuda_dispatch(const mq_cuda_dispatch_job *job, void *stream, mq_error *err);

/* y [index] += share * x, rounded after each step; no index twice; nothing where the share is 0. Without shares, in
 * float32: the way back of gathered rows. */
typedef struct mq_cuda_scatter_job {
    mq_cuda_matrix x, y;                  /* one dtype */
    const int64_t *index;                 /* [x.rows] rows of y */
    const float *shares;                  /* [x.rows], or NULL */
    const float *d_out;                   /* [rows of y, cols], of the backward, which reads no y */
    float *d_in, *d_shares;               /* [x.rows, cols] = share * d_out[index]; [x.rows] = <d_out[index], x>; d_in
                                           * may be d_out where index is 0, 1, ... */
} mq_cuda_scatter_job;

int mq_cuda_scatter(const mq_cuda_scatter_job *job, void *stream, mq_error *err);
int mq_cuda_scatter_backward(const mq_cuda_scatter_job *job, void *stream, mq_error *err);

/* ---- the loss ---- */

/* mq_loss_row. */
typedef struct mq_cuda_loss_row {
    float max;
    double sum;                           /* of exp(logit - max) */
    float target;                         /* the label's logit */
} mq_cuda_loss_row;

/* Columns first .. first + logits.cols of the vocabulary. The slice whose first is 0 comes first: it begins the
 * rows. */
typedef struct mq_cuda_loss_job {
    mq_cuda_matrix logits;                /* MQ_F32 */
    const int32_t *labels;                /* [rows], < 0 = none */
    int64_t first;
    mq_cuda_loss_row *state;              /* [rows] */
    const float *factors;                 /* [rows], of the backward */
    mq_cuda_matrix gradient;              /* of the backward: MQ_F32 or MQ_BF16; may be logits */
    double *losses;                       /* [rows], of mq_cuda_loss_finish: in nats, 0 where there is no label */
} mq_cuda_loss_job;

int mq_cuda_loss(const mq_cuda_loss_job *job, void *stream, mq_error *err);
int mq_cuda_loss_finish(const mq_cuda_loss_job *job, void *stream, mq_error *err);
int mq_cuda_loss_backward(const mq_cuda_loss_job *job, void *stream, mq_error *err);

/* sums [rows] float64: of (gradient * (made - was))^2 over each row, as mq_score_sum has it. */
typedef struct mq_cuda_score_job {
    const float *gradient;
    mq_cuda_matrix made, was;             /* one dtype; was.data NULL: made is the difference */
    double *sums;
} mq_cuda_score_job;

int mq_cuda_score(const mq_cuda_score_job *job, void *stream, mq_error *err);

/* ---- what quantizers do besides rounding ---- */

/* y = rotate(x * pre_scale) + sign * bias, each step rounded to the dtype, any of the three; y may be x. What is NULL
 * or 0 is left out. mq_quantizer_apply is: this with sign -1, then mq_cuda_scaled or mq_cuda_block_fake_quantize in
 * place, and where there is a bias, this with only that and sign 1. */
typedef struct mq_cuda_prepare_job {
    mq_cuda_matrix x, y;
    const float *pre_scale;               /* [cols] */
    int64_t rotate;                       /* columns that are rotated together: a power of two up to 1024 */
    const float *bias;                    /* [cols] */
    float sign;
} mq_cuda_prepare_job;

int mq_cuda_prepare(const mq_cuda_prepare_job *job, void *stream, mq_error *err);

#endif
