/* Rotary embedding on the two halves of each head (the layout of Hugging Face checkpoints). Angles are computed in
 * float32 from float32 frequencies, as transformers does: at position p an angle of p radians is only known to about
 * p * 2^-24, so more exact angles would be different ones. Scaling of frequencies: "linear", "llama3" (3.1), "yarn"
 * (Peng et al. 2023) and "longrope" (Ding et al. 2024). "dynamic" scales nothing up to max_position_embeddings. A
 * longer sequence has the base of its own length, as in transformers 5.17 (modeling_rope_utils.py): of what has come
 * so far, so that keys in a cache keep what they were turned by. There a call also depends on longer calls before it,
 * and on the others of its batch; here on neither. (vLLM 0.32 scales short sequences too.) */
#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

static const double PI = 3.14159265358979323846;

/* Llama 3.1: wavelengths beyond the original context are stretched, short ones kept, those between interpolated. */
static float llama3_frequency(const mq_config *config, float frequency)
{
    double original = (double)config->rope_original_max_position_embeddings;
    double low = config->rope_low_freq_factor, high = config->rope_high_freq_factor;
    double wavelength = 2.0 * PI / (double)frequency;
    if (wavelength < original / high) return frequency;
    float stretched = (float)((double)frequency / config->rope_factor);
    if (wavelength > original / low) return stretched;
    double smooth = (original / wavelength - low) / (high - low);
    return (float)((1.0 - smooth) * (double)frequency / config->rope_factor + smooth * (double)frequency);
}

/* The index below which frequencies make more than so many turns over the original context (YaRN, section 3.2). */
static double yarn_index(const mq_config *config, double turns, int64_t rotary)
{
    const double original = (double)config->rope_original_max_position_embeddings;
    return (double)rotary * log(original / (turns * 2.0 * PI)) / (2.0 * log(config->rope_theta));
}

/* Fast frequencies are kept, slow ones stretched, those between interpolated. */
static float yarn_frequency(const mq_config *config, int64_t index, int64_t rotary, float frequency)
{
    double low = yarn_index(config, config->rope_beta_fast, rotary);
    double high = yarn_index(config, config->rope_beta_slow, rotary);
    if (config->rope_truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = MQ_MAX(low, 0.0);
    high = MQ_MIN(high, (double)(rotary - 1));
    if (high == low) high += 0.001;
    const double ramp = MQ_MIN(MQ_MAX(((double)index - low) / (high - low), 0.0), 1.0);
    return (float)((double)frequency / config->rope_factor * ramp + (double)frequency * (1.0 - ramp));
}

static float power(double theta, int64_t index, int64_t rotary)
{
    const float exponent = (float)(2 * index) / (float)rotary;
    return (float)pow((double)(float)theta, (double)exponent);
}

static float frequency_of(const mq_config *config, mq_rope_kind kind, int64_t index, int64_t rotary)
{
    if (kind == MQ_ROPE_LOCAL) return 1.0f / power(config->rope_local_theta, index, rotary);
    const float base = power(config->rope_theta, index, rotary), frequency = 1.0f / base;
    switch ((mq_rope_type)config->rope_type) {
    case MQ_ROPE_LINEAR: return (float)((double)frequency / config->rope_factor);
    case MQ_ROPE_LLAMA3: return llama3_frequency(config, frequency);
    case MQ_ROPE_YARN: return yarn_frequency(config, index, rotary, frequency);
    case MQ_ROPE_LONGROPE:
        return 1.0f / ((kind == MQ_ROPE_LONG ? config->rope_long_factor : config->rope_short_factor)[index] * base);
    case MQ_ROPE_DYNAMIC:
    case MQ_ROPE_DEFAULT: break;
    }
    return frequency;
}

/* The base of a sequence of `length` tokens, beyond those that the table is for ("NTK-aware" scaling by length). Each
 * step is rounded as transformers' float32 tensors are. */
static double dynamic_theta(const mq_rope_table *table, int64_t length)
{
    const float grown = (float)(table->factor * (double)length) / (float)table->longest;
    const float stretch = (float)((double)grown - (table->factor - 1.0));
    const double exponent = (double)table->rotary / (double)(table->rotary - 2);
    return (double)((float)table->theta * (float)pow((double)stretch, exponent));
}

/* One frequency at every position. */
static void fill_column(const mq_rope_table *table, int64_t index, float frequency, float factor)
{
    const int64_t half = table->rotary / 2;
    for (int64_t p = 0; p < table->positions; p++) {
        const float angle = (float)p * frequency;
        table->cosine[p * half + index] = (float)cos((double)angle) * factor;
        table->sine[p * half + index] = (float)sin((double)angle) * factor;
    }
}

static int allocate_table(mq_rope_table *table, mq_error *err)
{
    table->cosine = mq_alloc_array((size_t)table->positions, (size_t)table->rotary * sizeof(float));
    if (table->cosine == NULL) return mq_fail_memory(err, "the rope table", mq_rope_table_nbytes(table));
    table->sine = table->cosine + table->positions * (table->rotary / 2);
    return MQ_OK;
}

int mq_rope_table_init(mq_rope_table *table, const mq_config *config, mq_rope_kind kind, int64_t positions,
                       mq_error *err)
{
    const int64_t rotary = mq_config_rotary(config);
    *table = (mq_rope_table){.positions = positions, .rotary = rotary};
    if (kind == MQ_ROPE_MAIN && config->rope_type == MQ_ROPE_DYNAMIC) {
        table->longest = config->rope_original_max_position_embeddings;
        table->positions = MQ_MIN(positions, table->longest);
        table->theta = config->rope_theta;
        table->factor = config->rope_factor;
    }
    const int rc = allocate_table(table, err);
    const float factor = kind == MQ_ROPE_LOCAL ? 1.0f : (float)config->rope_attention_factor;
    for (int64_t i = 0; rc == MQ_OK && i < rotary / 2; i++)
        fill_column(table, i, frequency_of(config, kind, i, rotary), factor);
    return rc;
}

int mq_ropes_init(mq_ropes *ropes, const mq_config *config, unsigned layer_ropes, int64_t positions, mq_error *err)
{
    const int longer = config->rope_type == MQ_ROPE_LONGROPE;
    int rc = MQ_OK;
    *ropes = (mq_ropes){.original = longer ? config->rope_original_max_position_embeddings : 0};
    const int wanted[MQ_ROPE_KINDS] = {
        [MQ_ROPE_MAIN] = (layer_ropes & 1u << MQ_LAYER_ROPE) != 0,
        [MQ_ROPE_LONG] = longer && positions > ropes->original,
        [MQ_ROPE_LOCAL] = (layer_ropes & 1u << MQ_LAYER_LOCAL_ROPE) != 0,
    };
    for (int kind = 0; rc == MQ_OK && kind < MQ_ROPE_KINDS; kind++)
        if (wanted[kind]) rc = mq_rope_table_init(&ropes->tables[kind], config, (mq_rope_kind)kind, positions, err);
    if (rc != MQ_OK) mq_ropes_free(ropes);
    return rc;
}

static const mq_rope_table *stretched_of(const mq_ropes *ropes, int64_t length)
{
    for (int64_t i = 0; i < ropes->stretched_count; i++)
        if (ropes->stretched[i].positions == length) return &ropes->stretched[i];
    return NULL;
}

int mq_ropes_stretch(mq_ropes *ropes, const mq_config *config, int64_t length, mq_error *err)
{
    const mq_rope_table *main = &ropes->tables[MQ_ROPE_MAIN];
    const size_t count = (size_t)ropes->stretched_count;
    mq_rope_table table = {.positions = length, .rotary = main->rotary};
    if (main->longest == 0 || length <= main->longest || stretched_of(ropes, length) != NULL) return MQ_OK;
    mq_rope_table *tables = mq_alloc_array(count + 1, sizeof *tables);
    if (tables == NULL) return mq_fail_memory(err, "rope tables", (count + 1) * sizeof *tables);
    const int rc = allocate_table(&table, err);
    if (rc != MQ_OK) {
        mq_free(tables);
        return rc;
    }
    const double theta = dynamic_theta(main, length);
    for (int64_t i = 0; i < table.rotary / 2; i++)
        fill_column(&table, i, 1.0f / power(theta, i, table.rotary), (float)config->rope_attention_factor);
    for (size_t i = 0; i < count; i++) tables[i] = ropes->stretched[i];
    tables[count] = table;
    mq_free(ropes->stretched);
    ropes->stretched = tables;
    ropes->stretched_count++;
    return MQ_OK;
}

int64_t mq_ropes_row(const mq_ropes *ropes, int64_t length)
{
    const mq_rope_table *main = &ropes->tables[MQ_ROPE_MAIN], *wanted = stretched_of(ropes, length);
    if (wanted == NULL) return ropes->original > 0 && length > ropes->original ? main->positions : 0;
    int64_t row = 0;
    for (int kind = 0; kind < MQ_ROPE_KINDS; kind++) row += ropes->tables[kind].positions;
    for (const mq_rope_table *table = ropes->stretched; table != wanted; table++) row += table->positions;
    return row;
}

void mq_ropes_free(mq_ropes *ropes)
{
    for (int kind = 0; kind < MQ_ROPE_KINDS; kind++) mq_rope_table_free(&ropes->tables[kind]);
    for (int64_t i = 0; i < ropes->stretched_count; i++) mq_rope_table_free(&ropes->stretched[i]);
    mq_free(ropes->stretched);
    ropes->stretched = NULL;
    ropes->stretched_count = 0;
}

size_t mq_ropes_nbytes(const mq_ropes *ropes)
{
    size_t total = 0;
    for (int kind = 0; kind < MQ_ROPE_KINDS; kind++) total += mq_rope_table_nbytes(&ropes->tables[kind]);
    for (int64_t i = 0; i < ropes->stretched_count; i++) total += mq_rope_table_nbytes(&ropes->stretched[i]);
    return total;
}

const mq_rope_table *mq_ropes_of(const mq_ropes *ropes, int layer_rope, int64_t length)
{
    if (layer_rope == MQ_LAYER_NO_ROPE) return NULL;
    if (layer_rope == MQ_LAYER_LOCAL_ROPE) return &ropes->tables[MQ_ROPE_LOCAL];
    return &ropes->tables[ropes->original > 0 && length > ropes->original ? MQ_ROPE_LONG : MQ_ROPE_MAIN];
}

void mq_rope_table_free(mq_rope_table *table)
{
    mq_free(table->cosine);
    memset(table, 0, sizeof *table);
}

size_t mq_rope_table_nbytes(const mq_rope_table *table)
{
    return (size_t)table->positions * (size_t)table->rotary * sizeof(float);
}

typedef struct rope_job {
    char *x;
    const mq_rope_table *table;
    const mq_rope_sizes *sizes;
    const mq_typed_row_ops *kernels;
    int is_stretched;
    float frequencies[MQ_ROPE_FACTORS];     /* if so, in the place of the table's */
} rope_job;

static void stretch(rope_job *job)
{
    const mq_rope_table *table = job->table;
    const int64_t length = job->sizes->first + job->sizes->tokens;
    job->is_stretched = table->longest > 0 && length > table->longest;
    if (!job->is_stretched) return;
    const double theta = dynamic_theta(table, length);
    for (int64_t i = 0; i < table->rotary / 2; i++) job->frequencies[i] = 1.0f / power(theta, i, table->rotary);
}

/* Cosines and sines of one row: the table's, or made in room for them. */
typedef struct rope_angles {
    const float *cosine, *sine;
    float room[2][MQ_ROPE_FACTORS];
} rope_angles;

static void look_up(const rope_job *job, int64_t row, rope_angles *angles)
{
    const int64_t half = job->table->rotary / 2, position = job->sizes->first + row;
    angles->cosine = job->is_stretched ? angles->room[0] : job->table->cosine + position * half;
    angles->sine = job->is_stretched ? angles->room[1] : job->table->sine + position * half;
    for (int64_t i = 0; i < (job->is_stretched ? half : 0); i++) {
        const float angle = (float)position * job->frequencies[i];
        angles->room[0][i] = (float)cos((double)angle);
        angles->room[1][i] = (float)sin((double)angle);
    }
}

/* The rotary part of each head of one token: pairs side by side become two halves, or (back) the other way round. */
static void untwine(char *x, const mq_rope_sizes *sizes, int64_t rotary, size_t size, int back)
{
    char held[MQ_ROPE_FACTORS * 2 * sizeof(float)];
    for (int64_t h = 0; h < sizes->heads; h++) {
        char *at = x + (size_t)(h * sizes->head_dim) * size;
        memcpy(held, at, (size_t)rotary * size);
        for (int64_t i = 0; i < rotary; i++) {
            const size_t half = (size_t)(i % 2 * (rotary / 2) + i / 2) * size, pair = (size_t)i * size;
            if (back) memcpy(at + pair, held + half, size);
            else memcpy(at + half, held + pair, size);
        }
    }
}

static void rope_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const rope_job *job = argument;
    const mq_rope_sizes *sizes = job->sizes;
    const size_t size = mq_dtype_size(sizes->dtype);
    rope_angles angles;
    (void)worker;
    for (int64_t t = begin; t < end; t++) {
        look_up(job, t, &angles);
        char *x = job->x + (size_t)(t * sizes->heads * sizes->head_dim + sizes->offset) * size;
        if (sizes->interleaved) untwine(x, sizes, job->table->rotary, size, 0);
        job->kernels->rope(x, angles.cosine, angles.sine, sizes->heads, sizes->head_dim, job->table->rotary);
    }
}

void mq_rope_forward(void *x, const mq_rope_table *table, const mq_rope_sizes *sizes)
{
    rope_job job = {.x = x, .table = table, .sizes = sizes, .kernels = mq_row_ops_of(sizes->dtype)};
    stretch(&job);
    mq_parallel_for(sizes->tokens, mq_row_grain(sizes->heads * sizes->head_dim), rope_rows, &job);
}

static void rope_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const rope_job *job = argument;
    const mq_rope_sizes *sizes = job->sizes;
    rope_angles angles;
    (void)worker;
    for (int64_t t = begin; t < end; t++) {
        look_up(job, t, &angles);
        float *x = (float *)(void *)job->x + t * sizes->heads * sizes->head_dim + sizes->offset;
        mq_row_ops_table()->rope_backward(x, angles.cosine, angles.sine, sizes->heads, sizes->head_dim,
                                          job->table->rotary);
        if (sizes->interleaved) untwine((char *)x, sizes, job->table->rotary, sizeof *x, 1);
    }
}

void mq_rope_backward(float *d_x, const mq_rope_table *table, const mq_rope_sizes *sizes)
{
    rope_job job = {.x = (char *)d_x, .table = table, .sizes = sizes};
    stretch(&job);
    mq_parallel_for(sizes->tokens, mq_row_grain(sizes->heads * sizes->head_dim), rope_backward_rows, &job);
}
