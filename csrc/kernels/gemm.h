/* C[M, N] = A[M, K] * B[N, K]^T (+ bias) (+ C): the one matrix product of the runtime.
 *
 * B (weights, or keys and values) is packed first into the layout of the micro-kernel in use; A and C are row-major.
 * MQ_GEMM_F32 computes in float32. MQ_GEMM_BF16 takes bfloat16 inputs (float32 ones are rounded to bfloat16) and sums
 * in float32, by AMX, AVX512-BF16 or, where neither is there, by float32 on rounded inputs.
 * Bits do not depend on the number of threads, nor on how M is cut; they may differ between ISAs. (Of a coded B, up
 * to MQ_FEW_ROWS rows are summed in another order than more: a single one costs no more than reading the codes.) */
#ifndef MQ_GEMM_H
#define MQ_GEMM_H

#include "core/tensor.h"
#include "format/format.h"

typedef enum mq_gemm_kind { MQ_GEMM_F32, MQ_GEMM_BF16 } mq_gemm_kind;

struct mq_gemm_kernel;

enum { MQ_FEW_ROWS = 8 };

typedef enum mq_code_kind {
    MQ_NOT_CODED,
    MQ_CODED_BY_TABLE,      /* 4 bits; a table has the 16 numbers of every one-byte scale */
    MQ_CODED_BY_VALUES,     /* 4 bits; scales are float32 */
    MQ_CODED_FLOATS, MQ_CODED_INTS      /* a byte each, the sign in its highest bit */
} mq_code_kind;

/* How codes become numbers: element * (scale * second) in float32, rounded to dtype, as _core.dequantize does. */
typedef struct mq_coding {
    mq_code_kind kind;
    float values[16];           /* what codes of 4 bits stand for */
    int mantissa_bits;          /* of MQ_CODED_FLOATS */
    int half, bfloat;           /* rounded to float16 first; rounded to bfloat16 then */
    int byte_scales;            /* 1: a byte, which a table makes float32 of (of MQ_CODED_BY_TABLE: of 16 numbers) */
    int block_shift;            /* 2^this sixteens of columns share a scale */
    int64_t row_codes, row_scales;      /* bytes of a row's codes; how many scales it has */
    size_t codes, scales, table;        /* where these begin in the packed memory */
    size_t nbytes;
} mq_coding;

/* An operand B of N rows and K columns, packed in memory of mq_gemm_packed_size bytes (64-byte aligned). The caller
 * sets data, packing fills in the rest. */
typedef struct mq_packed {
    mq_gemm_kind kind;
    int64_t n, k;
    void *data;
    const struct mq_gemm_kernel *kernel;            /* the micro-kernel whose layout data has */
    mq_coding coding;                               /* kind MQ_NOT_CODED: data are numbers */
} mq_packed;

typedef struct mq_gemm_args {
    int64_t m;
    const void *a; mq_dtype a_dtype; int64_t lda;   /* MQ_F32 or MQ_BF16; lda in elements */
    const mq_packed *b;
    const float *bias;                              /* [N] or NULL */
    void *c; mq_dtype c_dtype; int64_t ldc;         /* MQ_F32 or MQ_BF16 */
    int accumulate;                                 /* C += instead of C = */
    float alpha;                                    /* scales A*B^T before bias; 1 for plain products */
    int upper;                                      /* of a symmetric result: tiles below the diagonal are left out */
    int64_t diagonal;                               /* for upper: C[i, j] is on the diagonal where i == j + diagonal */
} mq_gemm_args;

size_t mq_gemm_packed_size(mq_gemm_kind kind, int64_t n, int64_t k);
size_t mq_packed_nbytes(const mq_packed *packed);       /* of one that is packed */

/* Packs w [N, K] (row-major, MQ_F32 or MQ_BF16, ldw elements between rows) into out->data. Runs on the pool. */
void mq_gemm_pack(mq_gemm_kind kind, const void *w, mq_dtype dtype, int64_t n, int64_t k, int64_t ldw, mq_packed *out);

/* The same from the transpose: w is [K, N], row-major. */
void mq_gemm_pack_transposed(mq_gemm_kind kind, const void *w, mq_dtype dtype, int64_t n, int64_t k, int64_t ldw,
                             mq_packed *out);

/* A quantized [N, K] matrix by its parts, row-major as an export holds them; scale has one element for each block. */
typedef struct mq_coded_matrix {
    const mq_scheme_row *scheme;
    int64_t n, k;
    int64_t block_rows, block_cols;     /* at least 1 */
    const uint8_t *codes;
    const void *scale;
    float second;                       /* 1 where there is no second level */
    mq_dtype dtype;                     /* MQ_F32, MQ_BF16 or MQ_F16: what its numbers are rounded to */
} mq_coded_matrix;

/* Whether B may stay codes, whose numbers products make on the way: exactly those of the dequantized matrix. 0 for
 * blocks whose length is not 16 times a power of two. */
int mq_gemm_can_code(const mq_coded_matrix *matrix);
size_t mq_gemm_coded_size(mq_gemm_kind kind, const mq_coded_matrix *matrix);
/* Returns whether all numbers are finite, and could be made; others are not to be multiplied with. Runs on the pool. */
int mq_gemm_pack_codes(mq_gemm_kind kind, const mq_coded_matrix *matrix, mq_packed *out);

/* Runs on the pool (inline inside a job). No allocation: scratch (about 230 KB) lives on the stack. */
void mq_gemm_run(const mq_gemm_args *args);

/* The dispatch table: "c", "avx2", "avx512", "avx512_bf16" or "amx" for a kind, the best one at first. Forcing one
 * is for tests and benchmarks, between products: NULL goes back to the best. MQ_ERR_VALUE if it cannot run here or
 * not serve kind. */
const char *mq_gemm_kernel_name(mq_gemm_kind kind);
int mq_gemm_force_kernel(mq_gemm_kind kind, const char *name);

#endif
