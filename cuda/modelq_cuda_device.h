/* The part of the CUDA library's interface that is about devices: which there are, their memory, streams and events.
 * Included by modelq_cuda.h. Calls return MQ_OK or a negative code and have then filled err, in words for users.
 * Memory, streams and events are of the thread's current device. */
#ifndef MODELQ_CUDA_DEVICE_H
#define MODELQ_CUDA_DEVICE_H

#ifdef __cplusplus
extern "C" {
#endif

#include "core/error.h"

#pragma GCC visibility push(default)

typedef struct mq_cuda_device {
    char name[128];
    int major, minor;               /* compute capability */
    int multiprocessors;
    size_t total_nbytes, free_nbytes;
} mq_cuda_device;

/* At least 1: no driver, one that is too old, and no GPU are errors that say what to do. */
int mq_cuda_device_count(int *count, mq_error *err);
int mq_cuda_device_get(int device, mq_cuda_device *out, mq_error *err);
int mq_cuda_device_set(int device, mq_error *err);      /* the thread's current device from here on */
int mq_cuda_device_current(int *device, mq_error *err);
/* The CUDA version that the library was made for, and that of the driver (1000 * major + 10 * minor; 0 = none). */
void mq_cuda_versions(int *library, int *driver);

/* nbytes 0 gives NULL. purpose: what it is for, in the error, which says what was asked for and what is free. */
int mq_cuda_memory_new(void **out, size_t nbytes, const char *purpose, mq_error *err);
void mq_cuda_memory_free(void *memory);                 /* waits for what uses it; NULL is accepted */
int mq_cuda_memory_free_nbytes(size_t *free_nbytes, size_t *total_nbytes, mq_error *err);
/* Host memory that a device reads and writes while the host goes on. */
int mq_cuda_pinned_new(void **out, size_t nbytes, mq_error *err);
void mq_cuda_pinned_free(void *memory);
/* The same of memory that is there already, until unpin, which comes before it is freed. */
int mq_cuda_pin(void *memory, size_t nbytes, mq_error *err);
void mq_cuda_unpin(void *memory);

/* Between any two places; the stream decides when. Of host memory that is not pinned, the call may wait. */
int mq_cuda_copy(void *to, const void *from, size_t nbytes, void *stream, mq_error *err);
int mq_cuda_fill(void *memory, int byte, size_t nbytes, void *stream, mq_error *err);

int mq_cuda_stream_new(void **out, mq_error *err);
void mq_cuda_stream_free(void *stream);
int mq_cuda_stream_wait(void *stream, mq_error *err);   /* for all that was asked of it; its late errors come here */
int mq_cuda_event_new(void **out, mq_error *err);
void mq_cuda_event_free(void *event);
int mq_cuda_event_wait(void *event, mq_error *err);     /* the host waits for it */
int mq_cuda_event_done(void *event, int *done, mq_error *err);      /* whether it would have to */
int mq_cuda_event_record(void *event, void *stream, mq_error *err);
int mq_cuda_event_after(void *event, void *stream, mq_error *err);  /* what the stream does next comes after it */

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
