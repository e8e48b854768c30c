/* The range below which a share of the values lies: the lower edge of the first bin at which the cumulative share
 * reaches it (searchsorted on the left, as the reference's _compute_amax_percentile). */
#include "calib/histogram.h"

int mq_range_percentile(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err)
{
    double total = 0.0, reached = 0.0;
    int64_t bin = 0;
    if (!(args->percentile >= 0.0 && args->percentile <= 100.0))
        return mq_fail(err, MQ_ERR_VALUE, "percentile must be between 0 and 100, got %g", args->percentile);
    for (int64_t i = 0; i < histogram->bins; i++) total += (double)histogram->counts[i];
    for (; bin < histogram->bins; bin++) {
        reached += (double)histogram->counts[bin] / total;
        if (reached >= args->percentile / 100.0) break;
    }
    *amax = (float)((double)bin * histogram->width);
    return MQ_OK;
}
