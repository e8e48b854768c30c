/* y = what the quantized matrix would dequantize to, without making it. A thread has eight neighbouring elements. */
#include "quantize.cuh"

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

mq_quantize_kernel mq_fake_quantize_kernel_of(mq_scheme scheme, mq_dtype dtype)
{
    static const mq_quantize_kernel table[MQ_SCHEME_COUNT][MQ_FLOAT_DTYPES] = {
#define MQ_SCHEME(id, name, element, rows, cols, scale, second, quotient, codes, packing, ...) \
        {fake_quantize<MQ_RULE(element, scale, quotient, codes, NONE), MQ_F32>, \
         fake_quantize<MQ_RULE(element, scale, quotient, codes, NONE), MQ_BF16>, \
         fake_quantize<MQ_RULE(element, scale, quotient, codes, NONE), MQ_F16>},
#include "format/schemes.def"
#undef MQ_SCHEME
    };
    return table[scheme][dtype];
}
