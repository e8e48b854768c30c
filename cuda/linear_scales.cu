/* A weight's scales in the order that cuBLASLt reads. No kernels. */
#include "linear.cuh"
#include "lt_scales.cuh"

static int64_t blocks_in(int64_t extent, int64_t block)
{
    return MQ_CEIL_DIV(extent, block);
}

static int64_t tiled_block(const mq_linear_way *way)
{
    return way->path == MQ_CUDA_PATH_NVFP4 ? 16 : 32;
}

size_t mq_linear_scales_nbytes(const mq_linear_way *way, const mq_cuda_linear *linear)
{
    const int64_t across = blocks_in(linear->cols, 128);
    switch (way->path) {
    case MQ_CUDA_PATH_NVFP4:
    case MQ_CUDA_PATH_MXFP8: return mq_lt_tiled_nbytes(linear->rows, blocks_in(linear->cols, tiled_block(way)));
    case MQ_CUDA_PATH_FP8_BLOCK:      /* K-major, columns a multiple of 4 apart */
        if (across % 4 == 0 && (uintptr_t)linear->scales % 16 == 0) return 0;
        return (size_t)(blocks_in(linear->rows, 128) * MQ_ROUND_UP(across, (int64_t)4)) * sizeof(float);
    case MQ_CUDA_PATH_FP8_OUTER:
        return linear->scheme == MQ_SCHEME_FP8 ? (size_t)linear->rows * sizeof(float) : 0;
    default: return 0;
    }
}

int mq_linear_scales_make(const mq_linear_way *way, const mq_cuda_linear *linear, void *out, void *stream,
                          mq_error *err)
{
    const float *scales = (const float *)linear->scales;
    const int64_t across = blocks_in(linear->cols, 128);
    if (mq_linear_scales_nbytes(way, linear) == 0) return MQ_OK;
    if (way->path == MQ_CUDA_PATH_FP8_BLOCK) {
        const mq_lt_spread_job pad = {scales, blocks_in(linear->rows, 128), across, MQ_ROUND_UP(across, (int64_t)4), 1,
                                      (float *)out};
        return mq_lt_spread(&pad, stream, err);
    }
    if (way->path == MQ_CUDA_PATH_FP8_OUTER) {
        const mq_lt_spread_job repeat = {scales, 1, linear->rows, linear->rows, 0, (float *)out};
        return mq_lt_spread(&repeat, stream, err);
    }
    return mq_lt_tile((const uint8_t *)linear->scales, linear->rows, blocks_in(linear->cols, tiled_block(way)),
                      (uint8_t *)out, stream, err);
}

mq_cuda_path mq_cuda_linear_path(const mq_cuda_gemm *gemm, const mq_cuda_linear *linear)
{
    return mq_linear_way_of(gemm, linear, NULL)->path;
}

size_t mq_cuda_linear_prepared_nbytes(const mq_cuda_gemm *gemm, const mq_cuda_linear *linear)
{
    return mq_linear_scales_nbytes(mq_linear_way_of(gemm, linear, NULL), linear);
}

int mq_cuda_linear_prepare(mq_cuda_gemm *gemm, const mq_cuda_linear *linear, void *out, void *stream, mq_error *err)
{
    const mq_linear_way *way = mq_linear_way_of(gemm, linear, NULL);
    if (mq_linear_scales_nbytes(way, linear) != 0 && (out == NULL || (uintptr_t)out % 16 != 0))
        return mq_fail(err, MQ_ERR_VALUE, "prepared scales at %p: expected an address that 16 divides", out);
    return mq_linear_scales_make(way, linear, out, stream, err);
}
