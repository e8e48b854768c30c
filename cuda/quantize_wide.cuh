/* Quantizing where blocks are whole sixteens of columns: the case that has to keep up with the memory.
 *
 * A thread has MQ_WIDE neighbouring elements of one block, and so one scale: 32 bytes of bfloat16. Maxima are found in
 * the words as they lie in memory. Codes are those of IEEE division, by multiplication: with r the rounded reciprocal
 * of the scale, a quotient that was corrected once is within a unit in the last place, and corrected once more it is
 * the rounded one (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990,
 * theorem 8.2). Where only five bits of it matter one correction is enough: tests/test_cuda_division.py tries the
 * numbers beside every such limit. All that holds far from the ends of float32's range; elsewhere, and for NaN and
 * infinity, there is a slow way. */
#ifndef MODELQ_QUANTIZE_WIDE_CUH
#define MODELQ_QUANTIZE_WIDE_CUH

#include <math.h>

#include "quantize.cuh"

enum { MQ_WIDE = 2 * MQ_GROUP };

/* ---- maxima ---- */

/* Of both halves of words. */
MQ_DEVICE uint32_t mq_max_halves(uint32_t a, uint32_t b)
{
#if defined(__CUDA_ARCH__)
    return __vmaxu2(a, b);
#else
    return MQ_MAX(a & 0xffff0000u, b & 0xffff0000u) | MQ_MAX(a & 0xffffu, b & 0xffffu);
#endif
}

/* The largest magnitude of a group as it lies in memory, in float32's bits: numbers of 16 bits are in the order of
 * their bits, too, NaN last. */
template <mq_dtype D>
MQ_DEVICE uint32_t mq_words_max(const mq_group_words<D> &group)
{
    uint32_t largest = 0;
    if constexpr (D == MQ_F32) {
        for (int i = 0; i < MQ_GROUP; i++) largest = MQ_MAX(largest, group.words[i] & 0x7fffffffu);
        return largest;
    } else {
        for (int i = 0; i < MQ_GROUP / 2; i++) {
            uint32_t pair;
            memcpy(&pair, &group.words[2 * i], sizeof pair);
            largest = mq_max_halves(largest, pair & 0x7fff7fffu);
        }
        return mq_bits_of(mq_widen<D>((uint16_t)MQ_MAX(largest >> 16, largest & 0xffffu)));
    }
}

template <mq_dtype D>
MQ_DEVICE void mq_load_words(const void *base, int64_t at, bool aligned, mq_group_words<D> *group)
{
    const typename mq_word<D>::type *from = (const typename mq_word<D>::type *)base + at;
    if (aligned) {
        for (int i = 0; i < group->pieces; i++) group->piece[i] = ((const uint4 *)from)[i];
    } else {
        for (int i = 0; i < MQ_GROUP; i++) group->words[i] = from[i];
    }
}

/* ---- codes ---- */

/* To E2M1 in the lowest three bits, nearest, ties to even: adding a power of two whose last place is the step between
 * neighbours rounds to whole steps, and the number that the codes of that range begin with is added with it. magnitude:
 * a number. */
MQ_DEVICE uint32_t mq_round_e2m1(float magnitude)
{
    const float m = MQ_MIN(magnitude, 6.0f);
    const float magic = m < 2.0f ? 0x1.8p22f : m < 4.0f ? 0x1.8p23f + 2.0f : 0x1.8p24f + 8.0f;
    return mq_bits_of(m + magic);
}

/* The scheme's code of a quotient that is a number. */
template <typename Rule, mq_dtype D>
MQ_DEVICE uint32_t mq_code_of_quotient(float quotient)
{
    if constexpr (Rule::quotient == MQ_QUOTIENT_DTYPE) quotient = mq_round_to<D>(quotient);
#if !defined(MQ_HAS_FP4_INSTRUCTIONS)
    if constexpr (Rule::element == MQ_FMT_FP4_E2M1 && Rule::codes != MQ_CODES_TIES_DOWN) {
        if constexpr (Rule::codes == MQ_CODES_NO_NEGATIVE_ZERO) quotient += 0.0f;
        return (mq_round_e2m1(fabsf(quotient)) & 7u) | (mq_bits_of(quotient) >> 28 & ~7u);
    }
#endif
#if defined(MQ_HAS_FP8_INSTRUCTIONS)
    if constexpr (Rule::element == MQ_FMT_FP8_E4M3 && Rule::codes == MQ_CODES_PLAIN) return mq_cvt_e4m3(quotient);
    if constexpr (Rule::element == MQ_FMT_FP8_E5M2 && Rule::codes == MQ_CODES_PLAIN) return mq_cvt_e5m2(quotient);
#endif
    return mq_encode_element<Rule>(quotient);
}

/* By division, and whatever x and scale are. */
template <typename Rule, mq_dtype D>
MQ_SLOW uint32_t mq_code_by_division(float x, float scale)
{
    float quotient = x / scale;
    if constexpr (Rule::quotient == MQ_QUOTIENT_DTYPE) quotient = mq_round_to<D>(quotient);
    return mq_encode_element<Rule>(quotient);
}

/* Whether no number on the way to a quotient leaves float32's normal range; below it all codes are those of zero. */
MQ_DEVICE bool mq_divides_by_products(float scale, uint32_t largest)
{
    return scale >= 0x1p-60f && scale <= 0x1p60f && largest < 0x5d800000u;      /* 2^60 */
}

/* x / scale, rounded, as far as codes depend on it; r = 1 / scale, rounded. Powers of two have exact reciprocals. */
template <typename Rule>
MQ_DEVICE float mq_quotient_by_products(float x, float scale, float r)
{
    const float first = x * r;
    if constexpr (Rule::scale == MQ_FMT_E8M0) return first;
    const float second = fmaf(fmaf(-first, scale, x), r, first);
    constexpr mq_codec codec = mq_codec_of<Rule::element>();
    if constexpr (codec.kind == MQ_KIND_FLOAT && codec.mantissa_bits <= 3 && Rule::quotient == MQ_QUOTIENT_F32)
        return second;
    return fmaf(fmaf(-second, scale, x), r, second);
}

template <typename Rule, mq_dtype D>
MQ_DEVICE void mq_wide_codes(const float *x, float scale, uint32_t largest, uint32_t *codes)
{
    const float r = 1.0f / scale;
    if (mq_divides_by_products(scale, largest)) {
        for (int i = 0; i < MQ_GROUP; i++)
            codes[i] = mq_code_of_quotient<Rule, D>(mq_quotient_by_products<Rule>(x[i], scale, r));
    } else {
        MQ_UNROLL
        for (int i = 0; i < MQ_GROUP; i++) codes[i] = mq_code_by_division<Rule, D>(x[i], scale);
    }
}

/* ---- a thread's part ---- */

typedef struct mq_wide_place {
    int64_t row, col;
    int64_t block;             /* of amax and scales */
    bool leads;                /* has the block's first element */
    bool works;                /* threads behind the end do not, but take part in finding maxima */
} mq_wide_place;

/* rows: of groups, of which two rows of the matrix may share one; down: which of them. */
MQ_DEVICE mq_wide_place mq_wide_place_of(const mq_quantize_args &a, int64_t rows, int64_t step, int64_t down)
{
    const int64_t index = mq_thread_index();
    mq_wide_place at = {0, 0, 0, false, index < rows * a.groups};
    if (!at.works) return at;
    if (a.small) {
        const uint32_t row = mq_divide((uint32_t)index, a.by_groups);
        const uint32_t group = (uint32_t)index - row * (uint32_t)a.groups;
        const uint32_t across = mq_divide(group, a.by_block);
        at.row = row * step + down;
        at.col = (int64_t)group * MQ_WIDE;
        at.block = at.row * a.blocks.cols + across;
        at.leads = (int64_t)across * a.blocks.block_cols == at.col;
        return at;
    }
    const mq_place place = mq_place_of(index, a.groups);
    at.row = place.row * step + down;
    at.col = place.group * MQ_WIDE;
    const mq_place above = mq_place_of(at.row, a.blocks.block_rows), across = mq_place_of(at.col, a.blocks.block_cols);
    at.block = above.row * a.blocks.cols + across.row;
    at.leads = above.group == 0 && across.group == 0;
    return at;
}

/* Sixteen elements as two groups, and their scale, which is stored. Whole warps must call. */
template <typename Rule, mq_dtype D>
MQ_DEVICE float mq_wide_load(const mq_quantize_args &a, const mq_wide_place &at, mq_group_words<D> *groups,
                             uint32_t *largest)
{
    *largest = 0;
    for (int half = 0; half < 2; half++) {
        if (at.works) mq_load_words<D>(a.x, at.row * a.ldx + at.col + half * MQ_GROUP, a.aligned_x, &groups[half]);
        else memset(&groups[half], 0, sizeof groups[half]);
        *largest = MQ_MAX(*largest, mq_words_max<D>(groups[half]));
    }
    if (at.works && *largest >= 0x7f800000u && a.bad_row != NULL) atomicMin(a.bad_row, (unsigned long long)at.row);
    const uint32_t of_block = a.amax == NULL ? mq_lanes_max(*largest, a.lanes) : 0;
    const float amax = a.amax == NULL ? mq_float_of(of_block) : at.works ? a.amax[at.block] : 0.0f;
    return mq_make_scale<Rule>(amax, a.second, at.works && at.leads ? a.scales : NULL, at.block);
}

#endif
