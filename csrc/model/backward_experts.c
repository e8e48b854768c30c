/* A layer with experts on the way back. Its attention half is computed again for all rows, which chooses the same
 * experts; each of them then gives back the gradients by its share and by its input; and when all are done, router,
 * norm and attention half follow, the latter from the layer's input once more. */
#include <string.h>

#include "core/alloc.h"
#include "kernels/row_ops.h"
#include "model/backward.h"

static int reserve(mq_backward *back, mq_error *err)
{
    const mq_run *run = back->run;
    const size_t hidden = (size_t)(run->rows * run->runtime->config.hidden_size) * sizeof(float);
    const size_t shares = (size_t)(run->rows * run->runtime->config.num_experts_per_tok) * sizeof(float);
    if (back->d_experts == NULL) back->d_experts = mq_alloc(hidden);
    if (back->d_shares == NULL) back->d_shares = mq_alloc(shares);
    if (back->d_experts == NULL || back->d_shares == NULL)
        return mq_fail_memory(err, "the gradients of the experts' inputs", hidden + shares);
    memset(back->d_experts, 0, hidden);
    memset(back->d_shares, 0, shares);
    return MQ_OK;
}

int mq_backward_to_experts(mq_backward *back, int64_t index, const void *input, mq_error *err)
{
    mq_run *run = back->run;
    int rc = reserve(back, err);
    if (rc == MQ_OK) rc = mq_run_restore(run, input, index, err);
    if (rc == MQ_OK) rc = mq_run_layer(run, index, err);
    if (rc == MQ_OK) back->input = input;
    return rc;
}

void mq_backward_take_expert(const mq_back_rows *rows, const float *d_normed, const float *d_shares)
{
    const mq_routes *routes = &rows->back->run->dispatch.routes;
    const mq_row_sizes sizes = {.rows = rows->rows, .width = rows->back->run->runtime->config.hidden_size,
                                .dtype = MQ_F32};
    for (int64_t i = 0; i < rows->rows; i++) {
        int64_t at = rows->tokens[i] * routes->top_k;
        while (routes->experts[at] != rows->expert) at++;
        rows->back->d_shares[at] = d_shares[i];
    }
    mq_gather_backward(rows->back->d_experts, d_normed, rows->tokens, &sizes);
}

static int observe(const mq_back_rows *rows, int64_t width)
{
    mq_observer *observer = rows->layer->experts_observer;
    const mq_linear *linears = rows->layer->linears;
    const mq_back_scratch *scratch = &rows->back->scratch;
    const mq_run *run = rows->back->run;
    const mq_gate gate = mq_gate_of(&run->runtime->config);
    const int shared_inputs = (run->runtime->family->flags & MQ_FAMILY_SHARED_INPUTS) != 0;
    float *gathered = scratch->d_output;
    mq_observed observed = {
        .input = scratch->mlp_normed, .output = scratch->output, .gradient = gathered, .rows = rows->rows,
        .dtype = run->runtime->dtype, .output_dtype = run->runtime->dtype, .columns = width, .width = width,
        .outputs = width, .first = rows->first, .total = run->rows, .expert = rows->expert, .tokens = rows->tokens,
        .shares = shared_inputs ? scratch->shared : rows->shares, .gate = &gate,
        .biases = {linears[MQ_ROLE_GATE].weight.bias, linears[MQ_ROLE_UP].weight.bias,
                   linears[MQ_ROLE_DOWN].weight.bias},
    };
    for (int64_t i = 0; shared_inputs && i < rows->rows; i++) scratch->shared[i] = 1.0f;
    mq_row_sizes sizes = {.rows = rows->rows, .width = width, .dtype = MQ_F32};
    mq_gather_forward(gathered, rows->back->gradient, rows->tokens, &sizes);
    mq_scale_forward(gathered, run->runtime->config.residual_multiplier, &sizes);
    return observer->see(observer, &observed, rows->err);
}

/* Where shares multiply what experts read: by share and by that, from the gradient by the product. normed: room. */
static void unshare(const mq_back_rows *rows, void *normed)
{
    const mq_run *run = rows->back->run;
    const mq_back_scratch *scratch = &rows->back->scratch;
    const int64_t width = run->runtime->config.hidden_size;
    const mq_row_sizes sizes = {.rows = rows->rows, .width = width, .dtype = run->runtime->dtype};
    const mq_row_sizes single = {.rows = rows->rows, .width = width, .dtype = MQ_F32};
    mq_gather_forward(normed, run->hidden, rows->tokens, &sizes);
    mq_backward_enter(rows, MQ_ROLE_POST_NORM, normed, normed);
    for (int64_t i = 0; i < rows->rows; i++) {
        const void *x = (const char *)normed + (size_t)(i * width) * mq_dtype_size(sizes.dtype);
        scratch->d_shares[i] = mq_row_ops_of(sizes.dtype)->dot(scratch->d_mlp_normed + i * width, x, width);
    }
    mq_scale_rows_forward(scratch->d_mlp_normed, rows->shares, &single);
}

static int expert_rows(const mq_back_rows *rows)
{
    const int shared_inputs = (rows->back->run->runtime->family->flags & MQ_FAMILY_SHARED_INPUTS) != 0;
    mq_backward *back = rows->back;
    const mq_run *run = back->run;
    const mq_config *config = &run->runtime->config;
    const mq_back_scratch *scratch = &back->scratch;
    const mq_row_sizes sizes = {.rows = rows->rows, .width = config->hidden_size, .dtype = run->runtime->dtype};
    const mq_row_sizes single = {.rows = rows->rows, .width = config->hidden_size, .dtype = MQ_F32};
    const mq_scatter_gradient shared = {.d_in = scratch->d_output, .d_shares = scratch->d_shares};
    int rc = mq_backward_poll(back, rows->err);
    if (rc != MQ_OK) return rc;
    mq_gather_forward(scratch->mlp_normed, run->hidden, rows->tokens, &sizes);
    mq_backward_enter(rows, MQ_ROLE_POST_NORM, scratch->mlp_normed, scratch->mlp_normed);
    if (shared_inputs) mq_scale_rows_forward(scratch->mlp_normed, rows->shares, &sizes);
    mq_backward_mlp_again(rows, &MQ_MLP_ROLES, 1);
    if (rows->layer->experts_observer != NULL) rc = observe(rows, config->hidden_size);
    if (rc != MQ_OK) return rc;
    for (int64_t i = 0; shared_inputs && i < rows->rows; i++) scratch->shared[i] = 1.0f;
    mq_scatter_backward(&shared, back->gradient, scratch->output, rows->tokens,
                        shared_inputs ? scratch->shared : rows->shares, &sizes);
    mq_scale_forward(scratch->d_output, config->residual_multiplier, &single);
    for (int64_t i = 0; i < rows->rows; i++) scratch->d_shares[i] *= (float)config->residual_multiplier;
    rc = mq_backward_mlp(rows, &MQ_MLP_ROLES, scratch->d_output);
    if (rc == MQ_OK && shared_inputs) unshare(rows, scratch->output);
    if (rc == MQ_OK) mq_backward_take_expert(rows, scratch->d_mlp_normed, scratch->d_shares);
    return rc;
}

/* By the factor that the shared expert's output is multiplied by, and by what that is made of; d_output becomes the one
 * by the expert's own output. */
static int shared_gate(const mq_back_rows *rows, float *d_normed)
{
    const mq_back_scratch *scratch = &rows->back->scratch;
    const mq_dtype dtype = rows->back->run->runtime->dtype;
    const int64_t width = rows->back->run->runtime->config.hidden_size;
    const mq_row_sizes sizes = {.rows = rows->rows, .width = width, .dtype = dtype};
    const mq_row_sizes single = {.rows = rows->rows, .width = width, .dtype = MQ_F32};
    const mq_linear_weight *weight = &rows->layer->linears[MQ_ROLE_SHARED_ROUTER].weight;
    mq_back_linear linear = {.in = scratch->mlp_normed, .out = scratch->router, .d_out = scratch->d_shares,
                             .d_in = d_normed, .accumulate = 1};
    mq_linear_forward(scratch->router, scratch->mlp_normed, weight, 0, &sizes);
    mq_sigmoid_forward(scratch->shared, scratch->router, rows->rows, dtype);
    for (int64_t i = 0; i < rows->rows; i++) {
        const void *made = (const char *)scratch->output + (size_t)(i * width) * mq_dtype_size(dtype);
        scratch->d_shares[i] = mq_row_ops_of(dtype)->dot(scratch->d_output + i * width, made, width);
    }
    mq_sigmoid_backward(scratch->d_shares, scratch->d_shares, scratch->shared, rows->rows);
    mq_scale_rows_forward(scratch->d_output, scratch->shared, &single);
    return mq_backward_linear(rows, MQ_ROLE_SHARED_ROUTER, &linear);
}

/* The expert that all rows have, of mlp_normed; d_normed is added to. */
static int shared_rows(const mq_back_rows *rows, float *d_normed)
{
    const mq_back_scratch *scratch = &rows->back->scratch;
    const mq_config *config = &rows->back->run->runtime->config;
    const mq_row_sizes sizes = {.rows = rows->rows, .width = config->hidden_size, .dtype = MQ_F32};
    const float *gradient = rows->back->gradient + rows->first * config->hidden_size;
    int rc = MQ_OK;
    mq_backward_mlp_again(rows, &MQ_SHARED_ROLES, 1);
    memcpy(scratch->d_output, gradient, (size_t)(sizes.rows * sizes.width) * sizeof *gradient);
    mq_scale_forward(scratch->d_output, config->residual_multiplier, &sizes);
    if (rows->layer->linears[MQ_ROLE_SHARED_ROUTER].cols > 0) rc = shared_gate(rows, d_normed);
    if (rc == MQ_OK) rc = mq_backward_mlp(rows, &MQ_SHARED_ROLES, scratch->d_output);
    if (rc == MQ_OK) mq_add_forward(d_normed, scratch->d_mlp_normed, &sizes);
    return rc;
}

/* Router, shared expert and norm of some rows; gradient becomes the one by the attention half's output. */
static int route_rows(const mq_back_rows *rows)
{
    mq_backward *back = rows->back;
    const mq_run *run = back->run;
    const mq_config *config = &run->runtime->config;
    const mq_back_scratch *scratch = &back->scratch;
    const int64_t width = config->hidden_size;
    const mq_row_sizes sizes = {.rows = rows->rows, .width = width, .dtype = run->runtime->dtype};
    mq_route_sizes route = mq_route_of(config);
    const char *middle = run->hidden + (size_t)(rows->first * width) * mq_dtype_size(sizes.dtype);
    float *d_normed = back->d_experts + rows->first * width;
    mq_back_linear router = {.in = scratch->mlp_normed, .out = scratch->router, .d_out = scratch->d_router,
                             .d_in = d_normed, .accumulate = 1};
    route.rows = rows->rows;
    route.experts = rows->layer->experts;
    route.first = rows->first;
    route.dtype = run->runtime->dtype;
    mq_backward_enter(rows, MQ_ROLE_POST_NORM, scratch->mlp_normed, middle);
    mq_linear_forward(scratch->router, scratch->mlp_normed, &rows->layer->linears[MQ_ROLE_ROUTER].weight, 0, &sizes);
    mq_route_backward(scratch->d_router, back->d_shares, &run->dispatch.routes, scratch->router, &route);
    int rc = mq_backward_linear(rows, MQ_ROLE_ROUTER, &router);
    if (rc == MQ_OK && rows->layer->linears[MQ_ROLE_SHARED_DOWN].cols > 0) rc = shared_rows(rows, d_normed);
    if (rc == MQ_OK)
        mq_backward_leave(rows, MQ_ROLE_POST_NORM, middle, d_normed, back->gradient + rows->first * width);
    return rc;
}

int mq_backward_observe_sum(const mq_backward *back, mq_observer *observer, mq_error *err)
{
    const mq_run *run = back->run;
    mq_observed observed = {
        .gradient = back->gradient, .dtype = run->runtime->dtype, .output_dtype = run->runtime->dtype,
        .rows = run->rows, .total = run->rows, .expert = -1, .factor = run->runtime->config.residual_multiplier,
        .columns = run->runtime->config.hidden_size, .width = run->runtime->config.hidden_size,
        .outputs = run->runtime->config.hidden_size,
    };
    return observer->see(observer, &observed, err);
}

/* What comes before the experts, when they are done. */
static int finish(mq_backward *back, mq_layer *layer, mq_error *err)
{
    const mq_run *run = back->run;
    const int64_t width = run->runtime->config.hidden_size;
    const size_t stride = (size_t)width * mq_dtype_size(run->runtime->dtype);
    mq_elsewhere *there = run->runtime->elsewhere;
    if (there != NULL) return there->back_layer(there, back, back->next, back->input, err);
    int rc = layer->experts_observer ? mq_backward_observe_sum(back, layer->experts_observer, err) : MQ_OK;
    for (int64_t first = 0; rc == MQ_OK && first < run->rows; first += back->scratch.piece) {
        const mq_back_rows rows = {.back = back, .layer = layer, .first = first, .expert = -1, .err = err,
                                   .rows = MQ_MIN(back->scratch.piece, run->rows - first)};
        rc = route_rows(&rows);
    }
    for (int64_t i = 0; rc == MQ_OK && i < run->unit_count; i++) {
        const mq_unit *unit = &run->units[i];
        mq_back_unit it = {.back = back, .layer = layer, .unit = unit, .err = err,
                           .input = (const char *)back->input + (size_t)unit->first * stride,
                           .gradient = back->gradient + unit->first * width};
        rc = mq_backward_poll(back, err);
        if (rc == MQ_OK) mq_backward_attention_again(&it);
        if (rc == MQ_OK) rc = mq_backward_attention(&it);
    }
    return rc;
}

static int check_order(const mq_backward *back, int64_t layer, int64_t expert, mq_error *err)
{
    const mq_dispatch *dispatch = &back->run->dispatch;
    if (back->failed || back->input == NULL || back->next != layer || dispatch->layer != layer)
        return mq_fail(err, MQ_ERR_STATE, "backward of layer %lld: its experts are not what comes next",
                       (long long)layer);
    if (expert < dispatch->next || dispatch->start[expert] != dispatch->start[dispatch->next])
        return mq_fail(err, MQ_ERR_STATE, "backward of layer %lld, expert %lld: expert %lld comes next",
                       (long long)layer, (long long)expert, (long long)dispatch->next);
    return MQ_OK;
}

/* All rows of the loaded expert. */
static int run_expert(mq_backward *back, mq_layer *layer, int64_t expert, mq_error *err)
{
    const mq_dispatch *dispatch = &back->run->dispatch;
    const int64_t first = dispatch->start[expert], end = dispatch->start[expert + 1], piece = back->scratch.piece;
    mq_elsewhere *there = back->run->runtime->elsewhere;
    const mq_back_expert_rows all = {.layer = back->next, .expert = expert, .first = first, .count = end - first};
    int rc = MQ_OK;
    if (there != NULL) return there->back_expert(there, back, &all, err);
    for (int64_t at = first; rc == MQ_OK && at < end; at += piece) {
        const mq_back_rows rows = {
            .back = back, .layer = layer, .first = at, .rows = MQ_MIN(piece, end - at), .expert = expert,
            .tokens = dispatch->tokens + at, .shares = dispatch->shares + at, .err = err,
        };
        rc = expert_rows(&rows);
    }
    return rc;
}

int mq_backward_expert(mq_backward *back, int64_t index, int64_t expert, const mq_named_tensor *tensors, size_t count,
                       mq_error *err)
{
    mq_run *run = back->run;
    mq_layer *layer = &run->runtime->layers[index];
    mq_dispatch *dispatch = &run->dispatch;
    int rc = check_order(back, index, expert, err);
    if (rc == MQ_OK && !layer->loaded)
        rc = mq_fail(err, MQ_ERR_STATE, "backward of layer %lld: it is not loaded", (long long)index);
    if (rc != MQ_OK) return rc;
    rc = mq_runtime_load_expert(run->runtime, index, expert, tensors, count, err);
    if (rc == MQ_OK) rc = mq_backward_load(back, index, expert, tensors, count, err);
    if (rc == MQ_OK) rc = run_expert(back, layer, expert, err);
    mq_runtime_drop_expert(run->runtime, index);
    dispatch->next = expert + 1;
    const int last = dispatch->start[dispatch->next] == dispatch->start[layer->experts];
    if (rc == MQ_OK && last) rc = finish(back, layer, err);
    if (rc == MQ_OK && !last) return rc;
    mq_backward_drop(back);
    back->input = NULL;
    run->next_layer = dispatch->layer = -1;
    if (rc == MQ_OK) back->next = index - 1;
    else back->failed = 1;
    return rc;
}
