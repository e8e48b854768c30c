/* The rows of one expert on their way back on a device: gathered on the host, where what comes out of them is added. */
#include "backend/device_backward.h"
#include "core/alloc.h"

typedef struct expert_work {
    mq_backward *back;
    const mq_back_expert_rows *rows;
    void *hidden;               /* (rows of a chunk, C) */
    float *gradient, *d_shares;
    int64_t *index;
    float *ones;                /* NULL, or what outputs are multiplied by where inputs are by the shares */
} expert_work;

/* Room for a chunk's rows on the host. */
static int reserve(expert_work *work, mq_device *device, int64_t rows, mq_error *err)
{
    const mq_runtime *runtime = work->back->run->runtime;
    const size_t count = (size_t)rows, numbers = count * (size_t)runtime->config.hidden_size;
    mq_arena places = {0};
    for (int counts = 1; counts >= 0; counts--) {
        if (!counts) {
            const int rc = mq_pinned_reserve(device, &device->gathered[0], places.used, err);
            if (rc != MQ_OK) return rc;
            places = (mq_arena){.memory = device->gathered[0].memory};
        }
        work->hidden = mq_arena_take(&places, numbers * mq_dtype_size(runtime->dtype));
        work->gradient = mq_arena_take(&places, numbers * sizeof *work->gradient);
        work->d_shares = mq_arena_take(&places, count * sizeof *work->d_shares);
        work->index = mq_arena_take(&places, count * sizeof *work->index);
    }
    if (!(runtime->family->flags & MQ_FAMILY_SHARED_INPUTS)) return MQ_OK;
    work->ones = mq_alloc_array(count, sizeof *work->ones);
    if (work->ones == NULL) return mq_fail_memory(err, "the shares of an expert", count * sizeof *work->ones);
    for (size_t i = 0; i < count; i++) work->ones[i] = 1.0f;
    return MQ_OK;
}

/* Hidden states, gradients and shares of the chunk's rows, to the device. */
static int send(const mq_device_back *it, const expert_work *work)
{
    const mq_backend *backend = it->device->backend;
    const mq_run *run = it->back->run;
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_device_chunk *chunk = it->chunk;
    void *stream = it->device->compute;
    const size_t rows = (size_t)chunk->rows, numbers = (size_t)(chunk->rows * it->context->config->hidden_size);
    const mq_row_sizes sizes = {.rows = chunk->rows, .width = it->context->config->hidden_size,
                                .dtype = it->context->dtype};
    const mq_row_sizes single = {.rows = chunk->rows, .width = sizes.width, .dtype = MQ_F32};
    for (int64_t i = 0; i < chunk->rows; i++) work->index[i] = i;
    mq_gather_forward(work->hidden, run->hidden, chunk->tokens, &sizes);
    mq_gather_forward(work->gradient, it->back->gradient, chunk->tokens, &single);
    int rc = backend->copy(chunk->hidden, work->hidden, numbers * mq_dtype_size(sizes.dtype), stream, it->err);
    if (rc == MQ_OK) rc = backend->copy(it->gradient, work->gradient, numbers * sizeof(float), stream, it->err);
    if (rc == MQ_OK)
        rc = backend->copy(scratch->indices[0], work->index, rows * sizeof *work->index, stream, it->err);
    if (rc != MQ_OK) return rc;
    return backend->copy(scratch->shares, run->dispatch.shares + chunk->position, rows * sizeof(float), stream,
                         it->err);
}

static int observe(const mq_device_back *it, const expert_work *work)
{
    const mq_run *run = it->back->run;
    const mq_linear *linears = it->layer->linears;
    const mq_gate gate = mq_gate_of(it->context->config);
    const int64_t width = it->context->config->hidden_size;
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_observed observed = {
        .input = scratch->mlp_normed, .output = scratch->output, .gradient = scratch->d_output,
        .rows = it->chunk->rows, .dtype = it->context->dtype, .output_dtype = it->context->dtype, .columns = width,
        .width = width, .outputs = width, .first = it->chunk->position, .total = run->rows, .expert = it->expert,
        .tokens = it->chunk->tokens, .gate = &gate,
        .shares = work->ones != NULL ? work->ones : run->dispatch.shares + it->chunk->position,
        .biases = {linears[MQ_ROLE_GATE].weight.bias, linears[MQ_ROLE_UP].weight.bias,
                   linears[MQ_ROLE_DOWN].weight.bias},
    };
    const mq_cuda_add_job scale = {
        .x = mq_device_back_single(it, it->gradient, width), .y = mq_device_back_single(it, scratch->d_output, width),
        .scale = (float)it->context->config->residual_multiplier,
    };
    const int rc = it->device->backend->add(&scale, it->device->compute, it->err);
    return rc == MQ_OK ? mq_device_observe(it, it->layer->experts_observer, &observed) : rc;
}

/* A row of x by its share: d_in and d_shares from d_out, by the product. */
static int share_back(const mq_device_back *it, const void *x, const float *d_out, float *d_in)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_cuda_scatter_job job = {
        .x = mq_device_back_matrix(it, x, it->context->config->hidden_size), .index = scratch->indices[0],
        .shares = scratch->shares, .d_out = d_out, .d_in = d_in, .d_shares = scratch->d_shares,
    };
    return it->device->backend->scatter_backward(&job, it->device->compute, it->err);
}

/* From what the expert makes to what the MLP in it reads. */
static int outputs_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const int rc = share_back(it, scratch->output, it->gradient, scratch->d_output);
    return rc == MQ_OK ? mq_device_mlp_back(it, &MQ_MLP_ROLES, scratch->d_output) : rc;
}

/* The same where shares multiply what experts read. */
static int inputs_back(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    void *normed = scratch->output;     /* nobody needs it any more */
    int rc = mq_device_mlp_back(it, &MQ_MLP_ROLES, it->gradient);
    if (rc == MQ_OK) rc = mq_device_back_enter(it, MQ_ROLE_POST_NORM, normed, it->chunk->hidden);
    return rc == MQ_OK ? share_back(it, normed, scratch->d_mlp_normed, scratch->d_mlp_normed) : rc;
}

/* By what the expert reads, in d_mlp_normed, and by its shares. */
static int compute(const mq_device_back *it, const expert_work *work)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const int shared_inputs = work->ones != NULL;
    const mq_cuda_matrix read = mq_device_back_matrix(it, scratch->mlp_normed, it->context->config->hidden_size);
    const mq_cuda_add_job scale = {.x = read, .y = read, .row_scales = scratch->shares};
    int rc = mq_device_back_enter(it, MQ_ROLE_POST_NORM, scratch->mlp_normed, it->chunk->hidden);
    if (rc == MQ_OK && shared_inputs) rc = it->device->backend->add(&scale, it->device->compute, it->err);
    if (rc == MQ_OK) rc = mq_device_mlp_again(it, &MQ_MLP_ROLES, 1);
    if (rc == MQ_OK && it->layer->experts_observer != NULL) rc = observe(it, work);
    if (rc == MQ_OK) rc = mq_device_back_scale(it, it->gradient, it->context->config->residual_multiplier);
    if (rc != MQ_OK) return rc;
    return shared_inputs ? inputs_back(it) : outputs_back(it);
}

/* What came out, on its way to the host: work->gradient and d_shares. */
static int fetch(const mq_device_back *it, const expert_work *work)
{
    const mq_backend *backend = it->device->backend;
    const size_t rows = (size_t)it->chunk->rows * sizeof(float);
    void *stream = it->device->compute;
    int rc = backend->copy(work->gradient, it->scratch->d_mlp_normed,
                           rows * (size_t)it->context->config->hidden_size, stream, it->err);
    return rc == MQ_OK ? backend->copy(work->d_shares, it->scratch->d_shares, rows, stream, it->err) : rc;
}

static int run_rows(mq_device_back *it, const expert_work *work)
{
    const mq_back_expert_rows *all = work->rows;
    const mq_dispatch *dispatch = &it->back->run->dispatch;
    int rc = MQ_OK;
    for (int64_t done = 0; rc == MQ_OK && done < all->count; done += it->scratch->rows) {
        const int64_t at = all->first + done, count = MQ_MIN(it->scratch->rows, all->count - done);
        const mq_device_chunk chunk = {.rows = count, .tokens = dispatch->tokens + at, .position = at,
                                       .hidden = it->scratch->input[0]};
        const mq_back_rows rows = {.back = it->back, .layer = it->layer, .first = at, .rows = count,
                                   .expert = all->expert, .tokens = chunk.tokens, .shares = dispatch->shares + at,
                                   .err = it->err};
        it->chunk = &chunk;
        it->gradient = it->scratch->gradient[0];
        rc = mq_backward_poll(it->back, it->err);
        if (rc == MQ_OK) rc = send(it, work);
        if (rc == MQ_OK) rc = compute(it, work);
        if (rc == MQ_OK) rc = fetch(it, work);
        if (rc == MQ_OK && done + count == all->count)
            rc = mq_device_meanwhile(it->device, it->back->run, NULL, it->err);
        if (rc == MQ_OK) rc = it->device->backend->stream_wait(it->device->compute, it->err);
        if (rc == MQ_OK) mq_backward_take_expert(&rows, work->gradient, work->d_shares);
    }
    it->chunk = NULL;
    return rc;
}

int mq_device_back_expert(mq_elsewhere *self, mq_backward *back, const mq_back_expert_rows *rows, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    const mq_layer_context context = mq_run_context(back->run);
    mq_layer *layer = &back->run->runtime->layers[rows->layer];
    mq_device_back_room room = {.device = device, .back = back, .layer = layer, .experts_only = 1};
    mq_device_back_scratch scratch = {0};
    mq_device_back it = {.device = device, .back = back, .layer = layer,
                         .context = &context, .scratch = &scratch, .expert = rows->expert, .err = err};
    expert_work work = {.back = back, .rows = rows};
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    if (!mq_device_scores_experts(&room)) room.layer = NULL;
    rc = mq_device_back_reserve(&room, rows->count, 1, &it);
    if (rc == MQ_OK) rc = mq_device_back_ready(device, err);
    if (rc == MQ_OK) rc = reserve(&work, device, scratch.rows, err);
    mq_device_pin(device, back->run->dispatch.shares,
                  (size_t)(back->run->rows * back->run->dispatch.routes.top_k) * sizeof(float), 1);
    if (rc == MQ_OK) rc = run_rows(&it, &work);
    rc = mq_device_finish(device, rc, err);
    mq_free(work.ones);
    mq_free(it.fetched);
    mq_device_leave(device, before);
    return rc;
}
