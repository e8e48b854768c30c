/* Weights move together: first their sizes are summed up, then each is copied and its own memory freed, so that no more
 * than one is there twice. */
#include <string.h>

#include "core/alloc.h"
#include "model/runtime.h"

typedef void (*weight_fn)(void *context, mq_linear_weight *weight, size_t nbytes);

typedef struct place {
    char *memory;
    size_t used;
} place;

static void visit(mq_linear_weight *weight, weight_fn fn, void *context)
{
    const mq_packed *packed = &weight->packed;
    if (packed->data == NULL || weight->lent) return;
    fn(context, weight, mq_packed_nbytes(packed));
}

static void visit_all(mq_runtime *runtime, mq_linear_weight *const *others, size_t count, weight_fn fn, void *context)
{
    for (int64_t i = 0; i < runtime->config.num_hidden_layers; i++)
        for (int role = 0; role < MQ_ROLE_COUNT; role++) {
            mq_linear *linear = &runtime->layers[i].linears[role];
            visit(&linear->weight, fn, context);
            visit(&linear->down, fn, context);
            visit(&linear->up, fn, context);
        }
    for (size_t i = 0; i < count; i++) visit(others[i], fn, context);
}

static void add_size(void *context, mq_linear_weight *weight, size_t nbytes)
{
    (void)weight;
    ((place *)context)->used += MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGNMENT);
}

static void move(void *context, mq_linear_weight *weight, size_t nbytes)
{
    place *to = context;
    char *at = to->memory + to->used;
    memcpy(at, weight->packed.data, nbytes);
    mq_free(weight->packed.data);
    weight->packed.data = at;
    weight->lent = 1;
    to->used += MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGNMENT);
}

int mq_runtime_gather(mq_runtime *runtime, mq_linear_weight *const *others, size_t count, mq_error *err)
{
    place to = {0};
    if (runtime->gathered != NULL) return MQ_OK;
    visit_all(runtime, others, count, add_size, &to);
    if (to.used == 0) return MQ_OK;
    to.memory = mq_alloc_huge(to.used);
    if (to.memory == NULL) return mq_fail_memory(err, "the weights", to.used);
    runtime->gathered = to.memory;
    to.used = 0;
    visit_all(runtime, others, count, move, &to);
    return MQ_OK;
}
