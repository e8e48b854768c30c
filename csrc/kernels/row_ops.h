/* Operations on one row of activations, vectorised: norms, rope, SwiGLU and their gradients, sums, conversions, amax.
 *
 * One generic source (row_ops.inc) compiled per ISA; the table is picked once. Every operation has a float32 and a
 * bfloat16 form (bfloat16 as its bits in uint16_t); arithmetic is float32 inside, and bfloat16 forms round to nearest
 * even where a bfloat16 model in transformers rounds. amax gives the same bits on every ISA; the others may differ in
 * the last bit (fused multiply-add where there is one). */
#ifndef MQ_ROW_OPS_H
#define MQ_ROW_OPS_H

#include "core/cpu.h"
#include "core/tensor.h"

/* The operations whose rows are float32 or bfloat16; T is float or uint16_t, passed as void. n is the row's length.
 * out may be the same row as in or gate. */
typedef struct mq_typed_row_ops {
    /* The largest magnitude, as the bits of a float32: above 0x7f800000 means that a NaN was seen. */
    uint32_t (*amax)(const void *x, int64_t n);
    /* amax[j] = max(amax[j], |x[j]|) over a row, on bits as above. */
    void (*amax_columns)(uint32_t *amax, const void *x, int64_t n);
    void (*rmsnorm)(void *out, const void *in, const float *weight, int64_t n, float eps);
    /* Rotates each of `heads` heads of head_dim; cosine and sine have rotary/2 entries; the rest of a head is left
     * alone. */
    void (*rope)(void *x, const float *cosine, const float *sine, int64_t heads, int64_t head_dim, int64_t rotary);
    void (*silu_mul)(void *out, const void *gate, const void *up, int64_t n);
    void (*add)(void *x, const void *y, int64_t n);          /* x += y */
    void (*from_f32)(void *out, const float *in, int64_t n);
    void (*to_f32)(float *out, const void *in, int64_t n);
    /* Gradients, which are float32 (row_ops_backward.inc). d_in may be d_out; accumulate: d_in += instead of =. */
    void (*rmsnorm_backward)(float *d_in, const float *d_out, const void *in, const float *weight, int64_t n, float eps,
                             int accumulate);
    void (*rmsnorm_weight_backward)(float *d_weight, const float *d_out, const void *in, int64_t n, float eps);
    void (*silu_mul_backward)(float *d_gate, float *d_up, const void *gate, const void *up, int64_t n);
    float (*dot)(const float *a, const void *b, int64_t n);
} mq_typed_row_ops;

typedef struct mq_row_ops {
    mq_typed_row_ops f32, bf16;
    float (*max)(const float *x, int64_t n);
    double (*sum_exp)(const float *x, int64_t n, float shift);  /* sum of exp(x - shift) */
    void (*exp_shifted)(float *out, const float *x, int64_t n, float shift, float factor);
    void (*softmax_backward)(float *d_p, const float *p, int64_t n, float mean);  /* d_p = p * (d_p - mean) */
    void (*add_scaled)(float *x, const float *y, int64_t n, float factor);        /* x += factor * y */
    void (*rope_backward)(float *x, const float *cosine, const float *sine, int64_t heads, int64_t head_dim,
                          int64_t rotary);
} mq_row_ops;

const mq_row_ops *mq_row_ops_table(void);
const mq_row_ops *mq_row_ops_table_of(mq_isa isa);                   /* for tests */
const mq_typed_row_ops *mq_row_ops_of(mq_dtype dtype);              /* MQ_F32 or MQ_BF16 */

#endif
