/* What the emulated cuBLASLt's objects hold, supports and computes. */
#ifndef MODELQ_CUBLASLT_REFERENCE_H
#define MODELQ_CUBLASLT_REFERENCE_H

#include "../cublaslt.cuh"

namespace lt {

struct mq_lt_matmul_desc {
    int32_t compute, scale_type, pointer_mode, op_a, op_b;
    uint32_t epilogue;
    const void *bias;
    int32_t bias_type;
    const void *a_scale, *b_scale;
    int32_t a_mode, b_mode;
    int8_t fast;
    cublasLtMatmulDesc_t real;      /* the same in the real library, if that is asked too */
};

struct mq_lt_matrix_layout {        /* column-major */
    int type;
    int64_t rows, cols, ld;
    int32_t batch;
    int64_t stride;
    cublasLtMatrixLayout_t real;
};

struct mq_lt_preference {
    uint64_t workspace_nbytes;
    uint32_t a, b, c, d;            /* alignments in bytes */
    cublasLtMatmulPreference_t real;
};

}  // namespace lt

typedef struct mq_lt_problem {
    const lt::mq_lt_matmul_desc *desc;
    const lt::mq_lt_matrix_layout *a, *b, *c, *d;
} mq_lt_problem;

typedef struct mq_lt_places {
    const void *alpha, *beta, *a, *b, *c;
    void *d, *workspace;
    size_t workspace_nbytes;
} mq_lt_places;

lt::cublasStatus_t mq_lt_supports(const mq_lt_problem *problem, const lt::mq_lt_preference *preference);
lt::cublasLtMatmulAlgo_t mq_lt_algo_for(const mq_lt_problem *problem, const lt::mq_lt_preference *preference,
                                        size_t workspace_nbytes);
lt::cublasStatus_t mq_lt_check(const mq_lt_problem *problem, const mq_lt_places *places,
                               const lt::cublasLtMatmulAlgo_t *algo);
lt::cublasStatus_t mq_lt_multiply(const mq_lt_problem *problem, const mq_lt_places *places);   /* of what was checked */

#endif
