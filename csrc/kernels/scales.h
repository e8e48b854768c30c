/* From the largest magnitudes of blocks to stored scales, and to what elements are divided by. */
#ifndef MQ_SCALES_H
#define MQ_SCALES_H

#include "format/format.h"

MQ_INLINE float mq_codec_largest(mq_codec c)
{
    return c.kind == MQ_KIND_INT ? (float)((1 << (c.bits - 1)) - 1) : mq_decode(mq_codec_max_code(c), c);
}

/* amax / largest. Where that is 0 the scale is 1: the reference puts the largest element for a zero amax. */
MQ_INLINE void mq_scales_fp32(const float *amax, int64_t count, float largest, float *scale)
{
    for (int64_t i = 0; i < count; i++) {
        float s = amax[i] / largest;
        scale[i] = s == 0.0f ? 1.0f : s;
    }
}

/* OCP MX with the reference's rounding up: 2^ceil(log2(amax / largest)), so that no element overflows. */
MQ_INLINE void mq_scales_e8m0(const float *amax, int64_t count, float largest, uint8_t *codes, float *scale)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t code = mq_encode_scale(amax[i] / largest);
        codes[i] = (uint8_t)code;
        scale[i] = mq_decode(code, MQ_CODEC(E8M0));
    }
}

/* NVFP4 as the reference exports it: e4m3(clamp(amax / (largest * second), 2^-9, 448)), 1 for a zero block. */
MQ_INLINE void mq_scale_codes_e4m3(const float *amax, int64_t count, float denominator, uint8_t *codes)
{
    for (int64_t i = 0; i < count; i++) {
        float s = amax[i] / denominator;
        s = s == 0.0f ? 1.0f : s;
        s = s < 0x1p-9f ? 0x1p-9f : s;
        s = s > 448.0f ? 448.0f : s;
        codes[i] = (uint8_t)mq_encode(s, MQ_CODEC(FP8_E4M3));
    }
}

MQ_INLINE void mq_scales_e4m3(const float *amax, int64_t count, float largest, float second, uint8_t *codes,
                              float *scale)
{
    mq_scale_codes_e4m3(amax, count, largest * second, codes);
    for (int64_t i = 0; i < count; i++) scale[i] = mq_decode(codes[i], MQ_CODEC(FP8_E4M3)) * second;
}

#endif
