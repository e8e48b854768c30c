#include "backend/device_parts.h"

#include <stdio.h>
#include <string.h>

#include "core/alloc.h"

/* ---- memory ---- */

int mq_device_enter(mq_device *device, int *before, mq_error *err)
{
    const int rc = device->backend->device_current(before, err);
    return rc != MQ_OK || *before == device->index ? rc : device->backend->device_set(device->index, err);
}

void mq_device_leave(mq_device *device, int before)
{
    mq_error err;
    if (before != device->index) device->backend->device_set(before, &err);
}

int mq_device_take(mq_device *device, void **out, size_t nbytes, const char *purpose, mq_error *err)
{
    *out = NULL;
    if (device->held + nbytes > device->budget)
        return mq_fail(err, MQ_ERR_MEMORY,
                       "out of device memory: %.1f MB for %s, but %.1f of the %.1f MB that may be used are in use "
                       "(load(..., device_memory=) or MODELQ_CUDA_MEMORY)",
                       (double)nbytes / 1e6, purpose, (double)device->held / 1e6, (double)device->budget / 1e6);
    const int rc = device->backend->memory_new(out, nbytes, purpose, err);
    if (rc == MQ_OK) device->held += nbytes;
    device->peak = MQ_MAX(device->peak, device->held);
    return rc;
}

void mq_device_give(mq_device *device, void **memory, size_t nbytes)
{
    if (*memory == NULL) return;
    device->backend->memory_free(*memory);
    device->held -= nbytes;
    *memory = NULL;
}

size_t mq_device_available(const mq_device *device, const mq_arena *arena)
{
    const size_t others = device->held - arena->nbytes;
    return device->budget > others ? device->budget - others : 0;
}

static void drop_arena(mq_device *device, mq_arena *arena)
{
    mq_device_give(device, (void **)&arena->memory, arena->nbytes);
    *arena = (mq_arena){0};
}

int mq_arena_reserve(mq_device *device, mq_arena *arena, size_t nbytes, const char *purpose, mq_error *err)
{
    arena->used = 0;
    if (nbytes <= arena->nbytes) return MQ_OK;
    drop_arena(device, arena);
    const int rc = mq_device_take(device, (void **)&arena->memory, nbytes, purpose, err);
    if (rc == MQ_OK) arena->nbytes = nbytes;
    return rc;
}

void *mq_arena_take(mq_arena *arena, size_t nbytes)
{
    void *at = arena->memory != NULL ? arena->memory + arena->used : NULL;
    arena->used += MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGN_DEVICE);
    return at;
}

/* ---- weights ---- */

/* Rows row to row + count of w to the pinned piece, without gaps; their dtype there. */
static mq_dtype fill_piece(char *piece, const mq_tensor *w, int64_t row, int64_t count, mq_dtype wanted)
{
    const int64_t columns = w->shape[1], size = (int64_t)mq_dtype_size(w->dtype);
    const int as_it_is = (int)w->dtype <= (int)MQ_F16 && w->stride[1] == 1;
    const mq_dtype dtype = as_it_is ? w->dtype : wanted;
    const size_t row_nbytes = (size_t)columns * mq_dtype_size(dtype);
    for (int64_t i = 0; i < count; i++) {
        char *to = piece + (size_t)i * row_nbytes;
        if (as_it_is) memcpy(to, (const char *)w->data + (row + i) * w->stride[0] * size, row_nbytes);
        else mq_read_row(to, wanted, w, row + i);
    }
    return dtype;
}

static int send_piece(mq_device *device, const mq_tensor *w, const mq_cuda_matrix *to, int64_t row, int64_t count,
                      mq_error *err)
{
    const mq_backend *backend = device->backend;
    const int slot = device->next_piece;
    char *to_row = (char *)to->data + (size_t)(row * to->ld) * mq_dtype_size(to->dtype);
    device->next_piece = 1 - slot;
    int rc = backend->event_wait(device->sent[slot], err);
    if (rc != MQ_OK) return rc;
    const mq_dtype dtype = fill_piece(device->pinned[slot], w, row, count, to->dtype);
    const size_t nbytes = (size_t)(count * to->cols) * mq_dtype_size(dtype);
    void *first = dtype == to->dtype ? to_row : device->staged[slot];
    rc = backend->copy(first, device->pinned[slot], nbytes, device->copies, err);
    if (rc == MQ_OK && dtype != to->dtype) {
        const mq_cuda_rows_job job = {.x = {device->staged[slot], dtype, count, to->cols, to->cols},
                                      .y = {to_row, to->dtype, count, to->cols, to->ld}};
        rc = backend->rows(&job, device->copies, err);
    }
    return rc == MQ_OK ? backend->event_record(device->sent[slot], device->copies, err) : rc;
}

int mq_device_upload(mq_device *device, const mq_tensor *w, const mq_cuda_matrix *to, mq_error *err)
{
    const int64_t row_nbytes = to->cols * (int64_t)MQ_MAX(mq_dtype_size(w->dtype), mq_dtype_size(to->dtype));
    const int64_t step = device->piece_nbytes / row_nbytes;
    int rc = MQ_OK;
    if (step < 1)
        return mq_fail(err, MQ_ERR_MEMORY,
                       "out of device memory: a row of %lld columns is larger than the piece of %lld bytes in which "
                       "weights come where %.1f MB may be used", (long long)to->cols, (long long)device->piece_nbytes,
                       (double)device->budget / 1e6);
    for (int64_t row = 0; rc == MQ_OK && row < to->rows; row += step)
        rc = send_piece(device, w, to, row, MQ_MIN(step, to->rows - row), err);
    return rc;
}

static size_t rounded(int64_t count, size_t size)
{
    return MQ_ROUND_UP((size_t)count * size, (size_t)MQ_ALIGN_DEVICE);
}

/* Bytes of the modules of one layer, or of one of its experts, on the device. */
static size_t weights_nbytes(const mq_runtime *runtime, int64_t layer, int64_t expert)
{
    const size_t size = mq_dtype_size(runtime->dtype);
    size_t total = 0;
    for (size_t i = runtime->layer_start[layer]; i < runtime->layer_start[layer + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        if (module->expert != expert || module->weight[0] == '\0') continue;
        if (module->ndim == 1) total += rounded(module->shape[0], sizeof(float));
        else total += rounded(module->shape[0] * module->shape[1], size) + rounded(module->shape[0], size);
    }
    return total;
}

static int put_vector(mq_device *device, mq_arena *arena, void **out, const void *from, size_t nbytes, mq_error *err)
{
    *out = mq_arena_take(arena, nbytes);
    return device->backend->copy(*out, from, nbytes, device->copies, err);
}

/* The bias in the activations' dtype, through which it was rounded before. */
static int put_bias(mq_device *device, mq_arena *arena, const mq_runtime *runtime, const float *bias, int64_t count,
                    void **out, mq_error *err)
{
    mq_tensor view = mq_tensor_make((void *)(uintptr_t)bias, MQ_F32, 1, &count);
    const size_t nbytes = (size_t)count * mq_dtype_size(runtime->dtype);
    void *made = mq_alloc(nbytes);
    if (made == NULL) return mq_fail_memory(err, "a bias", nbytes);
    mq_read_row(made, runtime->dtype, &view, 0);
    const int rc = put_vector(device, arena, out, made, nbytes, err);
    mq_free(made);
    return rc;
}

static int load(mq_elsewhere *self, const mq_runtime *runtime, const mq_module *module, const mq_tensor *weight,
                const float *vector, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_arena *arena = module->expert >= 0 ? &device->expert_weights : &device->layer_weights;
    const int is_first = module->expert >= 0 ? arena->used == 0 : device->layer != module->layer;
    const int64_t rows = module->shape[0], columns = module->shape[1];
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    if (is_first && module->expert < 0) self->drop_layer(self, device->layer);
    if (is_first)
        rc = mq_arena_reserve(device, arena, weights_nbytes(runtime, module->layer, module->expert),
                              "the weights of a layer", err);
    if (rc == MQ_OK && module->expert < 0) device->layer = module->layer;
    if (rc == MQ_OK && weight == NULL) {
        void **norm = (void **)&device->norms[module->role];
        rc = put_vector(device, arena, norm, vector, (size_t)rows * sizeof *vector, err);
    } else if (rc == MQ_OK) {
        mq_device_linear *linear = &device->linears[module->role];
        const size_t nbytes = (size_t)(rows * columns) * mq_dtype_size(runtime->dtype);
        linear->weight = (mq_cuda_matrix){mq_arena_take(arena, nbytes), runtime->dtype, rows, columns, columns};
        linear->bias = NULL;
        rc = mq_device_upload(device, weight, &linear->weight, err);
        if (rc == MQ_OK) rc = mq_finding_weight(device, &linear->weight, module->weight, err);
        if (rc == MQ_OK && vector != NULL) rc = put_bias(device, arena, runtime, vector, rows, &linear->bias, err);
    }
    if (rc == MQ_OK) rc = device->backend->event_record(device->loaded, device->copies, err);
    mq_device_leave(device, before);
    return rc;
}

static size_t branch_nbytes(const mq_device_linear *linear)
{
    const size_t size = mq_dtype_size(linear->weight.dtype);
    return rounded(linear->down.rows * linear->down.cols, size) + rounded(linear->up.rows * linear->up.cols, size);
}

static int load_low_rank(mq_elsewhere *self, const mq_module *module, const mq_tensor *down, const mq_tensor *up,
                         mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_device_linear *linear = &device->linears[module->role];
    const mq_dtype dtype = linear->weight.dtype;
    const int64_t rank = down->shape[0];
    if (device->layer != module->layer)
        return mq_fail(err, MQ_ERR_STATE, "%s: its layer is not loaded", module->name);
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    mq_device_give(device, &linear->branch, branch_nbytes(linear));
    linear->down = (mq_cuda_matrix){NULL, dtype, rank, linear->weight.cols, linear->weight.cols};
    linear->up = (mq_cuda_matrix){NULL, dtype, linear->weight.rows, rank, rank};
    rc = mq_device_take(device, &linear->branch, branch_nbytes(linear), "a branch of low rank", err);
    if (rc == MQ_OK) {
        linear->down.data = linear->branch;
        linear->up.data = (char *)linear->branch + rounded(rank * linear->weight.cols, mq_dtype_size(dtype));
        rc = mq_device_upload(device, down, &linear->down, err);
        if (rc == MQ_OK) rc = mq_device_upload(device, up, &linear->up, err);
        if (rc == MQ_OK) rc = device->backend->event_record(device->loaded, device->copies, err);
    }
    mq_device_leave(device, before);
    return rc;
}

static void drop_layer(mq_elsewhere *self, int64_t layer)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_error err;
    int before;
    if (device->layer < 0 || layer != device->layer) return;
    const int entered = mq_device_enter(device, &before, &err) == MQ_OK;
    for (int role = 0; role < MQ_ROLE_COUNT; role++)
        mq_device_give(device, &device->linears[role].branch, branch_nbytes(&device->linears[role]));
    memset(device->linears, 0, sizeof device->linears);
    memset(device->norms, 0, sizeof device->norms);
    device->layer_weights.used = 0;
    device->layer = -1;
    mq_findings_drop(device);
    if (entered) mq_device_leave(device, before);
}

static void drop_expert(mq_elsewhere *self)
{
    static const mq_role roles[MQ_EXPERT_LINEARS] = {MQ_ROLE_GATE, MQ_ROLE_UP, MQ_ROLE_DOWN};
    mq_device *device = (mq_device *)(void *)self;
    if (device->expert_weights.used == 0) return;
    for (int i = 0; i < MQ_EXPERT_LINEARS; i++) device->linears[roles[i]] = (mq_device_linear){0};
    device->expert_weights.used = 0;
}

/* ---- the object ---- */

static int choose_budget(mq_device *device, size_t wanted, mq_error *err)
{
    size_t free_nbytes = 0, total = 0;
    const int rc = device->backend->memory_free_nbytes(&free_nbytes, &total, err);
    device->budget = wanted != 0 ? wanted : free_nbytes / 10 * 9;
    device->piece_nbytes = (int64_t)MQ_MAX(MQ_MIN(device->budget / 32, (size_t)MQ_PIECE_NBYTES), (size_t)1 << 16);
    return rc;
}

static int open_gemm(mq_device *device, const char *cublas, mq_error *err)
{
    const size_t most = (size_t)128 << 20, least = (size_t)1 << 20;
    const mq_cuda_gemm_options options = {
        .library = cublas, .workspace_nbytes = MQ_MAX(MQ_MIN(device->budget / 16, most), least),
    };
    int rc = device->backend->gemm_open(&options, &device->gemm, err);
    if (rc != MQ_OK) return rc;
    const size_t nbytes = device->backend->gemm_workspace(device->gemm);
    rc = mq_device_take(device, &device->workspace_memory, nbytes + MQ_ALIGN_DEVICE, "the workspace of products", err);
    const uintptr_t at = (uintptr_t)device->workspace_memory;
    device->workspace = (mq_cuda_workspace){(void *)MQ_ROUND_UP(at, (uintptr_t)MQ_ALIGN_DEVICE), nbytes};
    return rc;
}

static int open_all(mq_device *device, const mq_device_options *options, mq_error *err)
{
    const mq_backend *backend = device->backend;
    int rc = choose_budget(device, options->budget, err);
    if (rc == MQ_OK) rc = backend->stream_new(&device->compute, err);
    if (rc == MQ_OK) rc = backend->stream_new(&device->copies, err);
    if (rc == MQ_OK) rc = backend->event_new(&device->loaded, err);
    for (int i = 0; rc == MQ_OK && i < 2; i++) {
        rc = backend->pinned_new((void **)&device->pinned[i], (size_t)device->piece_nbytes, err);
        if (rc == MQ_OK) rc = backend->event_new(&device->sent[i], err);
        if (rc == MQ_OK) rc = backend->event_new(&device->arrived[i], err);
        if (rc == MQ_OK) rc = backend->event_new(&device->computed[i], err);
    }
    if (rc == MQ_OK) rc = open_gemm(device, options->cublas, err);
    for (int i = 0; rc == MQ_OK && i < 2; i++)
        rc = mq_device_take(device, (void **)&device->staged[i], (size_t)device->piece_nbytes, "pieces of weights",
                            err);
    if (rc == MQ_OK)
        rc = mq_device_take(device, (void **)&device->maxima, MQ_MAXIMA * sizeof *device->maxima, "maxima", err);
    return rc;
}

int mq_device_new(const mq_backend *backend, const mq_device_options *options, mq_device **out, mq_error *err)
{
    mq_device *device = mq_alloc_zeroed(sizeof *device);
    int before = 0;
    *out = NULL;
    if (device == NULL) return mq_fail_memory(err, "a device", sizeof *device);
    device->backend = backend;
    device->index = options->index;
    device->layer = -1;
    device->elsewhere = (mq_elsewhere){
        .load = load, .load_low_rank = load_low_rank, .drop_layer = drop_layer, .drop_expert = drop_expert,
        .layer = mq_device_run_layer, .expert = mq_device_run_expert, .head = mq_device_run_head,
    };
    int rc = mq_device_enter(device, &before, err);
    if (rc == MQ_OK) {
        rc = open_all(device, options, err);
        mq_device_leave(device, before);
    }
    if (rc == MQ_OK) *out = device;
    else mq_device_free(device);
    return rc;
}

void mq_device_free(mq_device *device)
{
    mq_error err;
    int before = 0;
    if (device == NULL) return;
    const mq_backend *backend = device->backend;
    const int entered = mq_device_enter(device, &before, &err) == MQ_OK;
    if (device->compute != NULL) backend->stream_wait(device->compute, &err);
    if (device->copies != NULL) backend->stream_wait(device->copies, &err);
    drop_layer(&device->elsewhere, device->layer);
    for (int i = 0; i < MQ_QUANTIZERS; i++) mq_device_quantizer_free(&device->quantizers[i]);
    drop_arena(device, &device->layer_weights);
    drop_arena(device, &device->expert_weights);
    drop_arena(device, &device->work);
    backend->memory_free(device->maxima);
    backend->memory_free(device->workspace_memory);
    if (device->gemm != NULL) backend->gemm_close(device->gemm);
    for (int i = 0; i < 2; i++) {
        backend->memory_free(device->staged[i]);
        backend->pinned_free(device->pinned[i]);
        backend->event_free(device->sent[i]);
        backend->event_free(device->arrived[i]);
        backend->event_free(device->computed[i]);
    }
    backend->event_free(device->loaded);
    backend->stream_free(device->compute);
    backend->stream_free(device->copies);
    if (entered) mq_device_leave(device, before);
    mq_free(device);
}

mq_elsewhere *mq_device_elsewhere(mq_device *device)
{
    return &device->elsewhere;
}

size_t mq_device_budget(const mq_device *device)
{
    return device->budget;
}

size_t mq_device_peak(const mq_device *device)
{
    return device->peak;
}
