/* With P = softmax(S), S = scale * Q K^T, O = P V: dV = P^T dO, dP = dO V^T, dS = P * (dP - D), D = sum of dO * O per
 * query, dQ = scale * dS K, dK = scale * dS^T Q (Dao et al. 2022, algorithm 4). A sink is a score with no value: of
 * its probability p, the gradient is the sum of -p * D. */
#include <math.h>
#include <string.h>

#include "core/pool.h"
#include "kernels/gemm.h"
#include "kernels/row_ops.h"
#include "model/attention.h"
#include "model/ops.h"

enum { KEYS = 128, QUERIES = 64 };   /* of a block */

/* Blocks [kv_heads][blocks] of keys, values and transposed keys, packed; and what each head has for itself. */
typedef struct attention {
    const mq_attention_args *args;
    const mq_attention_gradient *gradient;
    mq_gemm_kind kind;
    int64_t blocks;
    size_t key_size, value_size, back_size, query_size, out_size;   /* bytes of a packed block */
    mq_packed *keys, *values, *back;
    char *block_memory;              /* [kv_heads][blocks] of the three */
    char *head_memory;               /* [heads] of packed queries and d_out */
    float *d_k, *d_v;                /* [heads, T_kv, head_dim], [heads, T_kv, value_dim] */
} attention;

typedef struct task {
    const attention *attention;
    int64_t head, first, rows;       /* queries [first, first + rows) */
    mq_packed queries, d_out;        /* transposed */
    float means[QUERIES];            /* D */
    _Alignas(64) float p[QUERIES * KEYS];
    _Alignas(64) float d_p[QUERIES * KEYS];
    _Alignas(64) float turned[QUERIES * KEYS];
} task;

static size_t aligned(size_t size)
{
    return MQ_ROUND_UP(size, (size_t)64);
}

/* Cuts scratch into what the attention needs, or only counts it if that is NULL. */
static size_t prepare(attention *it, char *scratch)
{
    const mq_attention_args *args = it->args;
    it->kind = args->dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    it->blocks = MQ_CEIL_DIV(args->T_kv, (int64_t)KEYS);
    it->key_size = aligned(mq_gemm_packed_size(it->kind, KEYS, args->head_dim));
    it->value_size = aligned(mq_gemm_packed_size(it->kind, KEYS, args->value_dim));
    it->back_size = aligned(mq_gemm_packed_size(it->kind, args->head_dim, KEYS));
    it->query_size = aligned(mq_gemm_packed_size(it->kind, args->head_dim, QUERIES));
    it->out_size = aligned(mq_gemm_packed_size(it->kind, args->value_dim, QUERIES));
    const size_t count = (size_t)(args->kv_heads * it->blocks), heads = (size_t)args->heads;
    const size_t sizes[] = {
        3 * count * sizeof(mq_packed), count * (it->key_size + it->value_size + it->back_size),
        heads * (it->query_size + it->out_size), heads * (size_t)(args->T_kv * args->head_dim) * sizeof(float),
        heads * (size_t)(args->T_kv * args->value_dim) * sizeof(float),
    };
    char *parts[MQ_COUNT(sizes)];
    size_t used = 0;
    for (size_t i = 0; i < MQ_COUNT(sizes); used += aligned(sizes[i++])) parts[i] = scratch ? scratch + used : NULL;
    if (scratch == NULL) return used;
    it->keys = (mq_packed *)(void *)parts[0];
    it->values = it->keys + count;
    it->back = it->values + count;
    it->block_memory = parts[1];
    it->head_memory = parts[2];
    it->d_k = (float *)(void *)parts[3];
    it->d_v = (float *)(void *)parts[4];
    return used;
}

size_t mq_attention_backward_scratch(const mq_attention_args *args)
{
    attention it = {.args = args};
    return prepare(&it, NULL);
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
        const void *k = element(args, args->k, first * args->ldk + head * args->head_dim);
        const void *v = element(args, args->v, first * args->ldv + head * args->value_dim);
        it->keys[i].data = it->block_memory + (size_t)i * (it->key_size + it->value_size + it->back_size);
        it->values[i].data = (char *)it->keys[i].data + it->key_size;
        it->back[i].data = (char *)it->values[i].data + it->value_size;
        mq_gemm_pack(it->kind, k, args->dtype, count, args->head_dim, args->ldk, &it->keys[i]);
        mq_gemm_pack(it->kind, v, args->dtype, count, args->value_dim, args->ldv, &it->values[i]);
        mq_gemm_pack_transposed(it->kind, k, args->dtype, args->head_dim, count, args->ldk, &it->back[i]);
    }
}

/* c (rows, b->n) = alpha * a b^T, or += . */
typedef struct product {
    const void *a;
    mq_dtype dtype;
    int64_t rows, lda;
    const mq_packed *b;
    float *c;
    int64_t ldc;
    int accumulate;
    float alpha;
} product;

static void multiply(const product *it)
{
    mq_gemm_args args = {
        .m = it->rows, .a = it->a, .a_dtype = it->dtype, .lda = it->lda, .b = it->b, .c = it->c, .c_dtype = MQ_F32,
        .ldc = it->ldc, .accumulate = it->accumulate, .alpha = it->alpha,
    };
    mq_gemm_run(&args);
}

static const float *d_out_of(const task *task)
{
    const mq_attention_args *args = task->attention->args;
    return task->attention->gradient->d_out + (task->first * args->heads + task->head) * args->value_dim;
}

/* What a block of queries adds to the gradient of the head's sink. */
static double sink_of(const task *task)
{
    const mq_attention_args *args = task->attention->args;
    const float sink = args->sinks[task->head];
    const int64_t query = task->head * args->T + task->first;
    double sum = 0.0;
    for (int64_t i = 0; i < task->rows; i++)
        sum -= (double)(expf(sink - args->maxima[query + i]) * args->factors[query + i] * task->means[i]);
    return sum;
}

/* What a block of queries brings: D, and both operands that keys are multiplied with on their way. */
static void enter_queries(task *task)
{
    const attention *it = task->attention;
    const mq_attention_args *args = it->args;
    const int64_t ld_out = args->heads * args->value_dim;
    const void *q = element(args, args->q, task->first * args->ldq + task->head * args->head_dim);
    for (int64_t i = 0; i < task->rows; i++) {
        const void *out = element(args, args->out, (task->first + i) * args->ldo + task->head * args->value_dim);
        task->means[i] = mq_row_ops_of(args->dtype)->dot(d_out_of(task) + i * ld_out, out, args->value_dim);
    }
    task->queries.data = it->head_memory + (size_t)task->head * (it->query_size + it->out_size);
    task->d_out.data = (char *)task->queries.data + it->query_size;
    mq_gemm_pack_transposed(it->kind, q, args->dtype, args->head_dim, task->rows, args->ldq, &task->queries);
    mq_gemm_pack_transposed(it->kind, d_out_of(task), MQ_F32, args->value_dim, task->rows, ld_out, &task->d_out);
}

/* p = P and d_p = dS of the block of keys from start. */
static void differentiate(task *task, int64_t index, int64_t start, int64_t width)
{
    const attention *it = task->attention;
    const mq_attention_args *args = it->args;
    const int64_t query = task->head * args->T + task->first;
    product scores = {
        .a = element(args, args->q, task->first * args->ldq + task->head * args->head_dim), .dtype = args->dtype,
        .rows = task->rows, .lda = args->ldq, .b = &it->keys[index], .c = task->p, .ldc = KEYS, .alpha = args->scale,
    };
    product changes = {.a = d_out_of(task), .dtype = MQ_F32, .rows = task->rows, .lda = args->heads * args->value_dim,
                       .b = &it->values[index], .c = task->d_p, .ldc = KEYS, .alpha = 1.0f};
    mq_attention_block block = {.scores = task->p, .ld = KEYS, .first = task->first, .rows = task->rows,
                                .start = start, .width = width};
    multiply(&scores);
    mq_attention_cap(args, &block);
    if (args->softcap > 0.0f) memcpy(task->turned, task->p, sizeof task->turned);
    mq_attention_hide(args, &block);
    multiply(&changes);
    for (int64_t i = 0; i < task->rows; i++) {
        float *p = task->p + i * KEYS, *d_p = task->d_p + i * KEYS;
        mq_row_ops_table()->exp_shifted(p, p, width, args->maxima[query + i], args->factors[query + i]);
        mq_row_ops_table()->softmax_backward(d_p, p, width, task->means[i]);
        if (args->softcap > 0.0f) mq_softcap_backward(d_p, task->turned + i * KEYS, args->softcap, width);
    }
}

/* turned (width, QUERIES) = x (rows, KEYS)^T. */
static void turn(task *task, const float *x, int64_t width)
{
    for (int64_t i = 0; i < task->rows; i++)
        for (int64_t j = 0; j < width; j++) task->turned[j * QUERIES + i] = x[i * KEYS + j];
}

static void add_block(task *task, int64_t index, int64_t start, int64_t width)
{
    const attention *it = task->attention;
    const mq_attention_args *args = it->args;
    float *d_v = it->d_v + (task->head * args->T_kv + start) * args->value_dim;
    float *d_k = it->d_k + (task->head * args->T_kv + start) * args->head_dim;
    float *d_q = it->gradient->d_q + (task->first * args->heads + task->head) * args->head_dim;
    product to_v = {.a = task->turned, .dtype = MQ_F32, .rows = width, .lda = QUERIES, .b = &task->d_out, .c = d_v,
                    .ldc = args->value_dim, .accumulate = 1, .alpha = 1.0f};
    product to_k = {.a = task->turned, .dtype = MQ_F32, .rows = width, .lda = QUERIES, .b = &task->queries, .c = d_k,
                    .ldc = args->head_dim, .accumulate = 1, .alpha = args->scale};
    product to_q = {.a = task->d_p, .dtype = MQ_F32, .rows = task->rows, .lda = KEYS, .b = &it->back[index], .c = d_q,
                    .ldc = args->heads * args->head_dim, .accumulate = 1, .alpha = args->scale};
    turn(task, task->p, width);
    multiply(&to_v);
    turn(task, task->d_p, width);
    multiply(&to_k);
    multiply(&to_q);
}

static void clear_head(const attention *it, int64_t head)
{
    const mq_attention_args *args = it->args;
    const size_t size = (size_t)args->head_dim * sizeof(float);
    for (int64_t i = 0; i < args->T; i++)
        memset(it->gradient->d_q + (i * args->heads + head) * args->head_dim, 0, size);
    memset(it->d_k + head * args->T_kv * args->head_dim, 0, (size_t)args->T_kv * size);
    memset(it->d_v + head * args->T_kv * args->value_dim, 0, (size_t)(args->T_kv * args->value_dim) * sizeof(float));
}

static void run_heads(void *argument, int64_t begin, int64_t end, int worker)
{
    const attention *it = argument;
    const mq_attention_args *args = it->args;
    task task;
    (void)worker;
    task.attention = it;
    for (task.head = begin; task.head < end; task.head++) {
        const int64_t group = task.head / (args->heads / args->kv_heads);
        double sink = 0.0;
        clear_head(it, task.head);
        for (task.first = 0; task.first < args->T; task.first += QUERIES) {
            task.rows = MQ_MIN((int64_t)QUERIES, args->T - task.first);
            const int64_t low = mq_attention_first_key(args, task.first);
            const int64_t high = mq_attention_last_key(args, task.first + task.rows - 1);
            enter_queries(&task);
            if (args->sinks != NULL && it->gradient->d_sinks != NULL) sink += sink_of(&task);
            for (int64_t block = low / KEYS; block * KEYS < high; block++) {
                const int64_t width = MQ_MIN(args->T_kv - block * KEYS, (int64_t)KEYS);
                differentiate(&task, group * it->blocks + block, block * KEYS, width);
                add_block(&task, group * it->blocks + block, block * KEYS, width);
            }
        }
        if (it->gradient->d_sinks != NULL) it->gradient->d_sinks[task.head] += (float)sink;
    }
}

/* out (T_kv, kv_heads, width) = sums over each group of heads (heads, T_kv, width). */
static void add_heads(const mq_attention_args *args, int64_t token, float *out, const float *heads, int64_t width)
{
    const int64_t group = args->heads / args->kv_heads;
    for (int64_t g = 0; g < args->kv_heads; g++) {
        float *to = out + (token * args->kv_heads + g) * width;
        for (int64_t i = 0; i < group; i++) {
            const float *from = heads + ((g * group + i) * args->T_kv + token) * width;
            if (i == 0) memcpy(to, from, (size_t)width * sizeof *to);
            else mq_row_ops_of(MQ_F32)->add(to, from, width);
        }
    }
}

static void add_tokens(void *argument, int64_t begin, int64_t end, int worker)
{
    const attention *it = argument;
    (void)worker;
    for (int64_t token = begin; token < end; token++) {
        add_heads(it->args, token, it->gradient->d_k, it->d_k, it->args->head_dim);
        add_heads(it->args, token, it->gradient->d_v, it->d_v, it->args->value_dim);
    }
}

void mq_attention_backward(const mq_attention_gradient *gradient, const mq_attention_args *args, void *scratch)
{
    attention it = {.args = args, .gradient = gradient};
    prepare(&it, scratch);
    mq_parallel_for(args->kv_heads * it.blocks, 1, pack_blocks, &it);
    mq_parallel_for(args->heads, 1, run_heads, &it);
    mq_parallel_for(args->T_kv, 64, add_tokens, &it);
}
