/* The words of CUDA on a CPU, so that g++ compiles the .cu files as they are and tests can run them.
 *
 * One thread block runs at a time; its threads are fibers on one operating system thread (cuda_shim.cc). A fiber
 * runs until it waits at a barrier or in a warp's exchange, so a missing barrier shows as soon as the order of
 * fibers differs from the one that happens to work: tests use three orders. What this cannot see: data races of
 * threads that run truly at once, memory that is not yet visible to others, bank conflicts, speed. */
#ifndef MODELQ_CUDA_SHIM_H
#define MODELQ_CUDA_SHIM_H

#include <stddef.h>
#include <stdint.h>

#define __global__
#define __host__
#define __device__
#define MQ_SHARED(type, name, count) \
    static char name##_key; \
    type *const name = (type *)mq_shim_shared(&name##_key, (count) * sizeof(type))
#define MQ_CHEVRONS(kernel, grid, block, stream, args) \
    mq_shim_launch_on((cudaStream_t)(stream), kernel, grid, block, args)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600, cudaErrorHostMemoryAlreadyRegistered = 712, cudaErrorHostMemoryNotRegistered = 713,
    cudaErrorLaunchFailure = 719, cudaErrorUnknown = 999
};
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);

#include "cuda_shim_runtime.h"

/* Of the fiber that runs. */
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

/* ---- between shim and kernels ---- */

typedef struct mq_shim_call {
    void (*run)(const void *call);   /* one thread */
    const void *call;
} mq_shim_call;

cudaError_t mq_shim_run(const mq_shim_call *call, dim3 grid, dim3 block);
bool mq_shim_is_valid(dim3 grid, dim3 block);

template <typename Args>
cudaError_t mq_shim_launch(void (*kernel)(Args), dim3 grid, dim3 block, const Args &args)
{
    struct bound {
        void (*kernel)(Args);
        const Args *args;
        static void run(const void *self) { ((const bound *)self)->kernel(*((const bound *)self)->args); }
    };
    const bound both = {kernel, &args};
    const mq_shim_call call = {bound::run, &both};
    return mq_shim_run(&call, grid, block);
}

/* Now, or when the stream gets to it (cuda_shim_runtime.h). */
template <typename Args>
cudaError_t mq_shim_launch_on(cudaStream_t stream, void (*kernel)(Args), dim3 grid, dim3 block, const Args &args)
{
    if (!mq_shim_is_valid(grid, block)) return cudaErrorInvalidConfiguration;
    if (mq_shim_fails()) return cudaErrorUnknown;
    return mq_shim_do(stream, [=]() { return mq_shim_launch(kernel, grid, block, args); });
}

/* The block's array of that key, made of rubbish when a thread of the block first asks for it. */
void *mq_shim_shared(const void *key, size_t nbytes);

/* Gives bits to the warp, returns those of lane `lane ^ distance`. All lanes of mask must come here. */
uint64_t mq_shim_exchange(unsigned mask, uint64_t bits, int distance);

static inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int distance)
{
    return (uint32_t)mq_shim_exchange(mask, value, distance);
}

/* Operations of a whole warp: the last lane that comes calls compute with what all 32 lanes gave as `own`, in order; it
 * writes results there. */
void mq_shim_warp(void (*compute)(void *const *lanes), void *own);

/* cp.async and its groups: 16 bytes of which count come from memory and the rest are zeros. They are there once the
 * thread has waited until only `left` of the groups that it closed are under way; before, the place holds rubbish. */
void mq_shim_copy_async(void *to, const void *from, int count);
void mq_shim_copy_close(void);
void mq_shim_copy_wait(int left);

/* Fibers change only where they wait, so these need nothing more. */
template <typename T>
T atomicMax(T *at, T value)
{
    const T old = *at;
    *at = value > old ? value : old;
    return old;
}

template <typename T>
T atomicMin(T *at, T value)
{
    const T old = *at;
    *at = value < old ? value : old;
    return old;
}

template <typename T>
T atomicAdd(T *at, T value)
{
    const T old = *at;
    *at = old + value;
    return old;
}

/* ---- for tests ---- */

#pragma GCC visibility push(default)
extern "C" {
/* 0: thread 0 first, 1: the last first, 2: any order, from seed, anew at every barrier. Blocks come in that order
 * too. */
void mq_shim_set_order(int order, uint64_t seed);
/* The n-th launch from now (1 = the next) fails with that error instead of running; 0 = none does. With late streams
 * that is an error which comes when somebody waits. */
void mq_shim_fail_launch(int n, int error);
/* The n-th call from now that may fail (memory, streams, events, copies, launches, cuBLASLt's) does, and with
 * persistent each one behind it; 0 = none does. Returns how many there were since the last call that had n > 0. */
uint64_t mq_shim_fail_at(uint64_t n, int persistent);
/* Pieces of device and pinned memory, streams and events that are there. */
size_t mq_shim_live(void);
/* on: notes from now on, in the order of asking, what is asked of which stream, a line "what number nbytes" each, what
 * being stream (a new one), work, send, fetch, after (an event), wait (the host, for all) or event (the host, for an
 * event). Returns what was noted, which stays there until notes are begun anew. */
const char *mq_shim_trace(int on);
/* Device memory. Only kernels may touch it: it is opened when one starts and closed when it ends, and the page behind
 * it is never open. (Under the address sanitizer it is ordinary memory, whose ends are watched to the byte.) */
void *mq_shim_alloc(size_t nbytes);
void mq_shim_free(void *memory);
void mq_shim_copy(void *to, const void *from, size_t nbytes);   /* between any two places */
/* Why the last kernel that failed did: threads that wait for others that will not come. */
const char *mq_shim_reason(void);
}
#pragma GCC visibility pop

#endif
