/* Weights of the part that comes next, which are sent to a device while another part is computed there: they have the
 * second of two arenas, if there is room for one. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

static void note_numbers(mq_weight_source *source, const mq_tensor *tensor)
{
    source->memory[0] = tensor->data;
    source->numbers = (int)tensor->dtype + 1;
    for (int i = 0; i < tensor->ndim; i++) source->stride[i] = tensor->stride[i];
}

/* FNV-1a (Fowler, Noll and Vo), by words: amax are others' memory, and few beside the weight's numbers. */
static uint64_t digest_of(uint64_t digest, const float *values, int64_t count)
{
    for (int64_t i = 0; values != NULL && i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        digest = (digest ^ bits) * 0x100000001b3u;
    }
    return (digest ^ (uint64_t)count) * 0x100000001b3u;
}

static void note_stored(mq_weight_source *source, const mq_stored_weight *stored)
{
    const mq_block_job *job = &stored->job;
    if (stored->numbers.data != NULL) {
        note_numbers(source, &stored->numbers);
    } else {
        source->memory[0] = stored->parts.weight.data;
        source->memory[1] = stored->parts.scale.data;
        source->memory[2] = stored->parts.has_scale_2 ? stored->parts.scale_2.data : NULL;
    }
    source->scheme = (int)job->scheme + 1;
    source->dtype = (int)stored->dtype;
    source->block_cols = job->block_cols;
    source->second_divisor = job->second_divisor;
    source->scaling = digest_of(0xcbf29ce484222325u, job->amax, job->amax != NULL ? job->amax_count : -1);
    source->scaling = digest_of(source->scaling, job->block_amax, job->block_amax != NULL ? job->block_amax_count : -1);
}

static mq_weight_source source_of(const mq_named_tensor *weight, const mq_tensor *bias)
{
    mq_weight_source source;
    memset(&source, 0, sizeof source);      /* they are compared byte by byte */
    if (weight->stored == NULL) note_numbers(&source, &weight->tensor);
    else note_stored(&source, weight->stored);
    source.memory[3] = bias != NULL ? bias->data : NULL;
    return source;
}

static int is_known(const mq_weight_source *source)
{
    return source->memory[0] != NULL;
}

static const mq_named_tensor *find(const mq_named_tensor *tensors, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(tensors[i].name, name) == 0) return &tensors[i];
    return NULL;
}

/* Whether all that came ahead was made of these tensors. */
static int is_of(const mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                 const mq_named_tensor *tensors, size_t count)
{
    const mq_device_ahead *ahead = &device->ahead;
    if (ahead->layer != layer || ahead->expert != expert) return 0;
    for (size_t i = runtime->layer_start[layer]; i < runtime->layer_start[layer + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        const mq_weight_source *had = &ahead->sources[module->role];
        if (module->kind != MQ_MODULE_LINEAR || module->expert != expert || !is_known(had)) continue;
        const mq_named_tensor *weight = find(tensors, count, module->weight);
        const mq_named_tensor *bias = module->bias[0] != '\0' ? find(tensors, count, module->bias) : NULL;
        if (weight == NULL) return 0;
        const mq_weight_source now = source_of(weight, bias != NULL ? &bias->tensor : NULL);
        if (memcmp(&now, had, sizeof now) != 0) return 0;
    }
    return 1;
}

void mq_device_forget_ahead(mq_elsewhere *self)
{
    mq_device *device = (mq_device *)(void *)self;
    device->ahead.layer = -1;
    memset(device->ahead.linears, 0, sizeof device->ahead.linears);
    memset(device->ahead.sources, 0, sizeof device->ahead.sources);
}

int mq_device_begin_ahead(mq_elsewhere *self, const mq_runtime *runtime, int64_t layer, int64_t expert,
                          const mq_named_tensor *tensors, size_t count, int *room, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_arena *arena = &device->spare[expert >= 0];
    *room = 1;
    if (is_of(device, runtime, layer, expert, tensors, count)) return MQ_OK;
    mq_device_forget_ahead(self);
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    const size_t nbytes = mq_device_weights_nbytes(device, runtime, layer, expert, tensors, count);
    *room = nbytes <= arena->nbytes || device->held - arena->nbytes + nbytes <= device->budget;
    if (*room) rc = mq_arena_reserve(device, arena, nbytes, "the weights of the next layer", err);
    if (rc == MQ_ERR_MEMORY) *room = 0;     /* others have the device's memory */
    if (rc == MQ_OK && *room) {
        device->ahead.layer = layer;
        device->ahead.expert = expert;
    }
    mq_device_leave(device, before);
    return *room ? rc : MQ_OK;
}

int mq_device_load_ahead(mq_elsewhere *self, const mq_runtime *runtime, const mq_module *module,
                         const mq_named_tensor *weight, const mq_tensor *bias, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_device_ahead *ahead = &device->ahead;
    const mq_weight_source source = source_of(weight, bias);
    mq_device_linear linear = {.came_ahead = 1};
    int before;
    if (ahead->layer != module->layer || ahead->expert != module->expert || !is_known(&source) ||
        is_known(&ahead->sources[module->role]))
        return MQ_OK;
    float *vector = bias != NULL ? mq_read_vector(bias, runtime->dtype, module->bias, err) : NULL;
    if (bias != NULL && vector == NULL) return err->code;
    int rc = mq_device_enter(device, &before, err);
    if (rc == MQ_OK) {
        const mq_given_linear given = {module, &weight->tensor, weight->stored, vector};
        rc = mq_device_put_linear(device, &device->spare[module->expert >= 0], runtime->dtype, &given, &linear, err);
        mq_device_leave(device, before);
    }
    mq_free(vector);
    if (rc != MQ_OK) return rc;
    ahead->linears[module->role] = linear;
    ahead->sources[module->role] = source;
    return MQ_OK;
}

int mq_device_take_ahead(mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                         const mq_named_tensor *tensors, size_t count, int *came, mq_error *err)
{
    const mq_device_ahead *ahead = &device->ahead;
    mq_arena *at_work = expert >= 0 ? &device->expert_weights : &device->layer_weights;
    mq_arena *spare = &device->spare[expert >= 0];
    if (ahead->layer != layer || ahead->expert != expert) return MQ_OK;
    const int fits = spare->nbytes >= mq_device_weights_nbytes(device, runtime, layer, expert, tensors, count);
    int rc = MQ_OK;
    if (fits && is_of(device, runtime, layer, expert, tensors, count)) {
        const mq_arena there = *spare;
        *spare = *at_work;
        *at_work = there;
        *came = 1;
        for (int role = 0; role < MQ_ROLE_COUNT; role++)
            if (ahead->linears[role].came_ahead) device->linears[role] = ahead->linears[role];
        rc = device->backend->event_record(device->loaded, device->copies, err);
    }
    mq_device_forget_ahead(&device->elsewhere);
    return rc;
}

int mq_device_give_spare(mq_device *device)
{
    mq_error err;
    if (device->spare[0].memory == NULL && device->spare[1].memory == NULL) return 0;
    mq_device_forget_ahead(&device->elsewhere);
    device->backend->stream_wait(device->copies, &err);
    for (int i = 0; i < 2; i++) mq_arena_drop(device, &device->spare[i]);
    return 1;
}
