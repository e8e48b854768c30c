/* The objects and calls of the emulated cuBLASLt; what it supports and computes is in cublaslt_reference.cc. */
#include "cublaslt_shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublaslt_reference.h"

using namespace lt;

#define MQ_LT_EXPORT extern "C" __attribute__((visibility("default")))

static const char *const names[] = {
#define MQ_LT_CALL(result, name, parameters) #name,
#include "cublaslt.def"
};

static struct {
    int64_t calls;
    int fail_after, fail_with;
} said[MQ_COUNT(names)];

static int64_t live;
static size_t version = 130100;
static library real;

static int index_of(const char *call)
{
    for (size_t i = 0; i < MQ_COUNT(names); i++)
        if (strcmp(names[i], call) == 0) return (int)i;
    abort();
}

/* Counts a call, and gives the status that a test wants of it. */
static cublasStatus_t enter(const char *call)
{
    auto &row = said[index_of(call)];
    row.calls++;
    if (mq_shim_fails()) return CUBLAS_STATUS_ALLOC_FAILED;
    return row.fail_after > 0 && --row.fail_after == 0 ? row.fail_with : (int)CUBLAS_STATUS_SUCCESS;
}

void mq_shim_lt_fail(const char *call, int n, int status)
{
    said[index_of(call)].fail_after = n;
    said[index_of(call)].fail_with = status;
}

int64_t mq_shim_lt_calls(const char *call)
{
    return said[index_of(call)].calls;
}

int64_t mq_shim_lt_live(void)
{
    return live;
}

int mq_shim_lt_mirror(const char *path)
{
    close(&real);
    return path == NULL || open(&real, path, NULL) == MQ_OK ? 0 : -1;
}

/* The real library's opinion of the same call, where it is there: it must be ours. */
#define RETURN_IF_AGREED(status, call) \
    do { \
        const cublasStatus_t ours = status; \
        return real.opened == NULL || real.call == ours ? ours : (int)CUBLAS_STATUS_INTERNAL_ERROR; \
    } while (0)

void mq_shim_lt_set_version(int wanted)
{
    version = (size_t)wanted;
}

/* ---- the library ---- */

MQ_LT_EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t *out)
{
    const cublasStatus_t status = enter("cublasLtCreate");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    *out = (cublasLtHandle_t)malloc(1);
    live++;
    return *out != NULL ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

MQ_LT_EXPORT cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    live--;
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

MQ_LT_EXPORT size_t cublasLtGetVersion(void)
{
    return version;
}

MQ_LT_EXPORT const char *cublasLtGetStatusName(cublasStatus_t status)
{
    switch (status) {
#define STATUS(name) case name: return #name;
    STATUS(CUBLAS_STATUS_SUCCESS)
    STATUS(CUBLAS_STATUS_NOT_INITIALIZED)
    STATUS(CUBLAS_STATUS_ALLOC_FAILED)
    STATUS(CUBLAS_STATUS_INVALID_VALUE)
    STATUS(CUBLAS_STATUS_ARCH_MISMATCH)
    STATUS(CUBLAS_STATUS_EXECUTION_FAILED)
    STATUS(CUBLAS_STATUS_INTERNAL_ERROR)
    STATUS(CUBLAS_STATUS_NOT_SUPPORTED)
    default: return "CUBLAS_STATUS_UNKNOWN";
    }
}

/* ---- objects ---- */

template <typename Object>
static cublasStatus_t make(Object **out, const Object &value)
{
    *out = (Object *)malloc(sizeof value);
    if (*out == NULL) return CUBLAS_STATUS_ALLOC_FAILED;
    **out = value;
    live++;
    return CUBLAS_STATUS_SUCCESS;
}

template <typename Object>
static cublasStatus_t destroy(Object *object)
{
    if (object == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    live--;
    free(object);
    return CUBLAS_STATUS_SUCCESS;
}

typedef struct field {
    int attribute;
    size_t offset, size;
} field;

#define FIELD(attribute, type, name) {attribute, offsetof(type, name), sizeof(((type *)0)->name)}

/* An attribute's size is checked against that of what is stored (cublasLtMatmulDescSetAttribute()). */
template <typename Object, size_t Count>
static cublasStatus_t set(Object *object, const field (&fields)[Count], int attribute, const void *value, size_t size)
{
    if (object == NULL || value == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    for (const field &f : fields) {
        if (f.attribute != attribute) continue;
        if (f.size != size) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy((char *)object + f.offset, value, size);
        return CUBLAS_STATUS_SUCCESS;
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

static const field of_desc[] = {
    FIELD(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, mq_lt_matmul_desc, compute),
    FIELD(CUBLASLT_MATMUL_DESC_SCALE_TYPE, mq_lt_matmul_desc, scale_type),
    FIELD(CUBLASLT_MATMUL_DESC_POINTER_MODE, mq_lt_matmul_desc, pointer_mode),
    FIELD(CUBLASLT_MATMUL_DESC_TRANSA, mq_lt_matmul_desc, op_a),
    FIELD(CUBLASLT_MATMUL_DESC_TRANSB, mq_lt_matmul_desc, op_b),
    FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE, mq_lt_matmul_desc, epilogue),
    FIELD(CUBLASLT_MATMUL_DESC_BIAS_POINTER, mq_lt_matmul_desc, bias),
    FIELD(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, mq_lt_matmul_desc, bias_type),
    FIELD(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, mq_lt_matmul_desc, a_scale),
    FIELD(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, mq_lt_matmul_desc, b_scale),
    FIELD(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mq_lt_matmul_desc, a_mode),
    FIELD(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mq_lt_matmul_desc, b_mode),
    FIELD(CUBLASLT_MATMUL_DESC_FAST_ACCUM, mq_lt_matmul_desc, fast),
};

static const field of_layout[] = {
    FIELD(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, mq_lt_matrix_layout, batch),
    FIELD(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, mq_lt_matrix_layout, stride),
};

static const field of_preference[] = {
    FIELD(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, mq_lt_preference, workspace_nbytes),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, mq_lt_preference, a),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, mq_lt_preference, b),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, mq_lt_preference, c),
    FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, mq_lt_preference, d),
};

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                                     cudaDataType_t scale_type)
{
    const cublasStatus_t status = enter("cublasLtMatmulDescCreate");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    mq_lt_matmul_desc made = {};
    made.compute = compute;
    made.scale_type = scale_type;
    made.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    made.bias_type = -1;
    RETURN_IF_AGREED(make(out, made), cublasLtMatmulDescCreate(&(*out)->real, compute, scale_type));
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    if (desc != NULL && desc->real != NULL && real.opened != NULL) real.cublasLtMatmulDescDestroy(desc->real);
    return destroy(desc);
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                           cublasLtMatmulDescAttributes_t attribute, const void *value,
                                                           size_t size)
{
    const cublasStatus_t status = enter("cublasLtMatmulDescSetAttribute");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    RETURN_IF_AGREED(set(desc, of_desc, attribute, value, size),
                     cublasLtMatmulDescSetAttribute(desc->real, attribute, value, size));
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type, uint64_t rows,
                                                       uint64_t cols, int64_t ld)
{
    const cublasStatus_t status = enter("cublasLtMatrixLayoutCreate");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    const mq_lt_matrix_layout made = {type, (int64_t)rows, (int64_t)cols, ld, 1, 0, NULL};
    RETURN_IF_AGREED(make(out, made), cublasLtMatrixLayoutCreate(&(*out)->real, type, rows, cols, ld));
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    if (layout != NULL && layout->real != NULL && real.opened != NULL) real.cublasLtMatrixLayoutDestroy(layout->real);
    return destroy(layout);
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                             cublasLtMatrixLayoutAttribute_t attribute,
                                                             const void *value, size_t size)
{
    const cublasStatus_t status = enter("cublasLtMatrixLayoutSetAttribute");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    RETURN_IF_AGREED(set(layout, of_layout, attribute, value, size),
                     cublasLtMatrixLayoutSetAttribute(layout->real, attribute, value, size));
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out)
{
    const cublasStatus_t status = enter("cublasLtMatmulPreferenceCreate");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    const mq_lt_preference made = {0, 256, 256, 256, 256, NULL};
    RETURN_IF_AGREED(make(out, made), cublasLtMatmulPreferenceCreate(&(*out)->real));
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    if (preference != NULL && preference->real != NULL && real.opened != NULL)
        real.cublasLtMatmulPreferenceDestroy(preference->real);
    return destroy(preference);
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                                 cublasLtMatmulPreferenceAttributes_t attribute,
                                                                 const void *value, size_t size)
{
    const cublasStatus_t status = enter("cublasLtMatmulPreferenceSetAttribute");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    RETURN_IF_AGREED(set(preference, of_preference, attribute, value, size),
                     cublasLtMatmulPreferenceSetAttribute(preference->real, attribute, value, size));
}

/* ---- products ---- */

MQ_LT_EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t *out, int *count)
{
    const cublasStatus_t status = enter("cublasLtMatmulAlgoGetHeuristic");
    *count = 0;
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (handle == NULL || wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    const mq_lt_problem problem = {desc, a, b, c, d};
    const cublasStatus_t can = mq_lt_supports(&problem, preference);
    if (can != CUBLAS_STATUS_SUCCESS) return can;
    out[0] = {};
    out[0].workspaceSize = preference->workspace_nbytes >= 4096 ? 4096 : 0;
    out[0].state = CUBLAS_STATUS_SUCCESS;
    out[0].algo = mq_lt_algo_for(&problem, preference, out[0].workspaceSize);
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

/* What a product reads of the host, for a stream that comes to it when that is gone. */
typedef struct held_product {
    mq_lt_matmul_desc desc;
    mq_lt_matrix_layout layouts[4];
    uint64_t alpha, beta;
    mq_lt_places places;
} held_product;

static held_product hold(const mq_lt_problem *problem, const mq_lt_places *places)
{
    held_product held = {*problem->desc, {*problem->a, *problem->b, *problem->c, *problem->d}, 0, 0, *places};
    if (held.desc.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE) return held;
    memcpy(&held.alpha, places->alpha, sizeof(float));      /* all scale types that are supported */
    memcpy(&held.beta, places->beta, sizeof(float));
    return held;
}

static cudaError_t multiply_held(const held_product *held)
{
    const mq_lt_problem problem = {&held->desc, &held->layouts[0], &held->layouts[1], &held->layouts[2],
                                   &held->layouts[3]};
    mq_lt_places places = held->places;
    if (held->desc.pointer_mode != CUBLASLT_POINTER_MODE_DEVICE) {
        places.alpha = &held->alpha;
        places.beta = &held->beta;
    }
    return mq_lt_multiply(&problem, &places) == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorLaunchFailure;
}

MQ_LT_EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                                           const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                                           cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                                           cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                                           const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_nbytes,
                                           cudaStream_t stream)
{
    const cublasStatus_t status = enter("cublasLtMatmul");
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (handle == NULL || algo == NULL || alpha == NULL || beta == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    const mq_lt_problem problem = {desc, a_layout, b_layout, c_layout, d_layout};
    const mq_lt_places places = {alpha, beta, a, b, c, d, workspace, workspace_nbytes};
    const cublasStatus_t ready = mq_lt_check(&problem, &places, algo);
    if (ready != CUBLAS_STATUS_SUCCESS) return ready;
    const held_product held = hold(&problem, &places);
    const cudaError_t done = mq_shim_do(stream, [=]() { return multiply_held(&held); });
    return done == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
