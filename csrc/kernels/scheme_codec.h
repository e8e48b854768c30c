/* One element by the rules of a scheme. */
#ifndef MQ_SCHEME_CODEC_H
#define MQ_SCHEME_CODEC_H

#include "format/format.h"

/* The element's code under the scheme's rules for ties and zero (schemes.def). Adding +0 turns -0 into +0. */
MQ_INLINE uint32_t scheme_encode(float x, mq_codec c, mq_codes rule)
{
    if (rule == MQ_CODES_PLAIN) return mq_encode(x, c);
    if (rule == MQ_CODES_NO_NEGATIVE_ZERO) return mq_encode(x + 0.0f, c);
    c.rounding = MQ_ROUND_TIES_DOWN;
    return mq_encode_magnitude(mq_bits_of(x) & 0x7fffffffu, c) | (x > 0.0f ? 0u : 1u << (c.bits - 1));
}

#endif
