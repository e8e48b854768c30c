/* Attention of one token over keys and values that lie in a cache. The products are those of mq_attention_forward, but
 * scores are computed the other way round, with the queries packed and the keys where they are: every key and value is
 * read once. A task is one head of keys and one block of positions, for all heads of queries that read it; what blocks
 * find is put together in order (Dao et al. 2023, "Flash-Decoding"). */
#include <math.h>
#include <string.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/attention.h"
#include "model/ops.h"

enum { KEYS = 256 };             /* of a block */

/* Of a task are, in floats: largest score, sum and output of every head that shares its keys, scores by head and by
 * key; and what is packed for its products, one after the other. */
typedef struct step {
    const mq_attention_args *args;
    const mq_typed_row_ops *kernels;
    mq_gemm_kind kind;
    int64_t blocks, group;
    char *memory;
    size_t floats, task_size;
} step;

/* What one block found for one head. */
typedef struct part {
    float *max, *sum, *out;
} part;

static step prepare(const mq_attention_args *args, void *scratch)
{
    step it = {.args = args, .kernels = mq_row_ops_of(args->dtype), .memory = scratch,
               .kind = args->dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32,
               .blocks = MQ_CEIL_DIV(args->T_kv, (int64_t)KEYS), .group = args->heads / args->kv_heads};
    const size_t queries = mq_gemm_packed_size(it.kind, it.group, args->head_dim);
    const size_t values = mq_gemm_packed_size(it.kind, args->value_dim, KEYS);
    it.floats = (size_t)MQ_ROUND_UP(it.group * (2 + args->value_dim + 2 * KEYS), (int64_t)16);
    it.task_size = MQ_ROUND_UP(it.floats * sizeof(float) + MQ_MAX(queries, values), (size_t)64);
    return it;
}

size_t mq_attention_step_scratch(const mq_attention_args *args)
{
    step it = prepare(args, NULL);
    return (size_t)(args->kv_heads * it.blocks) * it.task_size;
}

static part part_of(const step *it, int64_t task, int64_t member)
{
    float *at = (float *)(void *)(it->memory + (size_t)task * it->task_size);
    return (part){.max = at + member, .sum = at + it->group + member,
                  .out = at + 2 * it->group + member * it->args->value_dim};
}

static const char *element(const mq_attention_args *args, const void *base, int64_t index)
{
    return (const char *)base + index * (int64_t)mq_dtype_size(args->dtype);
}

static mq_packed packed_of(const step *it, int64_t task)
{
    return (mq_packed){.data = it->memory + (size_t)task * it->task_size + it->floats * sizeof(float)};
}

/* scores (n) of one query and n keys become probabilities relative to the largest. */
static void weigh(float *scores, int64_t n, const part *found)
{
    float sum = 0.0f;
    *found->max = mq_row_ops_table()->max(scores, n);
    mq_row_ops_table()->exp_shifted(scores, scores, n, *found->max, 1.0f);
    for (int64_t i = 0; i < n; i++) sum += scores[i];
    *found->sum = sum;
}

/* scores [group][KEYS] of n keys; by_key: [n][group], as the product has them. */
static void score(const step *it, int64_t task, const char *k, int64_t n, float *by_key, float *scores)
{
    const mq_attention_args *args = it->args;
    const char *q = element(args, args->q, task / it->blocks * it->group * args->head_dim);
    mq_packed queries = packed_of(it, task);
    mq_gemm_args product = {.m = n, .a = k, .a_dtype = args->dtype, .lda = args->ldk, .b = &queries, .c = by_key,
                            .c_dtype = MQ_F32, .ldc = it->group, .alpha = args->scale};
    mq_gemm_pack(it->kind, q, args->dtype, it->group, args->head_dim, args->head_dim, &queries);
    mq_gemm_run(&product);
    if (args->softcap > 0.0f) mq_softcap_forward(by_key, args->softcap, n * it->group);
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < it->group; i++) scores[i * KEYS + j] = by_key[j * it->group + i];
}

/* The block's share in the output of every head; in bfloat16 probabilities are rounded on the way. */
static void add_values(const step *it, int64_t task, const char *v, int64_t n, const float *scores)
{
    const mq_attention_args *args = it->args;
    mq_packed values = packed_of(it, task);
    mq_gemm_args product = {.m = it->group, .a = scores, .a_dtype = MQ_F32, .lda = KEYS, .b = &values,
                            .c = part_of(it, task, 0).out, .c_dtype = MQ_F32, .ldc = args->value_dim, .alpha = 1.0f};
    mq_gemm_pack_transposed(it->kind, v, args->dtype, args->value_dim, n, args->ldv, &values);
    mq_gemm_run(&product);
}

static void attend_block(const step *it, int64_t task)
{
    const mq_attention_args *args = it->args;
    const int64_t kv_head = task / it->blocks, first = task % it->blocks * KEYS;
    const int64_t low = MQ_MAX(mq_attention_first_key(args, 0), first);
    const int64_t n = MQ_MIN(mq_attention_last_key(args, 0), first + KEYS) - low;
    float *scores = part_of(it, task, 0).out + it->group * args->value_dim, *by_key = scores + it->group * KEYS;
    const char *k = element(args, args->k, low * args->ldk + mq_attention_head(args, kv_head, args->head_dim));
    const char *v = element(args, args->v, low * args->ldv + mq_attention_head(args, kv_head, args->value_dim));
    if (n <= 0) {       /* the window begins behind it */
        for (int64_t i = 0; i < it->group; i++) *part_of(it, task, i).sum = 0.0f;
        memset(part_of(it, task, 0).out, 0, (size_t)(it->group * args->value_dim) * sizeof(float));
        return;
    }
    score(it, task, k, n, by_key, scores);
    for (int64_t i = 0; i < it->group; i++) {
        const part found = part_of(it, task, i);
        weigh(scores + i * KEYS, n, &found);
    }
    add_values(it, task, v, n, scores);
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
    float largest = args->sinks ? args->sinks[head] : -INFINITY;
    for (int64_t block = 0; block < it->blocks; block++) {
        const part found = part_of(it, first + block, member);
        if (*found.sum > 0.0f) largest = MQ_MAX(largest, *found.max);
    }
    float sum = args->sinks ? expf(args->sinks[head] - largest) : 0.0f;
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
