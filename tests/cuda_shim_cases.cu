/* Kernels that are right, and kernels that are wrong in ways that the shim must show. Used by test_cuda_shim.py. */
#include "shim/cuda_shim.h"

struct job {
    int *out;
    int n;
};

static void write_places(job j)
{
    const int block = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    const int threads = (int)(blockDim.x * blockDim.y * blockDim.z);
    const int thread = (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
    j.out[block * threads + thread] += block * threads + thread;
}

/* Every thread gives its neighbour's number. */
static void neighbours(job j)
{
    MQ_SHARED(int, numbers, 256);
    numbers[threadIdx.x] = (int)threadIdx.x;
    __syncthreads();
    j.out[threadIdx.x] = numbers[(threadIdx.x + (unsigned)j.n) % blockDim.x];
}

static void neighbours_without_a_barrier(job j)
{
    MQ_SHARED(int, numbers, 256);
    numbers[threadIdx.x] = (int)threadIdx.x;
    j.out[threadIdx.x] = numbers[(threadIdx.x + (unsigned)j.n) % blockDim.x];
}

/* Two barriers: the second keeps a thread from writing what others are still to read. */
static void rotate(job j)
{
    MQ_SHARED(int, numbers, 256);
    numbers[threadIdx.x] = (int)threadIdx.x;
    __syncthreads();
    for (int i = 0; i < j.n; i++) {
        const int next = numbers[(threadIdx.x + 1) % blockDim.x];
        __syncthreads();
        numbers[threadIdx.x] = next;
        __syncthreads();
    }
    j.out[threadIdx.x] = numbers[threadIdx.x];
}

static void barrier_for_some(job j)
{
    if ((int)threadIdx.x >= j.n) return;
    __syncthreads();
    j.out[threadIdx.x] = 1;
}

static void exchange(job j)
{
    j.out[threadIdx.x] = (int)__shfl_xor_sync(0xffffffffu, threadIdx.x, j.n);
}

static void exchange_for_some(job j)
{
    if (threadIdx.x == 5) return;
    j.out[threadIdx.x] = (int)__shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
}

/* Shared memory is not what the block before left, nor zeros. */
static void unset_memory(job j)
{
    MQ_SHARED(int, numbers, 32);
    j.out[blockIdx.x] = numbers[0];
    numbers[0] = 7;
}

static void beyond_shared_memory(job j)
{
    MQ_SHARED(int, numbers, 32);
    numbers[j.n] = 1;
    j.out[0] = numbers[j.n];
}

static void order_of_blocks(job j)
{
    j.out[j.out[0]++ + 1] = (int)(blockIdx.x * blockDim.x + threadIdx.x);
}

#define CASE(name) {#name, name}
static const struct {
    const char *name;
    void (*kernel)(job);
} cases[] = {CASE(write_places), CASE(neighbours), CASE(neighbours_without_a_barrier), CASE(rotate), CASE(barrier_for_some),
             CASE(exchange), CASE(exchange_for_some), CASE(unset_memory), CASE(beyond_shared_memory),
             CASE(order_of_blocks)};

extern "C" __attribute__((visibility("default"))) int run_case(int i, const unsigned *grid, const unsigned *block, int *out,
                                                               int n)
{
    const job j = {out, n};
    return (int)MQ_CHEVRONS(cases[i].kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), NULL, j);
}

extern "C" __attribute__((visibility("default"))) const char *case_name(int i)
{
    return i < (int)(sizeof cases / sizeof cases[0]) ? cases[i].name : "";
}
