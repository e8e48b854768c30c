/* The rows of one expert on a device: gathered there, and added to the sums of all experts; or, where there is no room
 * for those of all rows (device_mixture.c), on the host. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

typedef struct expert_work {
    mq_device *device;
    mq_run *run;
    mq_layer *layer;
    const mq_device_scratch *scratch;
    int64_t first, count;       /* of the dispatch */
    int64_t piece_rows;         /* that go through an expert at a time on the host */
    int mixes;                  /* rows are gathered and added on the device */
    uint8_t *mask;
    float *ones;                /* NULL, or what outputs are multiplied by where inputs were by the shares */
    mq_error *err;
} expert_work;

static mq_row_sizes sizes_of(const expert_work *work, int64_t rows)
{
    const mq_runtime *runtime = work->run->runtime;
    return (mq_row_sizes){.rows = rows, .width = runtime->config.hidden_size, .dtype = runtime->dtype};
}

static size_t rows_nbytes(const expert_work *work, int64_t rows)
{
    const mq_row_sizes sizes = sizes_of(work, rows);
    return (size_t)(rows * sizes.width) * mq_dtype_size(sizes.dtype);
}

/* On the host: of a chunk's rows, or of their tokens and shares. */
static size_t place_nbytes(const expert_work *work)
{
    const size_t rows = (size_t)work->scratch->rows;
    return MQ_MAX(rows_nbytes(work, work->scratch->rows), rows * (sizeof(int64_t) + sizeof(float)));
}

/* Behind that, the indices of rows that count. */
static int64_t *index_of(const expert_work *work, const mq_pinned *here)
{
    const size_t at = MQ_ROUND_UP(place_nbytes(work), sizeof(int64_t));
    return (int64_t *)(void *)((char *)here->memory + at);
}

/* Of the device, behind the indices of rows that count: the tokens of a chunk's rows, and their shares of the sums. */
static int64_t *tokens_of(const expert_work *work)
{
    return (int64_t *)work->scratch->meta[0] + work->scratch->rows;
}

static float *shares_of(const expert_work *work)
{
    return (float *)(void *)(tokens_of(work) + work->scratch->rows);
}

static int gather_there(const expert_work *work, const mq_pinned *here, const mq_device_chunk *chunk)
{
    const mq_backend *backend = work->device->backend;
    const size_t rows = (size_t)chunk->rows, width = (size_t)sizes_of(work, 1).width;
    const float *shares = work->ones != NULL ? work->ones : work->run->dispatch.shares + chunk->position;
    const mq_cuda_matrix out = {chunk->hidden, work->run->runtime->dtype, chunk->rows, (int64_t)width, (int64_t)width};
    int64_t *tokens = here->memory;
    float *factors = (float *)(void *)(tokens + rows);
    memcpy(tokens, chunk->tokens, rows * sizeof *tokens);
    memcpy(factors, shares, rows * sizeof *factors);
    int rc = backend->copy(tokens_of(work), tokens, rows * sizeof *tokens, work->device->compute, work->err);
    if (rc == MQ_OK)
        rc = backend->copy(shares_of(work), factors, rows * sizeof *factors, work->device->compute, work->err);
    return rc == MQ_OK ? mq_device_gather(work->device, &out, tokens_of(work), work->err) : rc;
}

static int send_rows(const expert_work *work, const mq_pinned *here, mq_device_chunk *chunk)
{
    const mq_backend *backend = work->device->backend;
    const mq_run *run = work->run;
    const mq_row_sizes sizes = sizes_of(work, chunk->rows);
    const uint8_t *mask = run->count_padding ? NULL : run->mask;
    void *stream = work->device->compute;
    int64_t *index = index_of(work, here);
    chunk->counted = 0;
    for (int64_t i = 0; i < chunk->rows; i++) {
        work->mask[i] = mask == NULL || mask[chunk->tokens[i]] != 0;
        if (work->mask[i]) index[chunk->counted++] = i;
    }
    chunk->mask = mask != NULL ? work->mask : NULL;
    chunk->hidden = work->scratch->hidden[0];
    chunk->index = work->scratch->meta[0];
    int rc = backend->copy(chunk->index, index, (size_t)chunk->counted * sizeof *index, stream, work->err);
    if (rc == MQ_OK && work->mixes) rc = gather_there(work, here, chunk);
    else if (rc == MQ_OK) {
        mq_gather_forward(here->memory, run->hidden, chunk->tokens, &sizes);
        rc = backend->copy(chunk->hidden, here->memory, rows_nbytes(work, chunk->rows), stream, work->err);
    }
    if (rc != MQ_OK || work->ones == NULL) return rc;
    chunk->shares = work->scratch->factors;
    return backend->copy(chunk->shares, run->dispatch.shares + chunk->position, (size_t)chunk->rows * sizeof(float),
                         stream, work->err);
}

/* Hands a chunk to the stream: there and back, in the same memory of the host. */
static int start_rows(const expert_work *work, const mq_pinned *here, mq_device_chunk *chunk)
{
    const mq_backend *backend = work->device->backend;
    void *stream = work->device->compute;
    const mq_layer_context context = mq_run_context(work->run);
    mq_device_pass pass = {.device = work->device, .layer = work->layer, .context = &context, .chunk = chunk,
                           .scratch = work->scratch, .err = work->err};
    int rc = mq_run_poll(work->run, work->err);
    if (rc == MQ_OK) rc = send_rows(work, here, chunk);
    if (rc == MQ_OK) rc = mq_device_expert(&pass);
    const mq_cuda_matrix made = mq_device_matrix(&pass, work->scratch->temporary, context.config->hidden_size);
    if (rc == MQ_OK && work->mixes)
        rc = mq_device_scatter(work->device, &made, tokens_of(work), shares_of(work), work->err);
    else if (rc == MQ_OK)
        rc = backend->copy(here->memory, work->scratch->temporary, rows_nbytes(work, chunk->rows), stream, work->err);
    return rc == MQ_OK ? backend->event_record(here->passed, stream, work->err) : rc;
}

/* What came of a chunk to the sums. */
static int add_rows(const expert_work *work, const mq_pinned *here, const mq_device_chunk *chunk)
{
    const mq_dispatch *it = &work->run->dispatch;
    const mq_row_sizes sizes = sizes_of(work, chunk->rows);
    const float *shares = work->ones != NULL ? work->ones : it->shares + chunk->position;
    const int rc = work->device->backend->event_wait(here->passed, work->err);
    if (rc == MQ_OK && !work->mixes) mq_scatter_forward(it->sums, here->memory, chunk->tokens, shares, &sizes);
    return rc;
}

/* While a chunk is computed, the one before is added and the next is gathered. */
static int run_rows(const expert_work *work)
{
    mq_pinned *const gathered = work->device->gathered;
    mq_device_chunk chunks[2];
    int rc = MQ_OK, slot = 0, under_way = 0;
    for (int64_t done = 0; rc == MQ_OK && done < work->count; done += work->scratch->rows) {
        const int64_t at = work->first + done;
        chunks[slot] = (mq_device_chunk){.rows = MQ_MIN(work->scratch->rows, work->count - done), .position = at,
                                         .tokens = work->run->dispatch.tokens + at, .piece_rows = work->piece_rows,
                                         .piece_first = work->first};
        rc = start_rows(work, &gathered[slot], &chunks[slot]);
        slot = 1 - slot;
        if (rc == MQ_OK && under_way) rc = add_rows(work, &gathered[slot], &chunks[slot]);
        under_way = 1;
    }
    if (rc == MQ_OK) rc = mq_device_meanwhile(work->device, work->run, NULL, work->err);
    return rc == MQ_OK && under_way ? add_rows(work, &gathered[1 - slot], &chunks[1 - slot]) : rc;
}

static int make_ones(float **out, int64_t count, mq_error *err)
{
    *out = mq_alloc_array((size_t)count, sizeof **out);
    if (*out == NULL) return mq_fail_memory(err, "the shares of an expert", (size_t)count * sizeof **out);
    for (int64_t i = 0; i < count; i++) (*out)[i] = 1.0f;
    return MQ_OK;
}

static int reserve_rows(const expert_work *work)
{
    const int64_t rows = work->scratch->rows;
    const size_t nbytes = MQ_ROUND_UP(place_nbytes(work), sizeof(int64_t)) + (size_t)rows * sizeof(int64_t);
    const int places = rows < work->count ? 2 : 1;
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < places; i++)
        rc = mq_pinned_reserve(work->device, &work->device->gathered[i], nbytes, work->err);
    return rc;
}

static int run_expert(mq_device *device, mq_run *run, mq_layer *layer, const void *context, mq_error *err)
{
    expert_work work = *(const expert_work *)context;
    mq_device_scratch scratch = {0};
    const mq_layer_context layer_context = mq_run_context(run);
    mq_scratch here = {0};
    work.mixes = mq_device_mixes(device, run);
    int rc = mq_device_reserve(device, run, work.count, 0, &scratch, err);
    if (rc != MQ_OK) {
        mq_device_drop_mixture(device);
        return rc;
    }
    mq_scratch_init(&here, &layer_context, run->largest_unit, run->longest);
    work.device = device;
    work.run = run;
    work.layer = layer;
    work.scratch = &scratch;
    work.piece_rows = here.mlp_rows;
    work.err = err;
    work.mask = mq_alloc((size_t)scratch.rows);
    if (run->runtime->family->flags & MQ_FAMILY_SHARED_INPUTS) rc = make_ones(&work.ones, scratch.rows, err);
    if (work.mask == NULL) rc = mq_fail_memory(err, "the rows of an expert", (size_t)scratch.rows);
    if (rc == MQ_OK) rc = reserve_rows(&work);
    if (work.ones != NULL)
        mq_device_pin(device, run->dispatch.shares,
                      (size_t)(run->rows * run->dispatch.routes.top_k) * sizeof *run->dispatch.shares, 1);
    if (rc == MQ_OK) rc = run_rows(&work);
    if (rc != MQ_OK) mq_device_drop_mixture(device);
    mq_free(work.mask);
    mq_free(work.ones);
    return rc;
}

int mq_device_run_expert(mq_elsewhere *self, mq_run *run, int64_t layer, int64_t first, int64_t count, mq_error *err)
{
    const expert_work work = {.first = first, .count = count};
    return mq_device_watched((mq_device *)(void *)self, run, layer, run_expert, &work, err);
}
