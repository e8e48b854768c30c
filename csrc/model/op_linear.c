#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/ops.h"

enum { NOT_FINITE = 0x7f800000 };

/* A contiguous copy, or a scan, of the rows of w. A task's finding goes to its own place. */
typedef struct read_job {
    const mq_tensor *w;
    void *out;                /* NULL: w is read where it is */
    mq_dtype dtype;
    int64_t grain;
    uint32_t *amax;           /* one per task */
} read_job;

static void read_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const read_job *job = argument;
    const mq_typed_row_ops *kernels = mq_row_ops_of(job->dtype);
    int64_t columns = job->w->shape[1];
    size_t size = mq_dtype_size(job->dtype);
    uint32_t best = 0;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const char *row = (const char *)job->w->data + i * job->w->stride[0] * (int64_t)size;
        if (job->out != NULL) {
            char *copy = (char *)job->out + (size_t)(i * columns) * size;
            mq_read_row(copy, job->dtype, job->w, i);
            row = copy;
        }
        uint32_t amax = kernels->amax(row, columns);
        best = MQ_MAX(best, amax);
    }
    job->amax[begin / job->grain] = best;
}

/* Reads all of w, into copy if that is not NULL; an error if an element is not finite. */
static int read_weight(const mq_tensor *w, void *copy, mq_dtype dtype, const char *name, mq_error *err)
{
    int64_t grain = mq_row_grain(w->shape[1]), tasks = MQ_CEIL_DIV(w->shape[0], grain);
    read_job job = {.w = w, .out = copy, .dtype = dtype, .grain = grain};
    uint32_t best = 0;
    job.amax = mq_alloc_array((size_t)tasks, sizeof *job.amax);
    if (job.amax == NULL) return mq_fail_memory(err, name, (size_t)tasks * sizeof(uint32_t));
    mq_parallel_for(w->shape[0], grain, read_rows, &job);
    for (int64_t i = 0; i < tasks; i++) best = MQ_MAX(best, job.amax[i]);
    mq_free(job.amax);
    if (best < NOT_FINITE) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "%s contains %s", name, best > NOT_FINITE ? "NaN" : "an infinity");
}

/* transposed: for products with w itself instead of its transpose. */
static int load(mq_packed *packed, const mq_tensor *w, mq_gemm_kind kind, int transposed, const char *name,
                mq_error *err)
{
    int64_t rows = w->shape[0], columns = w->shape[1], ld = w->stride[0];
    size_t packed_size = transposed ? mq_gemm_packed_size(kind, columns, rows)
                                    : mq_gemm_packed_size(kind, rows, columns);
    mq_dtype dtype = w->dtype == MQ_F16 ? MQ_F32 : w->dtype;
    size_t size = mq_dtype_size(dtype);
    int in_place = dtype == w->dtype && w->stride[1] == 1 && ld >= columns && (uintptr_t)w->data % size == 0;
    void *copy = NULL;
    int rc = MQ_OK;
    if (!in_place) {
        copy = mq_alloc_array((size_t)(rows * columns), size);
        if (copy == NULL) return mq_fail_memory(err, name, (size_t)(rows * columns) * size);
        ld = columns;
    }
    rc = read_weight(w, copy, dtype, name, err);
    if (rc != MQ_OK) goto done;
    packed->data = mq_alloc(packed_size);
    if (packed->data == NULL) {
        rc = mq_fail_memory(err, name, packed_size);
        goto done;
    }
    if (transposed) mq_gemm_pack_transposed(kind, in_place ? w->data : copy, dtype, columns, rows, ld, packed);
    else mq_gemm_pack(kind, in_place ? w->data : copy, dtype, rows, columns, ld, packed);
done:
    mq_free(copy);
    return rc;
}

int mq_linear_load(mq_linear_weight *weight, const mq_tensor *w, mq_gemm_kind kind, const char *name, mq_error *err)
{
    return load(&weight->packed, w, kind, 0, name, err);
}

/* float32 is quantized, and what the parts stand for is rounded to bfloat16 or float16. */
static int fake_quantize_rounded(const mq_stored_weight *stored, mq_tensor *out, mq_error *err)
{
    const int64_t count = mq_tensor_count(out);
    mq_tensor made = mq_tensor_make(NULL, MQ_F32, 2, stored->shape);
    made.data = mq_alloc_array((size_t)count, sizeof(float));
    if (made.data == NULL) return mq_fail_memory(err, "a weight", (size_t)count * sizeof(float));
    const int rc = mq_block_fake_quantize(&stored->job, &stored->numbers, &made, err);
    const float *numbers = made.data;
    if (rc == MQ_OK && out->dtype == MQ_BF16) mq_row_ops_of(MQ_BF16)->from_f32(out->data, numbers, count);
    for (int64_t i = 0; rc == MQ_OK && out->dtype == MQ_F16 && i < count; i++)
        ((uint16_t *)out->data)[i] = (uint16_t)mq_encode(numbers[i], MQ_CODEC(FP16));
    mq_free(made.data);
    return rc;
}

int mq_stored_numbers(const mq_stored_weight *stored, mq_tensor *out, const char *name, mq_error *err)
{
    *out = mq_tensor_make(NULL, stored->dtype, 2, stored->shape);
    const size_t nbytes = (size_t)mq_tensor_count(out) * mq_dtype_size(stored->dtype);
    out->data = mq_alloc(nbytes);
    if (out->data == NULL) return mq_fail_memory(err, name, nbytes);
    if (stored->numbers.data == NULL) return mq_block_dequantize(&stored->job, &stored->parts, out, err);
    if (stored->numbers.dtype == out->dtype) return mq_block_fake_quantize(&stored->job, &stored->numbers, out, err);
    return fake_quantize_rounded(stored, out, err);
}

int mq_stored_check(const mq_stored_weight *stored, const char *name, mq_error *err)
{
    const mq_dtype dtype = stored->dtype == MQ_F16 ? MQ_F32 : stored->dtype;
    mq_tensor numbers;
    void *copy = NULL;
    int rc = mq_stored_numbers(stored, &numbers, name, err);
    if (rc == MQ_OK && dtype != stored->dtype) {
        copy = mq_alloc_array((size_t)mq_tensor_count(&numbers), mq_dtype_size(dtype));
        if (copy == NULL) rc = mq_fail_memory(err, name, (size_t)mq_tensor_count(&numbers) * mq_dtype_size(dtype));
    }
    if (rc == MQ_OK) rc = read_weight(&numbers, copy, dtype, name, err);
    mq_free(copy);
    mq_free(numbers.data);
    return rc;
}

static int load_numbers(mq_linear_weight *weight, const mq_stored_weight *stored, mq_gemm_kind kind, const char *name,
                        mq_error *err)
{
    mq_tensor numbers;
    int rc = mq_stored_numbers(stored, &numbers, name, err);
    if (rc == MQ_OK) rc = mq_linear_load(weight, &numbers, kind, name, err);
    mq_free(numbers.data);
    return rc;
}

int mq_linear_load_stored(mq_linear_weight *weight, const mq_stored_weight *stored, mq_gemm_kind kind, const char *name,
                          mq_error *err)
{
    if (stored->numbers.data != NULL) return load_numbers(weight, stored, kind, name, err);
    const mq_coded_matrix codes = mq_stored_codes(stored);
    if (!mq_gemm_can_code(&codes)) return load_numbers(weight, stored, kind, name, err);
    const size_t nbytes = mq_gemm_coded_size(kind, &codes);
    weight->packed.data = mq_alloc(nbytes);
    if (weight->packed.data == NULL) return mq_fail_memory(err, name, nbytes);
    if (mq_gemm_pack_codes(kind, &codes, &weight->packed)) return MQ_OK;
    /* NaN and infinities are an error of the numbers' own; scales at the ends of float32 are none. */
    mq_free(weight->packed.data);
    weight->packed.data = NULL;
    return load_numbers(weight, stored, kind, name, err);
}

int mq_linear_load_backward(mq_packed *packed, const mq_tensor *w, mq_gemm_kind kind, const char *name, mq_error *err)
{
    return load(packed, w, kind, 1, name, err);
}

void mq_linear_free(mq_linear_weight *weight)
{
    if (!weight->lent) mq_free(weight->packed.data);
    mq_free(weight->bias);
    memset(weight, 0, sizeof *weight);
}

void mq_linear_forward(void *out, const void *in, const mq_linear_weight *weight, int accumulate,
                       const mq_row_sizes *sizes)
{
    mq_gemm_args args = {
        .m = sizes->rows, .a = in, .a_dtype = sizes->dtype, .lda = weight->packed.k, .b = &weight->packed,
        .bias = weight->bias, .c = out, .c_dtype = sizes->dtype, .ldc = weight->packed.n, .accumulate = accumulate,
        .alpha = 1.0f,
    };
    mq_gemm_run(&args);
}

void mq_linear_backward(float *d_in, const float *d_out, const mq_packed *weight, int accumulate, int64_t rows)
{
    mq_gemm_args args = {
        .m = rows, .a = d_out, .a_dtype = MQ_F32, .lda = weight->k, .b = weight, .c = d_in, .c_dtype = MQ_F32,
        .ldc = weight->n, .accumulate = accumulate, .alpha = 1.0f,
    };
    mq_gemm_run(&args);
}

typedef struct transpose_job {
    float *out;
    const float *in;
    int64_t rows, width;
} transpose_job;

static void transpose_columns(void *argument, int64_t begin, int64_t end, int worker)
{
    const transpose_job *job = argument;
    (void)worker;
    for (int64_t i = 0; i < job->rows; i++)
        for (int64_t j = begin; j < end; j++) job->out[j * job->rows + i] = job->in[i * job->width + j];
}

int mq_linear_weight_backward(float *d_weight, const float *d_out, const void *in, int64_t columns,
                              const mq_row_sizes *sizes, mq_error *err)
{
    enum { COLUMNS = 16 };      /* of a task: a cache line of every row */
    const size_t packed_size = mq_gemm_packed_size(MQ_GEMM_F32, sizes->width, sizes->rows);
    const size_t transposed_size = (size_t)(sizes->rows * columns) * sizeof(float);
    mq_packed packed = {.data = mq_alloc(packed_size)};
    transpose_job job = {.out = mq_alloc(transposed_size), .in = d_out, .rows = sizes->rows, .width = columns};
    int rc = MQ_OK;
    if (packed.data == NULL || job.out == NULL) {
        rc = mq_fail_memory(err, "the gradient of a weight", packed_size + transposed_size);
    } else {
        mq_gemm_pack_transposed(MQ_GEMM_F32, in, sizes->dtype, sizes->width, sizes->rows, sizes->width, &packed);
        mq_parallel_for(columns, COLUMNS, transpose_columns, &job);
        mq_gemm_args args = {
            .m = columns, .a = job.out, .a_dtype = MQ_F32, .lda = sizes->rows, .b = &packed, .c = d_weight,
            .c_dtype = MQ_F32, .ldc = sizes->width, .accumulate = 1, .alpha = 1.0f,
        };
        mq_gemm_run(&args);
    }
    mq_free(job.out);
    mq_free(packed.data);
    return rc;
}

void mq_bias_backward(float *d_bias, const float *d_out, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; i++) mq_row_ops_of(MQ_F32)->add(d_bias, d_out + i * columns, columns);
}
