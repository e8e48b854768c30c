/* The CUDA runtime of the shim: see cuda_shim_runtime.h. */
#include "cuda_shim.h"

#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unordered_map>

struct mq_shim_stream {
    int device;
};

struct mq_shim_event {
    int device;
};

static std::mutex lock;
static std::unordered_map<void *, size_t> sizes;    /* of what cudaMalloc gave */
static size_t used;

static size_t number(const char *name, size_t otherwise)
{
    const char *given = getenv(name);
    return given != NULL && given[0] != '\0' ? (size_t)strtoull(given, NULL, 10) : otherwise;
}

cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = (int)number("MODELQ_SHIM_DRIVER", CUDART_VERSION);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    int driver;
    cudaDriverGetVersion(&driver);
    *count = 0;
    if (driver < CUDART_VERSION) return cudaErrorInsufficientDriver;
    *count = (int)number("MODELQ_SHIM_DEVICES", 1);
    return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device)
{
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "emulated device %d", device);
    out->major = 8;
    out->multiProcessorCount = 1;
    return cudaSuccess;
}

static thread_local int current_device;

cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    int count;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) return status;
    if (device < 0 || device >= count) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_nbytes, size_t *total)
{
    const std::lock_guard<std::mutex> held(lock);
    *total = number("MODELQ_SHIM_MEMORY", (size_t)1 << 34);
    *free_nbytes = *total > used ? *total - used : 0;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t nbytes)
{
    const std::lock_guard<std::mutex> held(lock);
    if (used + nbytes > number("MODELQ_SHIM_MEMORY", (size_t)1 << 34)) return cudaErrorMemoryAllocation;
    *out = mq_shim_alloc(nbytes);
    if (*out == NULL) return cudaErrorMemoryAllocation;
    sizes[*out] = nbytes;
    used += nbytes;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory)
{
    const std::lock_guard<std::mutex> held(lock);
    const auto found = sizes.find(memory);
    if (found == sizes.end()) return cudaErrorInvalidValue;
    used -= found->second;
    sizes.erase(found);
    mq_shim_free(memory);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t nbytes)
{
    *out = malloc(nbytes);
    return *out != NULL ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory)
{
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t nbytes, cudaMemcpyKind, cudaStream_t)
{
    mq_shim_copy(to, from, nbytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int byte, size_t nbytes, cudaStream_t)
{
    void *filled = malloc(nbytes);
    if (filled == NULL) return cudaErrorMemoryAllocation;
    memset(filled, byte, nbytes);
    mq_shim_copy(memory, filled, nbytes);
    free(filled);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = new mq_shim_stream{current_device};
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = new mq_shim_event{current_device};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t)
{
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned)
{
    return cudaSuccess;
}
