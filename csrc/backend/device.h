/* A device that computes the layers of a runtime (model/elsewhere.h). On it are the weights of one layer, or of one
 * expert, and the rows of two chunks of whole sequences: while one chunk is computed, the next comes and the last one
 * goes back on a stream of its own. So neither a model nor its activations need fit; what is used stays below a budget.
 *
 * A device belongs to one runtime and is used by one thread at a time. Errors leave it usable. */
#ifndef MQ_DEVICE_H
#define MQ_DEVICE_H

#include "backend/device_quantizer.h"
#include "model/run.h"

typedef struct mq_device mq_device;

typedef struct mq_device_options {
    int index;                  /* of the device */
    size_t budget;              /* bytes of it that may be used; 0 = nine tenths of what is free now */
    const char *cublas;         /* path or name of cuBLASLt; NULL: as the loader finds it */
    int host_statistics;        /* statistics other than maxima are made on the host, as where there is no room */
} mq_device_options;

/* Whether all that the runtime's family needs is there on a device; MQ_ERR_VALUE names what is not. */
int mq_device_supports(const mq_runtime *runtime, mq_error *err);

/* backend must outlive it. */
int mq_device_new(const mq_backend *backend, const mq_device_options *options, mq_device **out, mq_error *err);
void mq_device_free(mq_device *device);                 /* NULL is accepted */
mq_elsewhere *mq_device_elsewhere(mq_device *device);   /* for mq_runtime.elsewhere */
size_t mq_device_budget(const mq_device *device);
size_t mq_device_peak(const mq_device *device);         /* bytes of device memory that were in use at once, at most */
/* Tensors that came to the host for statistics or scores, where there was no room for these on the device. */
int64_t mq_device_copied(const mq_device *device);

/* How many products of weights that stay codes took that path so far, a mq_cuda_path; and its name. */
int64_t mq_device_products(const mq_device *device, int path);
const char *mq_device_path_name(int path);      /* NULL: there are no more */

#endif
