/* mq_run_finish on a device: statistics of what reaches lm_head, the normed hidden states, as many rows at a time as
 * there is room for. */
#include "backend/device_parts.h"
#include "core/alloc.h"

typedef struct head_look {
    mq_device *device;
    mq_run *run;
    int64_t piece_rows;
    int64_t rows;               /* of a chunk, at most */
    float *norm;                /* (C) */
    void *hidden, *counted;     /* (rows, C): and those that count */
    int64_t *index;             /* (rows) of the device, */
    int64_t *index_here;        /* and of the host; owned */
} head_look;

static size_t cut(head_look *it, mq_arena *arena, int64_t rows)
{
    const mq_runtime *runtime = it->run->runtime;
    const int64_t width = runtime->config.hidden_size;
    const size_t nbytes = (size_t)(rows * width) * mq_dtype_size(runtime->dtype);
    arena->used = 0;
    it->rows = rows;
    it->norm = mq_arena_take(arena, (size_t)width * sizeof *it->norm);
    it->hidden = mq_arena_take(arena, nbytes);
    it->counted = mq_arena_take(arena, nbytes);
    it->index = mq_arena_take(arena, (size_t)rows * sizeof *it->index);
    return arena->used;
}

static int reserve(head_look *it, mq_error *err)
{
    mq_device *device = it->device;
    const size_t room = mq_device_available(device, &device->work);
    int64_t rows = MQ_MIN((int64_t)MQ_CHUNK_ROWS, it->run->rows);
    mq_arena none = {0};
    while (rows > 1 && cut(it, &none, rows) > room) rows /= 2;
    const int rc = mq_arena_reserve(device, &device->work, cut(it, &none, rows), "rows before lm_head", err);
    if (rc != MQ_OK) return rc;
    cut(it, &device->work, rows);
    it->index_here = mq_alloc_array((size_t)rows, sizeof *it->index_here);
    return it->index_here != NULL ? MQ_OK : mq_fail_memory(err, "indices of rows", (size_t)rows * sizeof(int64_t));
}

/* Rows first to first + rows of the run, with those that count. */
static int begin_chunk(const head_look *it, int64_t first, mq_device_chunk *chunk, mq_error *err)
{
    const uint8_t *mask = it->run->count_padding ? NULL : it->run->mask;
    *chunk = (mq_device_chunk){.first = first, .rows = MQ_MIN(it->rows, it->run->rows - first), .position = first,
                               .piece_rows = it->piece_rows, .mask = mask != NULL ? mask + first : NULL,
                               .hidden = it->hidden, .index = it->index};
    for (int64_t i = 0; i < chunk->rows; i++)
        if (chunk->mask == NULL || chunk->mask[i]) it->index_here[chunk->counted++] = i;
    return it->device->backend->copy(it->index, it->index_here, (size_t)chunk->counted * sizeof *it->index,
                                     it->device->compute, err);
}

/* The chunk's rows as calibrators see them: what lm_head's quantizer leaves, or before it rounds. */
static int read_rows(const head_look *it, const mq_device_chunk *chunk, mq_error *err)
{
    mq_device *device = it->device;
    const mq_runtime *runtime = it->run->runtime;
    const mq_quantizer *quantizer = runtime->head_input.quantizer;
    const int64_t width = runtime->config.hidden_size;
    const size_t stride = (size_t)width * mq_dtype_size(runtime->dtype);
    const mq_cuda_matrix x = {it->hidden, runtime->dtype, chunk->rows, width, width};
    const mq_cuda_norm_job norm = {.x = x, .y = x, .weight = it->norm, .heads = 1,
                                   .eps = (float)runtime->config.rms_norm_eps};
    const int whole = runtime->head_input.watch_quantized;
    const mq_device_rows quantize = {.x = x, .y = x, .steps = whole ? MQ_QUANT_ALL : MQ_QUANT_PREPARE};
    int rc = device->backend->copy(it->hidden, it->run->hidden + (size_t)chunk->first * stride,
                                   (size_t)chunk->rows * stride, device->compute, err);
    if (rc == MQ_OK) rc = device->backend->rmsnorm(&norm, device->compute, err);
    if (rc != MQ_OK || quantizer == NULL || !mq_quantizer_acts(quantizer)) return rc;
    if (!whole && !mq_quantizer_prepares(quantizer)) return rc;
    return mq_device_quantizer_apply(&device->quantizers[MQ_QUANTIZERS - 1], device->backend, device->index, quantizer,
                                     &quantize, device->compute, err);
}

static int look(head_look *it, const float *norm, mq_error *err)
{
    mq_device *device = it->device;
    const mq_runtime *runtime = it->run->runtime;
    const int64_t width = runtime->config.hidden_size;
    const mq_layer_context context = mq_run_context(it->run);
    mq_device_chunk chunk;
    int rc = reserve(it, err);
    if (rc == MQ_OK)
        rc = device->backend->copy(it->norm, norm, (size_t)width * sizeof *norm, device->compute, err);
    for (int64_t first = 0; rc == MQ_OK && first < it->run->rows; first += it->rows) {
        rc = mq_run_poll(it->run, err);
        if (rc == MQ_OK) rc = begin_chunk(it, first, &chunk, err);
        if (rc == MQ_OK) rc = read_rows(it, &chunk, err);
        const mq_device_look seen = {.x = {it->hidden, runtime->dtype, chunk.rows, width, width}, .chunk = &chunk,
                                     .context = &context};
        if (rc == MQ_OK) rc = mq_device_collect(device, &it->run->runtime->head_input, &seen, it->counted, err);
    }
    return rc;
}

int mq_device_head_statistics(mq_elsewhere *self, mq_run *run, const float *norm, int64_t piece_rows, mq_error *err)
{
    head_look it = {.device = (mq_device *)(void *)self, .run = run, .piece_rows = piece_rows};
    mq_point *const point = &run->runtime->head_input;
    int before, rc = mq_device_enter(it.device, &before, err);
    if (rc != MQ_OK) return rc;
    mq_sums_begin(it.device, run, NULL, &point, 1);
    rc = mq_device_finish(it.device, look(&it, norm, err), err);
    mq_free(it.index_here);
    mq_device_leave(it.device, before);
    return rc;
}
