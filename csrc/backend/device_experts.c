/* The rows of one expert on a device: gathered on the host, added there to the sums of all experts. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

typedef struct expert_work {
    int64_t first, count;       /* of the dispatch */
    int64_t piece_rows;         /* that go through an expert at a time on the host */
    char *memory;               /* a chunk's rows */
    uint8_t *mask;
    int64_t *index;
    float *ones;                /* NULL, or what outputs are multiplied by where inputs were by the shares */
} expert_work;

static int send_rows(mq_device *device, const mq_run *run, const expert_work *work, const mq_device_scratch *scratch,
                     mq_device_chunk *chunk, mq_error *err)
{
    const mq_backend *backend = device->backend;
    const mq_row_sizes sizes = {.rows = chunk->rows, .width = run->runtime->config.hidden_size,
                                .dtype = run->runtime->dtype};
    const size_t nbytes = (size_t)(sizes.rows * sizes.width) * mq_dtype_size(sizes.dtype);
    const uint8_t *mask = run->count_padding ? NULL : run->mask;
    chunk->counted = 0;
    for (int64_t i = 0; i < chunk->rows; i++) {
        work->mask[i] = mask == NULL || mask[chunk->tokens[i]] != 0;
        if (work->mask[i]) work->index[chunk->counted++] = i;
    }
    chunk->mask = mask != NULL ? work->mask : NULL;
    chunk->hidden = scratch->hidden[0];
    chunk->index = scratch->meta[0];
    mq_gather_forward(work->memory, run->hidden, chunk->tokens, &sizes);
    int rc = backend->copy(chunk->index, work->index, (size_t)chunk->counted * sizeof *work->index, device->compute,
                           err);
    if (rc == MQ_OK) rc = backend->copy(chunk->hidden, work->memory, nbytes, device->compute, err);
    if (rc != MQ_OK || work->ones == NULL) return rc;
    chunk->shares = scratch->factors;
    return backend->copy(chunk->shares, run->dispatch.shares + chunk->position, (size_t)chunk->rows * sizeof(float),
                         device->compute, err);
}

static int run_rows(mq_device *device, mq_run *run, mq_layer *layer, const expert_work *work,
                    const mq_device_scratch *scratch, mq_error *err)
{
    const mq_layer_context context = mq_run_context(run);
    mq_dispatch *it = &run->dispatch;
    int rc = MQ_OK;
    for (int64_t done = 0; rc == MQ_OK && done < work->count; done += scratch->rows) {
        const int64_t at = work->first + done;
        mq_device_chunk chunk = {.rows = MQ_MIN(scratch->rows, work->count - done), .tokens = it->tokens + at,
                                 .position = at, .piece_rows = work->piece_rows, .piece_first = work->first};
        mq_device_pass pass = {.device = device, .layer = layer, .context = &context, .scratch = scratch,
                               .chunk = &chunk, .err = err};
        const mq_row_sizes sizes = {.rows = chunk.rows, .width = context.config->hidden_size, .dtype = context.dtype};
        const size_t nbytes = (size_t)(sizes.rows * sizes.width) * mq_dtype_size(sizes.dtype);
        const float *shares = work->ones != NULL ? work->ones : it->shares + at;
        rc = mq_run_poll(run, err);
        if (rc == MQ_OK) rc = send_rows(device, run, work, scratch, &chunk, err);
        if (rc == MQ_OK) rc = mq_device_expert(&pass);
        if (rc == MQ_OK && done + chunk.rows == work->count) rc = mq_device_meanwhile(device, run, NULL, err);
        if (rc == MQ_OK) rc = device->backend->copy(work->memory, scratch->temporary, nbytes, device->compute, err);
        if (rc == MQ_OK) rc = device->backend->stream_wait(device->compute, err);
        if (rc == MQ_OK) mq_scatter_forward(it->sums, work->memory, it->tokens + at, shares, &sizes);
    }
    return rc;
}

static int make_ones(float **out, int64_t count, mq_error *err)
{
    *out = mq_alloc_array((size_t)count, sizeof **out);
    if (*out == NULL) return mq_fail_memory(err, "the shares of an expert", (size_t)count * sizeof **out);
    for (int64_t i = 0; i < count; i++) (*out)[i] = 1.0f;
    return MQ_OK;
}

static int run_expert(mq_device *device, mq_run *run, mq_layer *layer, const void *context, mq_error *err)
{
    expert_work work = *(const expert_work *)context;
    mq_device_scratch scratch = {0};
    int rc = mq_device_reserve(device, run, work.count, 0, &scratch, err);
    if (rc != MQ_OK) return rc;
    const size_t width = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    const mq_layer_context layer_context = mq_run_context(run);
    mq_scratch here = {0};
    mq_scratch_init(&here, &layer_context, run->largest_unit, run->longest);
    work.piece_rows = here.mlp_rows;
    work.memory = mq_alloc_array((size_t)scratch.rows, width);
    work.mask = mq_alloc((size_t)scratch.rows);
    work.index = mq_alloc_array((size_t)scratch.rows, sizeof *work.index);
    if (run->runtime->family->flags & MQ_FAMILY_SHARED_INPUTS) rc = make_ones(&work.ones, scratch.rows, err);
    if (work.memory == NULL || work.mask == NULL || work.index == NULL)
        rc = mq_fail_memory(err, "the rows of an expert", (size_t)scratch.rows * width);
    if (rc == MQ_OK) rc = run_rows(device, run, layer, &work, &scratch, err);
    mq_free(work.memory);
    mq_free(work.mask);
    mq_free(work.index);
    mq_free(work.ones);
    return rc;
}

int mq_device_run_expert(mq_elsewhere *self, mq_run *run, int64_t layer, int64_t first, int64_t count, mq_error *err)
{
    const expert_work work = {.first = first, .count = count};
    return mq_device_watched((mq_device *)(void *)self, run, layer, run_expert, &work, err);
}
