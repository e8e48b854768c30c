/* Keys and values are packed for the matrix product once, in blocks of tokens; a task is one head and one block of
 * queries, which walks over the blocks of keys that it may see. */
#include "model/attention.h"

#include <math.h>
#include <string.h>

#include "core/mq.h"
#include "core/pool.h"
#include "kernels/gemm.h"
#include "kernels/softmax.h"
#include "model/ops.h"

enum {
    KEYS = 128,                  /* of a block */
    QUERIES = 64,                /* of a task, fewer where value_dim is large */
    OUTPUTS = QUERIES * 256      /* float32 sums that a task holds */
};

/* Blocks of keys [kv_heads][blocks] and of values, packed. */
typedef struct attention {
    const mq_attention_args *args;
    mq_gemm_kind kind;
    const mq_softmax_kernels *softmax;
    int64_t blocks, query_blocks, queries;
    mq_packed *keys, *values;
    char *key_memory, *value_memory;
    size_t key_size, value_size;
} attention;

typedef struct task {
    const attention *attention;
    int64_t head, first, rows;                 /* queries [first, first + rows) */
    _Alignas(64) float scores[QUERIES * KEYS];
    _Alignas(64) float p[QUERIES * KEYS];      /* float32, or bfloat16 in its first half */
    _Alignas(64) float sums[OUTPUTS];
    mq_softmax softmax[QUERIES];
} task;

static size_t aligned(size_t size)
{
    return MQ_ROUND_UP(size, (size_t)64);
}

static attention prepare(const mq_attention_args *args, char *scratch)
{
    attention it = {.args = args, .kind = args->dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32,
                    .softmax = mq_softmax_table(), .blocks = MQ_CEIL_DIV(args->T_kv, (int64_t)KEYS)};
    int64_t fitting = OUTPUTS / MQ_MAX(args->value_dim, (int64_t)1);
    it.queries = MQ_MAX(MQ_MIN(fitting, (int64_t)QUERIES), (int64_t)1);
    it.query_blocks = MQ_CEIL_DIV(args->T, it.queries);
    it.key_size = aligned(mq_gemm_packed_size(it.kind, KEYS, args->head_dim));
    it.value_size = aligned(mq_gemm_packed_size(it.kind, args->value_dim, KEYS));
    if (scratch == NULL) return it;
    const int64_t count = args->kv_heads * it.blocks;
    it.keys = (mq_packed *)(void *)scratch;
    it.values = it.keys + count;
    it.key_memory = scratch + aligned((size_t)(2 * count) * sizeof(mq_packed));
    it.value_memory = it.key_memory + (size_t)count * it.key_size;
    return it;
}

size_t mq_attention_scratch(const mq_attention_args *args)
{
    attention it = prepare(args, NULL);
    size_t count = (size_t)(args->kv_heads * it.blocks);
    return aligned(2 * count * sizeof(mq_packed)) + count * (it.key_size + it.value_size);
}

static const void *element(const mq_attention_args *args, const void *base, int64_t index)
{
    return (const char *)base + index * (int64_t)mq_dtype_size(args->dtype);
}

static void pack_blocks(void *argument, int64_t begin, int64_t end, int worker)
{
    const attention *it = argument;
    const mq_attention_args *args = it->args;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / it->blocks, first = i % it->blocks * KEYS;
        const int64_t count = MQ_MIN(args->T_kv - first, (int64_t)KEYS);
        const void *k = element(args, args->k, first * args->ldk + mq_attention_head(args, head, args->head_dim));
        const void *v = element(args, args->v, first * args->ldv + mq_attention_head(args, head, args->value_dim));
        it->keys[i].data = it->key_memory + (size_t)i * it->key_size;
        it->values[i].data = it->value_memory + (size_t)i * it->value_size;
        mq_gemm_pack(it->kind, k, args->dtype, count, args->head_dim, args->ldk, &it->keys[i]);
        mq_gemm_pack_transposed(it->kind, v, args->dtype, args->value_dim, count, args->ldv, &it->values[i]);
    }
}

void mq_attention_hide(const mq_attention_args *args, const mq_attention_block *block)
{
    const int64_t start = block->start, width = block->width;
    for (int64_t i = 0; i < block->rows; i++) {
        float *row = block->scores + i * block->ld;
        const int64_t query = block->first + i;
        int64_t low = MQ_MIN(MQ_MAX(mq_attention_first_key(args, query) - start, (int64_t)0), width);
        int64_t high = MQ_MIN(MQ_MAX(mq_attention_last_key(args, query) - start, (int64_t)0), width);
        for (int64_t j = 0; j < low; j++) row[j] = -INFINITY;
        for (int64_t j = high; j < width; j++) row[j] = -INFINITY;
        if (args->key_mask == NULL) continue;
        for (int64_t j = low; j < high; j++)
            if (!args->key_mask[start + j]) row[j] = -INFINITY;
    }
}

void mq_attention_cap(const mq_attention_args *args, const mq_attention_block *block)
{
    for (int64_t i = 0; args->softcap > 0.0f && i < block->rows; i++)
        mq_softcap_forward(block->scores + i * block->ld, args->softcap, block->width);
}

/* Scores [rows, width] of the block of keys from start; what a query may not see becomes minus infinity. */
static void score(task *task, const mq_packed *keys, int64_t start, int64_t width)
{
    const attention *it = task->attention;
    const mq_attention_args *args = it->args;
    mq_packed seen = *keys;
    seen.n = MQ_MIN(seen.n, width);
    mq_gemm_args product = {
        .m = task->rows, .a = element(args, args->q, task->first * args->ldq + task->head * args->head_dim),
        .a_dtype = args->dtype, .lda = args->ldq, .b = &seen, .c = task->scores, .c_dtype = MQ_F32, .ldc = KEYS,
        .alpha = args->scale,
    };
    mq_attention_block block = {.scores = task->scores, .ld = KEYS, .first = task->first, .rows = task->rows,
                                .start = start, .width = width};
    mq_gemm_run(&product);
    mq_attention_cap(args, &block);
    mq_attention_hide(args, &block);
}

/* Scores to probabilities, relative to the largest score so far; the sums follow when that changes. */
static void weigh(task *task, int64_t width)
{
    const attention *it = task->attention;
    const int64_t value_dim = it->args->value_dim, size = (int64_t)mq_dtype_size(it->args->dtype);
    float factors[QUERIES];
    mq_softmax_block block = {
        .scores = task->scores, .lds = KEYS, .rows = task->rows, .n = width, .p = task->p, .dtype = it->args->dtype,
        .ldp = KEYS, .factors = factors,
    };
    it->softmax->update(task->softmax, &block);
    for (int64_t i = 0; i < task->rows; i++) {
        float *sums = task->sums + i * value_dim;
        if (width < KEYS) memset((char *)task->p + (i * KEYS + width) * size, 0, (size_t)((KEYS - width) * size));
        if (factors[i] != 1.0f) it->softmax->scale(sums, factors[i], value_dim, sums, MQ_F32);
    }
}

static void add_values(task *task, const mq_packed *values)
{
    const mq_attention_args *args = task->attention->args;
    mq_gemm_args product = {
        .m = task->rows, .a = task->p, .a_dtype = args->dtype, .lda = KEYS, .b = values, .c = task->sums,
        .c_dtype = MQ_F32, .ldc = args->value_dim, .accumulate = 1, .alpha = 1.0f,
    };
    mq_gemm_run(&product);
}

/* out = sums / sum of probabilities, zero where there were none. */
static void finish(const task *task)
{
    const attention *it = task->attention;
    const mq_attention_args *args = it->args;
    for (int64_t i = 0; i < task->rows; i++) {
        const float sum = task->softmax[i].sum;
        const int64_t at = (task->first + i) * args->ldo + task->head * args->value_dim;
        char *out = (char *)args->out + at * (int64_t)mq_dtype_size(args->dtype);
        const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
        it->softmax->scale(task->sums + i * args->value_dim, factor, args->value_dim, out, args->dtype);
        if (args->maxima == NULL) continue;
        args->maxima[task->head * args->T + task->first + i] = sum == 0.0f ? 0.0f : task->softmax[i].max;
        args->factors[task->head * args->T + task->first + i] = factor;
    }
}

static void attend(task *task)
{
    const attention *it = task->attention;
    const mq_attention_args *args = it->args;
    const int64_t group = task->head / (args->heads / args->kv_heads);
    const int64_t low = mq_attention_first_key(args, task->first),
                  high = mq_attention_last_key(args, task->first + task->rows - 1);
    const mq_softmax none = {-INFINITY, 0.0f}, sink = {args->sinks ? args->sinks[task->head] : 0.0f, 1.0f};
    for (int64_t i = 0; i < task->rows; i++) task->softmax[i] = args->sinks ? sink : none;
    memset(task->sums, 0, (size_t)(task->rows * args->value_dim) * sizeof *task->sums);
    for (int64_t block = low / KEYS; block * KEYS < high; block++) {
        const int64_t index = group * it->blocks + block;
        const int64_t seen = MQ_MIN(high - block * KEYS, (int64_t)KEYS);
        const int64_t width = MQ_ROUND_UP(seen, (int64_t)MQ_SOFTMAX_LANES);
        score(task, &it->keys[index], block * KEYS, width);
        weigh(task, width);
        add_values(task, &it->values[index]);
    }
    finish(task);
}

static void attend_tasks(void *argument, int64_t begin, int64_t end, int worker)
{
    const attention *it = argument;
    task task;
    (void)worker;
    task.attention = it;
    for (int64_t index = begin; index < end; index++) {
        /* Heads of one group follow each other, and late queries, which see most, come first. */
        task.head = index % it->args->heads;
        task.first = (it->query_blocks - 1 - index / it->args->heads) * it->queries;
        task.rows = MQ_MIN(it->queries, it->args->T - task.first);
        attend(&task);
    }
}

void mq_attention_forward(const mq_attention_args *args, void *scratch)
{
    attention it = prepare(args, scratch);
    mq_parallel_for(args->kv_heads * it.blocks, 1, pack_blocks, &it);
    mq_parallel_for(args->heads * it.query_blocks, 1, attend_tasks, &it);
}
