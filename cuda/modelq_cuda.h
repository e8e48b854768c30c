/* The C interface of the CUDA library, which is a shared object of its own: the CPU side opens it when it is first
 * asked for a GPU, and never links it.
 *
 * Pointers in the structs below are device memory unless said otherwise; streams are cudaStream_t as void *. Calls
 * check their arguments, launch kernels on the stream and return: nothing waits, nothing is allocated. They return
 * MQ_OK or a negative code and have then filled err; a CUDA error names the kernel, its launch configuration and its
 * arguments. Results have the bits of the C kernels (csrc/quant); NaN results may differ in payload and sign on a
 * device. */
#ifndef MODELQ_CUDA_H
#define MODELQ_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "core/error.h"
#include "core/tensor.h"
#include "format/format.h"

#include "modelq_cuda_device.h"

#pragma GCC visibility push(default)   /* all else in the library is hidden */

enum { MQ_CUDA_INTERFACE = 10 };   /* changes whenever a struct or a call below does */

int mq_cuda_interface(void);
int mq_cuda_is_emulated(void);    /* 1 in the library that g++ makes of the same sources, for tests */

/* rows x cols of MQ_F32, MQ_BF16 or MQ_F16, ld elements from row to row. */
typedef struct mq_cuda_matrix {
    void *data;
    mq_dtype dtype;
    int64_t rows, cols, ld;
} mq_cuda_matrix;

/* ---- maxima ---- */

/* out [block rows, block columns] float32: the largest magnitude of every block; NaN wins over infinity, infinity over
 * numbers. 0 = the whole extent: 0, 0 per tensor; 1, 0 per row; 0, 1 per column; 1, 16 blocks along rows. */
typedef struct mq_cuda_amax_job {
    mq_cuda_matrix x;
    int64_t block_rows, block_cols;
    float *out;
} mq_cuda_amax_job;

int mq_cuda_amax(const mq_cuda_amax_job *job, void *stream, mq_error *err);

/* ---- one code per element: uint8, uint16 or uint32 by the format's width ---- */

typedef struct mq_cuda_codes_job {
    mq_format format;
    int64_t count;
    float *values;
    void *codes;
} mq_cuda_codes_job;

int mq_cuda_encode(const mq_cuda_codes_job *job, void *stream, mq_error *err); /* codes of values */
int mq_cuda_decode(const mq_cuda_codes_job *job, void *stream, mq_error *err); /* values of codes */

/* ---- matrices by a row of schemes.def ---- */

#define MQ_CUDA_NO_ROW UINT64_MAX

/* The parts lie as mq_block_shapes (csrc/quant/block.h) says. Static scales: amax is given; dynamic: it is NULL. */
typedef struct mq_cuda_block_job {
    mq_scheme scheme;
    int64_t block_cols;        /* 0 = the scheme's */
    float second_divisor;      /* of two-level schemes: the tensor's amax over this is its scale; 0 = the scheme's */
    mq_cuda_matrix x;          /* quantize, fake_quantize */
    mq_cuda_matrix y;          /* fake_quantize, dequantize; may be x */
    const float *amax;         /* one per block; of two-level schemes the tensor's; NULL = found in x. E8M0: NULL */
    const float *block_amax;   /* of two-level schemes: the blocks' maxima as calibration chose them; NULL = from x */
    uint8_t *codes;            /* packed as the scheme says */
    void *scales;              /* float32, or uint8 codes */
    float *scale_2;            /* of two-level schemes; fake_quantize takes no part but x and y */
    uint64_t *bad_row;         /* NULL, or set to MQ_CUDA_NO_ROW beforehand: the first row that holds NaN or infinity */
    void *workspace;           /* aligned to 16 bytes; mq_cuda_block_workspace says how many are needed, also none */
    size_t workspace_nbytes;
} mq_cuda_block_job;

size_t mq_cuda_block_workspace(const mq_cuda_block_job *job);
/* Nothing is written for an empty matrix. */
int mq_cuda_block_quantize(const mq_cuda_block_job *job, void *stream, mq_error *err);
int mq_cuda_block_fake_quantize(const mq_cuda_block_job *job, void *stream, mq_error *err);
int mq_cuda_block_dequantize(const mq_cuda_block_job *job, void *stream, mq_error *err);

/* ---- activations, whose scales are float32 numbers (mq_quantizer_apply) ---- */

typedef struct mq_cuda_scaled_job {
    mq_kind kind;              /* MQ_KIND_FLOAT: FP8 E4M3; MQ_KIND_INT */
    int bits, narrow_range, is_unsigned;  /* of integers */
    mq_cuda_matrix x, y;       /* y may be x */
    int64_t block_rows, block_cols;
    const float *amax;         /* one per block; NULL = a plain cast to FP8, or dynamic */
    int dynamic;               /* block maxima are found in x; needs workspace of a float per block */
    float *workspace;
} mq_cuda_scaled_job;

int mq_cuda_scaled(const mq_cuda_scaled_job *job, void *stream, mq_error *err);

/* ---- straight-through gradient: passes where |x| is at most its block's amax ---- */

typedef struct mq_cuda_gradient_job {
    mq_cuda_matrix x, gradient, out;      /* one dtype and shape; out may be gradient */
    int64_t block_rows, block_cols;
    const float *amax;         /* NULL: everything passes */
    const float *pre_scale;    /* [cols] that multiplied x first; NULL: none */
    const float *bias;         /* [cols] taken off x before rounding; NULL: none */
    int64_t rotate;            /* columns that were rotated together (mq_cuda_prepare_job); 0: none */
} mq_cuda_gradient_job;

int mq_cuda_straight_through(const mq_cuda_gradient_job *job, void *stream, mq_error *err);

/* ---- histogram: counts[floor(|x| * 2^-exponent)] += 1, as csrc/calib/histogram.c counts ---- */

enum { MQ_CUDA_LOWEST_EXPONENT = -120 };

/* What is known of a histogram beside its counts. All zero, and the counts too: nothing was counted. */
typedef struct mq_cuda_histogram {
    int32_t above;             /* exponent of the bins' width, above MQ_CUDA_LOWEST_EXPONENT */
    uint32_t worst;            /* bits of the largest magnitude, NaN and infinity too */
    uint32_t first_amax;       /* ... of the first piece of the data that was not all zeros */
    uint32_t latest;           /* ... of what was counted last */
    int64_t first_piece;
    unsigned long long zeros;  /* exact ones, which counts[0] holds too */
} mq_cuda_histogram;

/* Bins become wider as larger values come. What holds NaN or an infinity is not counted; worst tells of it. */
typedef struct mq_cuda_histogram_job {
    mq_cuda_matrix x;
    int64_t piece;             /* of which piece of the data the rows are; one piece's come one after the other */
    int bits;                  /* 2^bits bins */
    mq_cuda_histogram *numbers;
    unsigned long long *counts;/* [2^bits], added to */
} mq_cuda_histogram_job;

int mq_cuda_histogram_add(const mq_cuda_histogram_job *job, void *stream, mq_error *err);

#include "modelq_cuda_gemm.h"
#include "modelq_cuda_ops.h"

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
