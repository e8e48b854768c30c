/* The operations of the runtime, forward and backward: plain functions, outputs first, then inputs, parameters, sizes.
 *
 * A backward takes the gradient of the loss by the outputs (d_out) and gives those by the inputs (d_in); gradients are
 * float32, of whatever dtype the activations are, and roundings on the way count as identities. Gradients of weights
 * are added to (d_weight +=), row after row in order.
 *
 * Shape letters: B sequences, T tokens of one, N rows (tokens of one or several sequences), C hidden size, H heads,
 * G key and value heads, D head size, F intermediate size, V vocabulary, O and I rows and columns of a weight.
 * Activations are float32 or bfloat16 (`dtype`), row-major without gaps unless a stride is named; arithmetic is
 * float32. Rows are done in parallel on the pool, or inline when the caller already is a job; the bits
 * are the same. */
#ifndef MQ_OPS_H
#define MQ_OPS_H

#include "core/tensor.h"
#include "kernels/gemm.h"
#include "model/config.h"
#include "quant/block.h"

typedef struct mq_row_sizes {
    int64_t rows, width;
    mq_dtype dtype;
} mq_row_sizes;

/* out (N, C) = weight (C) * in / sqrt(mean(in^2) + eps); out may be in. Zhang and Sennrich 2019. */
void mq_rmsnorm_forward(void *out, const void *in, const float *weight, double eps, const mq_row_sizes *sizes);
/* d_in may be d_out; accumulate: d_in += instead of =. */
void mq_rmsnorm_backward(float *d_in, const float *d_out, const void *in, const float *weight, double eps,
                         int accumulate, const mq_row_sizes *sizes);
void mq_rmsnorm_weight_backward(float *d_weight, const float *d_out, const void *in, double eps,
                                const mq_row_sizes *sizes);

/* gate (N, F) = silu(gate) * up. Shazeer 2020, "GLU variants improve transformer". */
void mq_swiglu_forward(void *gate, const void *up, const mq_row_sizes *sizes);
/* d_gate is d_out at first; gate as it was before the forward. */
void mq_swiglu_backward(float *d_gate, float *d_up, const void *gate, const void *up, const mq_row_sizes *sizes);

/* The same with other activations: GELU by its tanh approximation (Hendrycks and Gimpel 2016), or that of gpt-oss:
 * min(gate, limit) * sigmoid(1.702 min(gate, limit)) * (clamp(up, -limit, limit) + 1). */
typedef struct mq_gate {
    mq_activation activation;
    float limit;
} mq_gate;
mq_gate mq_gate_of(const mq_config *config);
void mq_gate_forward(void *gate, const void *up, const mq_gate *kind, const mq_row_sizes *sizes);
void mq_gate_backward(float *d_gate, float *d_up, const void *gate, const void *up, const mq_gate *kind,
                      const mq_row_sizes *sizes);

/* The experts of each row and what share each has in the result: softmax over all experts, then the top_k largest
 * (the earlier one first where equal); Shazeer et al. 2017. normalize: the shares are divided by their sum. rounded:
 * they are rounded to dtype. sigmoid: of each logit, in the place of the softmax. correction (experts): added where
 * experts are chosen, not to shares. groups: only experts of the groups_kept best are chosen, by each group's best
 * (groups_best 1; DeepSeek-AI 2024, "DeepSeek-V2") or the sum of its two best ("DeepSeek-V3"); 0 = all. factor: of the
 * shares, in the end. kept: so many of the top_k are chosen so; the others are the next best of all groups, who see
 * the row and have no share; 0 = all. */
typedef struct mq_routes {
    int32_t *experts;   /* (N, top_k) */
    float *shares;      /* (N, top_k) */
    int64_t top_k, kept;
} mq_routes;
typedef struct mq_route_sizes {
    int64_t rows, experts, first;   /* first: row of routes where the first one goes */
    mq_dtype dtype;
    int normalize, rounded, sigmoid;
    const float *correction;    /* NULL = none */
    int64_t groups, groups_kept, groups_best;
    float factor;               /* 0 = 1 */
} mq_route_sizes;
mq_route_sizes mq_route_of(const mq_config *config);
/* logits (N, experts). */
void mq_route_forward(const mq_routes *routes, const void *logits, const mq_route_sizes *sizes);
/* d_logits (N, experts); d_shares (rows of routes, top_k). Which experts are chosen has no gradient. */
void mq_route_backward(float *d_logits, const float *d_shares, const mq_routes *routes, const void *logits,
                       const mq_route_sizes *sizes);

/* out (N, C) = in[index (N)]. */
void mq_gather_forward(void *out, const void *in, const int64_t *index, const mq_row_sizes *sizes);
/* d_in[index (N)] += d_out (N, C); no index twice. */
void mq_gather_backward(float *d_in, const float *d_out, const int64_t *index, const mq_row_sizes *sizes);
/* out[index (N)] += share (N) * in (N, C), rounded after each step; no index twice. */
void mq_scatter_forward(void *out, const void *in, const int64_t *index, const float *shares,
                        const mq_row_sizes *sizes);
/* d_in (N, C) = share * d_out[index], d_share = <d_out[index], in>. */
typedef struct mq_scatter_gradient {
    float *d_in, *d_shares;     /* (N, C), (N) */
} mq_scatter_gradient;
void mq_scatter_backward(const mq_scatter_gradient *gradient, const float *d_out, const void *in, const int64_t *index,
                         const float *shares, const mq_row_sizes *sizes);

/* x (N, C) += y. */
void mq_add_forward(void *x, const void *y, const mq_row_sizes *sizes);
/* x (N, C) += factor * y, rounded after each step; factor 1 is the above. */
void mq_add_scaled_forward(void *x, const void *y, double factor, const mq_row_sizes *sizes);
/* x (N, C) *= factor. */
void mq_scale_forward(void *x, double factor, const mq_row_sizes *sizes);
/* x (N, C) *= factor (N), of each row. */
void mq_scale_rows_forward(void *x, const float *factors, const mq_row_sizes *sizes);
/* factors (N) = sigmoid(x (N)); d_x = d_factors * factors * (1 - factors). */
void mq_sigmoid_forward(float *factors, const void *x, int64_t rows, mq_dtype dtype);
void mq_sigmoid_backward(float *d_x, const float *d_factors, const float *factors, int64_t rows);
/* x (N) = cap * tanh(x / cap), in float32; d_x = d_out * (1 - (out / cap)^2). */
void mq_softcap_forward(float *x, float cap, int64_t n);
void mq_softcap_backward(float *d_x, const float *out, float cap, int64_t n);

/* Columns of a matrix: `width` of each row go from `from` (ld_from numbers between rows) to `to`. */
typedef struct mq_columns {
    void *to;
    const void *from;
    int64_t ld_to, ld_from, width, rows;
    mq_dtype dtype;
} mq_columns;
void mq_columns_copy(const mq_columns *columns);
void mq_columns_add(const mq_columns *columns);     /* to += from, float32 */

/* Cosines and sines (positions, rotary / 2) of the rotary embedding; Su et al. 2021. Frequencies are those of the
 * config; LOCAL: unscaled, of rope_local_theta; LONG: of rope_long_factor. "dynamic": those of sequences of up to
 * `longest` tokens; a longer one has frequencies of its own, of a base that grows with its length. */
typedef enum mq_rope_kind { MQ_ROPE_MAIN, MQ_ROPE_LONG, MQ_ROPE_LOCAL, MQ_ROPE_KINDS } mq_rope_kind;
typedef struct mq_rope_table {
    int64_t positions, rotary;
    float *cosine, *sine;
    int64_t longest;            /* 0 = sequences of all lengths are alike */
    double theta, factor;       /* with longest: the base, and how much it grows */
} mq_rope_table;

int mq_rope_table_init(mq_rope_table *table, const mq_config *config, mq_rope_kind kind, int64_t positions,
                       mq_error *err);
void mq_rope_table_free(mq_rope_table *table);
size_t mq_rope_table_nbytes(const mq_rope_table *table);

/* The tables that a model's layers need. Longer than original, a sequence takes LONG in the place of MAIN. */
typedef struct mq_ropes {
    mq_rope_table tables[MQ_ROPE_KINDS];    /* empty where none is needed */
    int64_t original;                       /* 0 = sequences of all lengths are alike */
    mq_rope_table *stretched;               /* MAIN for single lengths beyond `longest`; only for a device */
    int64_t stretched_count;
} mq_ropes;
int mq_ropes_init(mq_ropes *ropes, const mq_config *config, unsigned layer_ropes, int64_t positions, mq_error *err);
/* Makes the table for sequences of this length, where MAIN is not for them and none is there. */
int mq_ropes_stretch(mq_ropes *ropes, const mq_config *config, int64_t length, mq_error *err);
/* All tables lie one behind the other (those of kinds first): the row where that of whole sequences of this length,
 * in layers without LOCAL, begins. */
int64_t mq_ropes_row(const mq_ropes *ropes, int64_t length);
void mq_ropes_free(mq_ropes *ropes);
size_t mq_ropes_nbytes(const mq_ropes *ropes);

/* Which rope a layer has. */
enum { MQ_LAYER_NO_ROPE, MQ_LAYER_ROPE, MQ_LAYER_LOCAL_ROPE };
/* The table for a sequence that ends behind `length` positions; NULL for MQ_LAYER_NO_ROPE. */
const mq_rope_table *mq_ropes_of(const mq_ropes *ropes, int layer_rope, int64_t length);

/* Rotates x (T, heads, D), in place; row t is at position first + t of a sequence of first + T so far. Of each head
 * the numbers from offset on are turned. interleaved: pairs lie side by side before it, and as two halves behind it. */
typedef struct mq_rope_sizes {
    int64_t tokens, heads, head_dim, first, offset;
    mq_dtype dtype;
    int interleaved;
} mq_rope_sizes;
void mq_rope_forward(void *x, const mq_rope_table *table, const mq_rope_sizes *sizes);
void mq_rope_backward(float *d_x, const mq_rope_table *table, const mq_rope_sizes *sizes);  /* in place */

/* out (N, C) = weight (V, C)[ids (N)]. */
void mq_embed_forward(void *out, const int32_t *ids, const mq_tensor *weight, const mq_row_sizes *sizes);
void mq_embed_backward(float *d_weight, const float *d_out, const int32_t *ids, const mq_row_sizes *sizes);

/* A weight (O, I) packed for the product, and its bias (O) or NULL. */
typedef struct mq_linear_weight {
    mq_packed packed;
    float *bias;
    int lent;           /* packed.data is somebody else's */
} mq_linear_weight;

/* Packs w (O, I) of any float dtype and stride for products in `kind`; name is used in errors (a NaN or an infinity in
 * the weight is one). */
int mq_linear_load(mq_linear_weight *weight, const mq_tensor *w, mq_gemm_kind kind, const char *name, mq_error *err);
/* The same from a quantized weight's parts, which stay codes wherever products can read them as codes. */
int mq_linear_load_stored(mq_linear_weight *weight, const mq_stored_weight *stored, mq_gemm_kind kind, const char *name,
                          mq_error *err);
/* What a quantized weight's parts stand for: the caller frees out->data, after a failure too. */
int mq_stored_numbers(const mq_stored_weight *stored, mq_tensor *out, const char *name, mq_error *err);
/* MQ_ERR_VALUE: one of them is NaN or an infinity. */
int mq_stored_check(const mq_stored_weight *stored, const char *name, mq_error *err);
void mq_linear_free(mq_linear_weight *weight);

/* out (N, O) = in (N, I) * weight^T + bias, or += if accumulate. dtype is of both. */
void mq_linear_forward(void *out, const void *in, const mq_linear_weight *weight, int accumulate,
                       const mq_row_sizes *sizes);

/* Packs w (O, I) for the way back; the caller frees packed->data. Errors as mq_linear_load. */
int mq_linear_load_backward(mq_packed *packed, const mq_tensor *w, mq_gemm_kind kind, const char *name, mq_error *err);
/* d_in (N, I) = d_out (N, O) * w, or += if accumulate. */
void mq_linear_backward(float *d_in, const float *d_out, const mq_packed *weight, int accumulate, int64_t rows);
/* d_weight (columns, C) += d_out (N, columns)^T * in (N, C); always in float32. */
int mq_linear_weight_backward(float *d_weight, const float *d_out, const void *in, int64_t columns,
                              const mq_row_sizes *sizes, mq_error *err);
void mq_bias_backward(float *d_bias, const float *d_out, int64_t rows, int64_t columns);

/* Next-token loss over a vocabulary that comes in slices: the running log-sum-exp of one row (Milakov and
 * Gimelshein 2018). */
typedef struct mq_loss_row {
    float max;
    double sum;     /* of exp(logit - max) */
    float target;   /* the label's logit */
} mq_loss_row;

/* Folds logits (N, n), columns first..first+n of the vocabulary, into rows (N). labels (N); < 0 = no label. */
typedef struct mq_loss_slice {
    int64_t rows, first, columns, ld;
} mq_loss_slice;
void mq_loss_begin(mq_loss_row *rows, int64_t count);
void mq_loss_forward(mq_loss_row *rows, const float *logits, const int32_t *labels, const mq_loss_slice *slice);
/* logits become factor (N) times the gradient of each row's loss by them; zero where there is no label. */
void mq_loss_backward(float *logits, const mq_loss_row *rows, const int32_t *labels, const float *factors,
                      const mq_loss_slice *slice);
double mq_loss_of(const mq_loss_row *row);   /* -log softmax(logits)[label], in nats */

/* What the model makes of lm_head's products (rows, columns), ld numbers apart: divided by logits_scaling, capped by
 * final_logit_softcapping. Backward: d_logits in place, raw as the products were. */
typedef struct mq_logits_sizes {
    int64_t rows, columns, ld;
} mq_logits_sizes;
void mq_logits_forward(float *logits, const mq_config *config, const mq_logits_sizes *sizes);
void mq_logits_backward(float *d_logits, const float *raw, const mq_config *config, const mq_logits_sizes *sizes);
int mq_logits_change(const mq_config *config);     /* whether they do anything */

/* Copies or converts a row or a whole tensor of any float dtype and stride; dtype is MQ_F32 or MQ_BF16. */
int mq_tensor_is_float(const mq_tensor *tensor);
/* row of a matrix; a vector is its row 0. */
void mq_read_row(void *out, mq_dtype dtype, const mq_tensor *tensor, int64_t row);

/* Rows that one task of an elementwise operation takes. */
MQ_INLINE int64_t mq_row_grain(int64_t width)
{
    return MQ_MAX((int64_t)1, 32768 / MQ_MAX(width, (int64_t)1));
}

#endif
