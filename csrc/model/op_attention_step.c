/* Attention of one token over keys and values that lie in a cache: nothing is packed, and every key and value is read
 * once. A task is one head of keys and one block of positions, for all heads of queries that read it; what blocks find
 * is put together in order (Dao et al. 2023, "Flash-Decoding"). */
#include <math.h>
#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/attention.h"
#include "model/ops.h"

enum { KEYS = 256 };             /* of a block */

/* Scratch of a task, in floats: queries and sums of the heads that share its keys, scores, one row of values. */
typedef struct step {
    const mq_attention_args *args;
    const mq_typed_row_ops *kernels;
    int64_t blocks, group;
    float *memory;
    size_t task_floats;
} step;

/* What one block found for one head. */
typedef struct part {
    float *max, *sum, *out;
} part;

static step prepare(const mq_attention_args *args, void *scratch)
{
    step it = {.args = args, .kernels = mq_row_ops_of(args->dtype), .memory = scratch,
               .blocks = MQ_CEIL_DIV(args->T_kv, (int64_t)KEYS), .group = args->heads / args->kv_heads};
    const int64_t each = 2 + args->value_dim + args->head_dim + KEYS;
    it.task_floats = (size_t)MQ_ROUND_UP(it.group * each + args->value_dim, (int64_t)16);
    return it;
}

size_t mq_attention_step_scratch(const mq_attention_args *args)
{
    step it = prepare(args, NULL);
    return (size_t)(args->kv_heads * it.blocks) * it.task_floats * sizeof(float);
}

static part part_of(const step *it, int64_t task, int64_t member)
{
    float *at = it->memory + (size_t)task * it->task_floats;
    return (part){.max = at + member, .sum = at + it->group + member,
                  .out = at + 2 * it->group + member * it->args->value_dim};
}

static const char *element(const mq_attention_args *args, const void *base, int64_t index)
{
    return (const char *)base + index * (int64_t)mq_dtype_size(args->dtype);
}

/* scores (n) of one query and n keys become probabilities relative to the largest; in bfloat16 they are rounded before
 * they meet the values, as in mq_attention_forward. */
static void weigh(const step *it, float *scores, int64_t n, const part *found)
{
    float rounded[KEYS];
    float sum = 0.0f;
    *found->max = mq_row_ops_table()->max(scores, n);
    mq_row_ops_table()->exp_shifted(scores, scores, n, *found->max, 1.0f);
    for (int64_t i = 0; i < n; i++) sum += scores[i];
    *found->sum = sum;
    if (it->args->dtype == MQ_F32) return;
    it->kernels->from_f32(rounded, scores, n);
    it->kernels->to_f32(scores, rounded, n);
}

static void attend_block(const step *it, int64_t task)
{
    const mq_attention_args *args = it->args;
    const int64_t kv_head = task / it->blocks, first = task % it->blocks * KEYS;
    const int64_t low = MQ_MAX(mq_attention_first_key(args, 0), first);
    const int64_t n = MQ_MIN(mq_attention_last_key(args, 0), first + KEYS) - low;
    float *queries = part_of(it, task, it->group).out, *scores = queries + it->group * args->head_dim;
    float *value = scores + it->group * KEYS;
    const char *k = element(args, args->k, low * args->ldk + kv_head * args->head_dim);
    const char *v = element(args, args->v, low * args->ldv + kv_head * args->value_dim);
    const char *q = element(args, args->q, kv_head * it->group * args->head_dim);
    it->kernels->to_f32(queries, q, it->group * args->head_dim);
    for (int64_t i = 0; i < it->group * args->head_dim; i++) queries[i] *= args->scale;
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < it->group; i++)
            scores[i * KEYS + j] = it->kernels->dot(queries + i * args->head_dim, element(args, k, j * args->ldk),
                                                    args->head_dim);
    for (int64_t i = 0; i < it->group; i++) {
        part found = part_of(it, task, i);
        *found.sum = 0.0f;
        memset(found.out, 0, (size_t)args->value_dim * sizeof *found.out);
        if (n > 0) weigh(it, scores + i * KEYS, n, &found);
    }
    for (int64_t j = 0; j < n; j++) {
        it->kernels->to_f32(value, element(args, v, j * args->ldv), args->value_dim);
        for (int64_t i = 0; i < it->group; i++)
            mq_row_ops_table()->add_scaled(part_of(it, task, i).out, value, args->value_dim, scores[i * KEYS + j]);
    }
}

static void attend_blocks(void *argument, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    for (int64_t task = begin; task < end; task++) attend_block(argument, task);
}

/* The blocks of one head, in order: into the first of them, then out. A query sees at least itself. */
static void fold_head(const step *it, int64_t head)
{
    const mq_attention_args *args = it->args;
    const int64_t first = head / it->group * it->blocks, member = head % it->group;
    const part total = part_of(it, first, member);
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t block = 0; block < it->blocks; block++) {
        const part found = part_of(it, first + block, member);
        if (*found.sum > 0.0f) largest = MQ_MAX(largest, *found.max);
    }
    for (int64_t block = 0; block < it->blocks; block++) {
        const part found = part_of(it, first + block, member);
        const float factor = *found.sum > 0.0f ? expf(*found.max - largest) : 0.0f;
        sum += factor * *found.sum;
        if (block > 0) mq_row_ops_table()->add_scaled(total.out, found.out, args->value_dim, factor);
        else for (int64_t i = 0; i < args->value_dim; i++) total.out[i] *= factor;
    }
    for (int64_t i = 0; i < args->value_dim; i++) total.out[i] /= sum;
    char *out = (char *)args->out + (size_t)(head * args->value_dim) * mq_dtype_size(args->dtype);
    it->kernels->from_f32(out, total.out, args->value_dim);
}

static void fold_heads(void *argument, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    for (int64_t head = begin; head < end; head++) fold_head(argument, head);
}

void mq_attention_step(const mq_attention_args *args, void *scratch)
{
    step it = prepare(args, scratch);
    mq_parallel_for(args->kv_heads * it.blocks, 1, attend_blocks, &it);
    mq_parallel_for(args->heads, mq_row_grain(it.blocks * args->value_dim), fold_heads, &it);
}
