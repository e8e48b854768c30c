/* One trip of a chunk through a layer on a device: what the files device_layer.c, device_attention.c and device_mlp.c
 * share, as model/pass.h has it for the CPU. */
#ifndef MQ_DEVICE_PASS_H
#define MQ_DEVICE_PASS_H

#include "backend/device_parts.h"

/* ---- device_layer.c ---- */

/* The quantizer of a point, or some steps of it, over all rows. */
int mq_device_quantize(mq_device_pass *pass, const mq_point *point, void *y, const void *x, int64_t width,
                       mq_quant_steps steps);
/* Statistics of x, if anybody looks on. */
int mq_device_watch(mq_device_pass *pass, mq_point *point, const void *x, int64_t width);
/* Those of a linear's input, as its quantizer leaves it or as it is before it is rounded. */
int mq_device_watch_input(mq_device_pass *pass, mq_linear *linear, const void *in);
/* The input of a linear as its quantizer leaves it. */
int mq_device_quantized(mq_device_pass *pass, const mq_linear *linear, const void *in, const void **out);
/* out = in * weight^T + bias, or += . */
int mq_device_product(mq_device_pass *pass, void *out, const void *in, const mq_cuda_matrix *weight, const void *bias,
                      int accumulate);
/* The amax of a point's quantizer on the device, one number. */
int mq_device_amax(mq_device_pass *pass, const mq_point *point, const float **out);
/* out = quantized(in) * weight^T + bias, or += ; at: whose input's quantizer it is. */
int mq_device_multiply(mq_device_pass *pass, const mq_linear *at, const mq_device_linear *weights, void *out,
                       const void *in, int accumulate);
/* out (rows, O) = linear(in (rows, I)). */
int mq_device_linear_of(mq_device_pass *pass, mq_role role, void *out, const void *in);
/* out = norm(in), part by part as wide as the norm is. */
int mq_device_norm(mq_device_pass *pass, mq_role role, void *out, const void *in, int64_t width);
/* hidden += norm(linear(in)), the norm where there is one. */
int mq_device_residual(mq_device_pass *pass, mq_role role, mq_role added, void *hidden, const void *in);
/* Columns from `first` on of rows that are ld numbers apart. */
typedef struct mq_device_part {
    void *data;
    int64_t first, rows, ld;
} mq_device_part;
/* `width` columns, each row of `from` so many times on end in `to`, which says how many rows there are. */
int mq_device_columns(mq_device_pass *pass, const mq_device_part *to, const mq_device_part *from, int64_t width,
                      int64_t repeat);
/* to (rows, width) = columns of what one linear made in the place of several. */
int mq_device_split(mq_device_pass *pass, void *to, int64_t first, int64_t width, int64_t joined);

/* ---- device_attention.c, device_mlp.c ---- */

int mq_device_attention_half(mq_device_pass *pass);
/* in: what the second half reads, normed where the layer has that norm. */
int mq_device_mlp_half(mq_device_pass *pass, const void *in);
/* The experts of the chunk's rows, to the host. */
int mq_device_route_half(mq_device_pass *pass, const void *in);

#endif
