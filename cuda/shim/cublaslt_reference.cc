/* Which products the emulated cuBLASLt supports, by the tables of cuBLAS's documentation, and their sums in double. */
#include "cublaslt_reference.h"

#include <initializer_list>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublaslt_shim.h"

using namespace lt;

static int capability = 90;
static char reason[160];

void mq_shim_lt_set_capability(int wanted)
{
    capability = wanted;
}

const char *mq_shim_lt_reason(void)
{
    return reason;
}

static cublasStatus_t refuse(cublasStatus_t status, const char *why)
{
    snprintf(reason, sizeof reason, "%s", why);
    return status;
}

/* ---- what is supported ---- */

#define NEEDS(condition, status, why) \
    do { \
        if (!(condition)) return refuse(CUBLAS_STATUS_##status, why); \
    } while (0)

static int bits_of(int type)
{
    switch (type) {
    case CUDA_R_32F: case CUDA_R_32I: return 32;
    case CUDA_R_16BF: case CUDA_R_16F: return 16;
    case CUDA_R_4F_E2M1: return 4;
    default: return 8;
    }
}

static bool is_fp8(int type)
{
    return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2;
}

static bool is_tn(const mq_lt_problem *p)
{
    return p->desc->op_a == CUBLAS_OP_T && p->desc->op_b == CUBLAS_OP_N;
}

static int64_t depth_of(const mq_lt_problem *p)
{
    return p->desc->op_a == CUBLAS_OP_T ? p->a->rows : p->a->cols;
}

static cublasStatus_t check_shapes(const mq_lt_problem *p)
{
    const int64_t m = p->desc->op_a == CUBLAS_OP_T ? p->a->cols : p->a->rows;
    const int64_t n = p->desc->op_b == CUBLAS_OP_T ? p->b->rows : p->b->cols;
    const int64_t k = p->desc->op_b == CUBLAS_OP_T ? p->b->cols : p->b->rows;
    NEEDS(m == p->d->rows && n == p->d->cols && k == depth_of(p), INVALID_VALUE, "shapes do not agree");
    NEEDS(m > 0 && n > 0 && k > 0, INVALID_VALUE, "nothing to multiply");
    for (const mq_lt_matrix_layout *layout : {p->a, p->b, p->c, p->d}) {
        NEEDS(layout->ld >= layout->rows, INVALID_VALUE, "columns overlap");
        NEEDS(layout->batch == p->d->batch, INVALID_VALUE, "batches differ");
    }
    NEEDS(p->c->type == p->d->type && p->c->rows == m && p->c->cols == n, INVALID_VALUE, "C is not like D");
    return CUBLAS_STATUS_SUCCESS;
}

/* "Datatypes Supported" */
static cublasStatus_t check_wide(const mq_lt_problem *p)
{
    const int type = p->a->type, out = p->d->type;
    const bool tf32 = p->desc->compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    NEEDS(p->desc->a_scale == NULL && p->desc->b_scale == NULL, INVALID_VALUE, "scales are for narrow types");
    NEEDS(p->b->type == type, NOT_SUPPORTED, "A and B differ in type");
    NEEDS(p->desc->compute == CUBLAS_COMPUTE_32F || (tf32 && type == CUDA_R_32F), NOT_SUPPORTED, "compute type");
    NEEDS(p->desc->scale_type == CUDA_R_32F, NOT_SUPPORTED, "scale type");
    NEEDS(out == type || out == CUDA_R_32F, NOT_SUPPORTED, "type of D");
    NEEDS(p->desc->bias == NULL || p->desc->bias_type == -1 || p->desc->bias_type == out, NOT_SUPPORTED, "bias type");
    NEEDS(capability >= 80 || type != CUDA_R_16BF, ARCH_MISMATCH, "bfloat16 is for 8.0 and later");
    return CUBLAS_STATUS_SUCCESS;
}

/* "To use IMMA kernels", a regular data ordering */
static cublasStatus_t check_int8(const mq_lt_problem *p, const mq_lt_preference *least)
{
    NEEDS(p->b->type == CUDA_R_8I && p->d->type == CUDA_R_32I, NOT_SUPPORTED, "types");
    NEEDS(p->desc->compute == CUBLAS_COMPUTE_32I && p->desc->scale_type == CUDA_R_32I, NOT_SUPPORTED, "compute type");
    NEEDS(p->desc->epilogue == CUBLASLT_EPILOGUE_DEFAULT, NOT_SUPPORTED, "integers have no epilogue");
    NEEDS(is_tn(p), NOT_SUPPORTED, "integers are TN only");
    NEEDS(p->a->ld % 4 == 0 && p->b->ld % 4 == 0 && p->c->ld % 4 == 0, NOT_SUPPORTED, "leading dimensions");
    NEEDS(p->d->rows % 4 == 0 && depth_of(p) % 4 == 0, NOT_SUPPORTED, "m and k");
    NEEDS(least->a >= 4 && least->b >= 4 && least->d >= 4, NOT_SUPPORTED, "alignment of 4 bytes");
    return CUBLAS_STATUS_SUCCESS;
}

/* "Tensor Core Usage": dimensions, leading dimensions and pointers in multiples of 16 bytes. */
static cublasStatus_t check_sixteen_bytes(const mq_lt_problem *p, const mq_lt_preference *least)
{
    const int64_t unit = 128 / bits_of(p->a->type), out_unit = 128 / bits_of(p->d->type);
    NEEDS(p->a->rows % unit == 0 && p->b->rows % unit == 0, NOT_SUPPORTED, "rows of A and B in 16 bytes");
    NEEDS(p->a->ld % unit == 0 && p->b->ld % unit == 0, NOT_SUPPORTED, "leading dimensions in 16 bytes");
    NEEDS(p->d->rows % out_unit == 0 && p->d->ld % out_unit == 0 && p->c->ld % out_unit == 0, NOT_SUPPORTED,
          "columns of D in 16 bytes");
    NEEDS(least->a >= 16 && least->b >= 16 && least->c >= 16 && least->d >= 16, NOT_SUPPORTED, "alignment of 16 bytes");
    return CUBLAS_STATUS_SUCCESS;
}

/* What FP8 and FP4 have in common: the tables of types, which say of the bias that it is of half precision. */
static cublasStatus_t check_narrow(const mq_lt_problem *p, const mq_lt_preference *least)
{
    const int out = p->d->type, bias = out == CUDA_R_16F ? CUDA_R_16F : CUDA_R_16BF;
    NEEDS(p->desc->compute == CUBLAS_COMPUTE_32F && p->desc->scale_type == CUDA_R_32F, NOT_SUPPORTED, "compute type");
    NEEDS(out == CUDA_R_16BF || out == CUDA_R_16F || out == CUDA_R_32F, NOT_SUPPORTED, "type of D");
    NEEDS(p->desc->bias == NULL || p->desc->bias_type == bias, NOT_SUPPORTED, "bias type");
    NEEDS(p->d->batch == 1, NOT_SUPPORTED, "batches are not emulated");
    return check_sixteen_bytes(p, least);
}

static bool is_aligned(const void *pointer, size_t nbytes)
{
    return (uintptr_t)pointer % nbytes == 0;
}

static bool is_block_mode(int mode)
{
    return mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F || mode == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
}

/* "Scaling Mode Support Overview", "128-element 1D and 128x128 2D Block Scaling" */
static cublasStatus_t check_fp8_scales(const mq_lt_problem *p)
{
    const int a = p->desc->a_mode, b = p->desc->b_mode;
    const bool tiled = a == CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
    const bool blocks = is_block_mode(a);
    if (a == CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F) {
        NEEDS(b == a, NOT_SUPPORTED, "scale modes differ");
        return CUBLAS_STATUS_SUCCESS;
    }
    NEEDS(p->desc->a_scale != NULL && p->desc->b_scale != NULL, INVALID_VALUE, "no scales");
    NEEDS(tiled ? capability >= 100 : capability == 90, NOT_SUPPORTED, "scale mode on this compute capability");
    if (!blocks) NEEDS(b == a, NOT_SUPPORTED, "scale modes differ");
    if (blocks) {
        NEEDS(a != b || a == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F, NOT_SUPPORTED, "both with 2-D blocks");
        NEEDS(is_block_mode(b), NOT_SUPPORTED, "scale modes differ");
        NEEDS(p->d->rows % 4 == 0 && p->d->cols % 4 == 0, NOT_SUPPORTED, "M and N must be multiples of 4");
    }
    NEEDS((!blocks && !tiled) || (is_aligned(p->desc->a_scale, 16) && is_aligned(p->desc->b_scale, 16)), NOT_SUPPORTED,
          "scales must be aligned to 16 bytes");
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_fp8(const mq_lt_problem *p, const mq_lt_preference *least)
{
    const bool only_tn = capability < 100 || capability / 10 == 12;
    NEEDS(capability >= 89, NOT_SUPPORTED, "FP8 is for 8.9 and later");
    NEEDS(is_fp8(p->b->type), NOT_SUPPORTED, "A and B differ in type");
    NEEDS(p->a->type == CUDA_R_8F_E4M3 || p->b->type == CUDA_R_8F_E4M3, NOT_SUPPORTED, "E5M2 times E5M2");
    NEEDS(is_tn(p) || !only_tn, NOT_SUPPORTED, "TN only");
    const cublasStatus_t status = check_narrow(p, least);
    return status == CUBLAS_STATUS_SUCCESS ? check_fp8_scales(p) : status;
}

static cublasStatus_t check_fp4(const mq_lt_problem *p, const mq_lt_preference *least)
{
    const int mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3;
    NEEDS(capability >= 100, NOT_SUPPORTED, "FP4 is for 10.0 and later");
    NEEDS(p->b->type == CUDA_R_4F_E2M1, NOT_SUPPORTED, "A and B differ in type");
    NEEDS(is_tn(p), NOT_SUPPORTED, "TN only");
    NEEDS(p->desc->a_mode == mode && p->desc->b_mode == mode, NOT_SUPPORTED, "FP4 has a scale per 16");
    NEEDS(p->desc->a_scale != NULL && p->desc->b_scale != NULL, INVALID_VALUE, "no scales");
    NEEDS(is_aligned(p->desc->a_scale, 16) && is_aligned(p->desc->b_scale, 16), NOT_SUPPORTED,
          "scales must be aligned to 16 bytes");
    return check_narrow(p, least);
}

cublasStatus_t mq_lt_supports(const mq_lt_problem *p, const mq_lt_preference *least)
{
    const cublasStatus_t status = check_shapes(p);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (p->a->type == CUDA_R_8I) return check_int8(p, least);
    if (p->a->type == CUDA_R_4F_E2M1) return check_fp4(p, least);
    return is_fp8(p->a->type) ? check_fp8(p, least) : check_wide(p);
}

/* ---- algorithms: what they were chosen for ---- */

static void mix(uint64_t *digest, int64_t number)
{
    *digest = (*digest ^ (uint64_t)number) * 1099511628211u;
    *digest ^= *digest >> 31;
}

static uint64_t digest_of(const mq_lt_problem *p)
{
    const mq_lt_matmul_desc *d = p->desc;
    uint64_t digest = 7;
    const int32_t has_scale = d->a_scale != NULL, has_bias = d->bias != NULL;
    for (int64_t number : {d->compute, d->scale_type, d->pointer_mode, d->op_a, d->op_b, (int32_t)d->epilogue,
                           d->bias_type, d->a_mode, d->b_mode, (int32_t)d->fast, has_scale, has_bias})
        mix(&digest, number);
    for (const mq_lt_matrix_layout *layout : {p->a, p->b, p->c, p->d})
        for (int64_t number : {(int64_t)layout->type, layout->rows, layout->cols, layout->ld, (int64_t)layout->batch,
                               layout->stride})
            mix(&digest, number);
    return digest;
}

cublasLtMatmulAlgo_t mq_lt_algo_for(const mq_lt_problem *p, const mq_lt_preference *least, size_t workspace_nbytes)
{
    const cublasLtMatmulAlgo_t algo = {{digest_of(p), workspace_nbytes, least->a, least->b, least->c, least->d,
                                        (uint64_t)capability, 0}};
    return algo;
}

/* ---- sums ---- */

static double element(int type, const void *data, int64_t at)
{
    switch (type) {
    case CUDA_R_32F: return ((const float *)data)[at];
    case CUDA_R_16BF: return mq_decode(((const uint16_t *)data)[at], MQ_CODEC(BF16));
    case CUDA_R_16F: return mq_decode(((const uint16_t *)data)[at], MQ_CODEC(FP16));
    case CUDA_R_8I: return ((const int8_t *)data)[at];
    case CUDA_R_32I: return ((const int32_t *)data)[at];
    case CUDA_R_8F_E4M3: return mq_decode(((const uint8_t *)data)[at], MQ_CODEC(FP8_E4M3));
    case CUDA_R_8F_E5M2: return mq_decode(((const uint8_t *)data)[at], MQ_CODEC(FP8_E5M2));
    default: return mq_decode(((const uint8_t *)data)[at / 2] >> (at % 2 * 4) & 15u, MQ_CODEC(FP4_E2M1));
    }
}

static void store(int type, void *data, int64_t at, double value)
{
    const float single = (float)value;
    if (type == CUDA_R_32F) ((float *)data)[at] = single;
    else if (type == CUDA_R_32I) ((int32_t *)data)[at] = (int32_t)value;
    else if (type == CUDA_R_16BF) ((uint16_t *)data)[at] = (uint16_t)mq_encode(single, MQ_CODEC(BF16));
    else ((uint16_t *)data)[at] = (uint16_t)mq_encode(single, MQ_CODEC(FP16));
}

/* "1D Block Scaling Factors Layout": tiles of 128 x 4, row after row. */
static int64_t tiled_offset(int64_t outer, int64_t inner, int64_t per_row)
{
    const int64_t tiles_in_row = (per_row + 3) / 4, tile = outer / 128 * tiles_in_row + inner / 4;
    return tile * 512 + outer % 32 * 16 + outer % 128 / 32 * 4 + inner % 4;
}

/* What element (outer, inner) of A^T or B is multiplied by; outer_count is M or N, depth is K. */
static double scale_of(const void *scales, int mode, int64_t outer, int64_t inner, int64_t outer_count, int64_t depth)
{
    const float *numbers = (const float *)scales;
    const uint8_t *codes = (const uint8_t *)scales;
    if (scales == NULL) return 1.0;
    switch (mode) {
    case CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F: return numbers[0];
    case CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F: return numbers[outer];
    case CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F: return numbers[inner / 128 * outer_count + outer];
    case CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F:
        return numbers[outer / 128 * (((depth + 127) / 128 + 3) / 4 * 4) + inner / 128];
    case CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3:      /* the sign is ignored */
        return mq_decode(codes[tiled_offset(outer, inner / 16, (depth + 15) / 16)] & 0x7fu, MQ_CODEC(FP8_E4M3));
    default: return mq_decode(codes[tiled_offset(outer, inner / 32, (depth + 31) / 32)], MQ_CODEC(E8M0));
    }
}

/* 10 bits of mantissa */
static double to_tf32(double value)
{
    return mq_float_of((mq_bits_of((float)value) + 0xfffu + (mq_bits_of((float)value) >> 13 & 1u)) & 0xffffe000u);
}

/* op(A)^T or op(B) with scales applied, K next to each other: out [outer_count, depth]. */
static void widen(const mq_lt_problem *p, bool is_a, const void *data, int64_t first, double *out)
{
    const mq_lt_matrix_layout *layout = is_a ? p->a : p->b;
    const bool along = (is_a ? p->desc->op_a == CUBLAS_OP_T : p->desc->op_b == CUBLAS_OP_N);
    const int64_t outer_count = along ? layout->cols : layout->rows, depth = along ? layout->rows : layout->cols;
    const void *scales = is_a ? p->desc->a_scale : p->desc->b_scale;
    const int mode = is_a ? p->desc->a_mode : p->desc->b_mode;
    for (int64_t i = 0; i < outer_count; i++)
        for (int64_t k = 0; k < depth; k++) {
            const int64_t at = first + (along ? i * layout->ld + k : k * layout->ld + i);
            double value = element(layout->type, data, at);
            if (p->desc->compute == CUBLAS_COMPUTE_32F_FAST_TF32) value = to_tf32(value);
            out[i * depth + k] = value * scale_of(scales, mode, i, k, outer_count, depth);
        }
}

typedef struct multiply_args {
    const mq_lt_problem *problem;
    const mq_lt_places *places;
    double *a, *b;
} multiply_args;

/* One thread is enough: it has the device's memory open. */
static void multiply(multiply_args args)
{
    const mq_lt_problem *p = args.problem;
    const mq_lt_places *at = args.places;
    const int64_t m = p->d->rows, n = p->d->cols, depth = depth_of(p);
    const double alpha = element(p->desc->scale_type, at->alpha, 0), beta = element(p->desc->scale_type, at->beta, 0);
    if (at->workspace != NULL) memset(at->workspace, 0xa5, at->workspace_nbytes);
    for (int64_t one = 0; one < p->d->batch; one++) {
        widen(p, true, at->a, one * p->a->stride, args.a);
        widen(p, false, at->b, one * p->b->stride, args.b);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                double sum = 0.0;
                for (int64_t k = 0; k < depth; k++) sum += args.a[i * depth + k] * args.b[j * depth + k];
                sum *= alpha;
                if (beta != 0.0)
                    sum += beta * element(p->c->type, at->c, one * p->c->stride + j * p->c->ld + i);
                if (p->desc->epilogue == CUBLASLT_EPILOGUE_BIAS)
                    sum += element(p->desc->bias_type < 0 ? p->d->type : p->desc->bias_type, p->desc->bias, i);
                store(p->d->type, at->d, one * p->d->stride + j * p->d->ld + i, sum);
            }
    }
}

static cublasStatus_t check_places(const mq_lt_problem *p, const mq_lt_places *at, const cublasLtMatmulAlgo_t *algo)
{
    const uint64_t *chosen = algo->data;
    NEEDS(chosen[0] == digest_of(p), INVALID_VALUE, "the algorithm was chosen for another product");
    NEEDS(chosen[6] == (uint64_t)capability, ARCH_MISMATCH, "the algorithm was chosen for another device");
    NEEDS(is_aligned(at->a, chosen[2]) && is_aligned(at->b, chosen[3]) && is_aligned(at->c, chosen[4]) &&
          is_aligned(at->d, chosen[5]), INVALID_VALUE, "pointers are less aligned than was promised");
    NEEDS(is_aligned(at->workspace, 256), INVALID_VALUE, "the workspace is not aligned to 256 bytes");
    NEEDS(at->workspace_nbytes >= chosen[1], INVALID_VALUE, "the workspace is too small");
    NEEDS(p->desc->epilogue == CUBLASLT_EPILOGUE_DEFAULT || p->desc->bias != NULL, INVALID_VALUE, "no bias");
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t mq_lt_check(const mq_lt_problem *p, const mq_lt_places *at, const cublasLtMatmulAlgo_t *algo)
{
    const uint64_t *chosen = algo->data;
    const mq_lt_preference least = {at->workspace_nbytes, (uint32_t)chosen[2], (uint32_t)chosen[3], (uint32_t)chosen[4],
                                    (uint32_t)chosen[5], NULL};
    const cublasStatus_t status = check_places(p, at, algo);
    return status == CUBLAS_STATUS_SUCCESS ? mq_lt_supports(p, &least) : status;
}

cublasStatus_t mq_lt_multiply(const mq_lt_problem *p, const mq_lt_places *at)
{
    cublasStatus_t status;
    multiply_args args = {p, at, NULL, NULL};
    args.a = (double *)malloc((size_t)(p->d->rows * depth_of(p)) * sizeof(double));
    args.b = (double *)malloc((size_t)(p->d->cols * depth_of(p)) * sizeof(double));
    status = args.a == NULL || args.b == NULL ? CUBLAS_STATUS_ALLOC_FAILED : CUBLAS_STATUS_SUCCESS;
    if (status == CUBLAS_STATUS_SUCCESS && mq_shim_launch(multiply, dim3(1), dim3(1), args) != cudaSuccess)
        status = CUBLAS_STATUS_EXECUTION_FAILED;
    free(args.a);
    free(args.b);
    return status;
}
