/* What gemm.cu needs of plans. All calls want the context's mutex held. */
#ifndef MODELQ_GEMM_PLANS_CUH
#define MODELQ_GEMM_PLANS_CUH

#include "gemm.cuh"

typedef struct mq_lt_key {
    int64_t numbers[24];
} mq_lt_key;

typedef struct mq_lt_alignments {
    int64_t a, b, out;         /* bytes */
} mq_lt_alignments;

struct mq_lt_plan {
    mq_lt_key key;
    int64_t next, used;        /* in the chain; when last */
    bool refused;              /* then there is no algorithm */
    lt::cublasLtMatmulDesc_t desc;
    lt::cublasLtMatrixLayout_t a, b, out;   /* in cuBLASLt's words: a is the product's b */
    lt::cublasLtMatmulAlgo_t algo;
    size_t workspace_nbytes;
};

mq_lt_alignments mq_lt_alignments_of(const mq_lt_product *product);
/* The plan for it, made if there is none. */
int mq_lt_plan_of(mq_cuda_gemm *gemm, const mq_lt_product *product, size_t workspace_nbytes, mq_lt_plan **out,
                  mq_error *err);
/* The product's own bias and scales into the plan. */
int mq_lt_point(const mq_cuda_gemm *gemm, const mq_lt_plan *plan, const mq_lt_product *product, mq_error *err);

int mq_lt_plans_new(mq_cuda_gemm *gemm, int64_t room, mq_error *err);
void mq_lt_plans_free(mq_cuda_gemm *gemm);

#endif
