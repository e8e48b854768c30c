/* silu(gate) * up and its like (Shazeer 2020), rounded where a bfloat16 model rounds: csrc/kernels/row_ops*.inc and
 * csrc/model/op_gate.c. And what models do to logits. */
#include "rows.cuh"

/* ---- kernels ---- */

typedef struct swiglu_args {
    mq_view gate, up, d_gate, d_up;
    int64_t rows, cols, groups;
    mq_cuda_activation activation;
    float limit;
} swiglu_args;

/* An activation: its number, and its derivative. */
typedef struct slope {
    float value, derivative;
} slope;

/* x * sigmoid(factor * x). Of silu'(x) = s * (1 + x * (1 - s)), s being the sigmoid. */
MQ_DEVICE slope slope_of_sigmoid(float x, float factor)
{
    const float s = mq_sigmoid(factor * x);
    const slope of = {x * s, s * fmaf(factor * x, 1.0f - s, 1.0f)};
    return of;
}

/* GELU by tanh (Hendrycks and Gimpel 2016): (1 + tanh(u)) / 2 is the sigmoid of 2 u. */
MQ_DEVICE slope slope_of_gelu(float x)
{
    const float root = 0.7978845608028654f, cubic = 0.044715f;
    const float s = mq_sigmoid(2.0f * root * (x + cubic * x * x * x));
    const slope of = {x * s, s + 2.0f * x * s * (1.0f - s) * root * (1.0f + 3.0f * cubic * x * x)};
    return of;
}

/* What the gate becomes and what it is multiplied with. A number that was clamped has no gradient: up_slope. */
MQ_DEVICE slope activate(const swiglu_args &a, float gate, float *up, float *up_slope)
{
    *up_slope = 1.0f;
    if (a.activation == MQ_CUDA_SILU) return slope_of_sigmoid(gate, 1.0f);
    if (a.activation == MQ_CUDA_GELU_TANH) return slope_of_gelu(gate);
    const float limited = gate > a.limit ? a.limit : gate;
    const float clamped = *up > a.limit ? a.limit : *up < -a.limit ? -a.limit : *up;
    slope of = slope_of_sigmoid(limited, 1.702f);
    if (limited != gate) of.derivative = 0.0f;
    if (clamped != *up) *up_slope = 0.0f;
    *up = clamped + 1.0f;
    return of;
}

static void describe(const swiglu_args &a, char *out, size_t size)
{
    snprintf(out, size, "gate [%lld, %lld] at %p, up at %p, d_gate at %p", (long long)a.rows, (long long)a.cols,
             a.gate.data, a.up.data, a.d_gate.data);
}

template <mq_dtype D>
static __global__ void swiglu(swiglu_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float gate[MQ_GROUP], up[MQ_GROUP], up_slope;
    if (span.count == 0) return;
    mq_load_span<D>(a.gate, span, gate);
    mq_load_span<D>(a.up, span, up);
    for (int i = 0; i < MQ_GROUP; i++) {
        const slope of = activate(a, gate[i], &up[i], &up_slope);
        gate[i] = mq_round_to<D>(of.value) * up[i];
    }
    mq_store_span<D>(a.gate, span, gate);
}

template <mq_dtype D>
static __global__ void swiglu_backward(swiglu_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float gate[MQ_GROUP], up[MQ_GROUP], d_gate[MQ_GROUP], d_up[MQ_GROUP];
    if (span.count == 0) return;
    mq_load_span<D>(a.gate, span, gate);
    mq_load_span<D>(a.up, span, up);
    mq_load_span<MQ_F32>(a.d_gate, span, d_gate);
    for (int i = 0; i < MQ_GROUP; i++) {
        float up_slope;
        const float d_out = d_gate[i];
        const slope of = activate(a, gate[i], &up[i], &up_slope);
        d_up[i] = d_out * of.value * up_slope;
        d_gate[i] = d_out * up[i] * of.derivative;
    }
    mq_store_span<MQ_F32>(a.d_gate, span, d_gate);
    mq_store_span<MQ_F32>(a.d_up, span, d_up);
}

typedef struct softcap_args {
    mq_view x, gradient;
    int64_t rows, cols, groups;
    float divisor, cap;
} softcap_args;

static void describe(const softcap_args &a, char *out, size_t size)
{
    snprintf(out, size, "x [%lld, %lld] at %p, divided by %g, capped at %g", (long long)a.rows, (long long)a.cols,
             a.x.data, (double)a.divisor, (double)a.cap);
}

static __global__ void softcap(softcap_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float x[MQ_GROUP], gradient[MQ_GROUP];
    if (span.count == 0) return;
    mq_load_span<MQ_F32>(a.x, span, x);
    if (a.gradient.data != NULL) mq_load_span<MQ_F32>(a.gradient, span, gradient);
    for (int i = 0; i < MQ_GROUP; i++) {
        const float scaled = x[i] / a.divisor, t = a.cap > 0.0f ? tanhf(scaled / a.cap) : 0.0f;
        x[i] = a.cap > 0.0f ? a.cap * t : scaled;
        if (a.gradient.data != NULL) gradient[i] = gradient[i] * (1.0f - t * t) / a.divisor;
    }
    if (a.gradient.data != NULL) mq_store_span<MQ_F32>(a.gradient, span, gradient);
    else mq_store_span<MQ_F32>(a.x, span, x);
}

/* ---- launchers ---- */

typedef void (*swiglu_kernel)(swiglu_args);

static int run(const mq_cuda_swiglu_job *job, const char *name, const swiglu_kernel *kernels, void *stream,
               mq_error *err)
{
    int rc = mq_cuda_check_activations(&job->gate, "gate", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->gate, &job->up, "up", err);
    if (rc != MQ_OK || mq_is_empty(&job->gate)) return rc;
    swiglu_args a = {};
    a.gate = mq_view_of(&job->gate);
    a.up = mq_view_of(&job->up);
    a.rows = job->gate.rows;
    a.cols = job->gate.cols;
    a.groups = mq_groups_of(a.cols);
    a.d_gate = mq_view_of_rows(job->d_gate, a.cols);
    a.d_up = mq_view_of_rows(job->d_up, a.cols);
    a.activation = job->activation;
    a.limit = job->limit;
    const mq_launch launch = {name, mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, kernels[job->gate.dtype], a);
}

int mq_cuda_swiglu(const mq_cuda_swiglu_job *job, void *stream, mq_error *err)
{
    static const swiglu_kernel kernels[MQ_ACTIVATION_DTYPES] = {swiglu<MQ_F32>, swiglu<MQ_BF16>};
    return run(job, "swiglu", kernels, stream, err);
}

int mq_cuda_swiglu_backward(const mq_cuda_swiglu_job *job, void *stream, mq_error *err)
{
    static const swiglu_kernel kernels[MQ_ACTIVATION_DTYPES] = {swiglu_backward<MQ_F32>, swiglu_backward<MQ_BF16>};
    if (job->d_gate == NULL || job->d_up == NULL)
        return mq_fail(err, MQ_ERR_VALUE, "swiglu_backward: needs d_gate and d_up");
    return run(job, "swiglu_backward", kernels, stream, err);
}

static int cap(const mq_cuda_softcap_job *job, const mq_cuda_matrix *gradient, void *stream, mq_error *err)
{
    int rc = mq_cuda_check_activations(&job->x, "x", err);
    if (rc == MQ_OK && job->x.dtype != MQ_F32) rc = mq_fail(err, MQ_ERR_TYPE, "softcap: expected float32");
    if (rc == MQ_OK && gradient != NULL) rc = mq_cuda_check_same(&job->x, gradient, "gradient", err);
    if (rc != MQ_OK || mq_is_empty(&job->x)) return rc;
    softcap_args a = {mq_view_of(&job->x), {}, job->x.rows, job->x.cols, mq_groups_of(job->x.cols),
                      job->divisor != 0.0f ? job->divisor : 1.0f, job->cap};
    if (gradient != NULL) a.gradient = mq_view_of(gradient);
    const mq_launch launch = {"softcap", mq_grid_of_groups(a.rows, a.cols), stream, err};
    return mq_launch_kernel(&launch, softcap, a);
}

int mq_cuda_softcap(const mq_cuda_softcap_job *job, void *stream, mq_error *err)
{
    return cap(job, NULL, stream, err);
}

int mq_cuda_softcap_backward(const mq_cuda_softcap_job *job, void *stream, mq_error *err)
{
    return cap(job, &job->gradient, stream, err);
}
