/* cuBLASLt opened at run time: its constants, its calls as a table of pointers, and where the library is looked for. */
#ifndef MODELQ_CUBLASLT_CUH
#define MODELQ_CUBLASLT_CUH

#include "common.cuh"

/* A namespace, as nvcc brings some of these names. */
namespace lt {

typedef int cublasStatus_t;
typedef int cublasComputeType_t, cudaDataType_t, cublasLtMatmulDescAttributes_t, cublasLtMatrixLayoutAttribute_t,
    cublasLtMatmulPreferenceAttributes_t;
typedef struct cublasLtContext *cublasLtHandle_t;
typedef struct mq_lt_matmul_desc *cublasLtMatmulDesc_t;
typedef struct mq_lt_matrix_layout *cublasLtMatrixLayout_t;
typedef struct mq_lt_preference *cublasLtMatmulPreference_t;
typedef struct cublasLtMatmulAlgo_t {
    uint64_t data[8];
} cublasLtMatmulAlgo_t;
typedef struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

enum {
#define MQ_LT_CONSTANT(name, value) name = value,
#include "cublaslt.def"
};

typedef struct library {
#define MQ_LT_CALL(result, name, parameters) result (*name) parameters;
#include "cublaslt.def"
    void *opened;
    int64_t version;      /* 130100 is 13.1 */
} library;

/* name: a path or a name; NULL: what it is called since CUDA 13, and before. */
int open(library *lib, const char *name, mq_error *err);
void close(library *lib);

}  // namespace lt

#endif
