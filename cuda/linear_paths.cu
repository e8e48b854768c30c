/* Which way a linear is computed: the one table of what devices can. No kernels.
 *
 * From cuBLAS's documentation: "Scaling Mode Support Overview" (compute capabilities), "cublasLtMatmul()" (TN; rows of
 * both operands, and columns of the result, in 16 bytes), "128-element 1D and 128x128 2D Block Scaling For FP8 Data
 * Types" (multiples of 4), and the release notes of 12.8 and 12.9 (versions). What cuBLASLt then refuses all the same
 * goes the next way. */
#include "linear.cuh"

enum { ANY = 9999 };

#define MODE(name) lt::CUBLASLT_MATMUL_MATRIX_SCALE_##name

static const mq_linear_way ways[] = {
    {MQ_CUDA_PATH_NVFP4, 100, ANY, 120800, 32, 4, 16, lt::CUDA_R_4F_E2M1, MODE(VEC16_UE4M3), MODE(VEC16_UE4M3), false,
     1},
    {MQ_CUDA_PATH_MXFP8, 100, ANY, 120800, 16, 4, 16, lt::CUDA_R_8F_E4M3, MODE(VEC32_UE8M0), MODE(VEC32_UE8M0), false,
     1},
    {MQ_CUDA_PATH_FP8_BLOCK, 90, 90, 120900, 16, 4, 16, lt::CUDA_R_8F_E4M3, MODE(BLK128x128_32F), MODE(VEC128_32F),
     false, 4},
    {MQ_CUDA_PATH_FP8_OUTER, 90, 90, 120900, 16, 4, 16, lt::CUDA_R_8F_E4M3, MODE(OUTER_VEC_32F), MODE(OUTER_VEC_32F),
     false, 1},
    {MQ_CUDA_PATH_FP8_TENSOR, 89, ANY, 0, 16, 4, 16, lt::CUDA_R_8F_E4M3, MODE(SCALAR_32F), MODE(SCALAR_32F), false, 1},
    {MQ_CUDA_PATH_FP8_SCALED, 89, ANY, 0, 16, 4, 16, lt::CUDA_R_8F_E4M3, MODE(SCALAR_32F), MODE(SCALAR_32F), true, 1},
    {MQ_CUDA_PATH_INT8, 75, ANY, 0, 4, 4, 4, lt::CUDA_R_8I, 0, 0, true, 1},
    {MQ_CUDA_PATH_DEQUANTIZE, 0, ANY, 0, 1, 1, 1, 0, 0, 0, false, 1},
};

static bool quantizes(const mq_cuda_linear *linear, mq_kind kind)
{
    const bool is_whole = linear->inputs == MQ_CUDA_INPUTS_TENSOR || linear->inputs == MQ_CUDA_INPUTS_TOKEN;
    return is_whole && linear->input_kind == kind;
}

static bool is_by_scheme(const mq_cuda_linear *linear, mq_scheme scheme, int64_t block)
{
    return linear->scheme == scheme && linear->inputs == MQ_CUDA_INPUTS_SCHEME && linear->input_scheme == scheme &&
           (linear->block_cols == 0 || linear->block_cols == block);
}

/* Whether a linear's formats are those of a way. */
static bool fits(mq_cuda_path path, const mq_cuda_linear *linear)
{
    const bool fp8 = linear->scheme == MQ_SCHEME_FP8 || linear->scheme == MQ_SCHEME_FP8_CHANNEL;
    const bool one_scale = linear->scheme == MQ_SCHEME_FP8 && linear->inputs == MQ_CUDA_INPUTS_TENSOR;
    if (path == MQ_CUDA_PATH_DEQUANTIZE) return true;
    if (linear->fp8_amax != NULL) return false;
    switch (path) {
    case MQ_CUDA_PATH_NVFP4: return is_by_scheme(linear, MQ_SCHEME_NVFP4, 16);
    case MQ_CUDA_PATH_MXFP8: return is_by_scheme(linear, MQ_SCHEME_MXFP8, 32);
    case MQ_CUDA_PATH_FP8_BLOCK:
        return linear->scheme == MQ_SCHEME_FP8_BLOCK && linear->inputs == MQ_CUDA_INPUTS_GROUP &&
               (linear->block_cols == 0 || linear->block_cols == 128);
    case MQ_CUDA_PATH_FP8_OUTER: return fp8 && !one_scale && quantizes(linear, MQ_KIND_FLOAT);
    case MQ_CUDA_PATH_FP8_TENSOR: return one_scale && quantizes(linear, MQ_KIND_FLOAT);
    case MQ_CUDA_PATH_FP8_SCALED: return fp8 && quantizes(linear, MQ_KIND_FLOAT);
    default: return linear->scheme == MQ_SCHEME_INT8 && linear->block_cols == 0 && quantizes(linear, MQ_KIND_INT);
    }
}

const mq_linear_way *mq_linear_way_of(const mq_cuda_gemm *gemm, const mq_cuda_linear *linear, const mq_linear_way *from)
{
    const mq_linear_way *way = from != NULL ? from : ways;
    while (way->path != MQ_CUDA_PATH_DEQUANTIZE) {
        const bool has = gemm->capability >= way->least && gemm->capability <= way->most &&
                         gemm->lt.version >= way->version;
        const bool sizes = linear->cols % way->cols == 0 && linear->rows % way->rows == 0 &&
                           (uintptr_t)linear->codes % way->alignment == 0;
        if (has && sizes && fits(way->path, linear)) break;
        way++;
    }
    return way;
}
