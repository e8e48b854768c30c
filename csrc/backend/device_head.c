/* Logits and losses on a device. The head's weight comes a slice of the vocabulary at a time, as wide as there is room
 * for, and each slice meets all rows, so that neither the whole head nor all logits need fit. */
#include <stddef.h>
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

enum { HEAD_ROWS = 1024, LEAST_COLUMNS = 64, LEAST_CODED_COLUMNS = 128 };

typedef struct head {
    mq_device *device;
    const mq_head_request *request;
    int64_t rows, columns;          /* of a step: rows of the run, columns of the vocabulary */
    int64_t first, width;           /* of the slice that is there */
    mq_device_linear weight;
    mq_cuda_linear narrow;          /* the weight with its input's quantizer, where codes are multiplied */
    int is_narrow;
    char *memory;                   /* of the slice */
    float *norm;
    void *hidden;
    float *logits;
    mq_cuda_loss_row *losses;       /* of all rows */
    int32_t *labels;
} head;

_Static_assert(sizeof(mq_cuda_loss_row) == sizeof(mq_loss_row) && offsetof(mq_cuda_loss_row, sum) ==
               offsetof(mq_loss_row, sum) && offsetof(mq_cuda_loss_row, target) == offsetof(mq_loss_row, target),
               "a loss is the same on the device and the host");

static const mq_runtime *runtime_of(const head *it)
{
    return it->request->run->runtime;
}

static size_t slice_nbytes(const head *it)
{
    const mq_runtime *runtime = runtime_of(it);
    if (it->request->stored == NULL)
        return (size_t)(it->columns * runtime->config.hidden_size) * mq_dtype_size(runtime->dtype);
    const mq_stored_weight part = mq_stored_rows(it->request->stored, 0, it->columns);
    return mq_device_packed_nbytes(it->device, &part);
}

static size_t cut(head *it, mq_arena *arena)
{
    const int64_t hidden = runtime_of(it)->config.hidden_size;
    const int64_t all = it->request->losses != NULL ? it->request->rows : 0;
    const size_t size = mq_dtype_size(runtime_of(it)->dtype);
    arena->used = 0;
    it->norm = mq_arena_take(arena, (size_t)hidden * sizeof *it->norm);
    it->hidden = mq_arena_take(arena, (size_t)(it->rows * hidden) * size);
    it->losses = mq_arena_take(arena, (size_t)all * sizeof *it->losses);
    it->labels = mq_arena_take(arena, (size_t)all * sizeof *it->labels);
    it->memory = mq_arena_take(arena, slice_nbytes(it));
    it->logits = mq_arena_take(arena, (size_t)(it->rows * it->columns) * sizeof *it->logits);
    return arena->used;
}

static size_t needed(head *it, int64_t rows, int64_t columns)
{
    mq_arena none = {0};
    it->rows = rows;
    it->columns = columns;
    return cut(it, &none);
}

static int reserve(head *it, mq_error *err)
{
    mq_device *device = it->device;
    const int64_t vocabulary = runtime_of(it)->config.vocab_size;
    const size_t room = mq_device_available(device, &device->work);
    const int64_t least = it->request->stored != NULL ? LEAST_CODED_COLUMNS : LEAST_COLUMNS;
    int64_t rows = MQ_MIN((int64_t)HEAD_ROWS, it->request->rows), columns = vocabulary;
    while (needed(it, rows, columns) > room && columns > least)
        columns = MQ_ROUND_UP((columns + 1) / 2, least);       /* which whole blocks of codes divide */
    while (needed(it, rows, columns) > room && rows > 1) rows /= 2;
    const int rc = mq_arena_reserve(device, &device->work, needed(it, rows, columns), "a slice of lm_head", err);
    if (rc == MQ_OK) cut(it, &device->work);
    return rc;
}

/* hidden = the quantized norm of rows of the run; what the product quantizes itself is only prepared. */
static int read_rows(head *it, int64_t first, int64_t rows, mq_error *err)
{
    const mq_runtime *runtime = runtime_of(it);
    const mq_backend *backend = it->device->backend;
    const mq_quantizer *quantizer = runtime->head_input.quantizer;
    const int64_t width = runtime->config.hidden_size, row = it->request->first_row + first;
    const size_t stride = (size_t)width * mq_dtype_size(runtime->dtype);
    const mq_cuda_matrix matrix = {it->hidden, runtime->dtype, rows, width, width};
    const mq_cuda_norm_job job = {.x = matrix, .y = matrix, .weight = it->norm, .heads = 1,
                                  .eps = (float)runtime->config.rms_norm_eps};
    const mq_device_rows quantize = {.x = matrix, .y = matrix,
                                     .steps = it->is_narrow ? MQ_QUANT_PREPARE : MQ_QUANT_ALL};
    int rc = backend->copy(it->hidden, it->request->run->hidden + (size_t)row * stride, (size_t)rows * stride,
                           it->device->compute, err);
    if (rc == MQ_OK) rc = backend->rmsnorm(&job, it->device->compute, err);
    if (rc != MQ_OK || quantizer == NULL || !mq_quantizer_acts(quantizer)) return rc;
    if (it->is_narrow && !mq_quantizer_prepares(quantizer)) return rc;
    return mq_device_quantizer_apply(&it->device->quantizers[MQ_QUANTIZERS - 1], backend, it->device->index, quantizer,
                                     &quantize, it->device->compute, err);
}

/* What the model makes of the products (mq_logits_forward). */
static int change_logits(head *it, const mq_cuda_matrix *logits, mq_error *err)
{
    const mq_config *config = &runtime_of(it)->config;
    const mq_cuda_softcap_job job = {.x = *logits, .divisor = (float)config->logits_scaling,
                                     .cap = (float)config->final_logit_softcapping};
    return mq_logits_change(config) ? it->device->backend->softcap(&job, it->device->compute, err) : MQ_OK;
}

static int fold_losses(head *it, const mq_cuda_matrix *logits, int64_t first, mq_error *err)
{
    const mq_cuda_loss_job job = {.logits = *logits, .labels = it->labels + first, .first = it->first,
                                  .state = it->losses + first};
    return it->device->backend->loss(&job, it->device->compute, err);
}

static int give_logits(head *it, int64_t first, int64_t rows, mq_error *err)
{
    const int64_t vocabulary = runtime_of(it)->config.vocab_size;
    float *to = it->request->logits + first * vocabulary + it->first;
    const int64_t pieces = it->width == vocabulary ? 1 : rows;
    const size_t nbytes = (size_t)(it->width * rows / pieces) * sizeof *to;
    const mq_backend *backend = it->device->backend;
    int rc = MQ_OK;
    for (int64_t i = 0; rc == MQ_OK && i < pieces; i++)
        rc = backend->copy(to + i * vocabulary, it->logits + i * it->width, nbytes, it->device->compute, err);
    return rc == MQ_OK ? backend->stream_wait(it->device->compute, err) : rc;
}

static int multiply(head *it, const mq_cuda_matrix *out, mq_error *err)
{
    mq_device *device = it->device;
    const mq_cuda_matrix *weight = &it->weight.weight;
    const mq_cuda_matrix in = {it->hidden, weight->dtype, out->rows, weight->cols, weight->cols};
    const mq_cuda_linear_job coded = {
        .linear = it->is_narrow ? it->narrow : it->weight.packed, .in = in, .out = *out, .workspace = device->workspace,
    };
    const mq_cuda_gemm_job job = {.a = in, .b = *weight, .out = *out, .transpose_b = 1, .alpha = 1.0f,
                                  .workspace = device->workspace};
    if (it->weight.packed.codes != NULL) return mq_device_run_packed(device, &coded, err);
    return device->backend->gemm_run(device->gemm, &job, device->compute, err);
}

static int step(head *it, int64_t first, mq_error *err)
{
    const int64_t rows = MQ_MIN(it->rows, it->request->rows - first);
    const mq_cuda_matrix logits = {it->logits, MQ_F32, rows, it->width, it->width};
    int rc = read_rows(it, first, rows, err);
    if (rc == MQ_OK) rc = multiply(it, &logits, err);
    if (rc == MQ_OK) rc = change_logits(it, &logits, err);
    if (rc == MQ_OK && it->request->losses != NULL) rc = fold_losses(it, &logits, first, err);
    if (rc == MQ_OK && it->request->logits != NULL) rc = give_logits(it, first, rows, err);
    return rc;
}

/* A slice that stays codes; its input's quantizer may be part of products with it. */
static int put_codes(head *it, mq_error *err)
{
    mq_device *device = it->device;
    const mq_runtime *runtime = runtime_of(it);
    const mq_quantizer *quantizer = runtime->head_input.quantizer;
    const mq_stored_weight part = mq_stored_rows(it->request->stored, it->first, it->width);
    int rc = mq_device_put_packed(device, it->memory, it->request->name, &part, runtime->dtype, &it->weight, err);
    if (rc != MQ_OK) return rc;
    it->is_narrow = mq_device_is_narrow(device, runtime->dtype, &it->weight, quantizer, &it->narrow);
    if (!it->is_narrow || !mq_device_has_amax(quantizer, &it->narrow)) return MQ_OK;
    return mq_device_quantizer_amax(&device->quantizers[MQ_QUANTIZERS - 1], device->backend, device->index, quantizer,
                                    &it->narrow.input_amax, device->compute, err);
}

static int put_numbers(head *it, mq_error *err)
{
    const int64_t hidden = runtime_of(it)->config.hidden_size;
    mq_tensor part = *it->request->weight;
    part.shape[0] = it->width;
    part.data = (char *)part.data + it->first * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
    it->weight.weight = (mq_cuda_matrix){it->memory, runtime_of(it)->dtype, it->width, hidden, hidden};
    const int rc = mq_device_upload(it->device, &part, &it->weight.weight, err);
    return rc == MQ_OK ? mq_finding_weight(it->device, &it->weight.weight, it->request->name, err) : rc;
}

/* Columns first to first + width of the vocabulary, to the device: after what still reads the ones before. */
static int load_slice(head *it, mq_error *err)
{
    mq_device *device = it->device;
    int rc = device->backend->event_record(device->loaded, device->compute, err);
    if (rc == MQ_OK) rc = device->backend->event_after(device->loaded, device->copies, err);
    if (rc == MQ_OK) rc = it->request->stored != NULL ? put_codes(it, err) : put_numbers(it, err);
    if (rc == MQ_OK) rc = device->backend->event_record(device->loaded, device->copies, err);
    return rc == MQ_OK ? device->backend->event_after(device->loaded, device->compute, err) : rc;
}

static int begin(head *it, mq_error *err)
{
    const mq_backend *backend = it->device->backend;
    const size_t width = (size_t)runtime_of(it)->config.hidden_size, rows = (size_t)it->request->rows;
    int rc = reserve(it, err);
    if (rc == MQ_OK)
        rc = backend->copy(it->norm, it->request->norm, width * sizeof *it->norm, it->device->compute, err);
    if (rc == MQ_OK && it->request->losses != NULL)
        rc = backend->copy(it->labels, it->request->labels, rows * sizeof *it->labels, it->device->compute, err);
    return rc;
}

static int end(head *it, mq_error *err)
{
    const size_t nbytes = (size_t)it->request->rows * sizeof *it->losses;
    int rc = MQ_OK;
    if (it->request->losses != NULL)
        rc = it->device->backend->copy(it->request->losses, it->losses, nbytes, it->device->compute, err);
    return rc == MQ_OK ? it->device->backend->stream_wait(it->device->compute, err) : rc;
}

static int run_head(head *it, mq_error *err)
{
    const mq_run *run = it->request->run;
    const int64_t vocabulary = run->runtime->config.vocab_size;
    int rc = begin(it, err);
    for (it->first = 0; rc == MQ_OK && it->first < vocabulary; it->first += it->columns) {
        it->width = MQ_MIN(it->columns, vocabulary - it->first);
        rc = load_slice(it, err);
        for (int64_t first = 0; rc == MQ_OK && first < it->request->rows; first += it->rows) {
            rc = mq_run_poll(run, err);
            if (rc == MQ_OK) rc = step(it, first, err);
        }
    }
    return rc == MQ_OK ? end(it, err) : rc;
}

int mq_device_run_head(mq_elsewhere *self, const mq_head_request *given, mq_error *err)
{
    mq_head_request request = *given;
    mq_tensor numbers = {0};
    head it = {.device = (mq_device *)(void *)self, .request = &request};
    int before, rc = mq_device_enter(it.device, &before, err);
    if (rc != MQ_OK) return rc;
    if (request.stored != NULL && !mq_device_can_pack(it.device, MQ_ROLE_HEAD, request.stored)) {
        rc = mq_stored_numbers(request.stored, &numbers, request.name, err);
        request.weight = &numbers;
        request.stored = NULL;
    }
    if (rc == MQ_OK) rc = mq_device_finish(it.device, run_head(&it, err), err);
    mq_free(numbers.data);
    mq_device_leave(it.device, before);
    return rc;
}
