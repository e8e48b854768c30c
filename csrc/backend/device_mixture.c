/* What a layer's experts add up to, on the device where there is room: hidden states of all rows are sent once, rows of
 * each expert are gathered and added there, and the sums come back when all experts are done. */
#include "backend/device_parts.h"

static size_t half_nbytes(const mq_run *run)
{
    const size_t nbytes = (size_t)(run->rows * run->runtime->config.hidden_size) * mq_dtype_size(run->runtime->dtype);
    return MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGN_DEVICE);
}

void mq_device_drop_mixture(mq_device *device)
{
    mq_device_give(device, (void **)&device->mixture.memory, device->mixture.nbytes);
    device->mixture = (mq_device_mixture){0};
}

/* Half of what rows and weights ahead would have may be taken from them. */
static int is_room(const mq_device *device, size_t nbytes)
{
    const size_t room = mq_device_available(device, &device->work), ahead = mq_device_ahead_nbytes(device);
    return room > ahead && nbytes <= (room - ahead) / 2;
}

int mq_device_mixes(mq_device *device, const mq_run *run)
{
    mq_device_mixture *mixture = &device->mixture;
    const mq_backend *backend = device->backend;
    const size_t nbytes = mq_run_state_nbytes(run);
    mq_error err;
    if (mixture->run == run) return mixture->memory != NULL;
    mq_device_drop_mixture(device);
    *mixture = (mq_device_mixture){.run = run, .nbytes = 2 * half_nbytes(run)};
    if (!is_room(device, mixture->nbytes)) return 0;
    mq_arena_drop(device, &device->work);
    if (mq_device_take(device, (void **)&mixture->memory, mixture->nbytes, "sums of experts", &err) != MQ_OK) return 0;
    int rc = backend->copy(mixture->memory, run->hidden, nbytes, device->compute, &err);
    if (rc == MQ_OK)
        rc = backend->copy(mixture->memory + half_nbytes(run), run->dispatch.sums, nbytes, device->compute, &err);
    if (rc == MQ_OK) return 1;
    mq_device_give(device, (void **)&mixture->memory, mixture->nbytes);
    return 0;
}

static mq_cuda_matrix all_rows(const mq_run *run, void *memory)
{
    const int64_t width = run->runtime->config.hidden_size;
    return (mq_cuda_matrix){memory, run->runtime->dtype, run->rows, width, width};
}

int mq_device_gather(mq_device *device, const mq_cuda_matrix *out, const int64_t *tokens, mq_error *err)
{
    const mq_device_mixture *mixture = &device->mixture;
    const mq_cuda_rows_job job = {.x = all_rows(mixture->run, mixture->memory), .y = *out, .index = tokens};
    return device->backend->rows(&job, device->compute, err);
}

int mq_device_scatter(mq_device *device, const mq_cuda_matrix *made, const int64_t *tokens, const float *shares,
                      mq_error *err)
{
    const mq_device_mixture *mixture = &device->mixture;
    const mq_cuda_scatter_job job = {.x = *made, .index = tokens, .shares = shares,
                                     .y = all_rows(mixture->run, mixture->memory + half_nbytes(mixture->run))};
    return device->backend->scatter(&job, device->compute, err);
}

int mq_device_end_experts(mq_elsewhere *self, mq_run *run, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    const mq_device_mixture *mixture = &device->mixture;
    if (mixture->run != run) return MQ_OK;
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    if (mixture->memory != NULL) {
        rc = device->backend->copy(run->dispatch.sums, mixture->memory + half_nbytes(run), mq_run_state_nbytes(run),
                                   device->compute, err);
        if (rc == MQ_OK) rc = device->backend->stream_wait(device->compute, err);
    }
    mq_device_drop_mixture(device);
    mq_device_leave(device, before);
    return rc;
}
