#include "calib/awq.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/kernels.h"
#include "kernels/search_ops.h"
#include "quant/rows.h"

static float rounded(mq_dtype dtype, float x)
{
    if (dtype == MQ_BF16) return mq_float_of(mq_encode_float(x, MQ_CODEC(BF16)) << 16);
    return dtype == MQ_F16 ? mq_decode_float(mq_encode_float(x, MQ_CODEC(FP16)), MQ_CODEC(FP16)) : x;
}

enum { ROWS = 128 };                 /* summed by one thread, then added to the others in order */

typedef struct weight_job {
    const mq_tensor *weight;
    int64_t block;
    double *partial;                 /* [chunks of rows, columns] */
    _Atomic int rc;
} weight_job;

static void add_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    weight_job *job = argument;
    const mq_tensor *weight = job->weight;
    const int64_t n = weight->shape[1];
    float *x = mq_alloc_array((size_t)n, sizeof *x);
    void *contiguous = mq_alloc(mq_row_scratch_bytes(weight));
    (void)worker;
    if (x == NULL || contiguous == NULL) atomic_store(&job->rc, MQ_ERR_MEMORY);
    else
        for (int64_t r = begin; r < end; r++) {
            mq_kernels_get()->to_float[weight->dtype](mq_row_contiguous(weight, r, contiguous), n, x);
            mq_search_ops_get()->add_normalized[weight->dtype](job->partial + r / ROWS * n, x, n, job->block);
        }
    mq_free(x);
    mq_free(contiguous);
}

int mq_awq_weight_scale(const mq_tensor *weight, int64_t block, const char *name, float *out, mq_error *err)
{
    const int64_t rows = weight->shape[0], n = weight->shape[1], chunks = MQ_CEIL_DIV(rows, (int64_t)ROWS);
    if (rows == 0) return mq_fail(err, MQ_ERR_VALUE, "%s [0, %lld]: there is no mean over no rows", name, (long long)n);
    weight_job job = {.weight = weight, .block = block > 0 ? block : MQ_MAX(n, (int64_t)1)};
    job.partial = mq_alloc_zeroed((size_t)(MQ_MAX(chunks, (int64_t)1) * n) * sizeof(double));
    if (job.partial == NULL) return mq_fail_memory(err, name, (size_t)(chunks * n) * sizeof(double));
    mq_parallel_for(rows, ROWS, add_rows, &job);
    for (int64_t i = 0; i < n; i++) {
        double sum = 0.0;
        for (int64_t c = 0; c < chunks; c++) sum += job.partial[c * n + i];
        out[i] = rounded(weight->dtype, (float)(sum / (double)rows));
    }
    mq_free(job.partial);
    return atomic_load(&job.rc) == MQ_OK ? MQ_OK : mq_fail_memory(err, name, 0);
}

static float clamped(float x)
{
    return MQ_MIN(MQ_MAX(x, 1e-4f), 1e4f);
}

/* NaN would pass the clamps as a number. */
static int check_magnitudes(const char *name, const float *values, int64_t n, mq_error *err)
{
    for (int64_t i = 0; i < n; i++)
        if (!(values[i] >= 0.0f && values[i] <= FLT_MAX))
            return mq_fail(err, MQ_ERR_VALUE, "%s: channel %lld is %g; expected finite numbers >= 0", name,
                           (long long)i, (double)values[i]);
    return MQ_OK;
}

static int check_channels(const float *activations, const float *weights, int64_t n, float alpha, mq_error *err)
{
    int rc = check_magnitudes("activations", activations, n, err);
    if (rc == MQ_OK) rc = check_magnitudes("weights", weights, n, err);
    if (rc == MQ_OK && !isfinite(alpha))
        rc = mq_fail(err, MQ_ERR_VALUE, "alpha: expected a finite number, got %g", (double)alpha);
    return rc;
}

int mq_awq_scale(const float *activations, const float *weights, int64_t n, float alpha, float *out, mq_error *err)
{
    float least = INFINITY, most = 0.0f;
    int rc = check_channels(activations, weights, n, alpha, err);
    if (rc != MQ_OK) return rc;
    for (int64_t i = 0; i < n; i++) {
        out[i] = clamped(powf(activations[i], alpha) / (powf(weights[i], 1.0f - alpha) + FLT_MIN));
        least = MQ_MIN(least, out[i]);
        most = MQ_MAX(most, out[i]);
    }
    const float middle = sqrtf(most * least);
    for (int64_t i = 0; i < n; i++) out[i] /= middle;
    return MQ_OK;
}

int mq_smoothquant_scale(const float *activations, const float *weights, mq_dtype dtype, int64_t n, float alpha,
                         float *out, mq_error *err)
{
    static const float silent = 0x1p-31f;
    int rc = check_channels(activations, weights, n, alpha, err);
    if (rc != MQ_OK) return rc;
    for (int64_t i = 0; i < n; i++) {
        const float scale = rounded(dtype, powf(weights[i], 1.0f - alpha)) / powf(activations[i], alpha);
        out[i] = activations[i] <= silent ? 1.0f : clamped(scale);
    }
    return MQ_OK;
}
