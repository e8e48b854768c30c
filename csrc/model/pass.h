/* One trip of a unit through a layer: what the files layer*.c share. */
#ifndef MQ_PASS_H
#define MQ_PASS_H

#include "model/layer.h"

/* first and rows move: the whole unit for attention, pieces of it for the MLP. */
typedef struct mq_pass {
    mq_layer *layer;
    const mq_layer_context *context;
    mq_error *err;
    int64_t first, rows;            /* rows of the run */
    const uint8_t *count_mask;      /* of these rows; NULL = all count */
    const int64_t *tokens;          /* rows of the run that these are, gathered for an expert; NULL = from first on */
    void *quantized, *temporary, *prepared, *low;
    const mq_quantizer *applied;    /* whose result quantized holds, of the input now in use: NULL with another one */
} mq_pass;

mq_row_sizes mq_pass_sizes(const mq_pass *pass, int64_t width);

/* Statistics of a linear's input as its quantizer leaves it, or as it is before it is rounded. */
int mq_pass_collect_input(mq_pass *pass, mq_linear *linear, const void *in);
/* The input of a linear as its quantizer leaves it. */
const void *mq_pass_quantized(mq_pass *pass, const mq_linear *linear, const void *in);
/* out (rows, O) = linear(in (rows, I)). */
int mq_pass_linear(mq_pass *pass, mq_role role, void *out, const void *in);
/* out (rows, width) = norm(in), part by part as wide as the norm is. */
void mq_pass_norm(const mq_pass *pass, mq_role role, void *out, const void *in, int64_t width);
/* The same of hidden states, into out; without such a norm it is in. */
const void *mq_pass_normed(const mq_pass *pass, mq_role role, void *out, const void *in);
/* hidden += residual_multiplier * norm(linear(in)), the norm where there is one. */
int mq_pass_residual(mq_pass *pass, mq_role role, mq_role norm, void *hidden, const void *in);
/* What reaches q, k or v of a unit, and its quantizer. */
int mq_pass_attention_point(mq_pass *pass, mq_point *point, void *x, int64_t width, const mq_unit *unit);

/* The halves of a layer. hidden: (rows of the pass, C), in place. mlp is of all or some rows of the unit; route chooses
 * the experts of rows, and puts what the shared one makes of them where the sums of the others will be. */
int mq_pass_attention_half(mq_pass *pass, const mq_unit *unit, void *hidden, const mq_scratch *scratch);
int mq_pass_mlp_half(mq_pass *pass, void *hidden, const mq_scratch *scratch);
int mq_pass_route_half(mq_pass *pass, const void *hidden, const mq_scratch *scratch);

#endif
