#include "backend/device_backward.h"

#include <string.h>
#include <unistd.h>

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
    if (device->held + nbytes > device->budget) mq_device_give_spare(device);
    if (device->held + nbytes > device->budget)
        return mq_fail(err, MQ_ERR_MEMORY,
                       "out of device memory: %.1f MB for %s, but %.1f of the %.1f MB that may be used are in use "
                       "(load(..., device_memory=) or MODELQ_CUDA_MEMORY)",
                       (double)nbytes / 1e6, purpose, (double)device->held / 1e6, (double)device->budget / 1e6);
    int rc = device->backend->memory_new(out, nbytes, purpose, err);
    if (rc == MQ_ERR_MEMORY && mq_device_give_spare(device))
        rc = device->backend->memory_new(out, nbytes, purpose, err);
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
    const size_t others = device->held - arena->nbytes - device->spare[0].nbytes - device->spare[1].nbytes;
    return device->budget > others ? device->budget - others : 0;
}

void mq_arena_drop(mq_device *device, mq_arena *arena)
{
    mq_device_give(device, (void **)&arena->memory, arena->nbytes);
    *arena = (mq_arena){0};
}

int mq_arena_reserve(mq_device *device, mq_arena *arena, size_t nbytes, const char *purpose, mq_error *err)
{
    arena->used = 0;
    if (nbytes <= arena->nbytes) return MQ_OK;
    mq_arena_drop(device, arena);
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

void mq_device_settle(mq_device *device)
{
    void *const streams[] = {device->compute, device->copies, device->rows};
    mq_error err;
    /* A wait may give an earlier error and not have waited; the second that fails is of a device that has stopped. */
    for (int i = 0; i < 3; i++)
        for (int tries = 0; streams[i] != NULL && tries < 2; tries++)
            if (device->backend->stream_wait(streams[i], &err) == MQ_OK) break;
}

/* ---- memory of the host ---- */

static size_t most_pinned(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (size_t)pages / MQ_PINNED_SHARE * (size_t)size : 0;
}

/* Whatever becomes of the device: the owner is about to free it. Copies of pinned memory, and no others of the host's,
 * are on their way while the host goes on, and an error may have left some behind. */
static void unpin(mq_device *device, mq_pin *pin)
{
    mq_error err;
    int before;
    if (pin->memory == NULL) return;
    const int entered = mq_device_enter(device, &before, &err) == MQ_OK;
    mq_device_settle(device);
    device->backend->unpin(pin->memory);
    if (entered) mq_device_leave(device, before);
    *pin = (mq_pin){0};
}

void mq_device_pin(mq_device *device, void *memory, size_t nbytes, int beside)
{
    mq_pin *const last = &device->pins[MQ_PINS - 1];
    mq_error err;
    size_t pinned = nbytes;
    if (memory == NULL || nbytes == 0 || nbytes > most_pinned()) return;
    for (int i = 0; i < MQ_PINS; i++) {
        if (device->pins[i].memory == memory && device->pins[i].nbytes == nbytes) return;
        pinned += device->pins[i].nbytes;
    }
    if (beside && (pinned > most_pinned() || last->memory != NULL)) return;
    mq_device_unpin(device, memory);
    for (int i = MQ_PINS - 1; i >= 0 && (pinned > most_pinned() || last->memory != NULL); i--) {
        pinned -= device->pins[i].nbytes;       /* the oldest is the last */
        unpin(device, &device->pins[i]);
    }
    if (device->backend->pin(memory, nbytes, &err) != MQ_OK) return;
    memmove(device->pins + 1, device->pins, (MQ_PINS - 1) * sizeof *device->pins);
    device->pins[0] = (mq_pin){memory, nbytes};
}

void mq_device_unpin(mq_device *device, const void *memory)
{
    for (int i = 0; i < MQ_PINS; i++)
        if (memory != NULL && device->pins[i].memory == memory) unpin(device, &device->pins[i]);
}

static void drop_pinned(mq_device *device, mq_pinned *it)
{
    if (it->is_plain) mq_free(it->memory);
    else device->backend->pinned_free(it->memory);
    it->memory = NULL;
    it->nbytes = 0;
    it->is_plain = 0;
}

int mq_pinned_reserve(mq_device *device, mq_pinned *it, size_t nbytes, mq_error *err)
{
    if (nbytes <= it->nbytes) return MQ_OK;
    drop_pinned(device, it);
    if (device->backend->pinned_new(&it->memory, nbytes, err) != MQ_OK) {
        it->memory = mq_alloc(nbytes);
        if (it->memory == NULL) return mq_fail_memory(err, "rows on their way to a device", nbytes);
        it->is_plain = 1;
    }
    it->nbytes = nbytes;
    return MQ_OK;
}

static void forget_run(mq_elsewhere *self, const mq_run *run)
{
    mq_device *device = (mq_device *)(void *)self;
    const mq_dispatch *dispatch = &run->dispatch;
    mq_device_unpin(device, run->hidden);
    mq_device_unpin(device, dispatch->routes.experts);
    mq_device_unpin(device, dispatch->routes.shares);
    mq_device_unpin(device, dispatch->shares);
    mq_device_unpin(device, dispatch->sums);
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
    if (rc == MQ_OK) rc = backend->stream_new(&device->rows, err);
    if (rc == MQ_OK) rc = backend->event_new(&device->loaded, err);
    for (int i = 0; rc == MQ_OK && i < 2; i++) {
        rc = backend->pinned_new((void **)&device->pinned[i], (size_t)device->piece_nbytes, err);
        if (rc == MQ_OK) rc = backend->event_new(&device->sent[i], err);
        if (rc == MQ_OK) rc = backend->event_new(&device->indices[i].passed, err);
        if (rc == MQ_OK) rc = backend->event_new(&device->gathered[i].passed, err);
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
    device->host_statistics = options->host_statistics;
    device->layer = device->ahead.layer = -1;
    device->elsewhere = (mq_elsewhere){
        .begin = mq_device_begin, .load = mq_device_load, .load_low_rank = mq_device_load_low_rank,
        .drop_layer = mq_device_drop_layer, .drop_expert = mq_device_drop_expert,
        .begin_ahead = mq_device_begin_ahead, .load_ahead = mq_device_load_ahead,
        .forget_ahead = mq_device_forget_ahead, .forget_run = forget_run,
        .forget_backward = mq_device_forget_backward,
        .layer = mq_device_run_layer, .expert = mq_device_run_expert,
        .end_experts = mq_device_end_experts, .head = mq_device_run_head,
        .head_statistics = mq_device_head_statistics,
        .back_head = mq_device_back_head, .back_layer = mq_device_back_layer,
        .back_expert = mq_device_back_expert,
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
    mq_device_settle(device);
    mq_device_drop_layer(&device->elsewhere, device->layer);
    for (int i = 0; i < MQ_QUANTIZERS; i++) mq_device_quantizer_free(&device->quantizers[i]);
    mq_arena_drop(device, &device->layer_weights);
    mq_arena_drop(device, &device->expert_weights);
    for (int i = 0; i < 2; i++) mq_arena_drop(device, &device->spare[i]);
    mq_arena_drop(device, &device->work);
    for (int i = 0; i < MQ_PINS; i++) mq_device_unpin(device, device->pins[i].memory);
    backend->memory_free(device->maxima);
    backend->memory_free(device->workspace_memory);
    if (device->gemm != NULL) backend->gemm_close(device->gemm);
    for (int i = 0; i < 2; i++) {
        backend->memory_free(device->staged[i]);
        backend->pinned_free(device->pinned[i]);
        backend->event_free(device->sent[i]);
        drop_pinned(device, &device->indices[i]);
        drop_pinned(device, &device->gathered[i]);
        backend->event_free(device->indices[i].passed);
        backend->event_free(device->gathered[i].passed);
        backend->event_free(device->arrived[i]);
        backend->event_free(device->computed[i]);
    }
    backend->event_free(device->loaded);
    backend->stream_free(device->compute);
    backend->stream_free(device->copies);
    backend->stream_free(device->rows);
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
