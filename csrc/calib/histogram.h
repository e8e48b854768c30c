/* Histograms of |x|, and the ranges that are found from them.
 *
 * As the reference has it (calib/histogram.py): bins of equal width over [0, largest |x| of the first data], and more
 * bins of that width as larger values come. Kept are counts in finer bins whose width is a power of two that depends on
 * the largest value of all only: they merge exactly, in any order, and the bins asked for are made of them at the end.
 * For bfloat16 data nothing is lost by that, but in the lowest few bins of 2048; for float32 data a value within 1/32
 * of a bin's width of an edge may be counted beside it. */
#ifndef MQ_HISTOGRAM_H
#define MQ_HISTOGRAM_H

#include "calib/calib.h"

enum { MQ_HISTOGRAM_BINS = 2048, MQ_HISTOGRAM_MAX_BINS = 65536, MQ_HISTOGRAM_GROWTH = 16,
       MQ_HISTOGRAM_LOWEST = -120 };

/* Bin i holds counts[i] values in [i * width, (i + 1) * width); the last also its upper edge. */
typedef struct mq_histogram {
    int64_t bins;
    double width;
    int64_t *counts;     /* mq_free */
} mq_histogram;

typedef enum mq_range_method { MQ_RANGE_ENTROPY, MQ_RANGE_MSE, MQ_RANGE_PERCENTILE } mq_range_method;

typedef struct mq_range_args {
    mq_range_method method;
    int bits;            /* of integers; 0 = FP8 E4M3 */
    int is_unsigned;
    int64_t stride, start_bin;  /* entropy and mse: candidates */
    double percentile;          /* 0 to 100 */
} mq_range_args;

/* The histogram of a calibrator of that kind, without exact zeros if skip_zeros. Where later data reach beyond
 * MQ_HISTOGRAM_GROWTH times the first, bins are made wider by a whole number, so that there are no more than that. */
int mq_histogram_of(mq_calib *calib, int skip_zeros, mq_histogram *out, mq_error *err);

/* The largest magnitude that should still be represented; MQ_ERR_VALUE for arguments that make no sense. */
int mq_histogram_range(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err);

int mq_range_entropy(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err);
int mq_range_mse(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err);
int mq_range_percentile(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err);

/* What was counted elsewhere (a device), in bins of this kind's own: 2^mq_histogram_bits(calib) of them, of width
 * 2^exponent, where exponent is the least one, but no less than MQ_HISTOGRAM_LOWEST, with all magnitudes in them. */
typedef struct mq_histogram_part {
    int64_t exponent, rows;
    const int64_t *counts;
    int64_t zeros;              /* exact ones, counted in counts[0] too */
    uint32_t worst;             /* bits of the largest magnitude, NaN and infinity too */
    uint32_t first_amax;        /* ... of the first piece of the rows that was not all zeros; 0 = there was none */
    int64_t first_chunk;        /* where that is, as mq_calib_rows.chunk */
    mq_dtype dtype;
} mq_histogram_part;

int mq_histogram_bits(const mq_calib *calib);
int mq_histogram_add(mq_calib *calib, const mq_histogram_part *part, mq_error *err);

#endif
