/* The range with the least squared error of the quantized values: candidates are bin centres, the error is that of the
 * centres, weighted by counts; the first minimum wins. The formula that the reference's _compute_amax_mse means: its
 * call passes num_bits in the place of a bias. */
#include "calib/histogram.h"

#include <math.h>

#include "format/format.h"

static double error_of(const mq_histogram *histogram, const mq_range_args *args, float amax)
{
    const float width = (float)histogram->width, high = (float)((1 << (args->bits - 1 + args->is_unsigned)) - 1);
    const float scale = high / amax;
    double sum = 0.0;
    for (int64_t i = 0; i < histogram->bins; i++) {
        const float centre = ((float)i + 0.5f) * width, scaled = MQ_MIN(centre * scale, high);
        const double off = (double)(rintf(scaled) / scale) - (double)centre;
        sum += off * off * (double)histogram->counts[i];
    }
    return sum;
}

static double error_of_fp8(const mq_histogram *histogram, float amax)
{
    const float width = (float)histogram->width, scale = 448.0f / amax;
    double sum = 0.0;
    for (int64_t i = 0; i < histogram->bins; i++) {
        if (histogram->counts[i] == 0) continue;
        const float centre = ((float)i + 0.5f) * width;
        const uint32_t code = mq_encode_float(centre * scale, MQ_CODEC(FP8_E4M3));
        const double off = (double)(mq_decode_float(code, MQ_CODEC(FP8_E4M3)) / scale) - (double)centre;
        sum += off * off * (double)histogram->counts[i];
    }
    return sum;
}

int mq_range_mse(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err)
{
    double best = INFINITY;
    if (args->bits < 0 || args->bits > 16 || args->bits + args->is_unsigned == 1)
        return mq_fail(err, MQ_ERR_VALUE, "mse: num_bits must be 2 to 16, or (4, 3), got %d", args->bits);
    if (args->start_bin >= histogram->bins)
        return mq_fail(err, MQ_ERR_VALUE, "mse: start_bin %lld is beyond the %lld bins", (long long)args->start_bin,
                       (long long)histogram->bins);
    for (int64_t i = args->start_bin; i < histogram->bins; i += args->stride) {
        const float candidate = (float)(((double)i + 0.5) * histogram->width);
        const double error = args->bits ? error_of(histogram, args, candidate) : error_of_fp8(histogram, candidate);
        if (error >= best) continue;
        best = error;
        *amax = candidate;
    }
    return MQ_OK;
}
