/* The CUDA runtime of the shim: see cuda_shim_runtime.h. */
#include "cuda_shim.h"

#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

/* What it was asked for and has not done; how much of all it has done. */
struct mq_shim_stream {
    std::deque<std::function<cudaError_t()>> queue;
    size_t done;
    cudaError_t error;
    int number;                 /* in the order in which they were made */
};

/* Behind the first `place` pieces of work of a stream. */
struct mq_shim_event {
    mq_shim_stream *stream;
    size_t place;
};

static std::recursive_mutex lock;
static std::map<char *, size_t> sizes, pinned;      /* of what cudaMalloc and cudaMallocHost gave */
static std::set<mq_shim_stream *> streams;
static size_t used, events;
static bool running;                                /* run_some */
static bool tracing;
static std::string traced;

static bool lies_in(const std::map<char *, size_t> &arrays, const void *memory)
{
    auto after = arrays.upper_bound((char *)memory);
    if (after == arrays.begin()) return false;
    --after;
    return (const char *)memory < after->first + after->second;
}

/* ---- faults ---- */

static struct {
    uint64_t calls, at;     /* since mq_shim_fail_at, and the one that fails; 0 = none */
    bool persistent;
} faults;

bool mq_shim_fails()
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    faults.calls++;
    return faults.at != 0 && (faults.persistent ? faults.calls >= faults.at : faults.calls == faults.at);
}

uint64_t mq_shim_fail_at(uint64_t n, int persistent)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    const uint64_t seen = faults.calls;
    faults.at = n;
    faults.persistent = persistent != 0;
    if (n > 0) faults.calls = 0;
    return seen;
}

size_t mq_shim_live(void)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    return sizes.size() + pinned.size() + streams.size() + events;
}

#define MQ_MAY_FAIL(error) \
    if (mq_shim_fails()) return error

/* ---- streams ---- */

static bool is_late()
{
    const char *given = getenv("MODELQ_SHIM_STREAMS");
    return given != NULL && (strcmp(given, "late") == 0 || strncmp(given, "random", 6) == 0);
}

static bool is_random()
{
    return strncmp(getenv("MODELQ_SHIM_STREAMS"), "random", 6) == 0;
}

/* The default stream's names (cudaStreamLegacy, cudaStreamPerThread), and streams that frameworks of tests made up. */
static bool is_ours(cudaStream_t stream)
{
    return streams.count(stream) != 0;
}

/* What was asked for, in the order of asking: a line for each. */
static void note(const char *what, mq_shim_stream *stream, size_t nbytes = 0)
{
    if (!tracing) return;
    traced += what + std::string(" ") + std::to_string(is_ours(stream) ? stream->number : -1) + " " +
              std::to_string(nbytes) + "\n";
}

const char *mq_shim_trace(int on)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    tracing = on != 0;
    if (tracing) traced.clear();
    return traced.c_str();
}

static void run_until(mq_shim_stream *stream, size_t place)
{
    while (stream->done < place && !stream->queue.empty()) {
        const auto work = stream->queue.front();
        stream->queue.pop_front();
        stream->done++;
        const cudaError_t status = work();
        if (stream->error == cudaSuccess) stream->error = status;
    }
}

static void drain_all()
{
    for (auto *stream : streams) run_until(stream, SIZE_MAX);
}

/* Any stream does some of its work, or none does. */
static void run_some()
{
    static uint64_t state = 0x9e3779b97f4a7c15u;
    if (running) return;        /* work that waits for work of others */
    running = true;
    state = state * 6364136223846793005u + 1442695040888963407u;
    size_t chosen = (size_t)(state >> 33) % (2 * streams.size());
    for (auto *stream : streams)
        if (chosen-- == 0) run_until(stream, stream->done + 1 + (size_t)(state >> 40) % 16);
    running = false;
}

cudaError_t mq_shim_drain(cudaStream_t stream)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (is_ours(stream)) run_until(stream, SIZE_MAX);
    else drain_all();
    return cudaSuccess;
}

static cudaError_t ask(cudaStream_t stream, const std::function<cudaError_t()> &work)
{
    if (is_ours(stream) && is_late()) {
        stream->queue.push_back(work);
        if (is_random()) run_some();
        return cudaSuccess;
    }
    mq_shim_drain(stream);
    return work();
}

cudaError_t mq_shim_do(cudaStream_t stream, const std::function<cudaError_t()> &work)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    note("work", stream);
    return ask(stream, work);
}

/* ---- devices and their memory ---- */

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
    const int capability = (int)number("MODELQ_SHIM_CAPABILITY", 80);
    out->major = capability / 10;
    out->minor = capability % 10;
    out->multiProcessorCount = 1;
    return cudaSuccess;
}

static thread_local int current_device;

cudaError_t cudaGetDevice(int *device)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    int count;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) return status;
    if (device < 0 || device >= count) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_nbytes, size_t *total)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    *total = number("MODELQ_SHIM_MEMORY", (size_t)1 << 34);
    *free_nbytes = *total > used ? *total - used : 0;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t nbytes)
{
    MQ_MAY_FAIL(cudaErrorMemoryAllocation);
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (used + nbytes > number("MODELQ_SHIM_MEMORY", (size_t)1 << 34)) return cudaErrorMemoryAllocation;
    *out = mq_shim_alloc(nbytes);
    if (*out == NULL) return cudaErrorMemoryAllocation;
    sizes[(char *)*out] = nbytes;
    used += nbytes;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    const auto found = sizes.find((char *)memory);
    if (found == sizes.end()) return cudaErrorInvalidValue;
    drain_all();
    used -= found->second;
    sizes.erase(found);
    mq_shim_free(memory);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t nbytes)
{
    MQ_MAY_FAIL(cudaErrorMemoryAllocation);
    const std::lock_guard<std::recursive_mutex> held(lock);
    *out = malloc(nbytes);
    if (*out == NULL) return cudaErrorMemoryAllocation;
    pinned[(char *)*out] = nbytes;
    return cudaSuccess;
}

/* Of the host's memory nobody promises that it is waited for. */
cudaError_t cudaFreeHost(void *memory)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    pinned.erase((char *)memory);
    free(memory);
    return cudaSuccess;
}

/* What is pinned already may not be pinned again, page by page (CUDA Driver API, cuMemHostRegister). */
cudaError_t cudaHostRegister(void *memory, size_t nbytes, unsigned)
{
    MQ_MAY_FAIL(cudaErrorMemoryAllocation);
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (memory == NULL || nbytes == 0) return cudaErrorInvalidValue;
    if (number("MODELQ_SHIM_PINNED", SIZE_MAX) < nbytes) return cudaErrorMemoryAllocation;
    for (const auto &[begin, size] : pinned)
        if (begin < (char *)memory + nbytes && (char *)memory < begin + size)
            return cudaErrorHostMemoryAlreadyRegistered;
    pinned[(char *)memory] = nbytes;
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *memory)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    return pinned.erase((char *)memory) == 1 ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}

/* What a late copy reads or writes has to be what it was when the copy was asked for. */
static void must_be_there(const void *memory)
{
    if (lies_in(sizes, memory) || lies_in(pinned, memory)) return;
    fprintf(stderr, "CUDA shim: a copy from or to %p runs after that memory was unpinned\n", memory);
    abort();
}

/* Memory of the host that is not pinned is read before the call returns, and written before it returns (CUDA Runtime
 * API, "API synchronization behavior"). */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t nbytes, cudaMemcpyKind, cudaStream_t stream)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    note(lies_in(sizes, to) ? "send" : "fetch", stream, nbytes);
    for (const void *end : {(const void *)to, from})
        if (!lies_in(sizes, end) && !lies_in(pinned, end)) note("plain", stream, nbytes);
    const auto copy = [=]() {
        mq_shim_copy(to, from, nbytes);
        return cudaSuccess;
    };
    const auto late_copy = [=]() {
        must_be_there(to);
        must_be_there(from);
        return copy();
    };
    if (!lies_in(sizes, to) && !lies_in(pinned, to)) {
        mq_shim_drain(stream);
        return copy();
    }
    if (!is_late()) return ask(stream, copy);
    if (lies_in(sizes, from) || lies_in(pinned, from)) return ask(stream, late_copy);
    const std::vector<char> held_back((const char *)from, (const char *)from + nbytes);
    return ask(stream, [=]() {
        mq_shim_copy(to, held_back.data(), nbytes);
        return cudaSuccess;
    });
}

cudaError_t cudaMemsetAsync(void *memory, int byte, size_t nbytes, cudaStream_t stream)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    return mq_shim_do(stream, [=]() {
        const std::vector<char> filled(nbytes, (char)byte);
        mq_shim_copy(memory, filled.data(), nbytes);
        return cudaSuccess;
    });
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    static int made;
    *out = new mq_shim_stream{{}, 0, cudaSuccess, made++};
    streams.insert(*out);
    note("stream", *out);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    mq_shim_drain(stream);
    streams.erase(stream);
    delete stream;
    return cudaSuccess;
}

/* A wait that fails alone has not waited; one that fails for good is of a GPU that runs nothing any longer (CUDA
 * Runtime API, cudaErrorLaunchFailure: "the process must be terminated and relaunched"): nothing stays queued. */
static bool wait_fails()
{
    if (!mq_shim_fails()) return false;
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (faults.persistent) drain_all();
    return true;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    if (wait_fails()) return cudaErrorUnknown;
    const std::lock_guard<std::recursive_mutex> held(lock);
    note("wait", stream);
    mq_shim_drain(stream);
    if (!is_ours(stream)) return cudaSuccess;
    const cudaError_t error = stream->error;
    stream->error = cudaSuccess;
    return error;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    *out = new mq_shim_event{NULL, 0};
    events++;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    const std::lock_guard<std::recursive_mutex> held(lock);
    delete event;
    events--;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    if (wait_fails()) return cudaErrorUnknown;
    const std::lock_guard<std::recursive_mutex> held(lock);
    note("event", event->stream);
    if (is_ours(event->stream)) run_until(event->stream, event->place);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    if (!is_ours(event->stream)) return cudaSuccess;
    if (is_late() && is_random()) run_some();
    return event->stream->done >= event->place ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    *event = {is_ours(stream) ? stream : NULL, is_ours(stream) ? stream->done + stream->queue.size() : 0};
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    MQ_MAY_FAIL(cudaErrorUnknown);
    const std::lock_guard<std::recursive_mutex> held(lock);
    const mq_shim_event now = *event;
    note("after", stream);
    return ask(stream, [=]() {
        if (is_ours(now.stream)) run_until(now.stream, now.place);
        return cudaSuccess;
    });
}
