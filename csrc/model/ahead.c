/* Weights on their way to another place than the host before they are wanted there. */
#include <string.h>

#include "model/runtime.h"

static const mq_named_tensor *given(const mq_ahead *it, const char *name)
{
    for (size_t i = 0; i < it->count; i++)
        if (strcmp(it->tensors[i].name, name) == 0) return &it->tensors[i];
    return NULL;
}

static int is_wanted(const mq_ahead *it, const mq_module *module)
{
    return module->kind == MQ_MODULE_LINEAR && module->expert == it->expert && given(it, module->weight) != NULL;
}

static int send_linear(mq_runtime *runtime, const mq_module *module, mq_error *err)
{
    const mq_ahead *it = &runtime->ahead;
    const mq_tensor *bias = NULL;
    const mq_named_tensor *weight = mq_find_weight(it->tensors, it->count, module, err);
    if (weight == NULL) return err->code;
    if (module->bias[0] != '\0') {
        bias = mq_find_tensor(it->tensors, it->count, module->bias, module->shape, 1, err);
        if (bias == NULL) return err->code;
    }
    return runtime->elsewhere->load_ahead(runtime->elsewhere, runtime, module, weight, bias, err);
}

int mq_runtime_begin_ahead(mq_runtime *runtime, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, int *room, mq_error *err)
{
    mq_elsewhere *there = runtime->elsewhere;
    *room = 0;
    runtime->ahead.layer = -1;
    if (there == NULL) return MQ_OK;
    int rc = mq_runtime_check_names(runtime, layer, expert, tensors, count, err);
    if (rc == MQ_OK) rc = there->begin_ahead(there, runtime, layer, expert, tensors, count, room, err);
    if (rc != MQ_OK || !*room) there->forget_ahead(there);
    else runtime->ahead = (mq_ahead){layer, expert, tensors, count, runtime->layer_start[layer]};
    return rc;
}

int mq_runtime_ahead(mq_runtime *runtime, int *more, mq_error *err)
{
    mq_ahead *it = &runtime->ahead;
    int rc = MQ_OK;
    *more = 0;
    if (it->layer < 0) return rc;
    const size_t end = runtime->layer_start[it->layer + 1];
    while (it->next < end && !is_wanted(it, &runtime->modules[it->next])) it->next++;
    if (it->next < end) rc = send_linear(runtime, &runtime->modules[it->next++], err);
    *more = rc == MQ_OK && it->next < end;
    if (rc != MQ_OK) mq_runtime_forget_ahead(runtime);
    else if (!*more) it->layer = -1;
    return rc;
}

void mq_runtime_forget_ahead(mq_runtime *runtime)
{
    runtime->ahead.layer = -1;
    if (runtime->elsewhere != NULL) runtime->elsewhere->forget_ahead(runtime->elsewhere);
}
