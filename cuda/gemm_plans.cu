/* Plans: descriptors and an algorithm for a product of given sizes, types, scale modes and alignments. The least
 * recently used goes first. No kernels. */
#include "gemm_plans.cuh"

extern "C" {
#include "core/alloc.h"
}

/* ---- keys ---- */

/* The largest power of two, up to 256, that divides an address and a distance. */
static int64_t alignment_of(const void *data, int64_t stride_nbytes)
{
    const uint64_t bits = (uint64_t)(uintptr_t)data | (uint64_t)stride_nbytes | MQ_LT_ALIGNMENT;
    return (int64_t)(bits & (~bits + 1));
}

static int64_t bits_of_type(int type)
{
    if (type == lt::CUDA_R_32F || type == lt::CUDA_R_32I) return 32;
    if (type == lt::CUDA_R_16BF || type == lt::CUDA_R_16F) return 16;
    return type == lt::CUDA_R_4F_E2M1 ? 4 : 8;
}

mq_lt_alignments mq_lt_alignments_of(const mq_lt_product *p)
{
    const int64_t many = p->batch > 1;
    mq_lt_alignments of;
    of.a = alignment_of(p->a.data, many * p->a.stride * bits_of_type(p->a.type) / 8);
    of.b = alignment_of(p->b.data, many * p->b.stride * bits_of_type(p->b.type) / 8);
    of.out = alignment_of(p->out, many * p->out_stride * bits_of_type(p->out_type) / 8);
    return of;
}

/* Everything that heuristics or descriptors depend on but for pointers, of which the alignment counts. */
static mq_lt_key key_of(const mq_lt_product *p, size_t workspace_nbytes)
{
    const mq_lt_alignments aligned = mq_lt_alignments_of(p);
    const int64_t flags = p->a.transpose | p->b.transpose << 1 | p->on_device << 2 | (p->bias != NULL) << 3 |
                          (p->a.scale != NULL) << 4 | (p->b.scale != NULL) << 5;
    const mq_lt_key key = {{
        p->rows, p->cols, p->depth, p->batch, p->a.type, p->b.type, p->out_type, p->a.ld, p->b.ld, p->out_ld,
        p->a.stride, p->b.stride, p->out_stride, p->a.scale_mode, p->b.scale_mode, p->compute, p->scale_type,
        p->bias_type, flags, aligned.a, aligned.b, aligned.out, alignment_of(p->bias, 0), (int64_t)workspace_nbytes}};
    return key;
}

static int64_t bucket_of(const mq_cuda_gemm *gemm, const mq_lt_key *key)
{
    uint64_t hash = 1469598103934665603u;      /* FNV-1a, a number at a time */
    for (size_t i = 0; i < MQ_COUNT(key->numbers); i++) {
        hash = (hash ^ (uint64_t)key->numbers[i]) * 1099511628211u;
        hash ^= hash >> 29;
    }
    return (int64_t)(hash % (uint64_t)gemm->bucket_count);
}

/* ---- making and dropping ---- */

static void drop(const mq_cuda_gemm *gemm, mq_lt_plan *plan)
{
    if (plan->desc != NULL) gemm->lt.cublasLtMatmulDescDestroy(plan->desc);
    if (plan->a != NULL) gemm->lt.cublasLtMatrixLayoutDestroy(plan->a);
    if (plan->b != NULL) gemm->lt.cublasLtMatrixLayoutDestroy(plan->b);
    if (plan->out != NULL) gemm->lt.cublasLtMatrixLayoutDestroy(plan->out);
    memset(plan, 0, sizeof *plan);
}

typedef struct maker {
    const mq_cuda_gemm *gemm;
    const mq_lt_product *product;
    mq_error *err;
    int rc;                  /* once it is not MQ_OK nothing more is done */
} maker;

static void check(maker *m, lt::cublasStatus_t status, const char *call)
{
    if (m->rc == MQ_OK && status != lt::CUBLAS_STATUS_SUCCESS)
        m->rc = mq_lt_failed(m->gemm, status, call, m->product, m->err);
}

template <typename Value>
static void describe_by(maker *m, lt::cublasLtMatmulDesc_t desc, int attribute, Value value)
{
    if (m->rc != MQ_OK) return;
    check(m, m->gemm->lt.cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value),
          "cublasLtMatmulDescSetAttribute");
}

/* Stored row-major [rows, cols], which is the column-major [cols, rows]. */
static void make_layout(maker *m, lt::cublasLtMatrixLayout_t *out, int type, int64_t rows, int64_t cols, int64_t ld,
                        int64_t stride)
{
    const lt::library *lib = &m->gemm->lt;
    const int32_t batch = (int32_t)m->product->batch;
    if (m->rc != MQ_OK) return;
    check(m, lib->cublasLtMatrixLayoutCreate(out, type, (uint64_t)cols, (uint64_t)rows, ld),
          "cublasLtMatrixLayoutCreate");
    if (m->rc != MQ_OK || batch <= 1) return;
    check(m, lib->cublasLtMatrixLayoutSetAttribute(*out, lt::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch),
          "cublasLtMatrixLayoutSetAttribute");
    check(m, lib->cublasLtMatrixLayoutSetAttribute(*out, lt::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                                   sizeof stride),
          "cublasLtMatrixLayoutSetAttribute");
}

/* out^T = op(b)^T op(a)^T in column-major words: A is b, B is a, m is cols, n is rows. A linear's forward,
 * in * weight^T, is then "TN": the only way for FP8 on compute capabilities 8.9, 9.0 and 12.x, and for FP4 and INT8
 * anywhere (cuBLAS documentation, "cublasLtMatmul()"). */
static void make_descriptors(maker *m, mq_lt_plan *plan)
{
    const mq_lt_product *p = m->product;
    const int32_t transpose_a = p->b.transpose ? lt::CUBLAS_OP_T : lt::CUBLAS_OP_N;
    const int32_t transpose_b = p->a.transpose ? lt::CUBLAS_OP_T : lt::CUBLAS_OP_N;
    check(m, m->gemm->lt.cublasLtMatmulDescCreate(&plan->desc, p->compute, p->scale_type), "cublasLtMatmulDescCreate");
    describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_TRANSA, transpose_a);
    describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_TRANSB, transpose_b);
    if (p->on_device)
        describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_POINTER_MODE, (int32_t)lt::CUBLASLT_POINTER_MODE_DEVICE);
    if (p->bias != NULL) {
        describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)lt::CUBLASLT_EPILOGUE_BIAS);
        describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (int32_t)p->bias_type);
    }
    if (p->a.scale != NULL || p->b.scale != NULL) {
        describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, (int32_t)p->b.scale_mode);
        describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, (int32_t)p->a.scale_mode);
    }
    if (m->gemm->fast_fp8 && p->a.type == lt::CUDA_R_8F_E4M3)
        describe_by(m, plan->desc, lt::CUBLASLT_MATMUL_DESC_FAST_ACCUM, (int8_t)1);
    const bool flip_a = p->a.transpose, flip_b = p->b.transpose;
    make_layout(m, &plan->a, p->b.type, flip_b ? p->cols : p->depth, flip_b ? p->depth : p->cols, p->b.ld,
                p->b.stride);
    make_layout(m, &plan->b, p->a.type, flip_a ? p->depth : p->rows, flip_a ? p->rows : p->depth, p->a.ld,
                p->a.stride);
    make_layout(m, &plan->out, p->out_type, p->rows, p->cols, p->out_ld, p->out_stride);
}

static void prefer(maker *m, lt::cublasLtMatmulPreference_t preference, int attribute, const void *value, size_t size)
{
    if (m->rc != MQ_OK) return;
    check(m, m->gemm->lt.cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, size),
          "cublasLtMatmulPreferenceSetAttribute");
}

/* Asks which algorithm is best. No answer is an answer: refused. */
static void ask(maker *m, mq_lt_plan *plan, size_t workspace_nbytes)
{
    const mq_lt_alignments aligned = mq_lt_alignments_of(m->product);
    const uint32_t of_a = (uint32_t)aligned.b, of_b = (uint32_t)aligned.a, of_out = (uint32_t)aligned.out;
    const uint64_t most = workspace_nbytes;
    lt::cublasLtMatmulPreference_t preference = NULL;
    lt::cublasLtMatmulHeuristicResult_t best;
    int count = 0;
    if (m->rc != MQ_OK) return;
    check(m, m->gemm->lt.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    prefer(m, preference, lt::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most);
    prefer(m, preference, lt::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of_a, sizeof of_a);
    prefer(m, preference, lt::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of_b, sizeof of_b);
    prefer(m, preference, lt::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of_out, sizeof of_out);
    prefer(m, preference, lt::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of_out, sizeof of_out);
    memset(&best, 0, sizeof best);
    if (m->rc == MQ_OK) {
        const lt::cublasStatus_t status = m->gemm->lt.cublasLtMatmulAlgoGetHeuristic(
            m->gemm->handle, plan->desc, plan->a, plan->b, plan->out, plan->out, preference, 1, &best, &count);
        plan->refused = status == lt::CUBLAS_STATUS_NOT_SUPPORTED || status == lt::CUBLAS_STATUS_INVALID_VALUE ||
                        status == lt::CUBLAS_STATUS_ARCH_MISMATCH;
        if (!plan->refused) check(m, status, "cublasLtMatmulAlgoGetHeuristic");
        if (m->rc == MQ_OK && (count == 0 || best.state != lt::CUBLAS_STATUS_SUCCESS)) plan->refused = true;
    }
    if (preference != NULL) m->gemm->lt.cublasLtMatmulPreferenceDestroy(preference);
    plan->algo = best.algo;
    plan->workspace_nbytes = best.workspaceSize;
}

/* Heuristics look at the pointers for their alignment, so those of this product are set before they are asked. */
int mq_lt_point(const mq_cuda_gemm *gemm, const mq_lt_plan *plan, const mq_lt_product *p, mq_error *err)
{
    maker m = {gemm, p, err, MQ_OK};
    if (p->bias != NULL) describe_by(&m, plan->desc, lt::CUBLASLT_MATMUL_DESC_BIAS_POINTER, p->bias);
    if (p->b.scale != NULL) describe_by(&m, plan->desc, lt::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, p->b.scale);
    if (p->a.scale != NULL) describe_by(&m, plan->desc, lt::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, p->a.scale);
    return m.rc;
}

/* ---- the plans ---- */

static void unlink_plan(mq_cuda_gemm *gemm, int64_t index)
{
    int64_t *at = &gemm->buckets[bucket_of(gemm, &gemm->plans[index].key)];
    while (*at != index) at = &gemm->plans[*at].next;
    *at = gemm->plans[index].next;
}

/* A place for a new plan: a free one, or that of the plan which was not used for longest. */
static int64_t free_place(mq_cuda_gemm *gemm)
{
    int64_t oldest = 0;
    if (gemm->count < gemm->room) return gemm->count++;
    for (int64_t i = 1; i < gemm->count; i++)
        if (gemm->plans[i].used < gemm->plans[oldest].used) oldest = i;
    unlink_plan(gemm, oldest);
    drop(gemm, &gemm->plans[oldest]);
    gemm->counts.evictions++;
    return oldest;
}

static int add_plan(mq_cuda_gemm *gemm, const mq_lt_product *product, const mq_lt_key *key, size_t workspace_nbytes,
                    mq_lt_plan **out, mq_error *err)
{
    mq_lt_plan plan;
    maker m = {gemm, product, err, MQ_OK};
    memset(&plan, 0, sizeof plan);
    plan.key = *key;
    make_descriptors(&m, &plan);
    if (m.rc == MQ_OK) m.rc = mq_lt_point(gemm, &plan, product, err);
    ask(&m, &plan, workspace_nbytes);
    if (m.rc != MQ_OK) {
        drop(gemm, &plan);
        return m.rc;
    }
    const int64_t index = free_place(gemm), bucket = bucket_of(gemm, key);
    plan.next = gemm->buckets[bucket];
    gemm->buckets[bucket] = index;
    gemm->plans[index] = plan;
    gemm->counts.refusals += plan.refused;
    *out = &gemm->plans[index];
    return MQ_OK;
}

int mq_lt_plan_of(mq_cuda_gemm *gemm, const mq_lt_product *product, size_t workspace_nbytes, mq_lt_plan **out,
                  mq_error *err)
{
    const mq_lt_key key = key_of(product, workspace_nbytes);
    int rc = MQ_OK;
    int64_t i = gemm->buckets[bucket_of(gemm, &key)];
    while (i >= 0 && memcmp(&gemm->plans[i].key, &key, sizeof key) != 0) i = gemm->plans[i].next;
    if (i >= 0) {
        gemm->counts.hits++;
        *out = &gemm->plans[i];
    } else {
        gemm->counts.misses++;
        rc = add_plan(gemm, product, &key, workspace_nbytes, out, err);
    }
    if (rc == MQ_OK) (*out)->used = ++gemm->clock;
    return rc;
}

int mq_lt_plans_new(mq_cuda_gemm *gemm, int64_t room, mq_error *err)
{
    gemm->room = room;
    gemm->bucket_count = 2 * room + 1;
    gemm->plans = (mq_lt_plan *)mq_alloc_array((size_t)room, sizeof *gemm->plans);
    gemm->buckets = (int64_t *)mq_alloc_array((size_t)gemm->bucket_count, sizeof *gemm->buckets);
    if (gemm->plans == NULL || gemm->buckets == NULL)
        return mq_fail_memory(err, "plans of products", (size_t)room * sizeof *gemm->plans);
    for (int64_t i = 0; i < gemm->bucket_count; i++) gemm->buckets[i] = -1;
    return MQ_OK;
}

void mq_lt_plans_free(mq_cuda_gemm *gemm)
{
    for (int64_t i = 0; i < gemm->count; i++) drop(gemm, &gemm->plans[i]);
    mq_free(gemm->plans);
    mq_free(gemm->buckets);
}
