/* Products of matrices through cuBLASLt, and whole linears of a quantized checkpoint. Included by modelq_cuda.h.
 *
 * A mq_cuda_gemm belongs to one device, which must be the current one whenever it is used. Threads may share it: the
 * calls take turns while they hand work to their streams. Nothing waits and no device memory is allocated. Workspace is
 * the caller's: one piece of mq_cuda_gemm_workspace bytes for each stream is enough for every call below, however large
 * the matrices are, and is free again for the next call on that stream. All matrices are row-major. */
#ifndef MODELQ_CUDA_GEMM_H
#define MODELQ_CUDA_GEMM_H

typedef struct mq_cuda_gemm mq_cuda_gemm;

typedef struct mq_cuda_gemm_options {
    const char *library;       /* cuBLASLt's path or name; NULL: libcublasLt.so.13, then .12, where the loader looks */
    int capability;            /* 10 * major + minor of the device; 0: of the current device */
    int allow_tf32;            /* float32 products may round their operands to TF32 */
    int fast_fp8;              /* FP8 products may accumulate in less than float32 (CUBLASLT_MATMUL_DESC_FAST_ACCUM) */
    int64_t plans;             /* most plans to be kept; 0 = 1024 */
    size_t workspace_nbytes;   /* for a stream; 0 = 128 MiB, of which cuBLASLt itself may use 32 */
} mq_cuda_gemm_options;

/* options may be NULL. MQ_ERR_STATE says which library is missing, or what cuBLASLt said. */
int mq_cuda_gemm_open(const mq_cuda_gemm_options *options, mq_cuda_gemm **out, mq_error *err);
void mq_cuda_gemm_close(mq_cuda_gemm *gemm);    /* NULL: nothing */
size_t mq_cuda_gemm_workspace(const mq_cuda_gemm *gemm);

typedef struct mq_cuda_gemm_counts {
    int64_t version;           /* of cuBLASLt, 130100 is 13.1 */
    int64_t plans, hits, misses, evictions;
    int64_t refusals;          /* misses for which cuBLASLt had nothing; they are remembered, too */
} mq_cuda_gemm_counts;

void mq_cuda_gemm_count(mq_cuda_gemm *gemm, mq_cuda_gemm_counts *out);

typedef struct mq_cuda_workspace {
    void *data;                /* aligned to 256 bytes */
    size_t nbytes;
} mq_cuda_workspace;

/* ---- plain products ---- */

/* out (M, N) = alpha * op(a) (M, K) * op(b) (K, N) + beta * out + bias, accumulated in float32.
 *
 *     forward          a = in (N, I), b = weight (O, I), transpose_b; bias
 *     d_in             a = d_out (N, O), b = weight (O, I)
 *     d_weight +=      a = d_out (N, O), transpose_a, b = in (N, I), beta = 1
 *
 * a and b: both MQ_F32, both MQ_BF16 or both MQ_F16; out: the same or MQ_F32. Any shape and alignment, K = 0 too. */
typedef struct mq_cuda_gemm_job {
    mq_cuda_matrix a, b, out;
    int transpose_a, transpose_b;
    float alpha, beta;
    const void *bias;          /* [out.cols] of out's dtype, or NULL */
    int64_t batch;             /* 0 or 1: one product. Else so many, each so many elements behind the one before: */
    int64_t stride_a, stride_b, stride_out;
    mq_cuda_workspace workspace;
} mq_cuda_gemm_job;

int mq_cuda_gemm_run(mq_cuda_gemm *gemm, const mq_cuda_gemm_job *job, void *stream, mq_error *err);

/* ---- linears of quantized checkpoints ---- */

/* What happens to a linear's input. Scales are made by the rules of mq_quantizer_apply (csrc/quant). */
typedef enum mq_cuda_inputs {
    MQ_CUDA_INPUTS_PLAIN,      /* nothing: weight-only */
    MQ_CUDA_INPUTS_SCHEME,     /* by the row `input_scheme` of schemes.def: NVFP4, MXFP8, ... */
    MQ_CUDA_INPUTS_TENSOR,     /* one scale, static or dynamic */
    MQ_CUDA_INPUTS_TOKEN,      /* a scale per row, dynamic */
    MQ_CUDA_INPUTS_GROUP       /* a scale per 128 columns of a row, dynamic: FP8 only */
} mq_cuda_inputs;

/* weight (O, I) as _core.quantize packs it, on the device; and what is done to inputs. */
typedef struct mq_cuda_linear {
    mq_scheme scheme;
    int64_t block_cols;        /* 0 = the scheme's */
    int64_t rows, cols;        /* O, I */
    const uint8_t *codes;
    const void *scales;
    const float *scale_2;      /* of two-level schemes */
    const float *fp8_amax;     /* [1]: what is dequantized goes through FP8 once more (W4A8 of INT4); NULL: not */
    mq_cuda_inputs inputs;
    mq_scheme input_scheme;    /* MQ_CUDA_INPUTS_SCHEME */
    mq_kind input_kind;        /* TENSOR, TOKEN: MQ_KIND_FLOAT is FP8 E4M3, MQ_KIND_INT is INT8 */
    const float *input_amax;   /* [1]; TENSOR, or two-level schemes; NULL: found in the input */
    const void *prepared;      /* what mq_cuda_linear_prepare wrote; NULL: made in the workspace at every call */
    mq_dtype dtype;            /* MQ_BF16, MQ_F16: dequantized numbers are rounded to it before they are to the inputs',
                                * float32 or bfloat16; MQ_F32: they are not */
} mq_cuda_linear;

/* How a product is computed. What each device can is the table in cuda/linear_paths.cu. */
typedef enum mq_cuda_path {
    MQ_CUDA_PATH_NVFP4,        /* FP4 * FP4, a scale per 16 */
    MQ_CUDA_PATH_MXFP8,        /* FP8 * FP8, a scale per 32 */
    MQ_CUDA_PATH_FP8_BLOCK,    /* FP8 * FP8, weights have a scale per 128 x 128, inputs per 128 */
    MQ_CUDA_PATH_FP8_OUTER,    /* FP8 * FP8, a scale per row of each */
    MQ_CUDA_PATH_FP8_TENSOR,   /* FP8 * FP8, two scales */
    MQ_CUDA_PATH_FP8_SCALED,   /* FP8 * FP8 without scales, which our own kernel applies to the sums */
    MQ_CUDA_PATH_INT8,         /* INT8 * INT8 in INT32, scaled by our own kernel */
    MQ_CUDA_PATH_DEQUANTIZE,   /* weights to the inputs' dtype, tile by tile */
    MQ_CUDA_PATHS
} mq_cuda_path;

/* out (N, O) = in (N, I) * weight^T + bias, or added to out. */
typedef struct mq_cuda_linear_job {
    mq_cuda_linear linear;
    mq_cuda_matrix in, out;    /* MQ_F32, MQ_BF16 or MQ_F16; out: in's dtype or MQ_F32 */
    const void *bias;          /* [O] of out's dtype, or NULL */
    int accumulate;
    mq_cuda_workspace workspace;
} mq_cuda_linear_job;

/* Every row of schemes.def, every device. taken (may be NULL): the path, for reports. */
int mq_cuda_linear_run(mq_cuda_gemm *gemm, const mq_cuda_linear_job *job, mq_cuda_path *taken, void *stream,
                       mq_error *err);

/* The path that it will take, unless cuBLASLt then refuses. */
mq_cuda_path mq_cuda_linear_path(const mq_cuda_gemm *gemm, const mq_cuda_linear *linear);

/* Scales in the order in which cuBLASLt reads them, which depend on the linear only. 0 bytes: none are needed. */
size_t mq_cuda_linear_prepared_nbytes(const mq_cuda_gemm *gemm, const mq_cuda_linear *linear);
/* out: aligned to 16 bytes */
int mq_cuda_linear_prepare(mq_cuda_gemm *gemm, const mq_cuda_linear *linear, void *out, void *stream, mq_error *err);

/* ---- Gram matrices, as csrc/calib/gram.h counts them ---- */

/* sums += X^T X over the tokens of x that the mask keeps, in the order of mq_calib_save's state: the upper triangle row
 * by row, n * (n + 1) / 2 numbers; or, block > 0, blocks on the diagonal [ceil(n / block), block, block], whose lower
 * halves and whatever lies beyond n stay as they are. Products of at most 8192 tokens (2048 of float32) are summed in
 * float32, those in float64: the result is gram.h's within that of one such sum,
 * |error| <= 2^-24 * 8192 * sum |x_i x_j|, and the same bits from the same calls. */
typedef struct mq_cuda_gram_job {
    mq_cuda_matrix x;          /* [tokens, n] MQ_F32, MQ_BF16 or MQ_F16 */
    const uint8_t *mask;       /* [tokens]: those that count; NULL: all */
    int64_t block;             /* 0: all of H */
    double *sums;
    mq_cuda_workspace workspace;
} mq_cuda_gram_job;

int mq_cuda_gram(mq_cuda_gemm *gemm, const mq_cuda_gram_job *job, void *stream, mq_error *err);

#endif
