/* Weights of the part that comes next, which are sent to a device while another part is computed there: they have the
 * second of two arenas, if there is room for one. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

static void note_tensor(mq_weight_source *source, const mq_tensor *tensor)
{
    source->memory[0] = tensor->data;
    source->dtype = (int)tensor->dtype;
    for (int i = 0; i < tensor->ndim; i++) source->stride[i] = tensor->stride[i];
}

/* FNV-1a, of 64 bits. */
static uint64_t hash_of(uint64_t hash, const void *data, size_t nbytes)
{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < nbytes; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t scaling_of(const mq_block_job *job)
{
    uint64_t hash = hash_of(0xcbf29ce484222325u, &job->second_divisor, sizeof job->second_divisor);
    if (job->amax != NULL) hash = hash_of(hash + 1, job->amax, (size_t)job->amax_count * sizeof(float));
    if (job->block_amax != NULL)
        hash = hash_of(hash + 2, job->block_amax, (size_t)job->block_amax_count * sizeof(float));
    return hash;
}

static mq_weight_source source_of(const mq_named_tensor *weight, const mq_tensor *bias)
{
    mq_weight_source source;
    memset(&source, 0, sizeof source);      /* they are compared byte by byte */
    const mq_stored_weight *stored = weight->stored;
    if (stored == NULL) {
        note_tensor(&source, &weight->tensor);
    } else {
        source.scheme = (int)stored->job.scheme + 1;
        source.block_cols = stored->job.block_cols;
        source.rounded = (int)stored->dtype;
    }
    if (stored != NULL && stored->numbers.data != NULL) {
        note_tensor(&source, &stored->numbers);
        source.scaling = scaling_of(&stored->job);
    } else if (stored != NULL) {
        source.memory[0] = stored->parts.weight.data;
        source.memory[1] = stored->parts.scale.data;
        source.memory[2] = stored->parts.has_scale_2 ? stored->parts.scale_2.data : NULL;
    }
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

/* Whether all linears of the part are among the tensors: else some are still to be made. */
static int has_all(const mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                   size_t count)
{
    for (size_t i = runtime->layer_start[layer]; i < runtime->layer_start[layer + 1]; i++) {
        const mq_module *module = &runtime->modules[i];
        if (module->kind != MQ_MODULE_LINEAR || module->expert != expert) continue;
        if (find(tensors, count, module->weight) == NULL) return 0;
    }
    return 1;
}

/* What the part will need: if all of it is not known yet, no more than the part at work has, which is like it as a
 * rule. What does not fit does not come ahead. */
static size_t wanted_nbytes(const mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                            const mq_named_tensor *tensors, size_t count)
{
    const size_t most = mq_device_weights_nbytes(device, runtime, layer, expert, tensors, count);
    const size_t at_work = expert >= 0 ? device->expert_weights.nbytes : device->layer_weights.nbytes;
    return has_all(runtime, layer, expert, tensors, count) || at_work == 0 ? most : MQ_MIN(most, at_work);
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
    const size_t nbytes = wanted_nbytes(device, runtime, layer, expert, tensors, count);
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
    mq_arena *arena = &device->spare[module->expert >= 0];
    mq_device_linear linear = {.came_ahead = 1};
    int before;
    if (ahead->layer != module->layer || ahead->expert != module->expert || !is_known(&source) ||
        is_known(&ahead->sources[module->role]) ||
        arena->used + mq_device_linear_nbytes(device, module, runtime->dtype, weight->stored) > arena->nbytes)
        return MQ_OK;
    float *vector = bias != NULL ? mq_read_vector(bias, runtime->dtype, module->bias, err) : NULL;
    if (bias != NULL && vector == NULL) return err->code;
    int rc = mq_device_enter(device, &before, err);
    if (rc == MQ_OK) {
        const mq_given_linear given = {module, &weight->tensor, weight->stored, vector};
        rc = mq_device_put_linear(device, arena, runtime->dtype, &given, &linear, err);
        mq_device_leave(device, before);
    }
    mq_free(vector);
    if (rc != MQ_OK) return rc;
    ahead->linears[module->role] = linear;
    ahead->sources[module->role] = source;
    return MQ_OK;
}

int mq_device_take_ahead(mq_device *device, const mq_runtime *runtime, int64_t layer, int64_t expert,
                         const mq_named_tensor *tensors, size_t count)
{
    const mq_device_ahead *ahead = &device->ahead;
    mq_arena *at_work = expert >= 0 ? &device->expert_weights : &device->layer_weights;
    mq_arena *spare = &device->spare[expert >= 0];
    if (ahead->layer != layer || ahead->expert != expert) return 0;
    const int fits = spare->nbytes >= mq_device_weights_nbytes(device, runtime, layer, expert, tensors, count);
    const int came = fits && is_of(device, runtime, layer, expert, tensors, count);
    if (came) {
        const mq_arena there = *spare;
        *spare = *at_work;
        *at_work = there;
        for (int role = 0; role < MQ_ROLE_COUNT; role++)
            if (ahead->linears[role].came_ahead) device->linears[role] = ahead->linears[role];
    }
    mq_device_forget_ahead(&device->elsewhere);
    return came;
}

int mq_device_give_spare(mq_device *device)
{
    if (device->spare[0].memory == NULL && device->spare[1].memory == NULL) return 0;
    mq_device_forget_ahead(&device->elsewhere);
    for (int i = 0; i < 2; i++) mq_arena_drop(device, &device->spare[i]);     /* which waits for what is on its way */
    return 1;
}
