#include "backend/device_quantizer.h"

#include <string.h>

#include "core/alloc.h"

/* ---- what lies on the device ---- */

static void drop_values(const mq_backend *backend, mq_device_values *values)
{
    mq_free(values->host);
    if (values->device != NULL) backend->memory_free(values->device);
    *values = (mq_device_values){0};
}

void mq_device_quantizer_free(mq_device_quantizer *self)
{
    int before = 0;
    mq_error err;
    if (self->backend == NULL) return;
    const int known = self->backend->device_current(&before, &err) == MQ_OK;
    self->backend->device_set(self->device, &err);
    drop_values(self->backend, &self->amax);
    drop_values(self->backend, &self->block_amax);
    drop_values(self->backend, &self->limits);
    drop_values(self->backend, &self->pre_scale);
    drop_values(self->backend, &self->bias);
    self->backend->memory_free(self->workspace);
    self->backend->event_free(self->event);
    if (known) self->backend->device_set(before, &err);
    memset(self, 0, sizeof *self);
}

static void use(mq_device_quantizer *self, const mq_backend *backend, int device)
{
    if (self->backend != NULL && (self->backend != backend || self->device != device)) mq_device_quantizer_free(self);
    self->backend = backend;
    self->device = device;
}

/* values of the device = count numbers of from (NULL: none). New memory for what has changed: kernels on other streams
 * may still read the old, whose release waits for them. */
static int put_values(mq_device_quantizer *self, mq_device_values *values, const float *from, int64_t count,
                      void *stream, mq_error *err)
{
    const size_t nbytes = (size_t)(from != NULL ? count : 0) * sizeof *from;
    if (from != NULL && values->count == count && memcmp(values->host, from, nbytes) == 0) return MQ_OK;
    drop_values(self->backend, values);
    if (nbytes == 0) return MQ_OK;
    values->host = mq_alloc(nbytes);
    if (values->host == NULL) return mq_fail_memory(err, "a quantizer's values", nbytes);
    memcpy(values->host, from, nbytes);
    int rc = self->backend->memory_new((void **)&values->device, nbytes, "a quantizer's values", err);
    if (rc == MQ_OK) rc = self->backend->copy(values->device, values->host, nbytes, stream, err);
    self->wrote = 1;
    if (rc == MQ_OK) values->count = count;
    else drop_values(self->backend, values);
    return rc;
}

/* Room for one call. */
static int take_workspace(mq_device_quantizer *self, size_t nbytes, mq_error *err)
{
    if (nbytes == 0) return MQ_OK;
    self->wrote = 1;
    if (nbytes <= self->workspace_nbytes) return MQ_OK;
    self->backend->memory_free(self->workspace);
    self->workspace = NULL;
    self->workspace_nbytes = 0;
    const int rc = self->backend->memory_new(&self->workspace, nbytes, "a quantizer's workspace", err);
    if (rc == MQ_OK) self->workspace_nbytes = nbytes;
    return rc;
}

/* What a call does on a stream comes after what others wrote on another: values, and the workspace. */
static int enter(mq_device_quantizer *self, void *stream, mq_error *err)
{
    self->wrote = 0;
    if (self->event == NULL) return self->backend->event_new(&self->event, err);
    return self->stream != stream ? self->backend->event_after(self->event, stream, err) : MQ_OK;
}

/* The end of a call, whose result rc is: also where it failed, something may have been written. */
static int leave(mq_device_quantizer *self, void *stream, int rc, mq_error *err)
{
    mq_error other;
    if (!self->wrote) return rc;
    self->stream = stream;
    const int recorded = self->backend->event_record(self->event, stream, rc == MQ_OK ? err : &other);
    return rc == MQ_OK ? recorded : rc;
}

/* ---- steps ---- */

static int apply_scheme(mq_device_quantizer *self, const mq_quantizer *quantizer, const mq_device_rows *rows,
                        void *stream, mq_error *err)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_scheme_row *scheme = mq_scheme_get((mq_scheme)spec->scheme);
    const mq_second_level second = mq_quantizer_second(quantizer);
    const int has_second = scheme->second_divisor != 0.0f && quantizer->amax != NULL;
    mq_cuda_block_job job = {
        .scheme = (mq_scheme)spec->scheme, .block_cols = spec->block_cols, .second_divisor = spec->second_divisor,
        .x = rows->x, .y = rows->y,
    };
    int rc = put_values(self, &self->amax, has_second ? &second.amax : NULL, 1, stream, err);
    if (rc == MQ_OK)
        rc = put_values(self, &self->block_amax, quantizer->block_amax != NULL ? quantizer->amax : NULL,
                        quantizer->amax_count, stream, err);
    if (rc != MQ_OK) return rc;
    job.amax = self->amax.device;
    job.block_amax = self->block_amax.device;
    job.workspace_nbytes = self->backend->block_workspace(&job);
    rc = take_workspace(self, job.workspace_nbytes, err);
    job.workspace = self->workspace;
    return rc == MQ_OK ? self->backend->block_fake_quantize(&job, stream, err) : rc;
}

static int apply_scaled(mq_device_quantizer *self, const mq_quantizer *quantizer, const mq_device_rows *rows,
                        void *stream, mq_error *err)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_grid grid = mq_grid_make(rows->x.rows, rows->x.cols, spec->block_rows, spec->block_cols);
    const int dynamic = spec->dynamic || (rows->find && quantizer->amax == NULL);
    mq_cuda_scaled_job job = {
        .kind = spec->kind, .bits = spec->bits, .narrow_range = spec->narrow_range, .is_unsigned = spec->is_unsigned,
        .x = rows->x, .y = rows->y, .block_rows = spec->block_rows, .block_cols = spec->block_cols, .dynamic = dynamic,
    };
    int rc = put_values(self, &self->amax, dynamic ? NULL : quantizer->amax, quantizer->amax_count, stream, err);
    if (rc == MQ_OK)
        rc = take_workspace(self, dynamic ? (size_t)(grid.rows * grid.cols) * sizeof(float) : 0, err);
    job.amax = self->amax.device;
    job.workspace = self->workspace;
    return rc == MQ_OK ? self->backend->scaled(&job, stream, err) : rc;
}

int mq_device_quantizer_amax(mq_device_quantizer *self, const mq_backend *backend, int device,
                             const mq_quantizer *quantizer, const float **out, void *stream, mq_error *err)
{
    const mq_second_level second = mq_quantizer_second(quantizer);
    const int two_levels = quantizer->spec.scale != MQ_FMT_FP32;
    use(self, backend, device);
    int rc = enter(self, stream, err);
    if (rc != MQ_OK) return rc;
    rc = put_values(self, &self->amax, two_levels ? &second.amax : quantizer->amax, 1, stream, err);
    *out = self->amax.device;
    return leave(self, stream, rc, err);
}

/* y = x, scaled and rotated if it prepares, and shifted if there is a bias. */
static int prepare(mq_device_quantizer *self, const mq_quantizer *quantizer, const mq_device_rows *rows, int prepares,
                   int shifts, void *stream, mq_error *err)
{
    mq_cuda_prepare_job job = {.x = rows->x, .y = rows->y, .rotate = prepares ? quantizer->rotate : 0, .sign = -1.0f};
    int rc = put_values(self, &self->pre_scale, quantizer->pre_scale, quantizer->pre_count, stream, err);
    if (rc == MQ_OK) rc = put_values(self, &self->bias, quantizer->bias, quantizer->bias_count, stream, err);
    job.pre_scale = prepares ? self->pre_scale.device : NULL;
    job.bias = shifts ? self->bias.device : NULL;
    return rc == MQ_OK ? self->backend->prepare(&job, stream, err) : rc;
}

static int apply(mq_device_quantizer *self, const mq_quantizer *quantizer, const mq_device_rows *given, void *stream,
                 mq_error *err)
{
    const int prepares = given->steps != MQ_QUANT_PREPARED && mq_quantizer_prepares(quantizer);
    const int rounds = quantizer->enabled && given->steps != MQ_QUANT_PREPARE;
    const int shifts = rounds && quantizer->bias != NULL;
    mq_device_rows rows = *given;
    int rc = MQ_OK;
    if (prepares || shifts || !rounds) {
        rc = prepare(self, quantizer, &rows, prepares, shifts, stream, err);
        rows.x = rows.y;
    }
    if (rc != MQ_OK || !rounds) return rc;
    if (quantizer->spec.scale != MQ_FMT_FP32) rc = apply_scheme(self, quantizer, &rows, stream, err);
    else rc = apply_scaled(self, quantizer, &rows, stream, err);
    if (rc != MQ_OK || !shifts) return rc;
    const mq_cuda_prepare_job back = {.x = rows.y, .y = rows.y, .bias = self->bias.device, .sign = 1.0f};
    return self->backend->prepare(&back, stream, err);
}

int mq_device_quantizer_apply(mq_device_quantizer *self, const mq_backend *backend, int device,
                              const mq_quantizer *quantizer, const mq_device_rows *given, void *stream, mq_error *err)
{
    use(self, backend, device);
    const int rc = enter(self, stream, err);
    return rc == MQ_OK ? leave(self, stream, apply(self, quantizer, given, stream, err), err) : rc;
}

int mq_device_quantizer_gradient(mq_device_quantizer *self, const mq_backend *backend, int device,
                                 const mq_quantizer *quantizer, const mq_device_gradient *rows, void *stream,
                                 mq_error *err)
{
    const int masks = quantizer->enabled && quantizer->amax != NULL, one = quantizer->amax_count == 1;
    mq_cuda_gradient_job job = {
        .x = rows->x, .gradient = rows->gradient, .out = rows->out, .block_rows = one ? 0 : quantizer->spec.block_rows,
        .block_cols = one ? 0 : quantizer->spec.block_cols, .rotate = quantizer->rotate,
    };
    use(self, backend, device);
    int rc = enter(self, stream, err);
    if (rc != MQ_OK) return rc;
    rc = put_values(self, &self->limits, masks ? quantizer->amax : NULL, quantizer->amax_count, stream, err);
    if (rc == MQ_OK)
        rc = put_values(self, &self->pre_scale, quantizer->pre_scale, quantizer->pre_count, stream, err);
    if (rc == MQ_OK) rc = put_values(self, &self->bias, quantizer->bias, quantizer->bias_count, stream, err);
    job.amax = self->limits.device;
    job.pre_scale = self->pre_scale.device;
    job.bias = self->bias.device;
    if (rc == MQ_OK) rc = backend->straight_through(&job, stream, err);
    return leave(self, stream, rc, err);
}
