#include "format/format.h"

#define MQ_FORMAT(id, name, kind, bits, ebits, mbits, bias, sign, special, round, over, dtype, tag, dlpack, type) \
    {name, {MQ_KIND_##kind, bits, ebits, mbits, bias, sign, MQ_SPECIAL_##special, MQ_ROUND_##round, \
            MQ_OVERFLOW_##over}, dtype, tag, dlpack, type},
static const mq_format_row format_table[MQ_FMT_COUNT] = {
#include "format/formats.def"
};
#undef MQ_FORMAT

#define MQ_SCHEME(id, name, element, rows, cols, scale, second, quotient, codes, packing, activations, \
                  ...) \
    {name, MQ_FMT_##element, rows, cols, MQ_FMT_##scale, second, MQ_QUOTIENT_##quotient, MQ_CODES_##codes, \
     MQ_PACK_##packing, MQ_ACTIVATIONS_##activations, __VA_ARGS__},
static const mq_scheme_row scheme_table[MQ_SCHEME_COUNT] = {
#include "format/schemes.def"
};
#undef MQ_SCHEME

const mq_format_row *mq_format_get(mq_format format)
{
    return &format_table[format];
}

const mq_scheme_row *mq_scheme_get(mq_scheme scheme)
{
    return &scheme_table[scheme];
}

int mq_format_find(const char *name, mq_format *out)
{
    for (int i = 0; i < MQ_FMT_COUNT; i++) {
        if (strcmp(format_table[i].name, name) != 0) continue;
        *out = (mq_format)i;
        return MQ_OK;
    }
    return MQ_ERR_VALUE;
}

int mq_scheme_find(const char *name, mq_scheme *out)
{
    for (int i = 0; i < MQ_SCHEME_COUNT; i++) {
        if (strcmp(scheme_table[i].name, name) != 0) continue;
        *out = (mq_scheme)i;
        return MQ_OK;
    }
    return MQ_ERR_VALUE;
}

float mq_format_max(mq_format format)
{
    mq_codec c = format_table[format].codec;
    if (c.kind == MQ_KIND_INT) return (float)((1 << (c.bits - 1)) - 1);
    if (c.kind == MQ_KIND_SCALE) return mq_decode(254, c);
    return mq_decode(mq_codec_max_code(c), c);
}

float mq_format_smallest_normal(mq_format format)
{
    mq_codec c = format_table[format].codec;
    if (c.kind == MQ_KIND_INT) return 1.0f;
    return c.kind == MQ_KIND_SCALE ? mq_decode(0, c) : mq_decode(1u << c.mantissa_bits, c);
}

float mq_format_smallest(mq_format format)
{
    mq_codec c = format_table[format].codec;
    return c.kind == MQ_KIND_SCALE ? mq_decode(0, c) : mq_decode(1, c);
}
