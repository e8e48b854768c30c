/* layer_mlp.c on a device: hidden += mlp(norm(hidden)), or the choice of experts, and each of these. */
#include "backend/device_pass.h"
#include "core/alloc.h"

static int swiglu(mq_device_pass *pass, int64_t width)
{
    const mq_cuda_swiglu_job job = {.gate = mq_device_matrix(pass, pass->scratch->gate, width),
                                    .up = mq_device_matrix(pass, pass->scratch->up, width)};
    return pass->device->backend->swiglu(&job, pass->device->compute, pass->err);
}

/* scratch->gate and up of in. */
static int project_gate(mq_device_pass *pass, const void *in)
{
    const mq_device_scratch *scratch = pass->scratch;
    const int64_t joined = pass->layer->linears[MQ_ROLE_GATE_UP].rows;
    int rc;
    if (joined > 0) {
        rc = mq_device_linear_of(pass, MQ_ROLE_GATE_UP, scratch->joined, in);
        if (rc == MQ_OK) rc = mq_device_split(pass, scratch->gate, 0, joined / 2, joined);
        return rc == MQ_OK ? mq_device_split(pass, scratch->up, joined / 2, joined / 2, joined) : rc;
    }
    rc = mq_device_linear_of(pass, MQ_ROLE_GATE, scratch->gate, in);
    return rc == MQ_OK ? mq_device_linear_of(pass, MQ_ROLE_UP, scratch->up, in) : rc;
}

int mq_device_mlp_half(mq_device_pass *pass, const void *in)
{
    pass->applied = NULL;
    if (pass->layer->kind.mlp == MQ_BLOCK_LINEAR)
        return mq_device_residual(pass, MQ_ROLE_LINEAR_MLP, MQ_ROLE_MLP_NORM, pass->chunk->hidden, in);
    int rc = project_gate(pass, in);
    if (rc == MQ_OK) rc = swiglu(pass, pass->layer->linears[MQ_ROLE_DOWN].cols);
    pass->applied = NULL;
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
    if (rc == MQ_OK) rc = mq_device_watch_input(pass, gate, in);
    if (rc == MQ_OK) rc = mq_device_multiply(pass, gate, &weights[MQ_ROLE_GATE], scratch->gate, in, 0);
    if (rc == MQ_OK) rc = mq_device_multiply(pass, gate, &weights[MQ_ROLE_UP], scratch->up, in, 0);
    if (rc == MQ_OK) rc = swiglu(pass, gate->rows);
    pass->applied = NULL;
    return rc == MQ_OK ? mq_device_linear_of(pass, MQ_ROLE_DOWN, scratch->temporary, scratch->gate) : rc;
}

/* What the device's kernel has no words for is chosen on the host. */
static int route_here(mq_device_pass *pass, const mq_route_sizes *sizes)
{
    const mq_backend *backend = pass->device->backend;
    const size_t nbytes = (size_t)(sizes->rows * sizes->experts) * mq_dtype_size(sizes->dtype);
    void *logits = mq_alloc(nbytes);
    if (logits == NULL) return mq_fail_memory(pass->err, "logits of experts", nbytes);
    int rc = backend->copy(logits, pass->scratch->router, nbytes, pass->device->compute, pass->err);
    if (rc == MQ_OK) rc = backend->stream_wait(pass->device->compute, pass->err);
    if (rc == MQ_OK) mq_route_forward(pass->context->routes, logits, sizes);
    mq_free(logits);
    return rc;
}

static int route_there(mq_device_pass *pass, const mq_route_sizes *sizes)
{
    const mq_device_scratch *scratch = pass->scratch;
    const mq_backend *backend = pass->device->backend;
    const mq_routes *routes = pass->context->routes;
    const int64_t first = sizes->first * routes->top_k, count = sizes->rows * routes->top_k;
    const mq_cuda_route_job job = {
        .logits = mq_device_matrix(pass, scratch->router, sizes->experts), .top_k = routes->top_k,
        .normalize = sizes->normalize, .rounded = sizes->rounded, .experts = scratch->experts,
        .shares = scratch->shares,
    };
    int rc = backend->route(&job, pass->device->compute, pass->err);
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
    const mq_device_linear *router = &pass->device->linears[MQ_ROLE_ROUTER];
    const mq_routes *routes = pass->context->routes;
    mq_route_sizes sizes = mq_route_of(pass->context->config);
    sizes.rows = pass->chunk->rows;
    sizes.experts = pass->layer->experts;
    sizes.first = pass->chunk->first;
    sizes.dtype = pass->context->dtype;
    sizes.rounded = pass->context->round_routes;
    sizes.correction = pass->layer->norms[MQ_ROLE_CORRECTION];
    const int plain = !sizes.sigmoid && sizes.correction == NULL && sizes.groups <= 1 &&
                      (sizes.factor == 0.0f || sizes.factor == 1.0f) &&
                      (routes->kept == 0 || routes->kept == routes->top_k);
    const int rc = mq_device_product(pass, pass->scratch->router, in, &router->weight, router->bias, 0);
    if (rc != MQ_OK) return rc;
    return plain ? route_there(pass, &sizes) : route_here(pass, &sizes);
}
