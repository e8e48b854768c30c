/* One product by cuBLASLt, and the plans that are kept of products seen before. */
#ifndef MODELQ_GEMM_CUH
#define MODELQ_GEMM_CUH

#include <pthread.h>

#include "cublaslt.cuh"

enum { MQ_LT_REFUSED = 1, MQ_LT_ALIGNMENT = 256 };   /* a status beside MQ_OK: cuBLASLt has nothing for it */

typedef struct mq_lt_operand {
    const void *data;
    int type;                /* CUDA_R_... */
    bool transpose;
    int64_t ld, stride;      /* elements from row to row, and from one of the batch to the next */
    int scale_mode;
    const void *scale;       /* NULL: none */
} mq_lt_operand;

/* out (rows, cols) = alpha * op(a) (rows, depth) * op(b) (depth, cols) + beta * out + bias, all of it row-major. */
typedef struct mq_lt_product {
    int64_t rows, cols, depth, batch;
    mq_lt_operand a, b;
    void *out;
    int out_type;
    int64_t out_ld, out_stride;
    int compute, scale_type;
    const void *bias;        /* [cols], or NULL */
    int bias_type;
    const void *alpha, *beta;
    bool on_device;          /* where alpha and beta are */
} mq_lt_product;

/* Of the first two, type is by mq_dtype: float32, bfloat16 or float16. */
int mq_lt_type_of(mq_dtype dtype);

/* MQ_OK; MQ_LT_REFUSED, and err is not touched; or a negative code. Both keep what they learn. */
int mq_lt_can(mq_cuda_gemm *gemm, const mq_lt_product *product, const mq_cuda_workspace *workspace, mq_error *err);
int mq_lt_run(mq_cuda_gemm *gemm, const mq_lt_product *product, const mq_cuda_workspace *workspace, void *stream,
              mq_error *err);

typedef struct mq_lt_plan mq_lt_plan;

struct mq_cuda_gemm {
    lt::library lt;
    lt::cublasLtHandle_t handle;
    int capability;
    bool allow_tf32, fast_fp8;
    size_t workspace_nbytes;
    pthread_mutex_t mutex;     /* of all below; held while a plan's pointers are set and the product is launched */
    mq_lt_plan *plans;         /* [room], count of them used */
    int64_t *buckets;          /* [bucket_count]: the first plan of a chain, -1 = none */
    int64_t room, count, bucket_count, clock;
    mq_cuda_gemm_counts counts;
};

/* mq_cuda_gemm_run, whatever the context allows. */
int mq_gemm_run(mq_cuda_gemm *gemm, const mq_cuda_gemm_job *job, bool allow_tf32, void *stream, mq_error *err);

void mq_lt_describe(const mq_lt_product *product, char *out, size_t size);
int mq_lt_failed(const mq_cuda_gemm *gemm, lt::cublasStatus_t status, const char *call, const mq_lt_product *product,
                 mq_error *err);

/* ---- workspace ---- */

enum { MQ_LT_WORKSPACE = 32 << 20 };    /* what cuBLAS asks for on Hopper (cublasSetWorkspace) */

/* The next nbytes of a workspace, aligned to 256; NULL where it is used up. */
void *mq_workspace_take(mq_cuda_workspace *rest, size_t nbytes);
/* What of a workspace cuBLASLt is to have: a quarter, but no more than it asks for. */
mq_cuda_workspace mq_workspace_split(mq_cuda_workspace *rest);

#endif
