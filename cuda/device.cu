/* Devices, their memory, streams and events: the CUDA runtime's calls, with errors in words for users. No kernels. */
#include "common.cuh"

enum { MQ_OLDEST_DRIVER = 580 };   /* the first that runs what CUDA 13 compiles (CUDA Toolkit release notes, table 2) */

void mq_cuda_versions(int *library, int *driver)
{
    *library = CUDART_VERSION;
    *driver = 0;
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
    cudaGetLastError();
}

static int failed(cudaError_t status, const char *call, mq_error *err)
{
    if (status == cudaSuccess) return MQ_OK;
    const int code = status == cudaErrorMemoryAllocation ? MQ_ERR_MEMORY : MQ_ERR_STATE;
    return mq_fail(err, code, "%s: %s (%s)", call, cudaGetErrorString(status), cudaGetErrorName(status));
}

static int no_device(cudaError_t status, mq_error *err)
{
    int library, driver;
    cudaGetLastError();
    mq_cuda_versions(&library, &driver);
    if (status == cudaErrorNoDevice || status == cudaSuccess)
        return mq_fail(err, MQ_ERR_STATE,
                       "the NVIDIA driver finds no GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)");
    if (driver == 0)
        return mq_fail(err, MQ_ERR_STATE,
                       "there is no NVIDIA driver (libcuda.so.1) on this machine: install version %d or newer",
                       (int)MQ_OLDEST_DRIVER);
    if (status == cudaErrorInsufficientDriver || driver / 1000 < library / 1000)
        return mq_fail(err, MQ_ERR_STATE,
                       "the NVIDIA driver is too old: it runs CUDA %d.%d, this library was made for CUDA %d.%d: "
                       "install driver %d or newer",
                       driver / 1000, driver % 1000 / 10, library / 1000, library % 1000 / 10, (int)MQ_OLDEST_DRIVER);
    return failed(status, "the NVIDIA driver does not start", err);
}

int mq_cuda_device_count(int *count, mq_error *err)
{
    *count = 0;
    const cudaError_t status = cudaGetDeviceCount(count);
    return status == cudaSuccess && *count > 0 ? MQ_OK : no_device(status, err);
}

int mq_cuda_device_get(int device, mq_cuda_device *out, mq_error *err)
{
    cudaDeviceProp properties;
    int count, before = 0;
    int rc = mq_cuda_device_count(&count, err);
    if (rc != MQ_OK) return rc;
    if (device < 0 || device >= count)
        return mq_fail(err, MQ_ERR_VALUE, "device cuda:%d: there are %d, from cuda:0 on", device, count);
    rc = failed(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", err);
    if (rc != MQ_OK) return rc;
    snprintf(out->name, sizeof out->name, "%.127s", properties.name);
    out->major = properties.major;
    out->minor = properties.minor;
    out->multiprocessors = properties.multiProcessorCount;
    rc = failed(cudaGetDevice(&before), "cudaGetDevice", err);
    if (rc == MQ_OK) rc = mq_cuda_device_set(device, err);
    if (rc != MQ_OK) return rc;
    rc = mq_cuda_memory_free_nbytes(&out->free_nbytes, &out->total_nbytes, err);
    cudaSetDevice(before);
    return rc;
}

int mq_cuda_device_set(int device, mq_error *err)
{
    return failed(cudaSetDevice(device), "cudaSetDevice", err);
}

int mq_cuda_device_current(int *device, mq_error *err)
{
    return failed(cudaGetDevice(device), "cudaGetDevice", err);
}

int mq_cuda_memory_free_nbytes(size_t *free_nbytes, size_t *total_nbytes, mq_error *err)
{
    return failed(cudaMemGetInfo(free_nbytes, total_nbytes), "cudaMemGetInfo", err);
}

int mq_cuda_memory_new(void **out, size_t nbytes, const char *purpose, mq_error *err)
{
    size_t free_nbytes = 0, total = 0;
    *out = NULL;
    if (nbytes == 0) return MQ_OK;
    const cudaError_t status = cudaMalloc(out, nbytes);
    if (status == cudaSuccess) return MQ_OK;
    *out = NULL;
    cudaGetLastError();
    if (status != cudaErrorMemoryAllocation) return failed(status, "cudaMalloc", err);
    cudaMemGetInfo(&free_nbytes, &total);
    cudaGetLastError();
    return mq_fail(err, MQ_ERR_MEMORY, "out of device memory: %.1f MB for %s, but %.1f of %.1f MB are free",
                   (double)nbytes / 1e6, purpose, (double)free_nbytes / 1e6, (double)total / 1e6);
}

void mq_cuda_memory_free(void *memory)
{
    if (memory != NULL) cudaFree(memory);
}

int mq_cuda_pinned_new(void **out, size_t nbytes, mq_error *err)
{
    *out = NULL;
    return nbytes == 0 ? MQ_OK : failed(cudaMallocHost(out, nbytes), "cudaMallocHost", err);
}

void mq_cuda_pinned_free(void *memory)
{
    if (memory != NULL) cudaFreeHost(memory);
}

int mq_cuda_pin(void *memory, size_t nbytes, mq_error *err)
{
    if (nbytes == 0) return MQ_OK;
    const int rc = failed(cudaHostRegister(memory, nbytes, cudaHostRegisterDefault), "cudaHostRegister", err);
    cudaGetLastError();
    return rc;
}

void mq_cuda_unpin(void *memory)
{
    if (memory != NULL) cudaHostUnregister(memory);
    cudaGetLastError();
}

int mq_cuda_copy(void *to, const void *from, size_t nbytes, void *stream, mq_error *err)
{
    if (nbytes == 0) return MQ_OK;
    const cudaError_t status = cudaMemcpyAsync(to, from, nbytes, cudaMemcpyDefault, (cudaStream_t)stream);
    if (status == cudaSuccess) return MQ_OK;
    return mq_fail(err, MQ_ERR_STATE, "cudaMemcpyAsync of %zu bytes from %p to %p: %s (%s)", nbytes, from, to,
                   cudaGetErrorString(status), cudaGetErrorName(status));
}

int mq_cuda_fill(void *memory, int byte, size_t nbytes, void *stream, mq_error *err)
{
    if (nbytes == 0) return MQ_OK;
    return failed(cudaMemsetAsync(memory, byte, nbytes, (cudaStream_t)stream), "cudaMemsetAsync", err);
}

int mq_cuda_stream_new(void **out, mq_error *err)
{
    cudaStream_t stream = NULL;
    const int rc = failed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags", err);
    *out = (void *)stream;
    return rc;
}

void mq_cuda_stream_free(void *stream)
{
    if (stream != NULL) cudaStreamDestroy((cudaStream_t)stream);
}

int mq_cuda_stream_wait(void *stream, mq_error *err)
{
    return failed(cudaStreamSynchronize((cudaStream_t)stream), "cudaStreamSynchronize", err);
}

int mq_cuda_event_new(void **out, mq_error *err)
{
    cudaEvent_t event = NULL;
    const int rc = failed(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags", err);
    *out = (void *)event;
    return rc;
}

void mq_cuda_event_free(void *event)
{
    if (event != NULL) cudaEventDestroy((cudaEvent_t)event);
}

int mq_cuda_event_wait(void *event, mq_error *err)
{
    return failed(cudaEventSynchronize((cudaEvent_t)event), "cudaEventSynchronize", err);
}

int mq_cuda_event_done(void *event, int *done, mq_error *err)
{
    const cudaError_t status = cudaEventQuery((cudaEvent_t)event);
    *done = status != cudaErrorNotReady;
    cudaGetLastError();
    return *done ? failed(status, "cudaEventQuery", err) : MQ_OK;
}

int mq_cuda_event_record(void *event, void *stream, mq_error *err)
{
    return failed(cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream), "cudaEventRecord", err);
}

int mq_cuda_event_after(void *event, void *stream, mq_error *err)
{
    return failed(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0), "cudaStreamWaitEvent", err);
}
