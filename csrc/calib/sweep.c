#include "calib/sweep.h"

#include <stdatomic.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/search_ops.h"
#include "quant/rows.h"
#include "quant/scale.h"

enum { NUMBERS = 126 };              /* positive, finite */

typedef struct sweep_run {
    const mq_sweep_job *job;
    float scale[NUMBERS], amax[NUMBERS];
    float *out;
    _Atomic int rc;
    _Atomic int64_t bad_row;         /* the first that holds NaN or infinity */
} sweep_run;

static void list_candidates(sweep_run *run)
{
    const mq_sweep_job *job = run->job;
    const mq_second_level level = {.amax = job->global_amax, .divisor = job->divisor};
    const float second = mq_second_scale(&level, 6.0f);
    for (int i = 0; i < NUMBERS; i++) {
        const float number = mq_decode((uint32_t)i + 1u, MQ_CODEC(FP8_E4M3));
        run->scale[i] = number * second;
        run->amax[i] = job->global_amax * (number / (job->divisor / 6.0f));
    }
}

static int is_finite(const float *x, int64_t n)
{
    int found = 1;
    for (int64_t i = 0; i < n; i++) found &= x[i] - x[i] == 0.0f;
    return found;
}

static void note_bad_row(sweep_run *run, int64_t row)
{
    int64_t seen = atomic_load(&run->bad_row);
    while (row < seen && !atomic_compare_exchange_weak(&run->bad_row, &seen, row)) {
    }
}

static void sweep_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    sweep_run *run = argument;
    const mq_tensor *weight = run->job->weight;
    const int64_t n = weight->shape[1], blocks = n / MQ_SWEEP_BLOCK;
    const mq_search_ops *ops = mq_search_ops_get();
    mq_sweep sweep = {.scale = run->scale, .count = NUMBERS};
    float *x = mq_alloc_array((size_t)n, sizeof *x);
    void *contiguous = mq_alloc(mq_row_scratch_bytes(weight));
    (void)worker;
    if (x == NULL || contiguous == NULL) atomic_store(&run->rc, MQ_ERR_MEMORY);
    else
        for (int64_t r = begin; r < end; r++) {
            mq_kernels_get()->to_float[weight->dtype](mq_row_contiguous(weight, r, contiguous), n, x);
            if (!is_finite(x, n)) note_bad_row(run, r);
            for (int64_t b = 0; b < blocks; b++) {
                if (run->job->hessian != NULL)
                    sweep.hessian = run->job->hessian + b * MQ_SWEEP_BLOCK * MQ_SWEEP_BLOCK;
                run->out[r * blocks + b] = run->amax[ops->sweep(x + b * MQ_SWEEP_BLOCK, &sweep)];
            }
        }
    mq_free(x);
    mq_free(contiguous);
}

static int check(const mq_sweep_job *job, mq_error *err)
{
    const mq_tensor *weight = job->weight;
    char text[96];
    if (weight->ndim != 2 || weight->shape[1] % MQ_SWEEP_BLOCK != 0 || (int)weight->dtype >= MQ_FLOAT_DTYPES)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: a sweep of block scales takes a float matrix of whole blocks of %d",
                       job->name, mq_tensor_describe(weight, text, sizeof text), (int)MQ_SWEEP_BLOCK);
    if (!(job->global_amax >= 0.0f && job->divisor > 0.0f && is_finite(&job->global_amax, 1)))
        return mq_fail(err, MQ_ERR_VALUE, "%s: global_amax %g over %g is no scale", job->name,
                       (double)job->global_amax, (double)job->divisor);
    if (job->hessian != NULL && !is_finite(job->hessian, weight->shape[1] * MQ_SWEEP_BLOCK))
        return mq_fail(err, MQ_ERR_VALUE, "%s: its hessian holds NaN or infinity", job->name);
    return MQ_OK;
}

int mq_sweep_block_scales(const mq_sweep_job *job, float *amax, mq_error *err)
{
    sweep_run run = {.job = job, .out = amax, .bad_row = INT64_MAX};
    const mq_tensor *weight = job->weight;
    int rc = check(job, err);
    if (rc != MQ_OK) return rc;
    list_candidates(&run);
    mq_parallel_for(weight->shape[0], mq_rows_per_chunk(16 * weight->shape[1]), sweep_rows, &run);
    if (atomic_load(&run.rc) != MQ_OK) return mq_fail_memory(err, job->name, (size_t)weight->shape[1] * 4);
    const int64_t bad = atomic_load(&run.bad_row);
    if (bad == INT64_MAX) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "%s: row %lld holds NaN or infinity", job->name, (long long)bad);
}
