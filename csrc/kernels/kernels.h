/* Loops over rows, one table of function pointers per ISA, picked once.
 *
 * Kernels do not allocate, do not fail and do not use the pool. Pointers need no alignment beyond the element's; n may
 * be 0; y may be x, other buffers do not overlap. Every table gives the same bits. mq_dtype indices are MQ_F32,
 * MQ_BF16, MQ_F16. */
#ifndef MQ_KERNELS_H
#define MQ_KERNELS_H

#include "core/cpu.h"
#include "core/tensor.h"
#include "format/format.h"

enum { MQ_FLOAT_DTYPES = 3 };

/* Tables that a kernel makes once for all rows of a matrix; what is inside is the kernel's own business. */
typedef struct mq_tables {
    _Alignas(32) unsigned char bytes[6144];
} mq_tables;

/* One row to quantize, fake-quantize or dequantize.
 * block divides the row into scale groups; the last may be short. If codes are packed along the row, block must be a
 * multiple of 8 or at least n. */
typedef struct mq_row {
    const mq_scheme_row *scheme;
    mq_dtype dtype;       /* of x and y */
    int64_t n, block;     /* elements; elements per block, at least 1 */
    const void *x;        /* quantize, fake_quantize: [n] */
    void *y;              /* dequantize, fake_quantize: [n] */
    const float *amax;    /* [blocks], or NULL: of the blocks of x */
    float second;         /* the tensor's scale, of two-level schemes */
    const mq_tables *tables; /* NULL, or of prepare[scheme] for rows like this: same dtype, block, amax, second */
    uint8_t *codes;       /* packed if the scheme packs along rows, else a byte each */
    void *scales;         /* [blocks] float, or uint8 codes; quantize writes them unless NULL, dequantize reads them */
} mq_row;

/* y = round(clamp(x * multiplier)) back to real: what fake quantization of activations does (reference's formulas). */
typedef struct mq_scaled {
    mq_dtype dtype;
    int64_t n;
    const void *x;
    void *y;
    float multiplier;
    float back;           /* FP8: multiplies the decoded value. Integers: divides it */
    float low, high;      /* integers only */
    const mq_tables *tables; /* NULL, or made by prepare_scaled_fp8 for the same dtype, multiplier and back */
} mq_scaled;

typedef struct mq_kernels {
    mq_isa isa;
    /* Largest magnitude; 0 if n is 0. NaN wins over infinity, infinity over numbers. */
    float (*amax[MQ_FLOAT_DTYPES])(const void *x, int64_t n);
    void (*amax_blocks[MQ_FLOAT_DTYPES])(const void *x, int64_t n, int64_t block, float *out);
    void (*to_float[MQ_FLOAT_DTYPES])(const void *x, int64_t n, float *y);
    void (*from_float[MQ_FLOAT_DTYPES])(const float *x, int64_t n, void *y); /* nearest-even */
    /* One code per element: uint8, uint16 or uint32 by the format's width. */
    void (*encode[MQ_FMT_COUNT])(const float *x, int64_t n, void *codes);
    void (*decode[MQ_FMT_COUNT])(const void *codes, int64_t n, float *y);
    /* These two return whether x holds NaN or infinity: then codes and scales are of no use, and y has NaN wherever the
     * format, or the block's scale, can say so. */
    int (*quantize[MQ_SCHEME_COUNT])(const mq_row *row);
    int (*fake_quantize[MQ_SCHEME_COUNT])(const mq_row *row); /* y = dequantize(quantize(x)) */
    void (*dequantize[MQ_SCHEME_COUNT])(const mq_row *row);    /* element * (scale * second), rounded to dtype */
    void (*prepare[MQ_SCHEME_COUNT])(const mq_row *row, mq_tables *tables); /* NULL where nothing is to be gained */
    void (*prepare_scaled_fp8)(const mq_scaled *args, mq_tables *tables);   /* may be NULL */
    void (*scaled_fp8)(const mq_scaled *args);
    void (*scaled_int)(const mq_scaled *args);
} mq_kernels;

const mq_kernels *mq_kernels_get(void);          /* the table of mq_cpu_isa() */
const mq_kernels *mq_kernels_of(mq_isa isa);     /* NULL if this build has none; ask mq_isa_supported before calling */

#endif
