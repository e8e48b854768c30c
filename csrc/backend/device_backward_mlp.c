/* The other half of a layer on its way back on a device: backward_layer.c's MLP and what stands in its place, and what
 * comes before experts (backward_experts.c). */
#include <string.h>

#include "backend/device_backward.h"

static mq_cuda_swiglu_job gate_of(const mq_device_back *it, const mq_mlp_roles *roles, void *gate)
{
    const mq_gate kind = mq_gate_of(it->context->config);
    const int64_t width = it->layer->linears[roles->down].cols;
    return (mq_cuda_swiglu_job){
        .gate = mq_device_back_matrix(it, gate, width), .up = mq_device_back_matrix(it, it->scratch->up, width),
        .activation = (mq_cuda_activation)kind.activation, .limit = kind.limit,
    };
}

/* Gate and up of one linear, taken out or put back together. */
static int split(const mq_device_back *it, void *const *parts, void *joined, int back)
{
    const int64_t whole = it->layer->linears[MQ_ROLE_GATE_UP].rows;
    mq_device_columns columns = {.joined = joined, .width = whole / 2, .whole = whole, .back = back,
                                 .dtype = back ? MQ_F32 : it->context->dtype};
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < 2; i++) {
        columns.part = parts[i];
        columns.first = i * columns.width;
        rc = mq_device_back_columns(it, &columns);
    }
    return rc;
}

int mq_device_mlp_again(const mq_device_back *it, const mq_mlp_roles *roles, int output)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_linear *linears = it->layer->linears;
    const mq_cuda_swiglu_job job = gate_of(it, roles, scratch->product);
    void *const parts[2] = {scratch->gate, scratch->up};
    int rc;
    if (linears[roles->joined].cols > 0) {
        rc = mq_device_back_forward(it, roles->joined, scratch->mlp_joined, scratch->mlp_normed, 0);
        if (rc == MQ_OK) rc = split(it, parts, scratch->mlp_joined, 0);
    } else {
        rc = mq_device_back_forward(it, roles->gate, scratch->gate, scratch->mlp_normed, 0);
        if (rc == MQ_OK) rc = mq_device_back_forward(it, roles->up, scratch->up, scratch->mlp_normed, 0);
    }
    if (rc == MQ_OK) rc = mq_device_back_copy(it, scratch->product, scratch->gate, linears[roles->down].cols);
    if (rc == MQ_OK) rc = it->device->backend->swiglu(&job, it->device->compute, it->err);
    return rc == MQ_OK && output ? mq_device_back_forward(it, roles->down, scratch->output, scratch->product, 0) : rc;
}

int mq_device_mlp_back(const mq_device_back *it, const mq_mlp_roles *roles, const float *d_output)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_back_linear down = {.in = scratch->product, .out = scratch->output, .d_out = d_output,
                                 .d_in = scratch->d_gate};
    const mq_back_linear gate = {.in = scratch->mlp_normed, .out = scratch->gate, .d_out = scratch->d_gate,
                                 .d_in = scratch->d_mlp_normed};
    const mq_back_linear up = {.in = scratch->mlp_normed, .out = scratch->up, .d_out = scratch->d_up,
                               .d_in = scratch->d_mlp_normed, .accumulate = 1};
    const mq_back_linear joined = {.in = scratch->mlp_normed, .out = scratch->mlp_joined,
                                   .d_out = scratch->d_mlp_joined, .d_in = scratch->d_mlp_normed};
    void *const parts[2] = {scratch->d_gate, scratch->d_up};
    mq_cuda_swiglu_job job = gate_of(it, roles, scratch->gate);
    job.d_gate = scratch->d_gate;
    job.d_up = scratch->d_up;
    int rc = mq_device_back_linear(it, roles->down, &down);
    if (rc == MQ_OK) rc = it->device->backend->swiglu_backward(&job, it->device->compute, it->err);
    if (rc != MQ_OK) return rc;
    if (it->layer->linears[roles->joined].cols > 0) {
        rc = split(it, parts, scratch->d_mlp_joined, 1);
        return rc == MQ_OK ? mq_device_back_linear(it, roles->joined, &joined) : rc;
    }
    rc = mq_device_back_linear(it, roles->gate, &gate);
    return rc == MQ_OK ? mq_device_back_linear(it, roles->up, &up) : rc;
}

/* A linear in the place of the MLP. */
static int linear_half(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    mq_back_linear linear = {.in = scratch->mlp_normed, .out = scratch->output, .d_out = it->gradient,
                             .d_in = scratch->d_mlp_normed};
    int rc = mq_device_back_forward(it, MQ_ROLE_LINEAR_MLP, scratch->output, scratch->mlp_normed, 0);
    if (rc == MQ_OK)
        rc = mq_device_back_added(it, MQ_ROLE_MLP_NORM, scratch->output, &linear.d_out, scratch->d_output);
    return rc == MQ_OK ? mq_device_back_linear(it, MQ_ROLE_LINEAR_MLP, &linear) : rc;
}

static int mlp_half(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const int output = it->layer->linears[MQ_ROLE_DOWN].observer != NULL || it->layer->norms[MQ_ROLE_MLP_NORM] != NULL;
    const float *d_output = it->gradient;
    int rc = mq_device_mlp_again(it, &MQ_MLP_ROLES, output);
    if (rc == MQ_OK) rc = mq_device_back_added(it, MQ_ROLE_MLP_NORM, scratch->output, &d_output, scratch->d_output);
    return rc == MQ_OK ? mq_device_mlp_back(it, &MQ_MLP_ROLES, d_output) : rc;
}

/* Router; the gradient by what experts read is there already, and is added to. */
static int route_half(const mq_device_back *it, float *d_normed)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_route_sizes sizes = mq_route_of(it->context->config);
    const mq_back_linear router = {.in = scratch->mlp_normed, .out = scratch->router, .d_out = scratch->d_router,
                                   .d_in = d_normed, .accumulate = 1};
    const mq_cuda_route_job job = {
        .logits = mq_device_back_matrix(it, scratch->router, it->layer->experts), .normalize = sizes.normalize,
        .top_k = it->context->routes->top_k, .sigmoid = sizes.sigmoid, .factor = sizes.factor,
        .experts = scratch->choices[it->slot], .d_shares = scratch->d_choices[it->slot], .d_logits = scratch->d_router,
    };
    int rc = mq_device_back_forward(it, MQ_ROLE_ROUTER, scratch->router, scratch->mlp_normed, 0);
    if (rc == MQ_OK) rc = it->device->backend->route_backward(&job, it->device->compute, it->err);
    return rc == MQ_OK ? mq_device_back_linear(it, MQ_ROLE_ROUTER, &router) : rc;
}

int mq_device_other_half(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    float *d_normed = it->layer->experts > 0 ? scratch->d_experts[it->slot] : scratch->d_mlp_normed;
    if (it->layer->experts == 0 && it->layer->kind.mlp == MQ_BLOCK_NONE) return MQ_OK;
    int rc = mq_device_back_enter(it, MQ_ROLE_POST_NORM, scratch->mlp_normed, scratch->middle);
    if (rc != MQ_OK) return rc;
    if (it->layer->experts > 0) rc = route_half(it, d_normed);
    else if (it->layer->kind.mlp == MQ_BLOCK_LINEAR) rc = linear_half(it);
    else rc = mlp_half(it);
    return rc == MQ_OK ? mq_device_back_leave(it, MQ_ROLE_POST_NORM, scratch->middle, d_normed, it->gradient) : rc;
}
