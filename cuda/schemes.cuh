/* What the kernels that quantize and dequantize by a row of schemes.def share. */
#ifndef MODELQ_SCHEMES_CUH
#define MODELQ_SCHEMES_CUH

#include "convert.cuh"

/* [scheme][dtype]: KERNEL is a template of (rule, dtype, further arguments). Rows that agree in what a rule holds share
 * one kernel, as the compiler makes each instance once. */
#define MQ_RULE(element, scale, quotient, codes, packing) \
    mq_rule<MQ_FMT_##element, MQ_FMT_##scale, MQ_QUOTIENT_##quotient, MQ_CODES_##codes, MQ_PACK_##packing>

/* The scale that a stored code stands for, times the tensor's; float32 scales are stored as they are. */
template <mq_format Scale>
MQ_DEVICE float mq_stored_scale(const void *scales, int64_t block, const float *second)
{
    if constexpr (Scale == MQ_FMT_FP32) return ((const float *)scales)[block];
    else if constexpr (Scale == MQ_FMT_E8M0) return mq_decode(((const uint8_t *)scales)[block], MQ_CODEC(E8M0));
    else return mq_decode(((const uint8_t *)scales)[block], MQ_CODEC(FP8_E4M3)) * *second;
}

/* What a block divides by; stored too where scales is not NULL. */
template <typename Rule>
MQ_DEVICE float mq_make_scale(float amax, const float *second, void *scales, int64_t block)
{
    const float largest = mq_codec_largest(mq_codec_of<Rule::element>());
    float scale;
    uint8_t code = 0;
    if constexpr (Rule::scale == MQ_FMT_FP32) mq_scales_fp32(&amax, 1, largest, &scale);
    else if constexpr (Rule::scale == MQ_FMT_E8M0) mq_scales_e8m0(&amax, 1, largest, &code, &scale);
    else {
        code = (uint8_t)mq_encode_as<MQ_FMT_FP8_E4M3>(mq_scale_number_e4m3(amax, largest * *second));
        scale = mq_decode(code, MQ_CODEC(FP8_E4M3)) * *second;
    }
    if (scales == NULL) return scale;
    if constexpr (Rule::scale == MQ_FMT_FP32) ((float *)scales)[block] = scale;
    else ((uint8_t *)scales)[block] = code;
    return scale;
}

/* The first nbytes of word, lowest first; in one piece where that is aligned. */
MQ_DEVICE void mq_store_bytes(uint8_t *to, uint64_t word, int nbytes)
{
    if (nbytes == 8 && (uintptr_t)to % 8 == 0) {
        *(uint64_t *)to = word;
    } else if (nbytes == 4 && (uintptr_t)to % 4 == 0) {
        *(uint32_t *)to = (uint32_t)word;
    } else {
        for (int i = 0; i < nbytes; i++) to[i] = (uint8_t)(word >> (8 * i));
    }
}

MQ_DEVICE uint64_t mq_load_bytes(const uint8_t *from, int nbytes)
{
    if (nbytes == 8 && (uintptr_t)from % 8 == 0) return *(const uint64_t *)from;
    if (nbytes == 4 && (uintptr_t)from % 4 == 0) return *(const uint32_t *)from;
    uint64_t word = 0;
    for (int i = 0; i < nbytes; i++) word |= (uint64_t)from[i] << (8 * i);
    return word;
}

/* Bits of a code in memory. */
template <typename Rule>
MQ_HD constexpr int mq_stored_bits()
{
    return Rule::packing == MQ_PACK_ROW ? mq_codec_of<Rule::element>().bits : 8;
}

/* ---- host ---- */

/* A job's scheme with the job's own settings. */
typedef struct mq_scheme_plan {
    const mq_scheme_row *scheme;
    mq_blocks blocks;
    int bits;              /* of an element */
    int64_t row_bytes;     /* of packed codes: of a row, or of a pair of rows */
    bool pairs;
    float largest, divisor;
} mq_scheme_plan;

int mq_cuda_plan(const mq_cuda_block_job *job, const mq_cuda_matrix *of, bool stores, mq_scheme_plan *plan,
                 mq_error *err);

#endif
