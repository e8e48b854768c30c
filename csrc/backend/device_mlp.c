/* layer_mlp.c on a device: hidden += mlp(norm(hidden)), or the choice of experts, and each of these. */
#include "backend/device_pass.h"

static int activate(mq_device_pass *pass, int64_t width)
{
    const mq_gate gate = mq_gate_of(pass->context->config);
    const mq_cuda_swiglu_job job = {
        .gate = mq_device_matrix(pass, pass->scratch->gate, width),
        .up = mq_device_matrix(pass, pass->scratch->up, width),
        .activation = (mq_cuda_activation)gate.activation, .limit = gate.limit,
    };
    return pass->device->backend->swiglu(&job, pass->device->compute, pass->err);
}

/* scratch->gate = what down reads, of an MLP whose input is in. */
static int run_gate(mq_device_pass *pass, const mq_mlp_roles *roles, const void *in)
{
    const mq_device_scratch *scratch = pass->scratch;
    const mq_linear *linears = pass->layer->linears;
    const int64_t width = linears[roles->down].cols;
    int rc;
    pass->applied = NULL;
    if (linears[roles->joined].cols > 0) {
        rc = mq_device_linear_of(pass, roles->joined, scratch->joined, in);
        if (rc == MQ_OK) rc = mq_device_split(pass, scratch->gate, 0, width, 2 * width);
        if (rc == MQ_OK) rc = mq_device_split(pass, scratch->up, width, width, 2 * width);
    } else {
        rc = mq_device_linear_of(pass, roles->gate, scratch->gate, in);
        if (rc == MQ_OK) rc = mq_device_linear_of(pass, roles->up, scratch->up, in);
    }
    if (rc == MQ_OK) rc = activate(pass, width);
    pass->applied = NULL;
    return rc;
}

int mq_device_mlp_half(mq_device_pass *pass, const void *in)
{
    if (pass->layer->kind.mlp == MQ_BLOCK_LINEAR)
        return mq_device_residual(pass, MQ_ROLE_LINEAR_MLP, MQ_ROLE_MLP_NORM, pass->chunk->hidden, in);
    const int rc = run_gate(pass, &MQ_MLP_ROLES, in);
    if (rc != MQ_OK) return rc;
    return mq_device_residual(pass, MQ_ROLE_DOWN, MQ_ROLE_MLP_NORM, pass->chunk->hidden, pass->scratch->gate);
}

/* temporary = the loaded expert of the chunk's rows; gate's point serves up too. */
int mq_device_expert(mq_device_pass *pass)
{
    mq_linear *gate = &pass->layer->linears[MQ_ROLE_GATE];
    const mq_device_scratch *scratch = pass->scratch;
    const mq_device_linear *weights = pass->device->linears;
    const void *in = pass->chunk->hidden;
    pass->applied = NULL;
    int rc = mq_device_normed(pass, MQ_ROLE_POST_NORM, scratch->normed, &in);
    if (rc == MQ_OK && pass->chunk->shares != NULL) {
        const mq_cuda_matrix matrix = mq_device_matrix(pass, (void *)(uintptr_t)in, gate->cols);
        const mq_cuda_add_job scale = {.x = matrix, .y = matrix, .row_scales = pass->chunk->shares};
        rc = pass->device->backend->add(&scale, pass->device->compute, pass->err);
    }
    if (rc == MQ_OK) rc = mq_device_watch_input(pass, gate, in);
    if (rc == MQ_OK) rc = mq_device_multiply(pass, gate, &weights[MQ_ROLE_GATE], scratch->gate, in, 0);
    if (rc == MQ_OK) rc = mq_device_multiply(pass, gate, &weights[MQ_ROLE_UP], scratch->up, in, 0);
    if (rc == MQ_OK) rc = activate(pass, gate->rows);
    pass->applied = NULL;
    return rc == MQ_OK ? mq_device_linear_of(pass, MQ_ROLE_DOWN, scratch->temporary, scratch->gate) : rc;
}

/* What the shared expert makes of the rows is where the sums of the others begin. */
static int run_shared(mq_device_pass *pass, const void *in)
{
    const mq_device_scratch *scratch = pass->scratch;
    const mq_backend *backend = pass->device->backend;
    const mq_device_linear *router = &pass->device->linears[MQ_ROLE_SHARED_ROUTER];
    const int64_t hidden = pass->context->config->hidden_size;
    const mq_cuda_matrix made = mq_device_matrix(pass, scratch->temporary, hidden);
    const size_t stride = (size_t)hidden * mq_dtype_size(pass->context->dtype);
    int rc = run_gate(pass, &MQ_SHARED_ROLES, in);
    if (rc == MQ_OK) rc = mq_device_linear_of(pass, MQ_ROLE_SHARED_DOWN, scratch->temporary, scratch->gate);
    if (rc == MQ_OK && router->weight.data != NULL) {
        const mq_cuda_sigmoid_job sigmoid = {.x = mq_device_matrix(pass, scratch->router, 1),
                                             .factors = scratch->factors};
        const mq_cuda_add_job scale = {.x = made, .y = made, .row_scales = scratch->factors};
        rc = mq_device_product(pass, scratch->router, in, &router->weight, router->bias, 0);
        if (rc == MQ_OK) rc = backend->sigmoid(&sigmoid, pass->device->compute, pass->err);
        if (rc == MQ_OK) rc = backend->add(&scale, pass->device->compute, pass->err);
    }
    if (rc != MQ_OK) return rc;
    return backend->copy((char *)pass->context->sums + (size_t)pass->chunk->first * stride, scratch->temporary,
                         (size_t)pass->chunk->rows * stride, pass->device->compute, pass->err);
}

/* The experts of the chunk's rows, to the host. */
static int route(mq_device_pass *pass, const void *in)
{
    const mq_device_scratch *scratch = pass->scratch;
    const mq_backend *backend = pass->device->backend;
    const mq_device_linear *router = &pass->device->linears[MQ_ROLE_ROUTER];
    const mq_routes *routes = pass->context->routes;
    const mq_route_sizes sizes = mq_route_of(pass->context->config);
    const int64_t first = pass->chunk->first * routes->top_k, count = pass->chunk->rows * routes->top_k;
    const mq_cuda_route_job job = {
        .logits = mq_device_matrix(pass, scratch->router, pass->layer->experts), .top_k = routes->top_k,
        .kept = routes->kept, .normalize = sizes.normalize, .rounded = pass->context->round_routes,
        .sigmoid = sizes.sigmoid, .correction = pass->device->norms[MQ_ROLE_CORRECTION], .groups = sizes.groups,
        .groups_kept = sizes.groups_kept, .groups_best = sizes.groups_best, .factor = sizes.factor,
        .experts = scratch->experts, .shares = scratch->shares,
    };
    int rc = mq_device_product(pass, scratch->router, in, &router->weight, router->bias, 0);
    if (rc == MQ_OK) rc = backend->route(&job, pass->device->compute, pass->err);
    if (rc == MQ_OK)
        rc = backend->copy(routes->experts + first, scratch->experts, (size_t)count * sizeof *routes->experts,
                           pass->device->compute, pass->err);
    if (rc == MQ_OK)
        rc = backend->copy(routes->shares + first, scratch->shares, (size_t)count * sizeof *routes->shares,
                           pass->device->compute, pass->err);
    return rc;
}

int mq_device_route_half(mq_device_pass *pass, const void *in)
{
    const int rc = route(pass, in);
    return rc == MQ_OK && pass->layer->linears[MQ_ROLE_SHARED_DOWN].cols > 0 ? run_shared(pass, in) : rc;
}
