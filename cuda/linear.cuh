/* A linear of a quantized checkpoint while it is computed. */
#ifndef MODELQ_LINEAR_CUH
#define MODELQ_LINEAR_CUH

#include "gemm.cuh"
#include "schemes.cuh"

/* ---- linear_paths.cu: which way ---- */

/* A row of the table of what devices and cuBLASLt can, and what it takes. */
typedef struct mq_linear_way {
    mq_cuda_path path;
    int least, most;           /* compute capability */
    int64_t version;           /* of cuBLASLt, which has had it since */
    int64_t cols, rows;        /* of the weight: multiples of */
    uintptr_t alignment;       /* of its codes */
    int type;                  /* of elements; and cuBLASLt's modes of scales: */
    int weight_mode, input_mode;
    bool sums;                 /* cuBLASLt gives sums, which our own kernel scales */
    int64_t padding;           /* rows of inputs: multiples of */
} mq_linear_way;

/* The first way from `from` on (NULL: the best) that this linear can go; there is always one. */
const mq_linear_way *mq_linear_way_of(const mq_cuda_gemm *gemm, const mq_cuda_linear *linear,
                                      const mq_linear_way *from);

/* ---- linear_scales.cu: the weight's scales as that way reads them ---- */

/* 0: as they are. */
size_t mq_linear_scales_nbytes(const mq_linear_way *way, const mq_cuda_linear *linear);
int mq_linear_scales_make(const mq_linear_way *way, const mq_cuda_linear *linear, void *out, void *stream,
                          mq_error *err);

/* ---- a call ---- */

typedef struct mq_linear_call {
    mq_cuda_gemm *gemm;
    const mq_cuda_linear_job *job;
    const mq_linear_way *way;
    void *stream;
    mq_error *err;
    mq_cuda_workspace own, rest;   /* cuBLASLt's, and what is left */
    float *numbers;                /* [MQ_LINEAR_NUMBERS] of device memory */
    const float *amax;             /* [1] of all inputs: given, or found */
    const void *scales;            /* the weight's, as the way reads them */
} mq_linear_call;

/* Places in `numbers`. Two of them go to cuBLASLt as alpha and beta. */
enum { MQ_LINEAR_AMAX, MQ_LINEAR_SCALE_2, MQ_LINEAR_ALPHA, MQ_LINEAR_BETA, MQ_LINEAR_NUMBERS = 16 };

int64_t mq_linear_dtype_size(mq_dtype dtype);
mq_cuda_matrix mq_linear_rows_of(const mq_cuda_matrix *x, int64_t first, int64_t rows);
/* A job that quantizes inputs by their scheme; codes, scales and workspace are left to be filled in. */
mq_cuda_block_job mq_linear_input_job(const mq_linear_call *call, const mq_cuda_matrix *x);
int mq_linear_too_small(const mq_linear_call *call, int64_t rows);

/* By products of narrow types: linear_narrow.cu. MQ_LT_REFUSED: cuBLASLt has nothing for it, and nothing was done. */
int mq_linear_narrow(mq_linear_call *call);
/* linear_dequantize.cu */
int mq_linear_dequantize(mq_linear_call *call);

#endif
