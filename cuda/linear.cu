/* Linears of quantized checkpoints: checks, the inputs' maximum, and one way after the other. No kernels. */
#include "linear.cuh"
#include "amax.cuh"

int64_t mq_linear_dtype_size(mq_dtype dtype)
{
    return dtype == MQ_F32 ? 4 : 2;
}

mq_cuda_matrix mq_linear_rows_of(const mq_cuda_matrix *x, int64_t first, int64_t rows)
{
    const mq_cuda_matrix part = {(char *)x->data + first * x->ld * mq_linear_dtype_size(x->dtype), x->dtype, rows,
                                 x->cols, x->ld};
    return part;
}

mq_cuda_block_job mq_linear_input_job(const mq_linear_call *call, const mq_cuda_matrix *x)
{
    mq_cuda_block_job job = {};
    job.scheme = call->job->linear.input_scheme;
    job.x = *x;
    if (mq_scheme_get(job.scheme)->second_divisor != 0.0f) {
        job.amax = call->amax;
        job.scale_2 = call->numbers + MQ_LINEAR_SCALE_2;
    }
    return job;
}

int mq_linear_too_small(const mq_linear_call *call, int64_t rows)
{
    const mq_cuda_linear_job *job = call->job;
    return mq_fail(call->err, MQ_ERR_VALUE, "a workspace of %zu bytes is too small for %lld rows of a linear [%lld, "
                   "%lld], scheme %s", job->workspace.nbytes, (long long)rows, (long long)job->linear.rows,
                   (long long)job->linear.cols, mq_scheme_get(job->linear.scheme)->name);
}

/* ---- checks ---- */

static const char *wrong_linear(const mq_cuda_linear *linear)
{
    if (linear->codes == NULL || linear->scales == NULL) return "codes and scales are needed";
    if (linear->rows < 1 || linear->cols < 1) return "it has no elements";
    if ((unsigned)linear->inputs > (unsigned)MQ_CUDA_INPUTS_GROUP) return "no such way to treat inputs";
    if ((unsigned)linear->dtype > (unsigned)MQ_F16) return "its numbers are no float32, bfloat16 or float16";
    if (linear->inputs == MQ_CUDA_INPUTS_SCHEME && (unsigned)linear->input_scheme >= (unsigned)MQ_SCHEME_COUNT)
        return "its inputs' scheme does not exist";
    if (mq_scheme_get(linear->scheme)->second_divisor != 0.0f && linear->scale_2 == NULL) return "scale_2 is needed";
    return NULL;
}

static int check(const mq_cuda_linear_job *job, mq_error *err)
{
    const mq_cuda_linear *linear = &job->linear;
    char in[128], out[128];
    int rc = mq_cuda_check_matrix(&job->in, "in", err);
    if (rc == MQ_OK) rc = mq_cuda_check_matrix(&job->out, "out", err);
    if (rc != MQ_OK) return rc;
    mq_cuda_describe_matrix(&job->in, in, sizeof in);
    mq_cuda_describe_matrix(&job->out, out, sizeof out);
    if ((unsigned)linear->scheme >= (unsigned)MQ_SCHEME_COUNT)
        return mq_fail(err, MQ_ERR_VALUE, "scheme %d does not exist", (int)linear->scheme);
    const char *wrong = wrong_linear(linear);
    if (wrong != NULL)
        return mq_fail(err, MQ_ERR_VALUE, "linear [%lld, %lld], scheme %s: %s", (long long)linear->rows,
                       (long long)linear->cols, mq_scheme_get(linear->scheme)->name, wrong);
    if (job->in.cols != linear->cols || job->out.cols != linear->rows || job->in.rows != job->out.rows)
        return mq_fail(err, MQ_ERR_VALUE, "in %s times a linear [%lld, %lld]^T does not give out %s", in,
                       (long long)linear->rows, (long long)linear->cols, out);
    if (job->out.dtype != job->in.dtype && job->out.dtype != MQ_F32)
        return mq_fail(err, MQ_ERR_TYPE, "in %s, out %s: expected one dtype, or float32 out", in, out);
    if (job->workspace.data == NULL || (uintptr_t)job->workspace.data % MQ_LT_ALIGNMENT != 0)
        return mq_fail(err, MQ_ERR_VALUE, "a workspace at %p: expected an address that 256 divides",
                       job->workspace.data);
    return MQ_OK;
}

/* ---- a call ---- */

static bool wants_amax(const mq_cuda_linear *linear)
{
    if (linear->inputs == MQ_CUDA_INPUTS_TENSOR) return true;
    return linear->inputs == MQ_CUDA_INPUTS_SCHEME && mq_scheme_get(linear->input_scheme)->second_divisor != 0.0f;
}

/* Of all rows, as one number scales them; so before they are taken in pieces. */
static int find_amax(mq_linear_call *call)
{
    const mq_cuda_linear *linear = &call->job->linear;
    call->amax = linear->input_amax;
    if (!wants_amax(linear) || linear->input_amax != NULL) return MQ_OK;
    const mq_blocks whole = mq_blocks_of(&call->job->in, 0, 0);
    call->amax = call->numbers + MQ_LINEAR_AMAX;
    return mq_cuda_amax_blocks(&call->job->in, &whole, call->numbers + MQ_LINEAR_AMAX, call->stream, call->err);
}

/* The weight's scales, prepared by the caller or made anew; what was prepared is for the best way. */
static int find_scales(mq_linear_call *call)
{
    const mq_cuda_linear *linear = &call->job->linear;
    const size_t nbytes = mq_linear_scales_nbytes(call->way, linear);
    call->scales = linear->scales;
    if (nbytes == 0) return MQ_OK;
    if (linear->prepared != NULL && call->way == mq_linear_way_of(call->gemm, linear, NULL)) {
        call->scales = linear->prepared;
        return MQ_OK;
    }
    void *made = mq_workspace_take(&call->rest, nbytes);
    call->scales = made;
    if (made == NULL) return mq_linear_too_small(call, 0);
    return mq_linear_scales_make(call->way, linear, made, call->stream, call->err);
}

static int run_way(mq_linear_call call)
{
    int rc = find_scales(&call);
    if (rc != MQ_OK) return rc;
    return call.way->path == MQ_CUDA_PATH_DEQUANTIZE ? mq_linear_dequantize(&call) : mq_linear_narrow(&call);
}

int mq_cuda_linear_run(mq_cuda_gemm *gemm, const mq_cuda_linear_job *job, mq_cuda_path *taken, void *stream,
                       mq_error *err)
{
    mq_linear_call call = {gemm, job, NULL, stream, err, {}, job->workspace, NULL, NULL, NULL};
    int rc = check(job, err);
    if (rc != MQ_OK) return rc;
    call.way = mq_linear_way_of(gemm, &job->linear, NULL);
    if (taken != NULL) *taken = call.way->path;
    if (job->in.rows == 0) return MQ_OK;
    call.own = mq_workspace_split(&call.rest);
    call.numbers = (float *)mq_workspace_take(&call.rest, MQ_LINEAR_NUMBERS * sizeof(float));
    if (call.numbers == NULL) return mq_linear_too_small(&call, job->in.rows);
    rc = find_amax(&call);
    if (rc == MQ_OK) rc = run_way(call);
    while (rc == MQ_LT_REFUSED) {
        call.way = mq_linear_way_of(gemm, &job->linear, call.way + 1);
        if (taken != NULL) *taken = call.way->path;
        rc = run_way(call);
    }
    return rc;
}
