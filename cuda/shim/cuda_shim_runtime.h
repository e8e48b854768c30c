/* The calls of the CUDA runtime that device.cu makes, on a machine that is all host: devices whose memory crashes
 * whoever touches it while no kernel runs, and streams. Tests say by the environment what the machine is like:
 * MODELQ_SHIM_DRIVER (the driver's CUDA version, 0 = there is no driver), MODELQ_SHIM_DEVICES, MODELQ_SHIM_MEMORY
 * (bytes of a device), MODELQ_SHIM_PINNED (how many bytes of the host's one call may pin), and MODELQ_SHIM_STREAMS:
 * "late" has streams do nothing before somebody waits for it, so that an order that nobody asked for is not there;
 * "random" has them do some now and then; else they do everything at once. The default stream does everything at once,
 * after all others. */
#ifndef MODELQ_CUDA_SHIM_RUNTIME_H
#define MODELQ_CUDA_SHIM_RUNTIME_H

#include <stddef.h>

#include <functional>

#define CUDART_VERSION 13000

typedef struct mq_shim_stream *cudaStream_t;
typedef struct mq_shim_event *cudaEvent_t;
typedef struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
} cudaDeviceProp;

enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostRegisterDefault = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3,
                      cudaMemcpyDefault = 4 };

/* Whether the call that asks is the one that a test wants to fail (mq_shim_fail_at). */
bool mq_shim_fails();
/* Work for a stream. Errors of late work come when it is waited for. */
cudaError_t mq_shim_do(cudaStream_t stream, const std::function<cudaError_t()> &work);
/* All that the stream was asked for. */
cudaError_t mq_shim_drain(cudaStream_t stream);

cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemGetInfo(size_t *free_nbytes, size_t *total);
cudaError_t cudaMalloc(void **out, size_t nbytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMallocHost(void **out, size_t nbytes);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaHostRegister(void *memory, size_t nbytes, unsigned flags);
cudaError_t cudaHostUnregister(void *memory);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t nbytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *memory, int byte, size_t nbytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);

#endif
