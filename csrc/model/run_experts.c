/* The second half of a layer with experts: each expert's rows are gathered from all batches, and one expert after the
 * other adds its part to the sums. Weights of one expert are in memory at a time, and the order of additions, by
 * expert, is that of a transformers model's loop whatever the threads do. */
#include <string.h>

#include "core/alloc.h"
#include "model/run.h"

static size_t sums_nbytes(const mq_run *run)
{
    return (size_t)(run->rows * run->runtime->config.hidden_size) * mq_dtype_size(run->runtime->dtype);
}

int64_t mq_run_experts_per_row(const mq_run *run)
{
    return MQ_MAX(run->onlooking, run->runtime->config.num_experts_per_tok);
}

int mq_dispatch_begin(mq_run *run, mq_error *err)
{
    const mq_config *config = &run->runtime->config;
    mq_dispatch *it = &run->dispatch;
    size_t experts = (size_t)config->num_experts, choices = (size_t)(run->rows * mq_run_experts_per_row(run));
    if (it->sums == NULL) {
        it->routes.top_k = mq_run_experts_per_row(run);
        it->routes.kept = config->num_experts_per_tok;
        it->routes.experts = mq_alloc_array(choices, sizeof *it->routes.experts);
        it->routes.shares = mq_alloc_array(choices, sizeof *it->routes.shares);
        it->start = mq_alloc_array(experts + 1, sizeof *it->start);
        it->counted = mq_alloc_array(experts, sizeof *it->counted);
        it->tokens = mq_alloc_array(choices, sizeof *it->tokens);
        it->shares = mq_alloc_array(choices, sizeof *it->shares);
        it->sums = mq_alloc(sums_nbytes(run));
    }
    if (it->routes.experts != NULL && it->routes.shares != NULL && it->start != NULL && it->counted != NULL &&
        it->tokens != NULL && it->shares != NULL && it->sums != NULL) {
        memset(it->sums, 0, sums_nbytes(run));
        return MQ_OK;
    }
    mq_dispatch_free(it);
    return mq_fail_memory(err, "the sums of the experts", sums_nbytes(run));
}

void mq_dispatch_free(mq_dispatch *dispatch)
{
    mq_free(dispatch->routes.experts);
    mq_free(dispatch->routes.shares);
    mq_free(dispatch->start);
    mq_free(dispatch->counted);
    mq_free(dispatch->tokens);
    mq_free(dispatch->shares);
    mq_free(dispatch->sums);
    *dispatch = (mq_dispatch){.layer = -1};
}

size_t mq_dispatch_nbytes(const mq_run *run)
{
    const mq_config *config = &run->runtime->config;
    size_t choice = sizeof *run->dispatch.tokens + sizeof *run->dispatch.shares + sizeof *run->dispatch.routes.experts +
                    sizeof *run->dispatch.routes.shares;
    if (run->dispatch.sums == NULL) return 0;
    return sums_nbytes(run) + (size_t)(run->rows * mq_run_experts_per_row(run)) * choice +
           (size_t)(2 * config->num_experts + 1) * sizeof(int64_t);
}

/* A counting sort. start[e + 1] is where expert e's next row goes, and in the end where its rows end. */
void mq_dispatch_rows(mq_run *run, int64_t layer)
{
    const int64_t experts = run->runtime->config.num_experts;
    const uint8_t *mask = run->count_padding ? NULL : run->mask;
    mq_dispatch *it = &run->dispatch;
    const int64_t top_k = it->routes.top_k, choices = run->rows * top_k;
    memset(it->start, 0, (size_t)(experts + 1) * sizeof *it->start);
    memset(it->counted, 0, (size_t)experts * sizeof *it->counted);
    for (int64_t i = 0; i < choices; i++)
        if (it->routes.experts[i] + 2 <= experts) it->start[it->routes.experts[i] + 2]++;
    for (int64_t e = 2; e <= experts; e++) it->start[e] += it->start[e - 1];
    for (int64_t i = 0; i < choices; i++) {
        const int32_t expert = it->routes.experts[i];
        const int64_t at = it->start[expert + 1]++, row = i / top_k;
        it->tokens[at] = row;
        it->shares[at] = it->routes.shares[i];
        it->counted[expert] += mask == NULL || mask[row] != 0;
    }
    it->layer = layer;
    it->next = 0;
}

static int check_order(const mq_run *run, int64_t layer, int64_t expert, mq_error *err)
{
    const mq_dispatch *it = &run->dispatch;
    if (it->layer < 0 || it->layer != layer)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld: its experts are not what comes next", (long long)layer);
    if (!run->runtime->layers[layer].loaded)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld is not loaded", (long long)layer);
    if (expert < it->next || it->start[expert] != it->start[it->next])
        return mq_fail(err, MQ_ERR_STATE, "layer %lld, expert %lld: expert %lld comes next", (long long)layer,
                       (long long)expert, (long long)it->next);
    return MQ_OK;
}

typedef struct expert_job {
    mq_layer *layer;
    int64_t first, count, step;   /* rows of the dispatch; how many at a time */
} expert_job;

static int run_rows(mq_run *run, void *context, int64_t index, const mq_scratch *scratch, mq_error *err)
{
    const expert_job *job = context;
    const mq_dispatch *it = &run->dispatch;
    const int64_t done = index * job->step, at = job->first + done;
    mq_layer_context layer_context = mq_run_context(run);
    mq_expert_rows rows = {
        .hidden = run->hidden, .sums = it->sums, .tokens = it->tokens + at, .shares = it->shares + at,
        .count = MQ_MIN(job->step, job->count - done), .position = at,
    };
    return mq_layer_expert(job->layer, &layer_context, &rows, scratch, err);
}

static int run_loaded(mq_run *run, int64_t index, int64_t expert, mq_error *err)
{
    mq_layer *layer = &run->runtime->layers[index];
    const int64_t *start = &run->dispatch.start[expert];
    mq_elsewhere *there = run->runtime->elsewhere;
    int rc = mq_layer_check(layer, &run->runtime->config, err);
    if (rc == MQ_OK && there != NULL) return there->expert(there, run, index, start[0], start[1] - start[0], err);
    if (rc == MQ_OK) rc = mq_run_reserve(run, err);
    if (rc != MQ_OK) return rc;
    expert_job job = {.layer = layer, .first = start[0], .count = start[1] - start[0],
                      .step = run->scratch[0].mlp_rows};
    mq_steps steps = {.count = MQ_CEIL_DIV(job.count, job.step), .rows = job.step, .step = run_rows, .context = &job};
    return mq_run_steps(run, layer, &steps, err);
}

static void finish_layer(mq_run *run)
{
    mq_row_sizes sizes = {.rows = run->rows, .width = run->runtime->config.hidden_size, .dtype = run->runtime->dtype};
    mq_add_scaled_forward(run->hidden, run->dispatch.sums, run->runtime->config.residual_multiplier, &sizes);
    run->next_layer = run->dispatch.layer + 1;
    run->dispatch.layer = -1;
}

static int finish_expert(mq_run *run, int64_t expert, int rc, mq_error *err)
{
    mq_dispatch *it = &run->dispatch;
    mq_elsewhere *there = run->runtime->elsewhere;
    it->next = expert + 1;
    const int is_last = it->start[it->next] == it->start[run->runtime->config.num_experts];
    if (rc == MQ_OK && is_last && there != NULL) rc = there->end_experts(there, run, err);
    if (rc != MQ_OK) run->next_layer = it->layer = -1;
    else if (is_last) finish_layer(run);
    return rc;
}

int mq_run_expert(mq_run *run, int64_t layer, int64_t expert, const mq_named_tensor *tensors, size_t count,
                  mq_error *err)
{
    int rc = check_order(run, layer, expert, err);
    if (rc == MQ_OK) rc = mq_runtime_load_expert(run->runtime, layer, expert, tensors, count, err);
    if (rc != MQ_OK) return rc;
    rc = run_loaded(run, layer, expert, err);
    mq_runtime_drop_expert(run->runtime, layer);
    return finish_expert(run, expert, rc, err);
}

int mq_run_held_expert(mq_run *run, int64_t layer, int64_t expert, const mq_linear_weight *weights, mq_error *err)
{
    int rc = check_order(run, layer, expert, err);
    if (rc != MQ_OK) return rc;
    mq_runtime_lend_expert(run->runtime, layer, weights);
    rc = run_loaded(run, layer, expert, err);
    mq_runtime_lend_expert(run->runtime, layer, NULL);
    return finish_expert(run, expert, rc, err);
}
