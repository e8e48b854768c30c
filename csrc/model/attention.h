/* Scaled dot-product attention, blockwise: softmax(scale * Q K^T) V without the T x T matrix (Milakov and Gimelshein
 * 2018; Dao et al. 2022). Queries attend to keys at their own position and before. Sums, maxima and the output's
 * accumulation are float32; in bfloat16 the probabilities are rounded to bfloat16 before they meet V, as PyTorch's
 * CPU attention does. */
#ifndef MQ_ATTENTION_H
#define MQ_ATTENTION_H

#include "core/tensor.h"

typedef struct mq_attention_args {
    int64_t T;                       /* queries */
    int64_t T_kv;                    /* keys and values */
    int64_t past;                    /* query i stands at position past + i */
    int64_t heads, kv_heads;         /* head h reads key and value head h / (heads / kv_heads) */
    int64_t head_dim, value_dim;     /* of q and k; of v and out */
    const void *q, *k, *v;           /* [T, heads, head_dim], [T_kv, kv_heads, head_dim], [T_kv, kv_heads, value_dim] */
    mq_dtype dtype;                  /* MQ_F32 or MQ_BF16, of all four */
    int64_t ldq, ldk, ldv;           /* elements between tokens */
    int64_t head_tokens;             /* k and v lie head by head, of so many tokens each; 0 = token by token. Not for
                                      * the backward */
    void *out;                       /* [T, heads, value_dim] */
    int64_t ldo;
    const uint8_t *key_mask;         /* [T_kv], nonzero = may be attended to; NULL = all */
    float scale;
    int64_t window;                  /* how many positions a query sees, its own included; 0 = all before it */
    int64_t chunk, chunk_first;      /* a query sees its own chunk of so many positions, counted from chunk_first; 0 =
                                      * all */
    float softcap;                   /* c: scores are c * tanh(score / c); 0 = they are not capped */
    const float *sinks;              /* [heads]: a further score of every query of the head, with no value (Xiao et al.
                                      * 2023); NULL = none */
    float *maxima, *factors;         /* [heads, T], NULL or where each softmax's largest score goes, and one over its
                                      * denominator relative to that (both 0 where a query sees no key): what the
                                      * backward needs */
} mq_attention_args;

/* Bytes of scratch (64-byte aligned) that a call with these arguments needs, whatever the number of threads. */
size_t mq_attention_scratch(const mq_attention_args *args);

/* A query that sees no key gets zeros. Runs on the pool, inline inside a job. */
void mq_attention_forward(const mq_attention_args *args, void *scratch);

/* The same for one token (T = 1, no key_mask, maxima and factors): keys and values are read where they lie. */
size_t mq_attention_step_scratch(const mq_attention_args *args);
void mq_attention_step(const mq_attention_args *args, void *scratch);

/* Probabilities are computed again, block by block (Dao et al. 2022); a task is one head, and heads that share keys and
 * values add their gradients in order. */
typedef struct mq_attention_gradient {
    const float *d_out;              /* [T, heads, value_dim], without gaps as all of these */
    float *d_q, *d_k, *d_v;          /* as q, k, v */
    float *d_sinks;                  /* [heads], added to; NULL = not wanted */
} mq_attention_gradient;

/* args: as given to the forward, with its out, maxima and factors. */
size_t mq_attention_backward_scratch(const mq_attention_args *args);
void mq_attention_backward(const mq_attention_gradient *gradient, const mq_attention_args *args, void *scratch);

/* Where keys and values of a head begin, in elements. */
MQ_INLINE int64_t mq_attention_head(const mq_attention_args *args, int64_t kv_head, int64_t dim)
{
    return kv_head * (args->head_tokens ? args->head_tokens * dim : dim);
}

/* The first and one past the last position that query i of the call may attend to. */
MQ_INLINE int64_t mq_attention_first_key(const mq_attention_args *args, int64_t i)
{
    const int64_t position = args->past + i, behind = position - args->chunk_first;
    const int64_t window = args->window > 0 ? MQ_MAX(position - args->window + 1, (int64_t)0) : 0;
    return args->chunk > 0 && behind >= 0 ? MQ_MAX(window, position - behind % args->chunk) : window;
}

MQ_INLINE int64_t mq_attention_last_key(const mq_attention_args *args, int64_t i)
{
    return MQ_MIN(args->past + i + 1, args->T_kv);
}

/* Scores [rows, width] of queries from `first` on and keys from `start` on, ld floats apart: what a query may not see
 * becomes minus infinity. */
typedef struct mq_attention_block {
    float *scores;
    int64_t ld, first, rows, start, width;
} mq_attention_block;
void mq_attention_hide(const mq_attention_args *args, const mq_attention_block *block);
/* Scores to capped ones, if there is a cap. */
void mq_attention_cap(const mq_attention_args *args, const mq_attention_block *block);

#endif
