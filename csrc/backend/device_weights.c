#include "backend/device_parts.h"

#include <string.h>

#include "core/alloc.h"

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

static const mq_stored_weight *find(const mq_named_tensor *tensors, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(tensors[i].name, name) == 0) return tensors[i].stored;
    return NULL;
}

size_t mq_device_linear_nbytes(const mq_device *device, const mq_module *module, mq_dtype dtype,
                               const mq_stored_weight *stored)
{
    const size_t size = mq_dtype_size(dtype);
    const size_t bias = rounded(module->shape[0], size);
    if (mq_device_can_pack(device, module->role, stored)) return bias + mq_device_packed_nbytes(device, stored);
    return bias + rounded(module->shape[0] * module->shape[1], size);
}

size_t mq_device_weights_nbytes(const mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                                const mq_named_tensor *tensors, size_t count)
{
    size_t total = 0;
    for (size_t i = runtime->layer_start[layer]; i < runtime->layer_start[layer + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        if (module->expert != expert || module->weight[0] == '\0') continue;
        if (module->ndim == 1) total += rounded(module->shape[0], sizeof(float));
        else total += mq_device_linear_nbytes(device, module, runtime->dtype, find(tensors, count, module->weight));
    }
    return total;
}

static int put_vector(mq_device *device, mq_arena *arena, void **out, const void *from, size_t nbytes, mq_error *err)
{
    *out = mq_arena_take(arena, nbytes);
    return device->backend->copy(*out, from, nbytes, device->copies, err);
}

/* The bias in the activations' dtype, through which it was rounded before. */
static int put_bias(mq_device *device, mq_arena *arena, mq_dtype dtype, const float *bias, int64_t count, void **out,
                    mq_error *err)
{
    mq_tensor view = mq_tensor_make((void *)(uintptr_t)bias, MQ_F32, 1, &count);
    const size_t nbytes = (size_t)count * mq_dtype_size(dtype);
    void *made = mq_alloc(nbytes);
    if (made == NULL) return mq_fail_memory(err, "a bias", nbytes);
    mq_read_row(made, dtype, &view, 0);
    const int rc = put_vector(device, arena, out, made, nbytes, err);
    mq_free(made);
    return rc;
}

/* Room for an expert before rows have all that is left; codes will need less. */
static void reserve_for_experts(mq_device *device, const mq_runtime *runtime, int64_t layer)
{
    mq_error err;
    if (runtime->layers[layer].experts == 0) return;
    mq_arena_reserve(device, &device->expert_weights, mq_device_weights_nbytes(device, runtime, layer, 0, NULL, 0),
                     "the weights of an expert", &err);
}

int mq_device_begin(mq_elsewhere *self, const mq_runtime *runtime, int64_t layer, int64_t expert,
                    const mq_named_tensor *tensors, size_t count, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_arena *arena = expert >= 0 ? &device->expert_weights : &device->layer_weights;
    const size_t nbytes = mq_device_weights_nbytes(device, runtime, layer, expert, tensors, count);
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    if (expert < 0) mq_device_drop_layer(self, device->layer);
    else mq_device_drop_expert(self);
    if (expert < 0) device->layer = layer;      /* and dropped where anything fails */
    const int came = mq_device_take_ahead(device, runtime, layer, expert, tensors, count);
    /* Rows may have taken all that layers before, which were smaller, left. */
    if (!came && nbytes > mq_device_available(device, arena)) mq_arena_drop(device, &device->work);
    if (!came) rc = mq_arena_reserve(device, arena, nbytes, "the weights of a layer", err);
    if (rc == MQ_OK && expert < 0) reserve_for_experts(device, runtime, layer);
    mq_device_leave(device, before);
    return rc;
}

/* The numbers of a weight, in the activations' dtype. */
static int put_numbers(mq_device *device, mq_arena *arena, const mq_module *module, const mq_tensor *weight,
                       mq_dtype dtype, mq_device_linear *linear, mq_error *err)
{
    const int64_t rows = module->shape[0], columns = module->shape[1];
    const size_t nbytes = (size_t)(rows * columns) * mq_dtype_size(dtype);
    linear->weight = (mq_cuda_matrix){mq_arena_take(arena, nbytes), dtype, rows, columns, columns};
    const int rc = mq_device_upload(device, weight, &linear->weight, err);
    return rc == MQ_OK ? mq_finding_weight(device, &linear->weight, module->weight, err) : rc;
}

static int put_weight(mq_device *device, mq_arena *arena, const mq_module *module, const mq_tensor *weight,
                      const mq_stored_weight *stored, mq_dtype dtype, mq_device_linear *linear, mq_error *err)
{
    mq_tensor numbers;
    if (stored == NULL) return put_numbers(device, arena, module, weight, dtype, linear, err);
    if (mq_device_can_pack(device, module->role, stored)) {
        void *memory = mq_arena_take(arena, mq_device_packed_nbytes(device, stored));
        return mq_device_put_packed(device, memory, module->weight, stored, dtype, linear, err);
    }
    int rc = mq_stored_numbers(stored, &numbers, module->weight, err);
    if (rc == MQ_OK) rc = put_numbers(device, arena, module, &numbers, dtype, linear, err);
    mq_free(numbers.data);
    return rc;
}

int mq_device_put_linear(mq_device *device, mq_arena *arena, mq_dtype dtype, const mq_given_linear *given,
                         mq_device_linear *linear, mq_error *err)
{
    const mq_module *module = given->module;
    const int rc = put_weight(device, arena, module, given->weight, given->stored, dtype, linear, err);
    if (rc != MQ_OK || given->bias == NULL) return rc;
    return put_bias(device, arena, dtype, given->bias, module->shape[0], &linear->bias, err);
}

int mq_device_load(mq_elsewhere *self, const mq_runtime *runtime, const mq_module *module, const mq_tensor *weight,
                   const mq_stored_weight *stored, const float *vector, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_arena *arena = module->expert >= 0 ? &device->expert_weights : &device->layer_weights;
    const int64_t rows = module->shape[0];
    mq_device_linear *linear = &device->linears[module->role];
    if (weight != NULL && linear->came_ahead) return MQ_OK;
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    if (weight == NULL) {
        void **norm = (void **)&device->norms[module->role];
        rc = put_vector(device, arena, norm, vector, (size_t)rows * sizeof *vector, err);
    } else {
        const mq_given_linear given = {module, weight, stored, vector};
        *linear = (mq_device_linear){0};
        rc = mq_device_put_linear(device, arena, runtime->dtype, &given, linear, err);
    }
    mq_device_leave(device, before);
    return rc;
}

static size_t branch_nbytes(const mq_device_linear *linear)
{
    const size_t size = mq_dtype_size(linear->weight.dtype);
    return rounded(linear->down.rows * linear->down.cols, size) + rounded(linear->up.rows * linear->up.cols, size);
}

int mq_device_load_low_rank(mq_elsewhere *self, const mq_module *module, const mq_tensor *down, const mq_tensor *up,
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
    }
    mq_device_leave(device, before);
    return rc;
}

void mq_device_drop_layer(mq_elsewhere *self, int64_t layer)
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
    mq_device_drop_changes(device);
    mq_device_drop_mixture(device);
    if (entered) mq_device_leave(device, before);
}

void mq_device_drop_expert(mq_elsewhere *self)
{
    static const mq_role roles[MQ_EXPERT_LINEARS] = {MQ_ROLE_GATE, MQ_ROLE_UP, MQ_ROLE_DOWN};
    mq_device *device = (mq_device *)(void *)self;
    if (device->expert_weights.used == 0) return;
    for (int i = 0; i < MQ_EXPERT_LINEARS; i++) device->linears[roles[i]] = (mq_device_linear){0};
    device->expert_weights.used = 0;
}
