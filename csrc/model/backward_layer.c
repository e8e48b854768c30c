/* One layer on the way back: units are computed again from the hidden states before it. Of a layer with experts this
 * is only what comes before them (backward_experts.c). */
#include <string.h>

#include "core/alloc.h"
#include "model/backward.h"

static mq_row_sizes sizes_of(const mq_back_rows *rows, int64_t width)
{
    return (mq_row_sizes){.rows = rows->rows, .width = width, .dtype = rows->back->run->runtime->dtype};
}

/* Gate and up of one linear, taken out or put back together. */
static void split(const mq_back_rows *rows, void *gate, void *up, void *joined, int back)
{
    const mq_dtype dtype = back ? MQ_F32 : rows->back->run->runtime->dtype;
    const int64_t width = rows->layer->linears[MQ_ROLE_GATE_UP].rows / 2;
    void *const parts[2] = {gate, up};
    for (int i = 0; i < 2; i++) {
        void *at = (char *)joined + (size_t)(i * width) * mq_dtype_size(dtype);
        const mq_columns columns = {
            .to = back ? at : parts[i], .from = back ? parts[i] : at, .ld_to = back ? 2 * width : width,
            .ld_from = back ? width : 2 * width, .width = width, .rows = rows->rows, .dtype = dtype,
        };
        mq_columns_copy(&columns);
    }
}

void mq_backward_mlp_again(const mq_back_rows *rows, const mq_mlp_roles *roles, int output)
{
    const mq_back_scratch *scratch = &rows->back->scratch;
    const mq_linear *linears = rows->layer->linears;
    const mq_gate gate = mq_gate_of(&rows->back->run->runtime->config);
    const mq_row_sizes hidden = sizes_of(rows, linears[roles->down].rows);
    const mq_row_sizes inner = sizes_of(rows, linears[roles->down].cols);
    if (linears[roles->joined].cols > 0) {
        mq_linear_forward(scratch->mlp_joined, scratch->mlp_normed, &linears[roles->joined].weight, 0, &hidden);
        split(rows, scratch->gate, scratch->up, scratch->mlp_joined, 0);
    } else {
        mq_linear_forward(scratch->gate, scratch->mlp_normed, &linears[roles->gate].weight, 0, &hidden);
        mq_linear_forward(scratch->up, scratch->mlp_normed, &linears[roles->up].weight, 0, &hidden);
    }
    memcpy(scratch->product, scratch->gate, (size_t)(inner.rows * inner.width) * mq_dtype_size(inner.dtype));
    mq_gate_forward(scratch->product, scratch->up, &gate, &inner);
    if (output) mq_linear_forward(scratch->output, scratch->product, &linears[roles->down].weight, 0, &inner);
}

int mq_backward_mlp(const mq_back_rows *rows, const mq_mlp_roles *roles, const float *d_output)
{
    const mq_back_scratch *scratch = &rows->back->scratch;
    const mq_linear *linears = rows->layer->linears;
    const mq_gate kind = mq_gate_of(&rows->back->run->runtime->config);
    const mq_row_sizes inner = sizes_of(rows, linears[roles->down].cols);
    mq_back_linear down = {.in = scratch->product, .out = scratch->output, .d_out = d_output, .d_in = scratch->d_gate};
    mq_back_linear gate = {.in = scratch->mlp_normed, .out = scratch->gate, .d_out = scratch->d_gate,
                           .d_in = scratch->d_mlp_normed};
    mq_back_linear up = {.in = scratch->mlp_normed, .out = scratch->up, .d_out = scratch->d_up,
                         .d_in = scratch->d_mlp_normed, .accumulate = 1};
    mq_back_linear joined = {.in = scratch->mlp_normed, .out = scratch->mlp_joined, .d_out = scratch->d_mlp_joined,
                             .d_in = scratch->d_mlp_normed};
    int rc = mq_backward_linear(rows, roles->down, &down);
    if (rc != MQ_OK) return rc;
    mq_gate_backward(scratch->d_gate, scratch->d_up, scratch->gate, scratch->up, &kind, &inner);
    if (linears[roles->joined].cols > 0) {
        split(rows, scratch->d_gate, scratch->d_up, scratch->d_mlp_joined, 1);
        return mq_backward_linear(rows, roles->joined, &joined);
    }
    rc = mq_backward_linear(rows, roles->gate, &gate);
    return rc == MQ_OK ? mq_backward_linear(rows, roles->up, &up) : rc;
}

/* A linear in the place of the MLP. */
static int linear_half(const mq_back_rows *rows, const void *middle, float *gradient)
{
    const mq_back_scratch *scratch = &rows->back->scratch;
    const mq_linear_weight *weight = &rows->layer->linears[MQ_ROLE_LINEAR_MLP].weight;
    const mq_row_sizes hidden = sizes_of(rows, rows->back->run->runtime->config.hidden_size);
    mq_back_linear linear = {.in = scratch->mlp_normed, .out = scratch->output, .d_in = scratch->d_mlp_normed};
    mq_backward_enter(rows, MQ_ROLE_POST_NORM, scratch->mlp_normed, middle);
    mq_linear_forward(scratch->output, scratch->mlp_normed, weight, 0, &hidden);
    linear.d_out = mq_backward_added(rows, MQ_ROLE_MLP_NORM, scratch->output, gradient, scratch->d_output);
    const int rc = mq_backward_linear(rows, MQ_ROLE_LINEAR_MLP, &linear);
    if (rc == MQ_OK) mq_backward_leave(rows, MQ_ROLE_POST_NORM, middle, scratch->d_mlp_normed, gradient);
    return rc;
}

/* The MLP half of some rows; middle (rows, C) is its input, gradient becomes the one by that. */
static int mlp_half(const mq_back_rows *rows, const void *middle, float *gradient)
{
    const mq_back_scratch *scratch = &rows->back->scratch;
    const int output = rows->layer->linears[MQ_ROLE_DOWN].observer != NULL || rows->layer->norms[MQ_ROLE_MLP_NORM];
    if (rows->layer->kind.mlp == MQ_BLOCK_NONE) return MQ_OK;
    if (rows->layer->kind.mlp == MQ_BLOCK_LINEAR) return linear_half(rows, middle, gradient);
    mq_backward_enter(rows, MQ_ROLE_POST_NORM, scratch->mlp_normed, middle);
    mq_backward_mlp_again(rows, &MQ_MLP_ROLES, output);
    const float *d_output = mq_backward_added(rows, MQ_ROLE_MLP_NORM, scratch->output, gradient, scratch->d_output);
    int rc = mq_backward_mlp(rows, &MQ_MLP_ROLES, d_output);
    if (rc == MQ_OK) mq_backward_leave(rows, MQ_ROLE_POST_NORM, middle, scratch->d_mlp_normed, gradient);
    return rc;
}

static int back_unit(const mq_back_unit *it)
{
    const mq_back_scratch *scratch = &it->back->scratch;
    const int64_t width = it->back->run->runtime->config.hidden_size;
    const size_t stride = (size_t)width * mq_dtype_size(it->back->run->runtime->dtype);
    int rc = mq_backward_poll(it->back, it->err);
    if (rc == MQ_OK) mq_backward_attention_again(it);
    for (int64_t done = 0; rc == MQ_OK && done < it->unit->rows; done += scratch->piece) {
        const mq_back_rows rows = {.back = it->back, .layer = it->layer, .first = it->unit->first + done,
                                   .rows = MQ_MIN(scratch->piece, it->unit->rows - done), .expert = -1, .err = it->err};
        rc = mlp_half(&rows, (const char *)scratch->middle + (size_t)done * stride, it->gradient + done * width);
    }
    return rc == MQ_OK ? mq_backward_attention(it) : rc;
}

static int back_units(mq_backward *back, mq_layer *layer, const void *input, mq_error *err)
{
    const mq_run *run = back->run;
    const int64_t width = run->runtime->config.hidden_size;
    const size_t stride = (size_t)width * mq_dtype_size(run->runtime->dtype);
    int rc = MQ_OK;
    for (int64_t i = 0; rc == MQ_OK && i < run->unit_count; i++) {
        const mq_unit *unit = &run->units[i];
        mq_back_unit it = {.back = back, .layer = layer, .unit = unit, .err = err,
                           .input = (const char *)input + (size_t)unit->first * stride,
                           .gradient = back->gradient + unit->first * width};
        rc = back_unit(&it);
    }
    return rc;
}

/* Gradients are those of the model without quantizers, and statistics would be taken twice. */
static int check_plain(mq_layer *layer, int64_t index, mq_error *err)
{
    mq_point *points[MQ_LAYER_MAX_POINTS];
    const size_t count = mq_layer_points(layer, points);
    for (size_t i = 0; i < count; i++) {
        const int quantized = points[i]->quantizer != NULL && mq_quantizer_acts(points[i]->quantizer);
        if (quantized || mq_point_has_calib(points[i]))
            return mq_fail(err, MQ_ERR_STATE, "backward: layer %lld has a %s, which has no gradient", (long long)index,
                           quantized ? "quantizer of activations" : "calibrator");
    }
    return MQ_OK;
}

static int check_order(const mq_backward *back, int64_t layer, mq_error *err)
{
    if (back->failed) return mq_fail(err, MQ_ERR_STATE, "backward: it failed before, and has to start again");
    if (back->next == back->run->runtime->config.num_hidden_layers)
        return mq_fail(err, MQ_ERR_STATE, "backward of layer %lld: the head comes first", (long long)layer);
    if (back->input != NULL)
        return mq_fail(err, MQ_ERR_STATE, "backward of layer %lld: experts of layer %lld come next", (long long)layer,
                       (long long)back->next);
    if (back->next != layer)
        return mq_fail(err, MQ_ERR_STATE, "backward of layer %lld: the next layer is %lld", (long long)layer,
                       (long long)back->next);
    return MQ_OK;
}

int mq_backward_layer(mq_backward *back, int64_t index, const void *input, const mq_named_tensor *tensors,
                      size_t count, mq_error *err)
{
    mq_layer *layer = &back->run->runtime->layers[index];
    mq_elsewhere *there = back->run->runtime->elsewhere;
    int rc = check_order(back, index, err);
    if (rc == MQ_OK) rc = check_plain(layer, index, err);
    if (rc != MQ_OK) return rc;
    rc = mq_backward_reserve(back, err);
    if (rc == MQ_OK) rc = mq_runtime_load_layer(back->run->runtime, index, tensors, count, err);
    if (rc == MQ_OK) rc = mq_backward_load(back, index, -1, tensors, count, err);
    if (rc == MQ_OK && layer->experts > 0) rc = mq_backward_to_experts(back, index, input, err);
    else if (rc == MQ_OK && there != NULL) rc = there->back_layer(there, back, index, input, err);
    else if (rc == MQ_OK) rc = back_units(back, layer, input, err);
    if (rc == MQ_OK && layer->experts > 0) return MQ_OK;    /* they come next */
    mq_backward_drop(back);
    if (rc == MQ_OK) back->next = index - 1;
    else back->failed = 1;
    return rc;
}

int mq_backward_embed(mq_backward *back, mq_error *err)
{
    const mq_run *run = back->run;
    const mq_row_sizes sizes = {.rows = run->rows, .width = run->runtime->config.hidden_size, .dtype = MQ_F32};
    float *wanted = mq_backward_wanted(back, mq_runtime_outer(run->runtime, MQ_ROLE_EMBED)->weight);
    if (back->failed || back->next != -1 || back->input != NULL)
        return mq_fail(err, MQ_ERR_STATE, "backward of the embedding: layers come first (next is %lld)",
                       (long long)back->next);
    if (wanted == NULL) return MQ_OK;
    mq_scale_forward(back->gradient, mq_embedding_factor(run->runtime), &sizes);
    mq_embed_backward(wanted, back->gradient, run->ids, &sizes);
    return MQ_OK;
}
