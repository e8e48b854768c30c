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
    void *out;                       /* [T, heads, value_dim] */
    int64_t ldo;
    const uint8_t *key_mask;         /* [T_kv], nonzero = may be attended to; NULL = all */
    float scale;
    int64_t window;                  /* how many positions a query sees, its own included; 0 = all before it */
} mq_attention_args;

/* Bytes of scratch (64-byte aligned) that a call with these arguments needs, whatever the number of threads. */
size_t mq_attention_scratch(const mq_attention_args *args);

/* A query that sees no key gets zeros. Runs on the pool, inline inside a job. */
void mq_attention_forward(const mq_attention_args *args, void *scratch);

#endif
