/* silu(gate) * up and its gradient (Shazeer 2020), rounded where a bfloat16 model rounds: csrc/kernels/row_ops*.inc. */
#include "rows.cuh"

/* ---- kernels ---- */

typedef struct swiglu_args {
    mq_view gate, up, d_gate, d_up;
    int64_t rows, cols, groups;
} swiglu_args;

static void describe(const swiglu_args &a, char *out, size_t size)
{
    snprintf(out, size, "gate [%lld, %lld] at %p, up at %p, d_gate at %p", (long long)a.rows, (long long)a.cols,
             a.gate.data, a.up.data, a.d_gate.data);
}

template <mq_dtype D>
static __global__ void swiglu(swiglu_args a)
{
    const mq_span span = mq_span_of(a.rows, a.cols, a.groups);
    float gate[MQ_GROUP], up[MQ_GROUP];
    if (span.count == 0) return;
    mq_load_span<D>(a.gate, span, gate);
    mq_load_span<D>(a.up, span, up);
    for (int i = 0; i < MQ_GROUP; i++) gate[i] = mq_round_to<D>(gate[i] * mq_sigmoid(gate[i])) * up[i];
    mq_store_span<D>(a.gate, span, gate);
}

/* silu'(g) = s * (1 + g * (1 - s)), s being the sigmoid of g. */
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
        const float s = mq_sigmoid(gate[i]), d_out = d_gate[i];
        d_up[i] = d_out * (gate[i] * s);
        d_gate[i] = d_out * up[i] * (s * fmaf(gate[i], 1.0f - s, 1.0f));
    }
    mq_store_span<MQ_F32>(a.d_gate, span, d_gate);
    mq_store_span<MQ_F32>(a.d_up, span, d_up);
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
