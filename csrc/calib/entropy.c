/* The range that loses the least information: for each candidate number of bins the Kullback-Leibler divergence of the
 * clipped histogram (what is cut off goes to its last bin) from the one that integers of `bits` bits can tell apart;
 * the last minimum wins (S. Migacz, 8-bit inference with TensorRT, 2017; the reference's _compute_amax_entropy).
 *
 * The second distribution is constant over the bins of one level, so that with running sums over the bins a candidate
 * costs as many steps as there are levels. */
#include "calib/histogram.h"

#include <math.h>

#include "core/alloc.h"

static const double TIE = 1e-12;   /* divergences (in nats) that rounding alone tells apart */

/* Of the bins before each: counts, counts times their logarithms, bins that are not empty. The first bin counts as much
 * as the second, as it is full of what is as good as zero. */
typedef struct sums {
    double *count, *weighted, *filled;
} sums;

static double bin_count(const mq_histogram *histogram, int64_t bin)
{
    return (double)histogram->counts[bin == 0 && histogram->bins > 1 ? 1 : bin];
}

static double times_log(double x)
{
    return x > 0.0 ? x * log(x) : 0.0;
}

static void add_up(const mq_histogram *histogram, sums *sums)
{
    sums->count[0] = sums->weighted[0] = sums->filled[0] = 0.0;
    for (int64_t i = 0; i < histogram->bins; i++) {
        const double count = bin_count(histogram, i);
        sums->count[i + 1] = sums->count[i] + count;
        sums->weighted[i + 1] = sums->weighted[i] + times_log(count);
        sums->filled[i + 1] = sums->filled[i] + (count > 0.0);
    }
}

/* Level g holds the bins from ceil(g * step). */
static double divergence(const mq_histogram *histogram, const sums *sums, int64_t bins, int64_t levels)
{
    const double total = sums->count[histogram->bins], kept = sums->count[bins], cut = total - kept;
    const double last = bin_count(histogram, bins - 1), step = (double)bins / (double)levels;
    double sum = 0.0, mean = 0.0;
    if (kept == 0.0 || (last == 0.0 && cut > 0.0)) return INFINITY;
    for (int64_t level = 0, begin = 0, end; level < levels; level++, begin = end) {
        end = level + 1 == levels ? bins : MQ_MIN((int64_t)ceil((double)(level + 1) * step), bins);
        const double count = sums->count[end] - sums->count[begin], filled = sums->filled[end] - sums->filled[begin];
        if (count == 0.0) continue;
        mean = count / filled;
        sum += sums->weighted[end] - sums->weighted[begin] - count * log(mean);
    }
    if (cut > 0.0) sum += times_log(last + cut) - times_log(last) - cut * log(mean);
    return sum / total - log(total) + log(kept);
}

static void search(const mq_histogram *histogram, const sums *sums, const mq_range_args *args, float *amax)
{
    const int64_t levels = (int64_t)1 << (args->bits - 1 + args->is_unsigned);
    double best = INFINITY;
    for (int64_t bins = args->start_bin; bins <= histogram->bins; bins += args->stride) {
        const double found = divergence(histogram, sums, bins, levels);
        if (found > best + TIE) continue;
        best = MQ_MIN(best, found);
        *amax = (float)((double)bins * histogram->width);
    }
}

int mq_range_entropy(const mq_histogram *histogram, const mq_range_args *args, float *amax, mq_error *err)
{
    sums sums;
    if (args->bits < 1 || args->bits > 16)
        return mq_fail(err, MQ_ERR_VALUE, "entropy: num_bits must be an integer of 1 to 16");
    if (args->start_bin > histogram->bins)
        return mq_fail(err, MQ_ERR_VALUE, "entropy: start_bin %lld is beyond the %lld bins",
                       (long long)args->start_bin, (long long)histogram->bins);
    const size_t length = (size_t)histogram->bins + 1;
    sums.count = mq_alloc_array(length, 3 * sizeof *sums.count);
    if (sums.count == NULL) return mq_fail_memory(err, "a histogram's sums", length * 3 * sizeof *sums.count);
    sums.weighted = sums.count + length;
    sums.filled = sums.weighted + length;
    add_up(histogram, &sums);
    search(histogram, &sums, args, amax);
    mq_free(sums.count);
    return MQ_OK;
}
