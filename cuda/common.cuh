/* What every kernel is written against: the one header that knows which compiler reads it.
 *
 * nvcc compiles the .cu files for GPUs, g++ compiles the same files with shim/cuda_shim.h for tests (MQ_CUDA_SHIM). A
 * kernel takes one struct by value; `describe` turns that struct into words for errors. */
#ifndef MODELQ_COMMON_CUH
#define MODELQ_COMMON_CUH

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(MQ_CUDA_SHIM)
#include "shim/cuda_shim.h"
#define MQ_IS_EMULATED 1
#define MQ_UNROLL
#define mq_sync_warp() ((void)mq_shim_exchange(0xffffffffu, 0, 0))
#define MQ_UNROLL_BY(count)
#define MQ_SLOW static __attribute__((noinline, unused))
#else
#include <cuda_runtime.h>
#define MQ_IS_EMULATED 0
#define mq_sync_warp() __syncwarp()
#define MQ_PRAGMA(text) _Pragma(#text)
#define MQ_UNROLL MQ_PRAGMA(unroll)
#define MQ_UNROLL_BY(count) MQ_PRAGMA(unroll count)
#define MQ_SLOW static __device__ __noinline__ __attribute__((unused))      /* seldom called: kept out of line */
#define MQ_SHARED(type, name, count) __shared__ type name[count]
#define MQ_CHEVRONS(kernel, grid, block, stream, args) \
    (kernel<<<grid, block, 0, (cudaStream_t)stream>>>(args), cudaGetLastError())
#endif

#include "modelq_cuda.h"

#include "kernels/scales.h"
#include "kernels/scheme_codec.h"

#define MQ_DEVICE static inline __device__ __attribute__((unused))

enum { MQ_THREADS = 256, MQ_WARP = 32, MQ_GROUP = 8, MQ_FLOAT_DTYPES = 3 };

/* ---- launches ---- */

typedef struct mq_launch {
    const char *kernel;
    dim3 grid;
    void *stream;
    mq_error *err;
} mq_launch;

int mq_cuda_launch_failed(const mq_launch *launch, cudaError_t status, const char *arguments);

/* Every kernel runs with MQ_THREADS threads a block. */
template <typename Args>
static int mq_launch_kernel(const mq_launch *launch, void (*kernel)(Args), const Args &args)
{
    const cudaError_t status = MQ_CHEVRONS(kernel, launch->grid, dim3(MQ_THREADS), launch->stream, args);
    if (status == cudaSuccess) return MQ_OK;
    char text[256];
    describe(args, text, sizeof text);
    return mq_cuda_launch_failed(launch, status, text);
}

/* The grid that gives `items` a thread each. One past the largest grid is refused by the launch, with its numbers. */
static inline dim3 mq_grid_for(int64_t items)
{
    const int64_t blocks = MQ_CEIL_DIV(items, (int64_t)MQ_THREADS);
    return dim3((unsigned)MQ_MIN(blocks, (int64_t)UINT32_MAX));
}

int mq_cuda_check_matrix(const mq_cuda_matrix *matrix, const char *name, mq_error *err);
int mq_cuda_check_same(const mq_cuda_matrix *a, const mq_cuda_matrix *b, const char *name, mq_error *err);
void mq_cuda_describe_matrix(const mq_cuda_matrix *matrix, char *out, size_t size);

/* ---- places ---- */

MQ_DEVICE int64_t mq_thread_index(void)
{
    return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}

/* 64-bit division takes some hundred instructions, and almost every index fits 32 bits. */
typedef struct mq_place {
    int64_t row, group;
} mq_place;

MQ_DEVICE mq_place mq_place_of(int64_t index, int64_t groups)
{
    mq_place place;
    if (index <= (int64_t)UINT32_MAX && groups <= (int64_t)UINT32_MAX) {
        place.row = (uint32_t)index / (uint32_t)groups;
        place.group = (uint32_t)index % (uint32_t)groups;
    } else {
        place.row = index / groups;
        place.group = index % groups;
    }
    return place;
}

/* The grid of blocks over a matrix, as mq_grid (csrc/quant/scale.h) has it. */
typedef struct mq_blocks {
    int64_t block_rows, block_cols; /* actual extents, at least 1 */
    int64_t rows, cols;             /* number of blocks each way */
} mq_blocks;

static inline mq_blocks mq_blocks_of(const mq_cuda_matrix *x, int64_t block_rows, int64_t block_cols)
{
    mq_blocks blocks;
    blocks.block_rows = MQ_MAX(block_rows > 0 ? block_rows : x->rows, (int64_t)1);
    blocks.block_cols = MQ_MAX(block_cols > 0 ? block_cols : x->cols, (int64_t)1);
    blocks.rows = MQ_MAX(MQ_CEIL_DIV(x->rows, blocks.block_rows), (int64_t)1);
    blocks.cols = MQ_MAX(MQ_CEIL_DIV(x->cols, blocks.block_cols), (int64_t)1);
    return blocks;
}

/* Which block of columns a walk along a row is in: a division at the start and none behind it. */
typedef struct mq_walk {
    int64_t block, within;
} mq_walk;

MQ_DEVICE mq_walk mq_walk_from(int64_t column, const mq_blocks *blocks)
{
    const mq_place place = mq_place_of(column, blocks->block_cols);
    const mq_walk walk = {place.row, place.group};
    return walk;
}

MQ_DEVICE void mq_walk_step(mq_walk *walk, const mq_blocks *blocks)
{
    walk->within++;
    if (walk->within < blocks->block_cols) return;
    walk->within = 0;
    walk->block++;
}

/* ---- reductions ---- */

/* Magnitudes are compared as integers: exact in any order, and NaN wins. */
MQ_DEVICE uint32_t mq_magnitude(float x)
{
    return mq_bits_of(x) & 0x7fffffffu;
}

/* The largest value of each `lanes` neighbouring threads (a power of two), in all of them. Whole warps must call. */
MQ_DEVICE uint32_t mq_lanes_max(uint32_t value, int lanes)
{
    for (int offset = 1; offset < lanes; offset <<= 1) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, value, offset);
        value = MQ_MAX(value, other);
    }
    return value;
}

/* The largest value of the block's threads, in thread 0. Once per kernel: a second call would need a barrier more. */
MQ_DEVICE uint32_t mq_block_max(uint32_t value)
{
    MQ_SHARED(uint32_t, partial, MQ_THREADS / MQ_WARP);
    const unsigned lane = threadIdx.x % MQ_WARP, warp = threadIdx.x / MQ_WARP;
    value = mq_lanes_max(value, MQ_WARP);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    for (unsigned i = 0; threadIdx.x == 0 && i < MQ_THREADS / MQ_WARP; i++) value = MQ_MAX(value, partial[i]);
    return value;
}

#endif
