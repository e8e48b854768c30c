/* Weights that stay codes on a device (mq_cuda_linear): their parts as they are stored, or made there of the numbers, a
 * piece of rows at a time. What this cannot do comes as numbers, as device_weights.c has it. */
#include <string.h>

#include "backend/device_parts.h"

static size_t aligned(size_t nbytes)
{
    return MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGN_DEVICE);
}

static size_t part_nbytes(const mq_tensor *part)
{
    return (size_t)mq_tensor_count(part) * mq_dtype_size(part->dtype);
}

static int64_t block_cols_of(const mq_stored_weight *stored)
{
    return stored->job.block_cols > 0 ? stored->job.block_cols : mq_scheme_get(stored->job.scheme)->block_cols;
}

static mq_grid grid_of(const mq_stored_weight *stored)
{
    const mq_scheme_row *scheme = mq_scheme_get(stored->job.scheme);
    return mq_grid_make(stored->shape[0], stored->shape[1], scheme->block_rows, block_cols_of(stored));
}

/* A linear of these sizes, its parts yet to be said. */
static mq_cuda_linear describe(const mq_stored_weight *stored)
{
    return (mq_cuda_linear){.scheme = stored->job.scheme, .block_cols = stored->job.block_cols,
                            .rows = stored->shape[0], .cols = stored->shape[1], .dtype = stored->dtype};
}

/* The inputs with which products by tensor cores read the weight's scales in an order of their own. */
static mq_cuda_linear prepared_for(const mq_stored_weight *stored)
{
    mq_cuda_linear linear = describe(stored);
    linear.inputs = linear.scheme == MQ_SCHEME_FP8_BLOCK ? MQ_CUDA_INPUTS_GROUP : MQ_CUDA_INPUTS_SCHEME;
    linear.input_scheme = linear.scheme;
    return linear;
}

/* ---- what is packed there ---- */

typedef struct places {
    size_t codes, scales, scale_2, prepared, nbytes;    /* where in the memory of one weight, and how much that is */
} places;

static places places_of(const mq_device *device, const mq_stored_weight *stored)
{
    const mq_cuda_linear linear = prepared_for(stored);
    places at = {0};
    at.scales = aligned(part_nbytes(&stored->parts.weight));
    at.scale_2 = at.scales + aligned(part_nbytes(&stored->parts.scale));
    at.prepared = at.scale_2 + (stored->parts.has_scale_2 ? MQ_ALIGN_DEVICE : 0);
    at.nbytes = at.prepared + aligned(device->backend->linear_prepared_nbytes(device->gemm, &linear));
    return at;
}

/* Rows of numbers on their way: with what scales them, and room for what quantizes them. */
typedef struct piece {
    size_t amax, block_amax, workspace, workspace_nbytes, nbytes;
} piece;

static mq_cuda_block_job job_of(const mq_stored_weight *stored, int64_t rows)
{
    const mq_tensor *numbers = &stored->numbers;
    static const float some = 0.0f;
    return (mq_cuda_block_job){
        .scheme = stored->job.scheme, .block_cols = stored->job.block_cols,
        .second_divisor = stored->job.second_divisor,
        .x = {NULL, numbers->dtype, rows, numbers->shape[1], numbers->shape[1]},
        .amax = stored->job.amax != NULL ? &some : NULL, .block_amax = stored->job.block_amax != NULL ? &some : NULL,
    };
}

static int64_t blocks_in(const mq_stored_weight *stored, int64_t rows)
{
    const mq_grid grid = grid_of(stored);
    return MQ_CEIL_DIV(rows, grid.block_rows) * grid.cols;
}

static piece piece_of(const mq_device *device, const mq_stored_weight *stored, int64_t rows)
{
    const mq_tensor *numbers = &stored->numbers;
    const size_t blocks = (size_t)blocks_in(stored, rows) * sizeof(float);
    const mq_cuda_block_job job = job_of(stored, rows);
    piece at = {0};
    at.amax = aligned((size_t)(rows * numbers->shape[1]) * mq_dtype_size(numbers->dtype));
    at.block_amax = at.amax + (job.amax != NULL ? aligned(stored->job.amax_count == 1 ? sizeof(float) : blocks) : 0);
    at.workspace = at.block_amax + (job.block_amax != NULL ? aligned(blocks) : 0);
    at.workspace_nbytes = device->backend->block_workspace(&job);
    at.nbytes = at.workspace + at.workspace_nbytes;
    return at;
}

/* As many rows as a piece of weights has room for, whole units of them; 0: not even one. */
static int64_t rows_of_piece(const mq_device *device, const mq_stored_weight *stored)
{
    const int64_t unit = mq_block_unit(stored->job.scheme);
    int64_t rows = MQ_ROUND_UP(stored->shape[0], unit);
    while (rows > 0 && piece_of(device, stored, MQ_MIN(rows, stored->shape[0])).nbytes > (size_t)device->piece_nbytes)
        rows = rows / 2 / unit * unit;
    return rows;
}

/* Whether each piece of rows can be quantized by itself: what one scale is of is known beforehand. */
static int can_quantize(const mq_device *device, const mq_stored_weight *stored)
{
    const mq_scheme_row *scheme = mq_scheme_get(stored->job.scheme);
    const mq_block_job *job = &stored->job;
    const int64_t rows = stored->shape[0], cols = stored->shape[1];
    const int whole = scheme->second_divisor != 0.0f || scheme->block_rows == 0;
    if ((stored->numbers.dtype == MQ_F16 && stored->numbers.stride[1] != 1) || (whole && job->amax == NULL)) return 0;
    if (job->amax != NULL && job->amax_count != mq_block_amax_count(job, rows, cols)) return 0;
    if (job->block_amax != NULL && (scheme->second_divisor == 0.0f || job->block_amax_count != blocks_in(stored, rows)))
        return 0;
    return rows_of_piece(device, stored) > 0;
}

/* Routers choose experts by numbers: no product of codes. */
int mq_device_can_pack(const mq_device *device, mq_role role, const mq_stored_weight *stored)
{
    if (stored == NULL || stored->shape[0] == 0 || stored->shape[1] == 0) return 0;
    if (role == MQ_ROLE_ROUTER || role == MQ_ROLE_SHARED_ROUTER) return 0;
    return stored->numbers.data == NULL || can_quantize(device, stored);
}

size_t mq_device_packed_nbytes(const mq_device *device, const mq_stored_weight *stored)
{
    return places_of(device, stored).nbytes;
}

/* ---- parts that are stored ---- */

static int has_special(const uint8_t *codes, size_t count, uint32_t largest)
{
    int special = 0;
    for (size_t i = 0; i < count; i++) special |= (codes[i] & 0x7fu) > largest;
    return special;
}

/* Bytes on their way, a piece at a time; special: codes beyond the largest are none of a number, and are noted. */
static int send_bytes(mq_device *device, char *to, const uint8_t *from, size_t nbytes, uint32_t largest, int *special,
                      mq_error *err)
{
    const mq_backend *backend = device->backend;
    int rc = MQ_OK;
    for (size_t done = 0; rc == MQ_OK && done < nbytes; done += (size_t)device->piece_nbytes) {
        const size_t count = MQ_MIN((size_t)device->piece_nbytes, nbytes - done);
        const int slot = device->next_piece;
        device->next_piece = 1 - slot;
        rc = backend->event_wait(device->sent[slot], err);
        if (rc != MQ_OK) break;
        memcpy(device->pinned[slot], from + done, count);
        if (special != NULL) *special |= has_special(from + done, count, largest);
        rc = backend->copy(to + done, device->pinned[slot], count, device->copies, err);
        if (rc == MQ_OK) rc = backend->event_record(device->sent[slot], device->copies, err);
    }
    return rc;
}

/* The largest scale, a number that is none if there is such a one. */
static float largest_scale(const mq_stored_weight *stored)
{
    const mq_scheme_row *scheme = mq_scheme_get(stored->job.scheme);
    const int64_t count = mq_tensor_count(&stored->parts.scale);
    const float second = stored->parts.has_scale_2 ? *(const float *)stored->parts.scale_2.data : 1.0f;
    uint32_t largest = 0;
    if (scheme->scale == MQ_FMT_FP32) {
        const float *scales = stored->parts.scale.data;
        for (int64_t i = 0; i < count; i++) largest = MQ_MAX(largest, mq_bits_of(scales[i]) & 0x7fffffffu);
        return mq_float_of(largest) * second;
    }
    const uint8_t *codes = stored->parts.scale.data;
    const uint32_t mask = scheme->scale == MQ_FMT_FP8_E4M3 ? 0x7fu : 0xffu;     /* E8M0 has no sign */
    for (int64_t i = 0; i < count; i++) largest = MQ_MAX(largest, codes[i] & mask);
    return mq_decode(largest, mq_format_get(scheme->scale)->codec) * second;
}

/* Where codes and scales leave it open whether all is finite, the numbers say. */
static int check_finite(const mq_stored_weight *stored, mq_dtype dtype, int special, const char *name, mq_error *err)
{
    const mq_scheme_row *scheme = mq_scheme_get(stored->job.scheme);
    const float largest = largest_scale(stored) * mq_format_max(scheme->element);
    const float half = 65504.0f, full = mq_format_max(dtype == MQ_F32 ? MQ_FMT_FP32 : MQ_FMT_BF16);
    if (!special && largest >= 0.0f && largest <= (stored->dtype == MQ_F16 ? half : full)) return MQ_OK;
    return mq_stored_check(stored, name, err);
}

static int put_parts(mq_device *device, const mq_stored_weight *stored, const places *at, char *memory,
                     const char *name, mq_dtype dtype, mq_error *err)
{
    const mq_scheme_row *scheme = mq_scheme_get(stored->job.scheme);
    const mq_parts *parts = &stored->parts;
    const mq_codec element = mq_format_get(scheme->element)->codec;
    const int bytes = scheme->packing == MQ_PACK_NONE && scheme->element != MQ_FMT_INT8;
    int special = 0;
    int rc = send_bytes(device, memory + at->codes, parts->weight.data, part_nbytes(&parts->weight),
                        mq_codec_max_code(element), bytes ? &special : NULL, err);
    if (rc == MQ_OK)
        rc = send_bytes(device, memory + at->scales, parts->scale.data, part_nbytes(&parts->scale), 0, NULL, err);
    if (rc == MQ_OK && parts->has_scale_2)
        rc = send_bytes(device, memory + at->scale_2, parts->scale_2.data, sizeof(float), 0, NULL, err);
    return rc == MQ_OK ? check_finite(stored, dtype, special, name, err) : rc;
}

/* ---- parts that are made there ---- */

static void fill(char *pinned, const piece *at, const mq_stored_weight *part)
{
    const mq_tensor *numbers = &part->numbers;
    const size_t row_nbytes = (size_t)numbers->shape[1] * mq_dtype_size(numbers->dtype);
    const mq_block_job *job = &part->job;
    for (int64_t i = 0; i < part->shape[0]; i++)
        mq_read_row(pinned + (size_t)i * row_nbytes, numbers->dtype, numbers, i);
    if (job->amax != NULL) memcpy(pinned + at->amax, job->amax, (size_t)job->amax_count * sizeof(float));
    if (job->block_amax != NULL)
        memcpy(pinned + at->block_amax, job->block_amax, (size_t)job->block_amax_count * sizeof(float));
}

/* Rows from `row` on, which part is. */
static int quantize_piece(mq_device *device, const mq_stored_weight *part, const mq_cuda_linear *linear, int64_t row,
                          const char *name, mq_error *err)
{
    const mq_backend *backend = device->backend;
    const mq_scheme_row *scheme = mq_scheme_get(linear->scheme);
    const piece at = piece_of(device, part, part->shape[0]);
    const int64_t pairs = scheme->packing == MQ_PACK_ROW_PAIRS ? 2 : 1;
    const int64_t block_row = scheme->block_rows > 0 ? row / scheme->block_rows : 0;
    const int slot = device->next_piece;
    char *staged = device->staged[slot];
    mq_cuda_block_job job = job_of(part, part->shape[0]);
    device->next_piece = 1 - slot;
    int rc = backend->event_wait(device->sent[slot], err);
    if (rc != MQ_OK) return rc;
    fill(device->pinned[slot], &at, part);
    rc = backend->copy(staged, device->pinned[slot], at.workspace, device->copies, err);
    job.x.data = staged;
    if (job.amax != NULL) job.amax = (const float *)(const void *)(staged + at.amax);
    if (job.block_amax != NULL) job.block_amax = (const float *)(const void *)(staged + at.block_amax);
    job.codes = (uint8_t *)(uintptr_t)linear->codes + row / pairs * part->parts.weight.shape[1];
    job.scales = (char *)(uintptr_t)linear->scales +
                 (size_t)(block_row * grid_of(part).cols) * mq_dtype_size(part->parts.scale.dtype);
    job.scale_2 = (float *)(uintptr_t)linear->scale_2;
    job.workspace = staged + at.workspace;
    job.workspace_nbytes = at.workspace_nbytes;
    if (rc == MQ_OK) rc = backend->block_quantize(&job, device->copies, err);
    if (rc == MQ_OK) rc = mq_finding_weight(device, &job.x, name, err);
    return rc == MQ_OK ? backend->event_record(device->sent[slot], device->copies, err) : rc;
}

static int make_parts(mq_device *device, const mq_stored_weight *stored, const mq_cuda_linear *linear, const char *name,
                      mq_error *err)
{
    const int64_t step = rows_of_piece(device, stored);
    int rc = MQ_OK;
    for (int64_t row = 0; rc == MQ_OK && row < stored->shape[0]; row += step) {
        const mq_stored_weight part = mq_stored_rows(stored, row, MQ_MIN(step, stored->shape[0] - row));
        rc = quantize_piece(device, &part, linear, row, name, err);
    }
    return rc;
}

/* ---- a weight ---- */

int mq_device_put_packed(mq_device *device, char *memory, const char *name, const mq_stored_weight *stored,
                         mq_dtype dtype, mq_device_linear *out, mq_error *err)
{
    const mq_backend *backend = device->backend;
    const places at = places_of(device, stored);
    mq_cuda_linear linear = prepared_for(stored);
    linear.codes = (uint8_t *)memory + at.codes;
    linear.scales = memory + at.scales;
    linear.scale_2 = stored->parts.has_scale_2 ? (float *)(void *)(memory + at.scale_2) : NULL;
    out->weight = (mq_cuda_matrix){NULL, dtype, linear.rows, linear.cols, linear.cols};
    int rc = stored->numbers.data != NULL ? make_parts(device, stored, &linear, name, err)
                                          : put_parts(device, stored, &at, memory, name, dtype, err);
    if (rc == MQ_OK && at.nbytes > at.prepared)
        rc = backend->linear_prepare(device->gemm, &linear, memory + at.prepared, device->copies, err);
    out->prepared_for = backend->linear_path(device->gemm, &linear);
    out->packed = linear;
    out->packed.inputs = MQ_CUDA_INPUTS_PLAIN;
    out->packed.prepared = at.nbytes > at.prepared ? memory + at.prepared : NULL;
    return rc;
}
