/* Statistics that are summed up on a device while a layer runs: Gram matrices, histograms, and sums by channel. Each
 * has memory of its own from the first rows on, and goes to its calibrator when the layer is done: as what the
 * calibrator would have kept of the same rows. */
#include <string.h>

#include "backend/device_parts.h"
#include "calib/gram.h"
#include "calib/histogram.h"
#include "core/alloc.h"

enum { ENTRIES_NBYTES = 4 << 20 };      /* of columns that wait to be taken */

_Static_assert((int)MQ_CUDA_LOWEST_EXPONENT == (int)MQ_HISTOGRAM_LOWEST, "bins are as the host's");
_Static_assert(sizeof(unsigned long long) == sizeof(int64_t), "and so are counts");

typedef struct sums_call {
    mq_device *device;
    mq_device_sums *sums;
    const mq_device_look *look;
    const mq_cuda_matrix *x;    /* rows that count, without gaps */
    mq_error *err;
} sums_call;

/* Rows of x that are rows begin to end of the chunk. */
static mq_cuda_matrix rows_of(const sums_call *call, int64_t counted, int64_t begin, int64_t end)
{
    const uint8_t *mask = call->look->chunk->mask;
    mq_cuda_matrix part = *call->x;
    part.rows = mask == NULL ? end - begin : 0;
    for (int64_t i = begin; mask != NULL && i < end; i++) part.rows += mask[i] != 0;
    part.data = (char *)part.data + (size_t)(counted * part.ld) * mq_dtype_size(part.dtype);
    return part;
}

/* Where the batch of row `begin` of the chunk ends. */
static int64_t batch_end(const mq_device_look *look, int64_t begin, int64_t *batch)
{
    int64_t end = begin + 1;
    *batch = mq_device_batch(look, begin);
    while (end < look->x.rows && mq_device_batch(look, end) == *batch) end++;
    return end;
}

static int fetch(const sums_call *call, void *to, const void *from, size_t nbytes)
{
    const int rc = call->device->backend->copy(to, from, nbytes, call->device->compute, call->err);
    return rc == MQ_OK ? call->device->backend->stream_wait(call->device->compute, call->err) : rc;
}

/* ---- Gram matrices ---- */

static size_t gram_nbytes(const mq_calib *watch, int64_t width)
{
    return (size_t)mq_gram_sums(watch, width) * sizeof(double);
}

static int gram_add(const sums_call *call)
{
    mq_device *device = call->device;
    const mq_cuda_gram_job job = {.x = *call->x, .block = call->sums->watch->option, .sums = call->sums->memory,
                                  .workspace = device->workspace};
    return device->backend->gram(device->gemm, &job, device->compute, call->err);
}

static int gram_give(const sums_call *call, void *memory)
{
    const mq_device_sums *sums = call->sums;
    const int rc = fetch(call, memory, sums->memory, sums->nbytes);
    return rc == MQ_OK ? mq_gram_add(sums->watch, memory, sums->width, sums->rows, call->err) : rc;
}

/* ---- histograms ---- */

static size_t histogram_nbytes(const mq_calib *watch, int64_t width)
{
    (void)width;
    return sizeof(mq_cuda_histogram) + ((size_t)1 << mq_histogram_bits(watch)) * sizeof(int64_t);
}

static int histogram_count(const sums_call *call, const mq_cuda_matrix *x, int64_t key)
{
    mq_device *device = call->device;
    mq_cuda_histogram *numbers = call->sums->memory;
    const mq_cuda_histogram_job job = {.x = *x, .piece = key, .bits = mq_histogram_bits(call->sums->watch),
                                       .numbers = numbers, .counts = (unsigned long long *)(void *)(numbers + 1)};
    return device->backend->histogram_add(&job, device->compute, call->err);
}

/* Piece by piece as long as that matters: the bins that calibrators offer are as wide as the first piece's values let
 * them be. (Where all of the first chunk is zeros, the first data are all that comes with the next.) */
static int histogram_add(const sums_call *call)
{
    mq_device_sums *sums = call->sums;
    const int64_t rows = call->look->x.rows;
    const int is_first = sums->rows == 0;
    int64_t counted = 0, key = 0;
    int rc = MQ_OK;
    for (int64_t begin = 0, end; rc == MQ_OK && begin < rows; begin = end) {
        end = mq_device_piece(call->look, begin, &key);
        if (!is_first && key != sums->first) end = rows;
        const mq_cuda_matrix part = rows_of(call, counted, begin, end);
        if (part.rows == 0) continue;
        if (is_first && counted == 0) sums->first = key;
        rc = histogram_count(call, &part, key);
        counted += part.rows;
    }
    return rc;
}

static int histogram_give(const sums_call *call, void *memory)
{
    const mq_device_sums *sums = call->sums;
    const int rc = fetch(call, memory, sums->memory, sums->nbytes);
    if (rc != MQ_OK) return rc;
    const mq_cuda_histogram *numbers = memory;
    const mq_histogram_part part = {
        .exponent = numbers->above + MQ_HISTOGRAM_LOWEST, .rows = sums->rows,
        .counts = (const int64_t *)(const void *)(numbers + 1), .zeros = (int64_t)numbers->zeros,
        .worst = numbers->worst, .first_amax = numbers->first_amax, .first_chunk = numbers->first_piece,
        .dtype = sums->dtype,
    };
    return mq_histogram_add(sums->watch, &part, call->err);
}

/* ---- sums by channel ---- */

static int has_bounds(const mq_calib *watch)
{
    return watch->kind->needs == MQ_NEEDS_SUMS_AND_BOUNDS;
}

static int wants_batches(const mq_calib *watch)
{
    return has_bounds(watch) || (watch->kind->by_group && watch->option == 1);
}

static size_t entry_nbytes(const mq_calib *watch, int64_t width)
{
    return (size_t)width * (sizeof(double) + (has_bounds(watch) ? 2 * sizeof(float) : 0));
}

static int64_t entry_room(const mq_calib *watch, int64_t width)
{
    const int64_t fit = (int64_t)((size_t)ENTRIES_NBYTES / entry_nbytes(watch, width));
    return wants_batches(watch) ? MQ_MAX(MQ_MIN(fit, (int64_t)MQ_SUMS_ENTRIES), (int64_t)1) : 1;
}

static size_t columns_nbytes(const mq_calib *watch, int64_t width)
{
    return (size_t)entry_room(watch, width) * entry_nbytes(watch, width);
}

static int columns_give(const sums_call *call, void *memory)
{
    mq_device_sums *sums = call->sums;
    int rc = fetch(call, memory, sums->memory, sums->nbytes);
    for (int64_t i = 0; rc == MQ_OK && i < sums->entry_count; i++) {
        mq_calib_sums entry = sums->entries[i];
        entry.sums = (const double *)(void *)((char *)memory + (size_t)i * entry_nbytes(sums->watch, sums->width));
        entry.lows = (const float *)(const void *)(entry.sums + sums->width);
        entry.highs = entry.lows + sums->width;
        rc = sums->watch->kind->add(sums->watch, &entry, call->err);
        if (rc == MQ_OK) rc = mq_calib_settle(sums->watch, 0, call->err);
    }
    sums->entry_count = 0;
    return rc;
}

/* Those before go to the calibrator when their room is needed. */
static int make_room(const sums_call *call)
{
    mq_device_sums *sums = call->sums;
    if (sums->entry_count < sums->entry_room) return MQ_OK;
    void *memory = mq_alloc(sums->nbytes);
    if (memory == NULL) return mq_fail_memory(call->err, "sums of channels", sums->nbytes);
    const int rc = columns_give(call, memory);
    mq_free(memory);
    return rc;
}

/* A new entry's sums become zeros, its bounds NaN, which stand for nothing. */
static int new_entry(const sums_call *call, const mq_calib_sums *entry)
{
    mq_device_sums *sums = call->sums;
    const mq_backend *backend = call->device->backend;
    const size_t nbytes = entry_nbytes(sums->watch, sums->width), rest = (size_t)sums->width * sizeof(double);
    int rc = make_room(call);
    if (rc != MQ_OK) return rc;
    char *memory = (char *)sums->memory + (size_t)sums->entry_count * nbytes;
    sums->entries[sums->entry_count++] = *entry;
    rc = backend->fill(memory, 0, rest, call->device->compute, call->err);
    if (rc != MQ_OK || nbytes == rest) return rc;
    return backend->fill(memory + rest, 0xff, nbytes - rest, call->device->compute, call->err);
}

static int columns_sum(const sums_call *call, const mq_cuda_matrix *x)
{
    mq_device *device = call->device;
    mq_device_sums *sums = call->sums;
    const size_t at = (size_t)(sums->entry_count - 1) * entry_nbytes(sums->watch, sums->width);
    mq_cuda_columns_job job = {
        .x = *x, .what = has_bounds(sums->watch) ? MQ_CUDA_SUM : MQ_CUDA_SUM_MAGNITUDES,
        .sums_f64 = (double *)(void *)((char *)sums->memory + at), .workspace = device->workspace.data,
        .workspace_nbytes = device->workspace.nbytes,
    };
    if (has_bounds(sums->watch)) {
        job.lows = (float *)(void *)(job.sums_f64 + sums->width);
        job.highs = job.lows + sums->width;
    }
    return device->backend->column_sums(&job, device->compute, call->err);
}

/* One entry for all rows, or one for each batch in a chunk. */
static int columns_add(const sums_call *call)
{
    mq_device_sums *sums = call->sums;
    const mq_device_chunk *chunk = call->look->chunk;
    const int apart = call->look->by_batch && wants_batches(sums->watch);
    int64_t counted = 0, batch = 0;
    int rc = MQ_OK;
    for (int64_t begin = 0, end; rc == MQ_OK && begin < call->look->x.rows; begin = end) {
        end = apart ? batch_end(call->look, begin, &batch) : call->look->x.rows;
        const mq_cuda_matrix part = rows_of(call, counted, begin, end);
        const mq_calib_sums entry = {.width = sums->width, .dtype = sums->dtype, .chunk = chunk->position + begin,
                                     .group = batch};
        if (part.rows == 0) continue;
        if (apart || sums->entry_count == 0) rc = new_entry(call, &entry);
        if (rc == MQ_OK) rc = columns_sum(call, &part);
        if (rc == MQ_OK) sums->entries[sums->entry_count - 1].rows += part.rows;
        counted += part.rows;
    }
    return rc;
}

/* ---- all kinds ---- */

typedef struct sums_kind {
    size_t (*nbytes)(const mq_calib *watch, int64_t width);
    int (*add)(const sums_call *call);
    int (*give)(const sums_call *call, void *memory);   /* memory of the host, of nbytes */
} sums_kind;

static const sums_kind *kind_of(const mq_calib *watch)
{
    static const sums_kind grams = {gram_nbytes, gram_add, gram_give};
    static const sums_kind histograms = {histogram_nbytes, histogram_add, histogram_give};
    static const sums_kind columns = {columns_nbytes, columns_add, columns_give};
    if (watch->kind == &mq_calib_gram) return &grams;
    if (watch->kind == &mq_calib_histogram) return &histograms;
    return watch->kind->needs != MQ_NEEDS_NO_SUMS ? &columns : NULL;
}

static void drop(mq_device *device, mq_device_sums *sums)
{
    mq_device_give(device, &sums->memory, sums->nbytes);
    *sums = (mq_device_sums){0};
}

/* Whether columns of chunks can be added up in the workspace. */
static int has_workspace(const mq_device *device, const mq_calib *watch, int64_t width, mq_dtype dtype)
{
    float bounds = 0.0f;
    const mq_cuda_columns_job job = {.x = {.dtype = dtype, .rows = MQ_CHUNK_ROWS, .cols = width, .ld = width},
                                     .lows = has_bounds(watch) ? &bounds : NULL};
    return watch->kind->needs == MQ_NEEDS_NO_SUMS ||
           device->backend->columns_workspace(&job) <= device->workspace.nbytes;
}

/* The one of that watch, made if there is room; NULL: there is none. */
static mq_device_sums *find(mq_device *device, mq_calib *watch, int64_t width, mq_dtype dtype)
{
    mq_device_sums *free_one = NULL, made = {.watch = watch, .width = width, .dtype = dtype};
    mq_error err;
    for (int i = 0; i < MQ_SUMS; i++) {
        if (device->sums[i].watch == watch) return &device->sums[i];
        if (device->sums[i].watch == NULL && free_one == NULL) free_one = &device->sums[i];
    }
    const sums_kind *kind = kind_of(watch);
    if (device->host_statistics || free_one == NULL || kind == NULL) return NULL;
    if (!has_workspace(device, watch, width, dtype)) return NULL;
    made.nbytes = kind->nbytes(watch, width);
    made.entry_room = kind->add == columns_add ? entry_room(watch, width) : 0;
    if (mq_device_take(device, &made.memory, made.nbytes, "statistics", &err) != MQ_OK) return NULL;
    *free_one = made;
    if (device->backend->fill(made.memory, 0, made.nbytes, device->compute, &err) == MQ_OK) return free_one;
    drop(device, free_one);
    return NULL;
}

/* 0: of no width that is known here. */
static int64_t width_of(const mq_run *run, const mq_layer *layer, const mq_point *point)
{
    const mq_config *config = &run->runtime->config;
    if (point == &run->runtime->head_input) return config->hidden_size;
    if (point == &layer->q) return mq_dim_of(config, &layer->kind, MQ_DIM_Q);
    if (point == &layer->k) return mq_dim_of(config, &layer->kind, MQ_DIM_KV);
    if (point == &layer->v) return mq_dim_of(config, &layer->kind, MQ_DIM_V);
    for (int role = 0; role < MQ_ROLE_COUNT; role++) {
        if (point == &layer->linears[role].input) return layer->linears[role].cols;
        if (point == &layer->linears[role].output) return layer->linears[role].rows;
    }
    return 0;
}

void mq_sums_begin(mq_device *device, const mq_run *run, const mq_layer *layer, mq_point *const *points, size_t count)
{
    for (size_t i = 0; i < count * MQ_POINT_WATCHERS; i++) {
        const mq_point *point = points[i / MQ_POINT_WATCHERS];
        mq_calib *watch = point->watchers[i % MQ_POINT_WATCHERS].watch;
        const int64_t width = watch != NULL && kind_of(watch) != NULL ? width_of(run, layer, point) : 0;
        if (width == 0 || find(device, watch, width, run->runtime->dtype) != NULL) continue;
        mq_arena_drop(device, &device->work);       /* the rows of the layer before have most of what there is */
        find(device, watch, width, run->runtime->dtype);
    }
}

int mq_sums_collect(mq_device *device, mq_calib *watch, const mq_device_look *look, const mq_cuda_matrix *x, int *done,
                    mq_error *err)
{
    sums_call call = {.device = device, .look = look, .x = x, .err = err};
    call.sums = find(device, watch, x->cols, x->dtype);
    *done = call.sums != NULL;
    if (call.sums == NULL) return MQ_OK;
    const int rc = kind_of(watch)->add(&call);
    call.sums->rows += x->rows;
    return rc;
}

int mq_sums_take(mq_device *device, mq_error *err)
{
    int rc = MQ_OK;
    for (int i = 0; rc == MQ_OK && i < MQ_SUMS; i++) {
        mq_device_sums *sums = &device->sums[i];
        const sums_call call = {.device = device, .sums = sums, .err = err};
        if (sums->watch == NULL) continue;
        void *memory = mq_alloc(sums->nbytes);
        if (memory == NULL) return mq_fail_memory(err, "statistics of a device", sums->nbytes);
        rc = kind_of(sums->watch)->give(&call, memory);
        mq_free(memory);
    }
    return rc;
}

void mq_sums_drop(mq_device *device)
{
    for (int i = 0; i < MQ_SUMS; i++)
        if (device->sums[i].watch != NULL) drop(device, &device->sums[i]);
}
