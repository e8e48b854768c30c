#include "quant/block.h"

#include <stdatomic.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "format/pack.h"
#include "kernels/kernels.h"
#include "quant/rows.h"
#include "quant/scale.h"

/* One matrix on its way through the pool. Work is cut by groups of rows: single ones, or pairs that share bytes. */
typedef struct matrix_job {
    const mq_scheme_row *scheme;
    const mq_kernels *kernels;
    mq_scheme id;
    mq_grid grid;
    const mq_tensor *weight; /* NULL when dequantizing */
    mq_tensor *out;          /* NULL when quantizing */
    const mq_parts *parts;   /* NULL when fake-quantizing */
    int64_t rows, cols;
    const float *amax;       /* one per block, or NULL: each row finds its own */
    float second;
    mq_tables tables;
    int has_tables;
    mq_row_buffers buffers;  /* 0: a contiguous row, 1 and 2: codes of a pair of rows */
    _Atomic int64_t bad_row; /* the first row that holds NaN or infinity */
} matrix_job;

static int64_t block_cols_of(const mq_block_job *job)
{
    return job->block_cols > 0 ? job->block_cols : mq_scheme_get(job->scheme)->block_cols;
}

static mq_grid grid_of(const mq_block_job *job, int64_t rows, int64_t cols)
{
    return mq_grid_make(rows, cols, mq_scheme_get(job->scheme)->block_rows, block_cols_of(job));
}

int64_t mq_block_amax_count(const mq_block_job *job, int64_t rows, int64_t cols)
{
    const mq_scheme_row *scheme = mq_scheme_get(job->scheme);
    if (scheme->scale == MQ_FMT_E8M0) return 0;
    if (scheme->second_divisor != 0.0f) return 1;
    mq_grid grid = grid_of(job, rows, cols);
    return grid.rows * grid.cols;
}

static mq_dtype code_dtype(mq_format format, int packed)
{
    if (packed) return MQ_U8;
    switch (format) {
    case MQ_FMT_FP32: return MQ_F32;
    case MQ_FMT_FP8_E4M3: return MQ_F8_E4M3;
    case MQ_FMT_FP8_E5M2: return MQ_F8_E5M2;
    case MQ_FMT_INT8: return MQ_I8;
    default: return MQ_U8;
    }
}

/* Where the reference pads (blocks whose scales are float32) a partial block is fine; elsewhere no tool reads it. */
static int check_shape(const mq_block_job *job, int64_t rows, int64_t cols, mq_error *err)
{
    const mq_scheme_row *scheme = mq_scheme_get(job->scheme);
    const int64_t block = block_cols_of(job);
    const char *name = job->name != NULL ? job->name : "weight";
    if (job->block_cols > 0 && scheme->block_cols == 0)
        return mq_fail(err, MQ_ERR_VALUE, "%s: scheme %s has no blocks along rows, so no block size", name,
                       scheme->name);
    if (scheme->block_rows == 1 && block > 0 && cols % block != 0 && scheme->scale != MQ_FMT_FP32)
        return mq_fail(err, MQ_ERR_VALUE, "%s [%lld, %lld]: scheme %s needs the last dimension to be a multiple of its "
                       "block size %lld; leave this layer out or choose a scheme without blocks", name,
                       (long long)rows, (long long)cols, scheme->name, (long long)block);
    if (scheme->packing == MQ_PACK_ROW && block % 8 != 0)
        return mq_fail(err, MQ_ERR_VALUE, "%s: scheme %s needs a block size that is a multiple of 8, not %lld", name,
                       scheme->name, (long long)block);
    if (scheme->packing == MQ_PACK_ROW_PAIRS && rows % 2 != 0)
        return mq_fail(err, MQ_ERR_VALUE,
                       "%s [%lld, %lld]: scheme %s packs pairs of rows and needs an even number of them", name,
                       (long long)rows, (long long)cols, scheme->name);
    return MQ_OK;
}

static mq_tensor scale_shape(const mq_scheme_row *scheme, const mq_grid *grid, int64_t rows, int64_t cols)
{
    const mq_dtype dtype = code_dtype(scheme->scale, 0);
    if (scheme->block_rows != 1 && grid->rows * grid->cols == 1) return mq_tensor_make(NULL, dtype, 0, NULL);
    if (scheme->block_rows != 1) return mq_tensor_make(NULL, dtype, 4, (int64_t[]){grid->rows, 1, grid->cols, 1});
    if (scheme->block_cols == 0) return mq_tensor_make(NULL, dtype, 1, &rows);
    return mq_tensor_make(NULL, dtype, 2, (int64_t[]){rows, cols == 0 ? 0 : grid->cols});
}

int mq_block_shapes(const mq_block_job *job, int64_t rows, int64_t cols, mq_parts *parts, mq_error *err)
{
    const mq_scheme_row *scheme = mq_scheme_get(job->scheme);
    const mq_grid grid = grid_of(job, rows, cols);
    int rc = check_shape(job, rows, cols, err);
    if (rc != MQ_OK) return rc;
    int64_t shape[2] = {rows, cols};
    if (scheme->packing == MQ_PACK_ROW) shape[1] = mq_packed_bytes(cols, mq_format_get(scheme->element)->codec.bits);
    if (scheme->packing == MQ_PACK_ROW_PAIRS) shape[0] = rows / 2;
    parts->weight = mq_tensor_make(NULL, code_dtype(scheme->element, scheme->packing != MQ_PACK_NONE), 2, shape);
    parts->scale = scale_shape(scheme, &grid, rows, cols);
    parts->scale_2 = mq_tensor_make(NULL, MQ_F32, 0, NULL);
    parts->has_scale_2 = scheme->second_divisor != 0.0f;
    return MQ_OK;
}

/* ---- one row ---- */

static void note_bad_row(matrix_job *job, int64_t row)
{
    int64_t seen = atomic_load(&job->bad_row);
    while (row < seen && !atomic_compare_exchange_weak(&job->bad_row, &seen, row)) {
    }
}

/* The row's place in everything that is stored by row; codes go to scratch where rows share bytes. */
static mq_row row_at(const matrix_job *job, int64_t r, int worker)
{
    const int64_t block_row = r / job->grid.block_rows;
    mq_row row = {.scheme = job->scheme, .n = job->cols, .block = job->grid.block_cols, .second = job->second};
    if (job->amax != NULL) row.amax = job->amax + block_row * job->grid.cols;
    if (job->has_tables) row.tables = &job->tables;
    if (job->out != NULL) {
        row.dtype = job->out->dtype;
        row.y = (char *)job->out->data + r * job->cols * (int64_t)mq_dtype_size(job->out->dtype);
    }
    if (job->parts == NULL) return row;
    const size_t scale_size = mq_dtype_size(job->parts->scale.dtype);
    row.scales = (char *)job->parts->scale.data + block_row * job->grid.cols * (int64_t)scale_size;
    if (job->scheme->packing == MQ_PACK_ROW_PAIRS)
        row.codes = mq_row_buffers_get(&job->buffers, worker, 1 + (int)(r % 2));
    else
        row.codes = (uint8_t *)job->parts->weight.data + r * job->parts->weight.shape[1];
    return row;
}

/* The first row of a block stores its scales. */
static void quantize_one(matrix_job *job, int64_t r, int worker)
{
    mq_row row = row_at(job, r, worker);
    row.dtype = job->weight->dtype;
    row.x = mq_row_contiguous(job->weight, r, mq_row_buffers_get(&job->buffers, worker, 0));
    if (r % job->grid.block_rows != 0) row.scales = NULL;
    const int is_bad = (job->out != NULL ? job->kernels->fake_quantize : job->kernels->quantize)[job->id](&row);
    if (is_bad) note_bad_row(job, r);
}

/* Tables that serve every row: there are none if rows have an amax each. */
static void prepare_tables(matrix_job *job)
{
    mq_row row = row_at(job, 0, 0);
    row.dtype = job->weight->dtype;
    if (job->kernels->prepare[job->id] == NULL || job->scheme->block_rows > 1) return;
    if (row.amax != NULL && job->scheme->block_rows != 0) return;
    job->kernels->prepare[job->id](&row, &job->tables);
    job->has_tables = 1;
}

static void quantize_rows(void *arg, int64_t begin, int64_t end, int worker)
{
    matrix_job *job = arg;
    if (job->scheme->packing != MQ_PACK_ROW_PAIRS || job->out != NULL) {
        for (int64_t r = begin; r < end; r++) quantize_one(job, r, worker);
        return;
    }
    for (int64_t pair = begin; pair < end; pair++) {
        quantize_one(job, 2 * pair, worker);
        quantize_one(job, 2 * pair + 1, worker);
        mq_pack_row_pair(mq_row_buffers_get(&job->buffers, worker, 1), mq_row_buffers_get(&job->buffers, worker, 2),
                         job->cols, (uint8_t *)job->parts->weight.data + pair * job->cols);
    }
}

static void dequantize_rows(void *arg, int64_t begin, int64_t end, int worker)
{
    matrix_job *job = arg;
    if (job->scheme->packing != MQ_PACK_ROW_PAIRS) {
        for (int64_t r = begin; r < end; r++) {
            mq_row row = row_at(job, r, worker);
            job->kernels->dequantize[job->id](&row);
        }
        return;
    }
    for (int64_t pair = begin; pair < end; pair++) {
        mq_row even = row_at(job, 2 * pair, worker), odd = row_at(job, 2 * pair + 1, worker);
        mq_unpack_row_pair((const uint8_t *)job->parts->weight.data + pair * job->cols, job->cols, even.codes,
                           odd.codes);
        job->kernels->dequantize[job->id](&even);
        job->kernels->dequantize[job->id](&odd);
    }
}

/* ---- the whole matrix ---- */

/* The blocks' maxima as calibration chose them, and the tensor's: the largest of them unless it was given. */
static int use_block_amax(matrix_job *job, const mq_block_job *given, float **owned, mq_error *err)
{
    const int64_t count = given->block_amax_count;
    const float largest = mq_format_max(job->scheme->element);
    mq_second_level second = {.divisor = given->second_divisor > 0.0f ? given->second_divisor
                                                                      : job->scheme->second_divisor};
    *owned = mq_alloc_array((size_t)count, sizeof(float));
    if (*owned == NULL) return mq_fail_memory(err, "block maxima", (size_t)count * sizeof(float));
    if (given->amax != NULL) second.amax = given->amax[0];
    else for (int64_t i = 0; i < count; i++) second.amax = MQ_MAX(second.amax, given->block_amax[i]);
    mq_static_amax(&second, largest, given->block_amax, count, *owned);
    job->second = mq_second_scale(&second, largest);
    job->amax = *owned;
    return MQ_OK;
}

/* Maxima that no single row can find: of the tensor, or of blocks of several rows. *owned is to be freed. */
static int find_amax(matrix_job *job, const mq_block_job *given, float **owned, mq_error *err)
{
    const int two_level = job->scheme->second_divisor != 0.0f;
    const mq_grid grid = two_level ? mq_grid_make(job->rows, job->cols, 0, 0) : job->grid;
    const float *amax = given->amax;
    if (given->block_amax != NULL) return use_block_amax(job, given, owned, err);
    if (amax == NULL && (two_level || job->scheme->block_rows != 1)) {
        const size_t nbytes = (size_t)(grid.rows * grid.cols) * sizeof(float);
        *owned = mq_alloc(nbytes);
        if (*owned == NULL) return mq_fail_memory(err, "block maxima", nbytes);
        int rc = mq_amax(job->weight, &grid, *owned, err);
        if (rc != MQ_OK) return rc;
        amax = *owned;
    }
    if (two_level) job->second = mq_scale_second(job->scheme, amax[0]);
    else job->amax = amax;
    return MQ_OK;
}

static int check_amax(const mq_block_job *given, const float *amax, int64_t count, int64_t expected,
                      const mq_tensor *weight, mq_error *err)
{
    const char *name = given->name != NULL ? given->name : "weight";
    char text[96];
    if (amax == NULL) return MQ_OK;
    if (count != expected)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: scheme %s takes %lld amax values, got %lld", name,
                       mq_tensor_describe(weight, text, sizeof text), mq_scheme_get(given->scheme)->name,
                       (long long)expected, (long long)count);
    for (int64_t i = 0; i < count; i++)
        if (!(amax[i] >= 0.0f && amax[i] <= 3.4028234664e38f))
            return mq_fail(err, MQ_ERR_VALUE, "%s: amax %lld is %g; expected a finite number >= 0", name, (long long)i,
                           (double)amax[i]);
    return MQ_OK;
}

static int check_weight(const mq_block_job *given, const mq_tensor *weight, mq_error *err)
{
    const char *name = given->name != NULL ? given->name : "weight";
    char text[96];
    if (weight->ndim != 2)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: expected 2 dimensions", name,
                       mq_tensor_describe(weight, text, sizeof text));
    if ((int)weight->dtype >= MQ_FLOAT_DTYPES)
        return mq_fail(err, MQ_ERR_TYPE, "%s %s: expected float32, bfloat16 or float16", name,
                       mq_tensor_describe(weight, text, sizeof text));
    const int64_t rows = weight->shape[0], cols = weight->shape[1];
    const mq_grid grid = grid_of(given, rows, cols);
    if (given->block_amax != NULL && mq_scheme_get(given->scheme)->second_divisor == 0.0f)
        return mq_fail(err, MQ_ERR_VALUE, "%s: scheme %s has one level of scales: its blocks' maxima are its amax",
                       name, mq_scheme_get(given->scheme)->name);
    int rc = check_amax(given, given->amax, given->amax_count, mq_block_amax_count(given, rows, cols), weight, err);
    if (rc != MQ_OK) return rc;
    return check_amax(given, given->block_amax, given->block_amax_count, cols == 0 ? 0 : grid.rows * grid.cols, weight,
                      err);
}

static int run_rows(matrix_job *job, const mq_block_job *given, mq_error *err)
{
    float *owned = NULL;
    const int pairs = job->scheme->packing == MQ_PACK_ROW_PAIRS && job->parts != NULL;
    const size_t codes = pairs ? (size_t)job->cols : 0;
    const size_t nbytes[3] = {job->weight != NULL ? mq_row_scratch_bytes(job->weight) : 0, codes, codes};
    atomic_init(&job->bad_row, INT64_MAX);
    int rc = mq_row_buffers_init(&job->buffers, nbytes, 3, err);
    if (rc != MQ_OK) return rc;
    if (job->weight != NULL) rc = find_amax(job, given, &owned, err);
    if (job->weight != NULL && rc == MQ_OK) prepare_tables(job);
    if (rc == MQ_OK)
        mq_parallel_for(pairs ? job->rows / 2 : job->rows, mq_rows_per_chunk(pairs ? 2 * job->cols : job->cols),
                        job->weight != NULL ? quantize_rows : dequantize_rows, job);
    const int64_t bad = atomic_load(&job->bad_row);
    if (rc == MQ_OK && bad != INT64_MAX)
        rc = mq_fail(err, MQ_ERR_VALUE,
                     "%s [%lld, %lld]: row %lld holds NaN or infinity; such a tensor cannot be quantized",
                     given->name != NULL ? given->name : "weight", (long long)job->rows, (long long)job->cols,
                     (long long)bad);
    mq_free(owned);
    mq_row_buffers_free(&job->buffers);
    return rc;
}

static matrix_job job_make(const mq_block_job *given, int64_t rows, int64_t cols)
{
    return (matrix_job){.scheme = mq_scheme_get(given->scheme), .kernels = mq_kernels_get(), .id = given->scheme,
                        .grid = grid_of(given, rows, cols), .rows = rows, .cols = cols, .second = 1.0f};
}

int mq_block_quantize(const mq_block_job *given, const mq_tensor *weight, mq_parts *parts, mq_error *err)
{
    int rc = check_weight(given, weight, err);
    if (rc != MQ_OK) return rc;
    matrix_job job = job_make(given, weight->shape[0], weight->shape[1]);
    if (mq_tensor_count(weight) == 0 && job.scheme->scale == MQ_FMT_FP32) /* no row will write them */
        for (int64_t i = 0; i < mq_tensor_count(&parts->scale); i++) ((float *)parts->scale.data)[i] = 1.0f;
    job.weight = weight;
    job.parts = parts;
    rc = run_rows(&job, given, err);
    if (parts->has_scale_2) *(float *)parts->scale_2.data = job.second;
    return rc;
}

int mq_block_fake_quantize(const mq_block_job *given, const mq_tensor *weight, mq_tensor *out, mq_error *err)
{
    int rc = check_weight(given, weight, err);
    if (rc != MQ_OK) return rc;
    matrix_job job = job_make(given, weight->shape[0], weight->shape[1]);
    job.weight = weight;
    job.out = out;
    return run_rows(&job, given, err);
}

int mq_block_dequantize(const mq_block_job *given, const mq_parts *parts, mq_tensor *out, mq_error *err)
{
    matrix_job job = job_make(given, out->shape[0], out->shape[1]);
    job.parts = parts;
    job.out = out;
    if (parts->has_scale_2) job.second = *(const float *)parts->scale_2.data;
    return run_rows(&job, given, err);
}

int64_t mq_block_unit(mq_scheme scheme)
{
    const mq_scheme_row *row = mq_scheme_get(scheme);
    return MQ_MAX((int64_t)row->block_rows, row->packing == MQ_PACK_ROW_PAIRS ? (int64_t)2 : (int64_t)1);
}

/* data, so many elements of the tensor's further on. */
static void *moved(const mq_tensor *tensor, int64_t elements)
{
    return tensor->data == NULL ? NULL : (char *)tensor->data + elements * (int64_t)mq_dtype_size(tensor->dtype);
}

mq_stored_weight mq_stored_rows(const mq_stored_weight *weight, int64_t first, int64_t rows)
{
    const mq_block_job *job = &weight->job;
    const mq_grid grid = grid_of(job, weight->shape[0], weight->shape[1]);
    const int64_t block = first / grid.block_rows * grid.cols;
    const int64_t blocks = MQ_CEIL_DIV(rows, grid.block_rows) * grid.cols;
    const int64_t pairs = mq_scheme_get(job->scheme)->packing == MQ_PACK_ROW_PAIRS ? 2 : 1;
    mq_stored_weight part = *weight;
    mq_error err;
    part.shape[0] = rows;
    mq_block_shapes(job, rows, weight->shape[1], &part.parts, &err);     /* a part of what fits fits */
    part.parts.weight.data = moved(&weight->parts.weight, first / pairs * weight->parts.weight.shape[1]);
    part.parts.scale.data = moved(&weight->parts.scale, block);
    part.parts.scale_2.data = weight->parts.scale_2.data;
    part.numbers.data = moved(&weight->numbers, weight->numbers.data != NULL ? first * weight->numbers.stride[0] : 0);
    part.numbers.shape[0] = weight->numbers.data != NULL ? rows : 0;
    if (job->amax_count > 1) part.job.amax = job->amax + block;
    if (job->amax_count > 1) part.job.amax_count = blocks;
    if (job->block_amax != NULL) part.job.block_amax = job->block_amax + block;
    if (job->block_amax != NULL) part.job.block_amax_count = blocks;
    return part;
}

mq_coded_matrix mq_stored_codes(const mq_stored_weight *weight)
{
    const mq_grid grid = grid_of(&weight->job, weight->shape[0], weight->shape[1]);
    return (mq_coded_matrix){
        .scheme = mq_scheme_get(weight->job.scheme), .n = weight->shape[0], .k = weight->shape[1],
        .block_rows = grid.block_rows, .block_cols = grid.block_cols, .codes = weight->parts.weight.data,
        .scale = weight->parts.scale.data, .dtype = weight->dtype,
        .second = weight->parts.has_scale_2 ? *(const float *)weight->parts.scale_2.data : 1.0f,
    };
}
