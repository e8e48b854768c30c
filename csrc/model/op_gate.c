/* Activations of an MLP beyond SwiGLU, and what multiplies rows. These are computed in float32 a few columns at a time,
 * rounded where a model in transformers rounds. */
#include <math.h>

#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

enum { COLUMNS = 256 };
static const float ALPHA = 1.702f;      /* of gpt-oss's sigmoid */

mq_gate mq_gate_of(const mq_config *config)
{
    return (mq_gate){.activation = (mq_activation)config->hidden_act, .limit = (float)config->swiglu_limit};
}

static float gelu_tanh(float x)
{
    return tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
}

static float gelu(float x)
{
    return 0.5f * x * (1.0f + gelu_tanh(x));
}

static float gelu_slope(float x)
{
    const float t = gelu_tanh(x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
}

static float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

static float clamp(float x, float limit)
{
    return x > limit ? limit : x < -limit ? -limit : x;
}

typedef struct gate_job {
    char *gate;
    const char *up;
    float *d_gate, *d_up;
    const mq_gate *kind;
    mq_dtype dtype;
    int64_t width;
} gate_job;

/* n products; gate and up become what they are. */
static void gate_columns(const gate_job *job, float *gate, float *up, int64_t n)
{
    const mq_typed_row_ops *kernels = mq_row_ops_of(job->dtype);
    const float limit = job->kind->limit;
    float rounded[COLUMNS];
    if (job->kind->activation == MQ_ACT_GELU_TANH) {
        for (int64_t i = 0; i < n; i++) gate[i] = gelu(gate[i]);
    } else {
        for (int64_t i = 0; i < n; i++) {
            gate[i] = gate[i] > limit ? limit : gate[i];
            gate[i] *= sigmoid(ALPHA * gate[i]);
            up[i] = clamp(up[i], limit) + 1.0f;
        }
    }
    kernels->from_f32(rounded, gate, n);
    kernels->to_f32(gate, rounded, n);
    for (int64_t i = 0; i < n; i++) gate[i] *= up[i];
}

/* d_gate is by the product at first. A number that was clamped has no gradient. */
static void slope_columns(const gate_job *job, const float *gate, const float *up, int64_t at, int64_t n)
{
    float *d_gate = job->d_gate + at, *d_up = job->d_up + at;
    const float limit = job->kind->limit;
    for (int64_t i = 0; i < n; i++) {
        const float d = d_gate[i];
        if (job->kind->activation == MQ_ACT_GELU_TANH) {
            d_up[i] = d * gelu(gate[i]);
            d_gate[i] = d * up[i] * gelu_slope(gate[i]);
            continue;
        }
        const float g = gate[i] > limit ? limit : gate[i], s = sigmoid(ALPHA * g), u = clamp(up[i], limit);
        d_up[i] = u == up[i] ? d * g * s : 0.0f;
        d_gate[i] = g == gate[i] ? d * (u + 1.0f) * (s + g * ALPHA * s * (1.0f - s)) : 0.0f;
    }
}

/* Forward, or backward where there is a gradient. */
static void gate_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const gate_job *job = argument;
    const mq_typed_row_ops *kernels = mq_row_ops_of(job->dtype);
    const size_t size = mq_dtype_size(job->dtype);
    float gate[COLUMNS], up[COLUMNS];
    (void)worker;
    for (int64_t at = begin * job->width; at < end * job->width; at += COLUMNS) {
        const int64_t n = MQ_MIN((int64_t)COLUMNS, end * job->width - at);
        kernels->to_f32(gate, job->gate + (size_t)at * size, n);
        kernels->to_f32(up, job->up + (size_t)at * size, n);
        if (job->d_gate != NULL) {
            slope_columns(job, gate, up, at, n);
            continue;
        }
        gate_columns(job, gate, up, n);
        kernels->from_f32(job->gate + (size_t)at * size, gate, n);
    }
}

void mq_gate_forward(void *gate, const void *up, const mq_gate *kind, const mq_row_sizes *sizes)
{
    gate_job job = {.gate = gate, .up = up, .kind = kind, .dtype = sizes->dtype, .width = sizes->width};
    if (kind->activation == MQ_ACT_SILU) mq_swiglu_forward(gate, up, sizes);
    else mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), gate_rows, &job);
}

void mq_gate_backward(float *d_gate, float *d_up, const void *gate, const void *up, const mq_gate *kind,
                      const mq_row_sizes *sizes)
{
    gate_job job = {.d_gate = d_gate, .d_up = d_up, .kind = kind, .dtype = sizes->dtype, .width = sizes->width,
                    .up = up};
    if (kind->activation == MQ_ACT_SILU) {
        mq_swiglu_backward(d_gate, d_up, gate, up, sizes);
        return;
    }
    job.gate = (char *)(uintptr_t)gate;     /* is only read */
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), gate_rows, &job);
}

typedef struct scale_job {
    char *x;
    const char *y;              /* NULL: x itself is scaled */
    const float *factors;       /* of rows; NULL: factor is of all */
    float factor;
    mq_dtype dtype;
    int64_t width;
} scale_job;

static void scale_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const scale_job *job = argument;
    const mq_typed_row_ops *kernels = mq_row_ops_of(job->dtype);
    const size_t size = mq_dtype_size(job->dtype);
    float values[COLUMNS], rounded[COLUMNS];
    (void)worker;
    for (int64_t row = begin; row < end; row++) {
        const float factor = job->factors ? job->factors[row] : job->factor;
        for (int64_t first = 0; first < job->width; first += COLUMNS) {
            const int64_t n = MQ_MIN((int64_t)COLUMNS, job->width - first);
            const size_t at = (size_t)(row * job->width + first) * size;
            kernels->to_f32(values, (job->y ? job->y : job->x) + at, n);
            for (int64_t i = 0; i < n; i++) values[i] *= factor;
            kernels->from_f32(job->y ? (void *)rounded : job->x + at, values, n);
            if (job->y != NULL) kernels->add(job->x + at, rounded, n);
        }
    }
}

static void run_scale(scale_job *job, const mq_row_sizes *sizes)
{
    job->dtype = sizes->dtype;
    job->width = sizes->width;
    mq_parallel_for(sizes->rows, mq_row_grain(sizes->width), scale_rows, job);
}

void mq_add_scaled_forward(void *x, const void *y, double factor, const mq_row_sizes *sizes)
{
    scale_job job = {.x = x, .y = y, .factor = (float)factor};
    if (factor == 1.0) mq_add_forward(x, y, sizes);
    else run_scale(&job, sizes);
}

void mq_scale_forward(void *x, double factor, const mq_row_sizes *sizes)
{
    scale_job job = {.x = x, .factor = (float)factor};
    if (factor != 1.0) run_scale(&job, sizes);
}

void mq_scale_rows_forward(void *x, const float *factors, const mq_row_sizes *sizes)
{
    scale_job job = {.x = x, .factors = factors};
    run_scale(&job, sizes);
}

void mq_sigmoid_forward(float *factors, const void *x, int64_t rows, mq_dtype dtype)
{
    float rounded[COLUMNS];
    mq_row_ops_of(dtype)->to_f32(factors, x, rows);
    for (int64_t first = 0; first < rows; first += COLUMNS) {
        const int64_t n = MQ_MIN((int64_t)COLUMNS, rows - first);
        for (int64_t i = first; i < first + n; i++) factors[i] = sigmoid(factors[i]);
        mq_row_ops_of(dtype)->from_f32(rounded, factors + first, n);
        mq_row_ops_of(dtype)->to_f32(factors + first, rounded, n);
    }
}

void mq_sigmoid_backward(float *d_x, const float *d_factors, const float *factors, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++) d_x[i] = d_factors[i] * factors[i] * (1.0f - factors[i]);
}

void mq_softcap_forward(float *x, float cap, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = cap * tanhf(x[i] / cap);
}

void mq_softcap_backward(float *d_x, const float *out, float cap, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float t = out[i] / cap;
        d_x[i] *= 1.0f - t * t;
    }
}
