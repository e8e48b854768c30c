#include "calib/factor.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/gemm.h"

/* Seen from the lower right corner, U is the lower triangle of Cholesky's factorization: the buffer is turned around,
 * factored in place, and turned back. Blocked and right-looking: sums over a block are float64, the update of what is
 * left, nearly all of the work, is a float32 product. */
enum { BLOCK = 64, STRIP = 256 };

typedef struct factor_job {
    float *a;                            /* [n, n] */
    int64_t n, begin, size;              /* the block */
    double lower[BLOCK * BLOCK];         /* its factor */
} factor_job;

static void turn_around(float *a, int64_t count)
{
    for (int64_t i = 0; i < count / 2; i++) {
        const float x = a[i];
        a[i] = a[count - 1 - i];
        a[count - 1 - i] = x;
    }
}

/* The block on the diagonal. */
static int factor_block(factor_job *job, mq_error *err)
{
    double *l = job->lower;
    for (int64_t i = 0; i < job->size; i++) {
        float *row = job->a + (job->begin + i) * job->n + job->begin;
        for (int64_t j = 0; j <= i; j++) {
            double sum = (double)row[j];
            for (int64_t k = 0; k < j; k++) sum -= l[i * BLOCK + k] * l[j * BLOCK + k];
            if (i == j && !(sum > 0.0 && sum < HUGE_VAL))
                return mq_fail(err, MQ_ERR_VALUE, "the matrix is not positive definite (channel %lld of %lld)",
                               (long long)(job->n - 1 - job->begin - i), (long long)job->n);
            l[i * BLOCK + j] = i == j ? sqrt(sum) : sum / l[j * BLOCK + j];
        }
        for (int64_t j = 0; j <= i; j++) row[j] = (float)l[i * BLOCK + j];
    }
    return MQ_OK;
}

/* Rows below it: x L^T = row. */
static void solve_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const factor_job *job = argument;
    const int64_t below = job->begin + job->size;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float *row = job->a + (below + i) * job->n + job->begin;
        double x[BLOCK];
        for (int64_t j = 0; j < job->size; j++) {
            double sum = (double)row[j];
            for (int64_t k = 0; k < j; k++) sum -= x[k] * job->lower[j * BLOCK + k];
            x[j] = sum / job->lower[j * BLOCK + j];
        }
        for (int64_t j = 0; j < job->size; j++) row[j] = (float)x[j];
    }
}

/* What is left loses the product of these rows with themselves, below the diagonal. */
static void update_rest(const factor_job *job, void *packed)
{
    const int64_t n = job->n, begin = job->begin + job->size;
    for (int64_t column = begin; column < n; column += STRIP) {
        const int64_t columns = MQ_MIN((int64_t)STRIP, n - column);
        const float *rows = job->a + column * n + job->begin;
        mq_packed b = {.data = packed};
        mq_gemm_pack(MQ_GEMM_F32, rows, MQ_F32, columns, job->size, n, &b);
        const mq_gemm_args args = {
            .m = n - column, .a = rows, .a_dtype = MQ_F32, .lda = n, .b = &b, .c = job->a + column * n + column,
            .c_dtype = MQ_F32, .ldc = n, .accumulate = 1, .alpha = -1.0f,
        };
        mq_gemm_run(&args);
    }
}

/* Lower triangle to the unit upper triangle, and its diagonal. */
static void finish_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    const factor_job *job = ((void **)argument)[0];
    const float *root = ((void **)argument)[1];
    (void)worker;
    for (int64_t k = begin; k < end; k++) {
        float *row = job->a + k * job->n;
        memset(row, 0, (size_t)k * sizeof *row);
        for (int64_t j = k; j < job->n; j++) row[j] /= root[j];
    }
}

int mq_factor(float *h, int64_t n, float *diagonal, mq_error *err)
{
    factor_job *job = mq_alloc(sizeof *job);
    void *packed = mq_alloc(mq_gemm_packed_size(MQ_GEMM_F32, STRIP, BLOCK));
    int rc = job == NULL || packed == NULL ? mq_fail_memory(err, "a factorization", sizeof *job) : MQ_OK;
    if (rc != MQ_OK) goto done;
    *job = (factor_job){.a = h, .n = n};
    turn_around(h, n * n);
    for (job->begin = 0; rc == MQ_OK && job->begin < n; job->begin += BLOCK) {
        job->size = MQ_MIN((int64_t)BLOCK, n - job->begin);
        rc = factor_block(job, err);
        if (rc != MQ_OK) break;
        mq_parallel_for(n - job->begin - job->size, 32, solve_rows, job);
        update_rest(job, packed);
    }
    if (rc != MQ_OK) goto done;
    turn_around(h, n * n);
    for (int64_t j = 0; j < n; j++) diagonal[j] = h[j * n + j];
    mq_parallel_for(n, 16, finish_rows, (void *[]){job, diagonal});
    for (int64_t j = 0; j < n; j++) diagonal[j] *= diagonal[j];
done:
    mq_free(packed);
    mq_free(job);
    return rc;
}
