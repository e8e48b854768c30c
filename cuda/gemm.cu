/* Products by cuBLASLt: the context of a device, and plain ones of float32, bfloat16 and float16. No kernels. */
#include "gemm_plans.cuh"
#include "sums.cuh"

extern "C" {
#include "core/alloc.h"
}

enum { PLANS = 1024, WORKSPACE = 128 << 20, LEAST_WORKSPACE = 1 << 20 };

/* ---- the context ---- */

static int find_capability(mq_cuda_gemm *gemm, mq_error *err)
{
    mq_cuda_device device;
    int current;
    int rc = mq_cuda_device_current(&current, err);
    if (rc == MQ_OK) rc = mq_cuda_device_get(current, &device, err);
    if (rc == MQ_OK) gemm->capability = 10 * device.major + device.minor;
    return rc;
}

int mq_cuda_gemm_open(const mq_cuda_gemm_options *options, mq_cuda_gemm **out, mq_error *err)
{
    const mq_cuda_gemm_options given = options != NULL ? *options : mq_cuda_gemm_options{};
    *out = NULL;
    if (given.plans < 0 || (given.workspace_nbytes != 0 && given.workspace_nbytes < LEAST_WORKSPACE))
        return mq_fail(err, MQ_ERR_VALUE, "cuBLASLt: %lld plans, a workspace of %zu bytes; expected at least 1 and %d",
                       (long long)given.plans, given.workspace_nbytes, (int)LEAST_WORKSPACE);
    mq_cuda_gemm *gemm = (mq_cuda_gemm *)mq_alloc_zeroed(sizeof *gemm);
    if (gemm == NULL) return mq_fail_memory(err, "the state of cuBLASLt", sizeof *gemm);
    pthread_mutex_init(&gemm->mutex, NULL);
    gemm->capability = given.capability;
    gemm->allow_tf32 = given.allow_tf32 != 0;
    gemm->fast_fp8 = given.fast_fp8 != 0;
    gemm->workspace_nbytes = given.workspace_nbytes != 0 ? given.workspace_nbytes : (size_t)WORKSPACE;
    int rc = mq_lt_plans_new(gemm, given.plans > 0 ? given.plans : (int64_t)PLANS, err);
    if (rc == MQ_OK) rc = lt::open(&gemm->lt, given.library, err);
    if (rc == MQ_OK && gemm->capability == 0) rc = find_capability(gemm, err);
    if (rc == MQ_OK) {
        const lt::cublasStatus_t status = gemm->lt.cublasLtCreate(&gemm->handle);
        if (status != lt::CUBLAS_STATUS_SUCCESS) rc = mq_lt_failed(gemm, status, "cublasLtCreate", NULL, err);
    }
    if (rc == MQ_OK) *out = gemm;
    else mq_cuda_gemm_close(gemm);
    return rc;
}

void mq_cuda_gemm_close(mq_cuda_gemm *gemm)
{
    if (gemm == NULL) return;
    mq_lt_plans_free(gemm);
    if (gemm->handle != NULL) gemm->lt.cublasLtDestroy(gemm->handle);
    lt::close(&gemm->lt);
    pthread_mutex_destroy(&gemm->mutex);
    mq_free(gemm);
}

size_t mq_cuda_gemm_workspace(const mq_cuda_gemm *gemm)
{
    return gemm->workspace_nbytes;
}

void mq_cuda_gemm_count(mq_cuda_gemm *gemm, mq_cuda_gemm_counts *out)
{
    pthread_mutex_lock(&gemm->mutex);
    *out = gemm->counts;
    out->plans = gemm->count;
    out->version = gemm->lt.version;
    pthread_mutex_unlock(&gemm->mutex);
}

/* ---- words ---- */

static const char *name_of(int type)
{
    switch (type) {
    case lt::CUDA_R_32F: return "float32";
    case lt::CUDA_R_16BF: return "bfloat16";
    case lt::CUDA_R_16F: return "float16";
    case lt::CUDA_R_8F_E4M3: return "fp8_e4m3";
    case lt::CUDA_R_8F_E5M2: return "fp8_e5m2";
    case lt::CUDA_R_4F_E2M1: return "fp4_e2m1";
    case lt::CUDA_R_8I: return "int8";
    case lt::CUDA_R_32I: return "int32";
    default: return "?";
    }
}

static const char *scales_of(const mq_lt_operand *operand)
{
    static const char *const names[] = {" one scale", " a scale per 16", " a scale per 32", " a scale per row",
                                        " a scale per 128", " a scale per 128 x 128"};
    const bool known = operand->scale != NULL && (unsigned)operand->scale_mode < MQ_COUNT(names);
    return known ? names[operand->scale_mode] : "";
}

void mq_lt_describe(const mq_lt_product *p, char *out, size_t size)
{
    char batch[32] = "";
    if (p->batch > 1) snprintf(batch, sizeof batch, "%lld times ", (long long)p->batch);
    snprintf(out, size, "%sout [%lld, %lld] %s = a [%lld, %lld]%s %s%s * b [%lld, %lld]%s %s%s%s%s", batch,
             (long long)p->rows, (long long)p->cols, name_of(p->out_type),
             (long long)(p->a.transpose ? p->depth : p->rows), (long long)(p->a.transpose ? p->rows : p->depth),
             p->a.transpose ? "^T" : "", name_of(p->a.type), scales_of(&p->a),
             (long long)(p->b.transpose ? p->cols : p->depth), (long long)(p->b.transpose ? p->depth : p->cols),
             p->b.transpose ? "^T" : "", name_of(p->b.type), scales_of(&p->b), p->bias != NULL ? " + bias " : "",
             p->bias != NULL ? name_of(p->bias_type) : "");
}

static int code_of(lt::cublasStatus_t status)
{
    if (status == lt::CUBLAS_STATUS_ALLOC_FAILED) return MQ_ERR_MEMORY;
    return status == lt::CUBLAS_STATUS_INVALID_VALUE ? MQ_ERR_VALUE : MQ_ERR_STATE;
}

int mq_lt_failed(const mq_cuda_gemm *gemm, lt::cublasStatus_t status, const char *call, const mq_lt_product *product,
                 mq_error *err)
{
    char text[320] = "";
    if (product != NULL) mq_lt_describe(product, text, sizeof text);
    return mq_fail(err, code_of(status), "%s: %s (%d)%s%s; cuBLAS %lld, compute capability %d.%d", call,
                   gemm->lt.cublasLtGetStatusName(status), status, product != NULL ? ": " : "", text,
                   (long long)gemm->lt.version, gemm->capability / 10, gemm->capability % 10);
}

/* ---- running one ---- */

int mq_lt_type_of(mq_dtype dtype)
{
    return dtype == MQ_F32 ? lt::CUDA_R_32F : dtype == MQ_BF16 ? lt::CUDA_R_16BF : lt::CUDA_R_16F;
}

int mq_lt_can(mq_cuda_gemm *gemm, const mq_lt_product *product, const mq_cuda_workspace *workspace, mq_error *err)
{
    mq_lt_plan *plan;
    pthread_mutex_lock(&gemm->mutex);
    int rc = mq_lt_plan_of(gemm, product, workspace->nbytes, &plan, err);
    if (rc == MQ_OK && plan->refused) rc = MQ_LT_REFUSED;
    pthread_mutex_unlock(&gemm->mutex);
    return rc;
}

/* A plan's pointers are set and read under the mutex: cublasLtMatmul has taken what it needs when it returns. */
int mq_lt_run(mq_cuda_gemm *gemm, const mq_lt_product *p, const mq_cuda_workspace *workspace, void *stream,
              mq_error *err)
{
    mq_lt_plan *plan;
    pthread_mutex_lock(&gemm->mutex);
    int rc = mq_lt_plan_of(gemm, p, workspace->nbytes, &plan, err);
    if (rc == MQ_OK && plan->refused) rc = MQ_LT_REFUSED;
    if (rc == MQ_OK) rc = mq_lt_point(gemm, plan, p, err);
    if (rc == MQ_OK) {
        const lt::cublasStatus_t status = gemm->lt.cublasLtMatmul(
            gemm->handle, plan->desc, p->alpha, p->b.data, plan->a, p->a.data, plan->b, p->beta, p->out, plan->out,
            p->out, plan->out, &plan->algo, workspace->data, workspace->nbytes, (cudaStream_t)stream);
        if (status != lt::CUBLAS_STATUS_SUCCESS) rc = mq_lt_failed(gemm, status, "cublasLtMatmul", p, err);
    }
    pthread_mutex_unlock(&gemm->mutex);
    return rc;
}

/* ---- workspace ---- */

void *mq_workspace_take(mq_cuda_workspace *rest, size_t nbytes)
{
    const size_t size = MQ_ROUND_UP(nbytes, (size_t)MQ_LT_ALIGNMENT);
    if (rest->data == NULL || size < nbytes || size > rest->nbytes) return NULL;
    void *taken = rest->data;
    rest->data = (char *)taken + size;
    rest->nbytes -= size;
    return taken;
}

mq_cuda_workspace mq_workspace_split(mq_cuda_workspace *rest)
{
    const size_t quarter = rest->nbytes / 4 / MQ_LT_ALIGNMENT * MQ_LT_ALIGNMENT;
    mq_cuda_workspace own = {NULL, MQ_MIN(quarter, (size_t)MQ_LT_WORKSPACE)};
    own.data = mq_workspace_take(rest, own.nbytes);
    if (own.data == NULL) own.nbytes = 0;
    return own;
}

/* ---- plain products ---- */

static int check(const mq_cuda_gemm_job *job, mq_error *err)
{
    const int64_t rows = job->transpose_a ? job->a.cols : job->a.rows;
    const int64_t cols = job->transpose_b ? job->b.rows : job->b.cols;
    const int64_t depth = job->transpose_a ? job->a.rows : job->a.cols;
    const int64_t other = job->transpose_b ? job->b.cols : job->b.rows;
    char a[128], b[128], out[128];
    int rc = mq_cuda_check_matrix(&job->a, "a", err);
    if (rc == MQ_OK) rc = mq_cuda_check_matrix(&job->b, "b", err);
    if (rc == MQ_OK) rc = mq_cuda_check_matrix(&job->out, "out", err);
    if (rc != MQ_OK) return rc;
    mq_cuda_describe_matrix(&job->a, a, sizeof a);
    mq_cuda_describe_matrix(&job->b, b, sizeof b);
    mq_cuda_describe_matrix(&job->out, out, sizeof out);
    if (job->a.dtype != job->b.dtype || (job->out.dtype != job->a.dtype && job->out.dtype != MQ_F32))
        return mq_fail(err, MQ_ERR_TYPE, "a %s, b %s, out %s: expected a and b of one dtype, and out of that or "
                       "float32", a, b, out);
    if (depth != other || rows != job->out.rows || cols != job->out.cols)
        return mq_fail(err, MQ_ERR_VALUE, "a%s %s times b%s %s does not give out %s", job->transpose_a ? "^T" : "", a,
                       job->transpose_b ? "^T" : "", b, out);
    if (job->batch < 0 || (job->batch > 1 && (job->stride_a < 0 || job->stride_b < 0 || job->stride_out < 1)))
        return mq_fail(err, MQ_ERR_VALUE, "a batch of %lld, strides %lld, %lld, %lld", (long long)job->batch,
                       (long long)job->stride_a, (long long)job->stride_b, (long long)job->stride_out);
    if ((uintptr_t)job->workspace.data % MQ_LT_ALIGNMENT != 0)
        return mq_fail(err, MQ_ERR_VALUE, "a workspace at %p: expected an address that 256 divides",
                       job->workspace.data);
    return MQ_OK;
}

/* Without a single product: what is left of the formula. */
static int run_empty(const mq_cuda_gemm_job *job, void *stream, mq_error *err)
{
    int rc = MQ_OK;
    mq_sums_job rest = {};
    rest.bias = job->bias;
    rest.beta = job->beta;
    rest.out = job->out;
    for (int64_t i = 0; i < MQ_MAX(job->batch, (int64_t)1) && rc == MQ_OK; i++) {
        rc = mq_sums_finish(&rest, stream, err);
        rest.out.data = (char *)rest.out.data + (size_t)job->stride_out * (job->out.dtype == MQ_F32 ? 4 : 2);
    }
    return rc;
}

int mq_cuda_gemm_run(mq_cuda_gemm *gemm, const mq_cuda_gemm_job *job, void *stream, mq_error *err)
{
    return mq_gemm_run(gemm, job, gemm->allow_tf32, stream, err);
}

int mq_gemm_run(mq_cuda_gemm *gemm, const mq_cuda_gemm_job *job, bool allow_tf32, void *stream, mq_error *err)
{
    int rc = check(job, err);
    if (rc != MQ_OK || job->out.rows == 0 || job->out.cols == 0) return rc;
    mq_lt_product p = {};
    p.rows = job->out.rows;
    p.cols = job->out.cols;
    p.depth = job->transpose_a ? job->a.rows : job->a.cols;
    if (p.depth == 0) return run_empty(job, stream, err);
    p.batch = MQ_MAX(job->batch, (int64_t)1);
    p.a = {job->a.data, mq_lt_type_of(job->a.dtype), job->transpose_a != 0, job->a.ld, job->stride_a, 0, NULL};
    p.b = {job->b.data, mq_lt_type_of(job->b.dtype), job->transpose_b != 0, job->b.ld, job->stride_b, 0, NULL};
    p.out = job->out.data;
    p.out_type = mq_lt_type_of(job->out.dtype);
    p.out_ld = job->out.ld;
    p.out_stride = job->stride_out;
    p.compute = allow_tf32 && job->a.dtype == MQ_F32 ? lt::CUBLAS_COMPUTE_32F_FAST_TF32 : lt::CUBLAS_COMPUTE_32F;
    p.scale_type = lt::CUDA_R_32F;
    p.bias = job->bias;
    p.bias_type = p.out_type;
    p.alpha = &job->alpha;
    p.beta = &job->beta;
    mq_cuda_workspace workspace = job->workspace;
    workspace.nbytes = workspace.data == NULL ? 0 : MQ_MIN(workspace.nbytes, (size_t)MQ_LT_WORKSPACE);
    rc = mq_lt_run(gemm, &p, &workspace, stream, err);
    return rc == MQ_LT_REFUSED
        ? mq_lt_failed(gemm, lt::CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic", &p, err) : rc;
}
