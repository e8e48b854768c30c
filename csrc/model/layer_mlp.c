/* hidden += mlp(norm(hidden)), or the choice of experts, and each of these. */
#include <string.h>

#include "model/pass.h"

/* A layer with no shared expert has no columns at any of its roles; no MLP of one has gate and up in one linear. */
const mq_mlp_roles MQ_MLP_ROLES = {MQ_ROLE_GATE, MQ_ROLE_UP, MQ_ROLE_DOWN, MQ_ROLE_GATE_UP};
const mq_mlp_roles MQ_SHARED_ROLES = {MQ_ROLE_SHARED_GATE, MQ_ROLE_SHARED_UP, MQ_ROLE_SHARED_DOWN, MQ_ROLE_EMBED};

static void enter(mq_pass *pass, const mq_scratch *scratch)
{
    pass->quantized = scratch->mlp_quantized;
    pass->temporary = scratch->mlp_temporary;
    pass->prepared = scratch->mlp_prepared;
    pass->low = scratch->mlp_low;
    pass->applied = NULL;
}

/* scratch->gate and up, of one linear. */
static int project_joined(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    const int64_t width = pass->layer->linears[MQ_ROLE_GATE_UP].rows / 2;
    const size_t half = (size_t)width * mq_dtype_size(pass->context->dtype);
    const int rc = mq_pass_linear(pass, MQ_ROLE_GATE_UP, scratch->mlp_joined, in);
    mq_columns columns = {.to = scratch->gate, .from = scratch->mlp_joined, .ld_to = width, .ld_from = 2 * width,
                          .width = width, .rows = pass->rows, .dtype = pass->context->dtype};
    if (rc != MQ_OK) return rc;
    mq_columns_copy(&columns);
    columns.to = scratch->up;
    columns.from = (const char *)scratch->mlp_joined + half;
    mq_columns_copy(&columns);
    return MQ_OK;
}

/* scratch->gate (rows, F) = what down reads, of an MLP whose input is in. */
static int run_gate(mq_pass *pass, const mq_mlp_roles *roles, const void *in, const mq_scratch *scratch)
{
    const mq_layer *layer = pass->layer;
    const mq_gate gate = mq_gate_of(pass->context->config);
    const mq_row_sizes inner = mq_pass_sizes(pass, layer->linears[roles->down].cols);
    int rc;
    pass->applied = NULL;
    if (layer->linears[roles->joined].cols > 0) {
        rc = project_joined(pass, in, scratch);
    } else {
        rc = mq_pass_linear(pass, roles->gate, scratch->gate, in);
        if (rc == MQ_OK) rc = mq_pass_linear(pass, roles->up, scratch->up, in);
    }
    if (rc == MQ_OK) mq_gate_forward(scratch->gate, scratch->up, &gate, &inner);
    pass->applied = NULL;
    return rc;
}

int mq_pass_mlp_half(mq_pass *pass, void *hidden, const mq_scratch *scratch)
{
    enter(pass, scratch);
    const void *in = mq_pass_normed(pass, MQ_ROLE_POST_NORM, scratch->mlp_normed, hidden);
    if (pass->layer->kind.mlp == MQ_BLOCK_LINEAR)
        return mq_pass_residual(pass, MQ_ROLE_LINEAR_MLP, MQ_ROLE_MLP_NORM, hidden, in);
    const int rc = run_gate(pass, &MQ_MLP_ROLES, in, scratch);
    return rc == MQ_OK ? mq_pass_residual(pass, MQ_ROLE_DOWN, MQ_ROLE_MLP_NORM, hidden, scratch->gate) : rc;
}

/* What the shared expert makes of the rows is where the sums of the others begin. */
static int run_shared(mq_pass *pass, const void *in, const mq_scratch *scratch)
{
    const mq_layer *layer = pass->layer;
    const mq_row_sizes sizes = mq_pass_sizes(pass, pass->context->config->hidden_size);
    char *sums = (char *)pass->context->sums + (size_t)(pass->first * sizes.width) * mq_dtype_size(sizes.dtype);
    int rc = run_gate(pass, &MQ_SHARED_ROLES, in, scratch);
    if (rc == MQ_OK) rc = mq_pass_linear(pass, MQ_ROLE_SHARED_DOWN, sums, scratch->gate);
    if (rc != MQ_OK || layer->linears[MQ_ROLE_SHARED_ROUTER].cols == 0) return rc;
    mq_linear_forward(scratch->router, in, &layer->linears[MQ_ROLE_SHARED_ROUTER].weight, 0, &sizes);
    mq_sigmoid_forward(scratch->factors, scratch->router, pass->rows, sizes.dtype);
    mq_scale_rows_forward(sums, scratch->factors, &sizes);
    return MQ_OK;
}

int mq_pass_route_half(mq_pass *pass, const void *hidden, const mq_scratch *scratch)
{
    const mq_layer *layer = pass->layer;
    const mq_row_sizes sizes = mq_pass_sizes(pass, pass->context->config->hidden_size);
    mq_route_sizes route = mq_route_of(pass->context->config);
    enter(pass, scratch);
    route.rows = pass->rows;
    route.experts = layer->experts;
    route.first = pass->first;
    route.dtype = pass->context->dtype;
    route.rounded = pass->context->round_routes;
    route.correction = layer->norms[MQ_ROLE_CORRECTION];
    const void *in = mq_pass_normed(pass, MQ_ROLE_POST_NORM, scratch->mlp_normed, hidden);
    mq_linear_forward(scratch->router, in, &layer->linears[MQ_ROLE_ROUTER].weight, 0, &sizes);
    mq_route_forward(pass->context->routes, scratch->router, &route);
    return layer->linears[MQ_ROLE_SHARED_DOWN].cols > 0 ? run_shared(pass, in, scratch) : MQ_OK;
}

/* temporary (rows, C) = the loaded expert of normed (rows, C); gate's points serve up too. */
static int run_expert(mq_pass *pass, const mq_scratch *scratch)
{
    mq_linear *gate = &pass->layer->linears[MQ_ROLE_GATE], *up = &pass->layer->linears[MQ_ROLE_UP];
    const mq_gate kind = mq_gate_of(pass->context->config);
    const mq_row_sizes sizes = mq_pass_sizes(pass, gate->cols), inner = mq_pass_sizes(pass, gate->rows);
    int rc = mq_pass_collect_input(pass, gate, scratch->mlp_normed);
    if (rc != MQ_OK) return rc;
    const void *in = mq_pass_quantized(pass, gate, scratch->mlp_normed);
    mq_linear_forward(scratch->gate, in, &gate->weight, 0, &sizes);
    mq_linear_forward(scratch->up, in, &up->weight, 0, &sizes);
    mq_gate_forward(scratch->gate, scratch->up, &kind, &inner);
    pass->applied = NULL;
    return mq_pass_linear(pass, MQ_ROLE_DOWN, scratch->mlp_temporary, scratch->gate);
}

int mq_layer_expert(mq_layer *layer, const mq_layer_context *context, const mq_expert_rows *rows,
                    const mq_scratch *scratch, mq_error *err)
{
    mq_pass pass = {.layer = layer, .context = context, .err = err, .first = rows->position, .rows = rows->count,
                    .tokens = rows->tokens};
    const mq_row_sizes sizes = mq_pass_sizes(&pass, context->config->hidden_size);
    enter(&pass, scratch);
    if (context->count_mask != NULL) {
        pass.count_mask = scratch->count_mask;
        for (int64_t i = 0; i < rows->count; i++) scratch->count_mask[i] = context->count_mask[rows->tokens[i]];
    }
    mq_gather_forward(scratch->mlp_normed, rows->hidden, rows->tokens, &sizes);
    mq_pass_normed(&pass, MQ_ROLE_POST_NORM, scratch->mlp_normed, scratch->mlp_normed);
    const float *shares = rows->shares;
    if (context->shared_inputs) {
        mq_scale_rows_forward(scratch->mlp_normed, rows->shares, &sizes);
        for (int64_t i = 0; i < rows->count; i++) scratch->factors[i] = 1.0f;
        shares = scratch->factors;
    }
    int rc = run_expert(&pass, scratch);
    if (rc == MQ_OK) mq_scatter_forward(rows->sums, scratch->mlp_temporary, rows->tokens, shares, &sizes);
    return rc;
}
