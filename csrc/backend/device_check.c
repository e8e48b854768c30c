/* What a device does not compute so far: models that need it are refused by name, before anything is loaded. */
#include "backend/device_parts.h"

typedef struct need {
    int is_there;
    const char *what;
} need;

int mq_device_supports(const mq_runtime *runtime, mq_error *err)
{
    const mq_config *config = &runtime->config;
    const int own_ropes = (runtime->layer_ropes & 1u << MQ_LAYER_LOCAL_ROPE) != 0;
    const need needs[] = {
        {config->rope_type == MQ_ROPE_LONGROPE && own_ropes, "longrope, and layers with a rope of their own beside it"},
        {config->rope_type == MQ_ROPE_DYNAMIC && own_ropes, "dynamic rope, and layers with one of their own beside it"},
        {config->residual_multiplier == 0.0, "a multiplier of zero for what layers add"},
        {config->expert_groups > 32, "more than 32 groups of experts"},
        {config->head_dim > 256 || config->value_head_dim > 256, "heads of more than 256 numbers"},
    };
    for (size_t i = 0; i < MQ_COUNT(needs); i++)
        if (needs[i].is_there)
            return mq_fail(err, MQ_ERR_VALUE,
                           "this %s model is computed on the CPU only so far: it has %s, which is not there on a GPU; "
                           "load it without device='cuda'", runtime->family->name, needs[i].what);
    return MQ_OK;
}
