/* From the largest magnitudes of blocks to stored scales, and to what elements are divided by. Read by C and CUDA. */
#ifndef MQ_SCALES_H
#define MQ_SCALES_H

#include "format/format.h"

MQ_INLINE MQ_HD float mq_codec_largest(mq_codec c)
{
    return c.kind == MQ_KIND_INT ? (float)((1 << (c.bits - 1)) - 1) : mq_decode(mq_codec_max_code(c), c);
}

/* amax / largest. Where that is 0 the scale is 1: the reference puts the largest element for a zero amax. */
MQ_INLINE MQ_HD void mq_scales_fp32(const float *amax, int64_t count, float largest, float *scale)
{
    for (int64_t i = 0; i < count; i++) {
        float s = amax[i] / largest;
        scale[i] = s == 0.0f ? 1.0f : s;
    }
}

/* OCP MX with the reference's rounding up: 2^ceil(log2(amax / largest)), so that no element overflows. */
MQ_INLINE MQ_HD void mq_scales_e8m0(const float *amax, int64_t count, float largest, uint8_t *codes, float *scale)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t code = mq_encode_scale(amax[i] / largest);
        codes[i] = (uint8_t)code;
        scale[i] = mq_decode(code, MQ_CODEC(E8M0));
    }
}

/* NVFP4 as the reference exports it: e4m3(clamp(amax / (largest * second), 2^-9, 448)), 1 for a zero block. This is the
 * number before it is rounded. */
MQ_INLINE MQ_HD float mq_scale_number_e4m3(float amax, float denominator)
{
    float s = amax / denominator;
    s = s == 0.0f ? 1.0f : s;
    s = s < 0x1p-9f ? 0x1p-9f : s;
    return s > 448.0f ? 448.0f : s;
}

MQ_INLINE MQ_HD void mq_scale_codes_e4m3(const float *amax, int64_t count, float denominator, uint8_t *codes)
{
    for (int64_t i = 0; i < count; i++)
        codes[i] = (uint8_t)mq_encode(mq_scale_number_e4m3(amax[i], denominator), MQ_CODEC(FP8_E4M3));
}

MQ_INLINE MQ_HD void mq_scales_e4m3(const float *amax, int64_t count, float largest, float second, uint8_t *codes,
                                    float *scale)
{
    mq_scale_codes_e4m3(amax, count, largest * second, codes);
    for (int64_t i = 0; i < count; i++) scale[i] = mq_decode(codes[i], MQ_CODEC(FP8_E4M3)) * second;
}

/* The fp32 scale of a whole tensor; a zero amax counts as the largest element, as the reference does. */
MQ_INLINE MQ_HD float mq_second_scale_of(float amax, float divisor, float largest)
{
    const float scale = amax / divisor;
    return scale != 0.0f ? scale : largest / divisor;
}

/* The maximum from which mq_scale_codes_e4m3 makes the scale that calibration chose (quant/scale.h: mq_static_amax).
 * tensor, divisor: the amax of the whole tensor, and what it is divided by. */
MQ_INLINE MQ_HD float mq_static_amax_of(float amax, float tensor, float divisor, float largest)
{
    const float block = amax / largest, most = divisor / largest;
    float scale = (block == 0.0f ? 1.0f : block) * most / (tensor / largest);
    scale = scale < 0x1p-9f ? 0x1p-9f : scale;
    scale = scale > 448.0f ? 448.0f : scale;
    const float value = mq_decode(mq_encode(scale, MQ_CODEC(FP8_E4M3)), MQ_CODEC(FP8_E4M3));
    return value * (largest * mq_second_scale_of(tensor, divisor, largest));
}

/* What fake quantization of activations multiplies, clamps and divides by (kernels.h: mq_scaled). */
typedef struct mq_scaled_numbers {
    float multiplier, back, low, high;
} mq_scaled_numbers;

/* At or below 2^-24 the reference treats an amax as zero (tensor_quant.py). */
MQ_INLINE MQ_HD int mq_amax_is_tiny(float amax)
{
    return amax <= 0x1p-24f;
}

/* The reference's _fp8_eager: two roundings, as torch's scalar / tensor. */
MQ_INLINE MQ_HD mq_scaled_numbers mq_scaled_fp8_numbers(float amax)
{
    const float multiplier = (1.0f / (mq_amax_is_tiny(amax) ? 1.0f : amax)) * 448.0f;
    const mq_scaled_numbers numbers = {multiplier, 1.0f / multiplier, 0.0f, 0.0f};
    return numbers;
}

/* bound: the largest integer; low: the smallest. */
MQ_INLINE MQ_HD mq_scaled_numbers mq_scaled_int_numbers(float amax, float low, float bound)
{
    const int tiny = mq_amax_is_tiny(amax);
    const float multiplier = tiny ? 0.0f : bound / amax;
    const mq_scaled_numbers numbers = {multiplier, tiny ? 1.0f : multiplier, low, bound};
    return numbers;
}

#endif
