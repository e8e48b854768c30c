/* One element by the rules of a scheme, or of an activation's quantizer. Read by C and CUDA. */
#ifndef MQ_SCHEME_CODEC_H
#define MQ_SCHEME_CODEC_H

#include "format/format.h"

/* The element's code under the scheme's rules for ties and zero (schemes.def). Adding +0 turns -0 into +0. */
MQ_INLINE MQ_HD uint32_t scheme_encode(float x, mq_codec c, mq_codes rule)
{
    if (rule == MQ_CODES_PLAIN) return mq_encode(x, c);
    if (rule == MQ_CODES_NO_NEGATIVE_ZERO) return mq_encode(x + 0.0f, c);
    c.rounding = MQ_ROUND_TIES_DOWN;
    return mq_encode_magnitude(mq_bits_of(x) & 0x7fffffffu, c) | (x > 0.0f ? 0u : 1u << (c.bits - 1));
}

MQ_INLINE MQ_HD float scaled_fp8_element(float x, float multiplier, float back)
{
    return mq_decode(mq_encode(x * multiplier, MQ_CODEC(FP8_E4M3)), MQ_CODEC(FP8_E4M3)) * back;
}

/* Clamping before rounding gives the same integers; NaN stays NaN. 1.5 * 2^23 rounds to the nearest integer, ties to
 * even, but forgets the sign of zero. */
MQ_INLINE MQ_HD float scaled_int_element(float x, float multiplier, float back, float low, float high)
{
    float v = x * multiplier;
    v = v < low ? low : v;
    v = v > high ? high : v;
    const float rounded = (v + 12582912.0f) - 12582912.0f;
    return mq_float_of(mq_bits_of(rounded) | (mq_bits_of(v) & 0x80000000u)) / back;
}

#endif
