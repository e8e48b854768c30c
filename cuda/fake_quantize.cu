/* y = what the quantized matrix would dequantize to, without making it. A thread has eight neighbouring elements, or
 * sixteen (quantize_wide.cuh). */
#include "quantize_wide.cuh"

template <typename Rule, mq_dtype D>
static __global__ void fake_quantize(mq_quantize_args a)
{
    uint32_t codes[MQ_GROUP];
    float scales[MQ_GROUP], y[MQ_GROUP];
    int count;
    const mq_place place = mq_group_of(a.rows, a.groups, a.cols, &count);
    mq_quantize_group<Rule, D>(a, place, count, codes, scales);
    for (int i = 0; i < MQ_GROUP; i++) y[i] = mq_decode(codes[i], mq_codec_of<Rule::element>()) * scales[i];
    mq_store_group<D>(a.y, place.row * a.ldy + place.group * MQ_GROUP, count, a.aligned_y, y);
}

template <typename Rule, mq_dtype D>
static __global__ void fake_quantize_wide(mq_quantize_args a)
{
    const mq_wide_place at = mq_wide_place_of(a, a.rows, 1, 0);
    mq_group_words<D> groups[2];
    uint32_t largest;
    const float scale = mq_wide_load<Rule, D>(a, at, groups, &largest);
    if (!at.works) return;
    for (int half = 0; half < 2; half++) {
        float x[MQ_GROUP];
        uint32_t codes[MQ_GROUP];
        for (int i = 0; i < MQ_GROUP; i++) x[i] = mq_widen<D>(groups[half].words[i]);
        mq_wide_codes<Rule, D>(x, scale, largest, codes);
        for (int i = 0; i < MQ_GROUP; i++) x[i] = mq_decode(codes[i], mq_codec_of<Rule::element>()) * scale;
        mq_store_group<D>(a.y, at.row * a.ldy + at.col + half * MQ_GROUP, MQ_GROUP, a.aligned_y, x);
    }
}

mq_quantize_kernel mq_fake_quantize_kernel_of(mq_scheme scheme, mq_dtype dtype, bool wide)
{
#define MQ_OF_DTYPES(kernel, ...) \
    {kernel<__VA_ARGS__, MQ_F32>, kernel<__VA_ARGS__, MQ_BF16>, kernel<__VA_ARGS__, MQ_F16>}
    static const mq_quantize_kernel table[MQ_SCHEME_COUNT][2][MQ_FLOAT_DTYPES] = {
#define MQ_SCHEME(id, name, element, rows, cols, scale, second, quotient, codes, packing, ...) \
        {MQ_OF_DTYPES(fake_quantize, MQ_RULE(element, scale, quotient, codes, NONE)), \
         MQ_OF_DTYPES(fake_quantize_wide, MQ_RULE(element, scale, quotient, codes, NONE))},
#include "format/schemes.def"
#undef MQ_SCHEME
    };
    return table[scheme][wide][dtype];
}
