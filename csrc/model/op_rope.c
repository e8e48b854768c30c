/* Rotary embedding on the two halves of each head (the layout of Hugging Face checkpoints). Angles are computed in
 * float32 from float32 frequencies, as transformers does: at position p an angle of p radians is only known to about
 * p * 2^-24, so more exact angles would be different ones. Scaling of frequencies: "linear", and "llama3" (3.1). */
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

static float frequency_of(const mq_config *config, int64_t index, int64_t rotary)
{
    float exponent = (float)(2 * index) / (float)rotary;
    float frequency = 1.0f / (float)pow((double)(float)config->rope_theta, (double)exponent);
    switch ((mq_rope_type)config->rope_type) {
    case MQ_ROPE_LINEAR: return (float)((double)frequency / config->rope_factor);
    case MQ_ROPE_LLAMA3: return llama3_frequency(config, frequency);
    case MQ_ROPE_DEFAULT: break;
    }
    return frequency;
}

static void fill_table(mq_rope_table *table, const mq_config *config)
{
    int64_t half = table->rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float frequency = frequency_of(config, i, table->rotary);
        for (int64_t p = 0; p < table->positions; p++) {
            float angle = (float)p * frequency;
            table->cosine[p * half + i] = (float)cos((double)angle);
            table->sine[p * half + i] = (float)sin((double)angle);
        }
    }
}

int mq_rope_table_init(mq_rope_table *table, const mq_config *config, int64_t positions, mq_error *err)
{
    int64_t rotary = (int64_t)((double)config->head_dim * config->partial_rotary_factor) / 2 * 2;
    *table = (mq_rope_table){.positions = positions, .rotary = rotary};
    table->cosine = mq_alloc_array((size_t)positions, (size_t)rotary * sizeof(float));
    if (table->cosine == NULL) return mq_fail_memory(err, "the rope table", mq_rope_table_nbytes(table));
    table->sine = table->cosine + positions * (rotary / 2);
    fill_table(table, config);
    return MQ_OK;
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
} rope_job;

static void rope_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const rope_job *job = argument;
    const mq_rope_sizes *sizes = job->sizes;
    int64_t half = job->table->rotary / 2;
    size_t stride = (size_t)(sizes->heads * sizes->head_dim) * mq_dtype_size(sizes->dtype);
    (void)worker;
    for (int64_t t = begin; t < end; t++) {
        int64_t at = (sizes->first + t) * half;
        job->kernels->rope(job->x + (size_t)t * stride, job->table->cosine + at, job->table->sine + at, sizes->heads,
                           sizes->head_dim, job->table->rotary);
    }
}

void mq_rope_forward(void *x, const mq_rope_table *table, const mq_rope_sizes *sizes)
{
    rope_job job = {.x = x, .table = table, .sizes = sizes, .kernels = mq_row_ops_of(sizes->dtype)};
    mq_parallel_for(sizes->tokens, mq_row_grain(sizes->heads * sizes->head_dim), rope_rows, &job);
}

static void rope_backward_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const rope_job *job = argument;
    const mq_rope_sizes *sizes = job->sizes;
    float *x = (float *)(void *)job->x;
    (void)worker;
    for (int64_t t = begin; t < end; t++) {
        const int64_t at = (sizes->first + t) * (job->table->rotary / 2);
        mq_row_ops_table()->rope_backward(x + t * sizes->heads * sizes->head_dim, job->table->cosine + at,
                                          job->table->sine + at, sizes->heads, sizes->head_dim, job->table->rotary);
    }
}

void mq_rope_backward(float *d_x, const mq_rope_table *table, const mq_rope_sizes *sizes)
{
    rope_job job = {.x = (char *)d_x, .table = table, .sizes = sizes};
    mq_parallel_for(sizes->tokens, mq_row_grain(sizes->heads * sizes->head_dim), rope_backward_rows, &job);
}
