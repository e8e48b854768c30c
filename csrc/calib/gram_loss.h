/* What a change of a linear's weight does to its outputs, from the Gram matrix H of its inputs: for a row d of the
 * change, ||X d||^2 over all tokens X is d H d^T, however many tokens there were (Frantar and Alistarh 2022).
 *
 * H is symmetric, so half of it will do: d U d^T, where U is its upper triangle, everything off the diagonal doubled.
 * It is packed strip by strip, each as deep as its last column, for the micro-kernels of the GEMM. */
#ifndef MQ_GRAM_LOSS_H
#define MQ_GRAM_LOSS_H

#include "kernels/gemm.h"

enum { MQ_GRAM_LOSS_STRIP = 128 };

typedef struct mq_gram_strip {
    mq_packed packed;
    int64_t block, first, column, columns;   /* rows first .. column + columns of U take part */
} mq_gram_strip;

typedef struct mq_gram_loss {
    mq_gemm_kind kind;
    int64_t n, block, blocks;                /* one block of n, or the blocks on the diagonal */
    mq_gram_strip *strips;
    int64_t strip_count;
    char *memory;
} mq_gram_loss;

/* gram: [n, n], or with a block > 0 [ceil(n / block), block, block] as a calibrator of Gram matrices gives it. In
 * bfloat16, H and the rows are rounded, sums are float32. */
int mq_gram_loss_init(mq_gram_loss *loss, const float *gram, int64_t n, int64_t block, mq_gemm_kind kind,
                      mq_error *err);
void mq_gram_loss_free(mq_gram_loss *loss);   /* zeroed memory is accepted */

/* What elements of rows have: MQ_BF16 or MQ_F32. */
mq_dtype mq_gram_loss_dtype(const mq_gram_loss *loss);

/* Bytes of scratch for so many rows at a time. */
size_t mq_gram_loss_scratch(int64_t rows);

/* out [rows, blocks] = what each row of d [rows, n] loses in each block. Inline inside a job. */
void mq_gram_loss_rows(const mq_gram_loss *loss, const void *d, int64_t rows, void *scratch, double *out);

#endif
