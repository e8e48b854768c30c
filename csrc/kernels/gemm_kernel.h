/* Inside of the matrix product: what a micro-kernel is. Not for use outside csrc/kernels/gemm*.
 *
 * * K is counted in units of 4 bytes: one float32 (MQ_UNIT_F32), or two neighbouring bfloat16 (MQ_UNIT_PAIR). Packed
 * B is [ceil(N / nr)][stored depth][nr] units, stored depth being K in units rounded up to 16; what is beyond N or K
 * is zero. */
#ifndef MQ_GEMM_KERNEL_H
#define MQ_GEMM_KERNEL_H

#include "kernels/gemm.h"

typedef enum mq_gemm_unit { MQ_UNIT_F32, MQ_UNIT_PAIR } mq_gemm_unit;

enum {
    MQ_GEMM_MAX_MR = 32, MQ_GEMM_MAX_NR = 32,
    MQ_GEMM_ROWS = 256,          /* of a task; its block of A stays in L2 */
    MQ_GEMM_COLUMNS = 256,       /* of a task; the wider, the less often A is read */
    MQ_GEMM_STAGE_BYTES = 96 * 1024
};

/* C[rows, nr] = A[rows, depth] * B[depth, nr], or += if add. C is float32, row-major with nr columns. */
typedef struct mq_gemm_tile {
    const char *a;               /* rows of units */
    int64_t lda;                 /* bytes */
    const void *b;
    int64_t depth;               /* units */
    float *c;
    int rows;                    /* 1 to mr, a multiple of row_multiple */
    int add;
} mq_gemm_tile;

/* From elements in memory to units. */
typedef enum mq_gemm_convert {
    MQ_COPY_F32, MQ_COPY_BF16,
    MQ_BF16_TO_F32, MQ_F32_TO_BF16,
    MQ_F32_ROUNDED               /* float32 rounded to bfloat16, kept as float32 */
} mq_gemm_convert;

/* out[rows, columns] = alpha * c (+ bias) (+ out). */
typedef struct mq_gemm_store {
    const float *c;              /* [rows, nr of the kernel] */
    void *out; mq_dtype dtype; int64_t ldo;
    const float *bias;           /* at this tile's first column, or NULL */
    float alpha;
    int accumulate;
    int rows, columns;
} mq_gemm_store;

/* A coded B. Codes are in chunks of 64 columns, so that a vector makes of a chunk what is multiplied next: codes of 4
 * bits are the nibbles of 16 words of 16 bits, nibble j of word i being column 16 j + i; codes of a byte are the bytes
 * of 16 words of 32 bits, byte j of word i being column 16 j + i. Four rows lie chunk by chunk beside each other, as
 * they are multiplied together: memory is read as one stream. Rows are padded with zeros to whole chunks, and with rows
 * to whole panels. Whoever reads 4 bytes may begin 3 before a chunk. */
enum { MQ_CHUNK = 64, MQ_CODED_ROWS = 16, MQ_ROWS_BESIDE = 4 };

/* Rows of codes on their way to be numbers, as a micro-kernel counts K: float32, or bfloat16 in units of pairs. */
typedef struct mq_gemm_codes {
    const mq_coding *coding;
    const uint8_t *codes;        /* of the first row; more than one begin at a multiple of MQ_ROWS_BESIDE */
    const void *scales;
    const void *table;
} mq_gemm_codes;

/* sums[i * ld + r] = the product of row i of x with row r: few rows of x against several of codes. */
typedef struct mq_gemm_dot {
    mq_gemm_codes b;
    int64_t chunks;              /* of a row */
    int rows;                    /* of codes: a multiple of 4 */
    const void *x;               /* [m][chunks * MQ_CHUNK], converted, zero beyond K */
    int m;                       /* 1, 2, 4 or 8 */
    float *sums;
    int ld;
} mq_gemm_dot;

/* The operations around the micro-kernels, one set per ISA. */
typedef struct mq_gemm_helpers {
    /* count elements to units; the rest up to padded (elements) becomes zero. */
    void (*convert)(mq_gemm_convert how, const void *src, int64_t count, void *dst, int64_t padded);
    /* out[j * ldo + i] = in[i * ldi + j] for 16 x 16 units. */
    void (*transpose)(const uint32_t *in, int64_t ldi, uint32_t *out, int64_t ldo);
    /* out[2 j] = even[j], out[2 j + 1] = odd[j]. */
    void (*interleave)(const uint16_t *even, const uint16_t *odd, uint16_t *out, int64_t count);
    void (*store)(const mq_gemm_store *store);
    void (*dot)(const mq_gemm_dot *dot);
    /* Chunks [first, first + count) of a row, as K elements of units. */
    void (*decode)(const mq_gemm_codes *row, int64_t first, int64_t count, void *out);
} mq_gemm_helpers;

typedef struct mq_gemm_kernel {
    const char *name;
    unsigned needs;              /* MQ_CPU_ flags */
    mq_gemm_unit unit;
    int mr, nr;                  /* nr is a multiple of 16 */
    int row_multiple, k_multiple; /* of rows and of units of K in one call; 16 at most */
    int k_block;                 /* units of K in one go, so that a panel of B stays in L1 */
    void (*begin)(void);         /* around the tiles of one task, on the thread that runs them; may be NULL */
    void (*end)(void);
    void (*tile)(const mq_gemm_tile *tile);
    const mq_gemm_helpers *helpers;
} mq_gemm_kernel;

extern const mq_gemm_kernel mq_gemm_kernel_c;
extern const mq_gemm_kernel mq_gemm_kernel_avx2;
extern const mq_gemm_kernel mq_gemm_kernel_avx512;
extern const mq_gemm_kernel mq_gemm_kernel_avx512_bf16;
extern const mq_gemm_kernel mq_gemm_kernel_amx;
extern const mq_gemm_helpers mq_gemm_helpers_avx512_bf16;
void mq_gemm_transpose_avx512(const uint32_t *in, int64_t ldi, uint32_t *out, int64_t ldo);

const mq_gemm_kernel *mq_gemm_kernel_of(mq_gemm_kind kind);

/* Rows of a coded B from row n on. */
mq_gemm_codes mq_gemm_codes_at(const mq_packed *b, int64_t n);

/* Units [first, first + depth) of the panel of a coded B that begins at row n, into stage; returns where they begin.
 * At most MQ_CODED_UNITS may be asked for. */
enum { MQ_CODED_UNITS = 128, MQ_CODED_STAGE = (MQ_CODED_UNITS + 2 * MQ_CHUNK) * MQ_GEMM_MAX_NR };
const char *mq_gemm_unpack_panel(const mq_packed *b, int64_t n, int64_t first, int64_t depth, uint32_t *stage);

/* Whether a product is one of few rows against codes, and that product. */
int mq_gemm_is_few(const mq_gemm_args *args);
void mq_gemm_run_few(const mq_gemm_args *args);

MQ_INLINE int64_t mq_gemm_unit_elements(const mq_gemm_kernel *kernel)
{
    return kernel->unit == MQ_UNIT_PAIR ? 2 : 1;
}

/* K in units, as far as the kernel runs. */
MQ_INLINE int64_t mq_gemm_depth(const mq_gemm_kernel *kernel, int64_t k)
{
    int64_t units = MQ_CEIL_DIV(k, mq_gemm_unit_elements(kernel));
    return MQ_ROUND_UP(units, (int64_t)kernel->k_multiple);
}

/* Units between the panels of packed B. */
MQ_INLINE int64_t mq_gemm_panel_size(const mq_gemm_kernel *kernel, int64_t k)
{
    int64_t units = MQ_CEIL_DIV(k, mq_gemm_unit_elements(kernel));
    return MQ_ROUND_UP(units, (int64_t)16) * kernel->nr;
}

MQ_INLINE mq_gemm_convert mq_gemm_conversion(const mq_gemm_kernel *kernel, mq_gemm_kind kind, mq_dtype dtype)
{
    if (kernel->unit == MQ_UNIT_PAIR) return dtype == MQ_BF16 ? MQ_COPY_BF16 : MQ_F32_TO_BF16;
    if (dtype == MQ_BF16) return MQ_BF16_TO_F32;
    return kind == MQ_GEMM_BF16 ? MQ_F32_ROUNDED : MQ_COPY_F32;
}

#endif
