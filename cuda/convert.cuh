/* Elements of memory to float32 and back, eight at a time, and codes by the device's own instructions where it has
 * them. The arithmetic is csrc/format/format.h, which C and CUDA share; instructions are used only where they give
 * its bits. */
#ifndef MODELQ_CONVERT_CUH
#define MODELQ_CONVERT_CUH

#include "common.cuh"

/* ---- the tables as compile-time numbers ---- */

template <mq_format F>
MQ_HD constexpr mq_codec mq_codec_of()
{
#define MQ_FORMAT(id, ...) if constexpr (F == MQ_FMT_##id) return MQ_CODEC(id); else
#include "format/formats.def"
#undef MQ_FORMAT
    return mq_codec{};
}

/* What kernels need to know of a scheme. Schemes that agree in it share their kernels. */
template <mq_format Element, mq_format Scale, mq_quotient Quotient, mq_codes Codes, mq_packing Packing>
struct mq_rule {
    static constexpr mq_format element = Element, scale = Scale;
    static constexpr mq_quotient quotient = Quotient;
    static constexpr mq_codes codes = Codes;
    static constexpr mq_packing packing = Packing;
};

/* ---- memory ---- */

template <mq_dtype D> struct mq_word { typedef uint16_t type; };
template <> struct mq_word<MQ_F32> { typedef uint32_t type; };

#if defined(__CUDA_ARCH__)
/* One instruction each, since sm_80; of NaN they keep no payload. */
MQ_DEVICE float mq_widen_half(uint16_t word)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(word));
    return x;
}

MQ_DEVICE uint16_t mq_narrow_half(float x)
{
    uint16_t word;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(x));
    return word;
}

MQ_DEVICE uint16_t mq_narrow_bfloat16(float x)
{
    uint16_t word;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(word) : "f"(x));
    return word;
}
#else
MQ_DEVICE float mq_widen_half(uint16_t word)
{
    return mq_decode_float(word, MQ_CODEC(FP16));
}

MQ_DEVICE uint16_t mq_narrow_half(float x)
{
    return (uint16_t)mq_encode_float(x, MQ_CODEC(FP16));
}

MQ_DEVICE uint16_t mq_narrow_bfloat16(float x)
{
    return (uint16_t)mq_encode_float(x, MQ_CODEC(BF16));
}
#endif

template <mq_dtype D>
MQ_DEVICE float mq_widen(typename mq_word<D>::type word)
{
    if constexpr (D == MQ_F32) return mq_float_of(word);
    else if constexpr (D == MQ_BF16) return mq_float_of((uint32_t)word << 16);
    else return mq_widen_half(word);
}

template <mq_dtype D>
MQ_DEVICE typename mq_word<D>::type mq_narrow(float x)
{
    if constexpr (D == MQ_F32) return mq_bits_of(x);
    else if constexpr (D == MQ_BF16) return mq_narrow_bfloat16(x);
    else return mq_narrow_half(x);
}

/* To D and back: one rounding. */
template <mq_dtype D>
MQ_DEVICE float mq_round_to(float x)
{
    return mq_widen<D>(mq_narrow<D>(x));
}

template <mq_dtype D>
union mq_group_words {
    typename mq_word<D>::type words[MQ_GROUP];
    static constexpr int pieces = (int)(MQ_GROUP * sizeof(typename mq_word<D>::type) / 16);
    uint4 piece[pieces];
};

/* MQ_GROUP neighbouring elements; a short last group has count < MQ_GROUP. Whole groups may be moved 16 bytes at a time
 * where rows are aligned to that. */
template <mq_dtype D>
MQ_DEVICE void mq_load_group(const void *base, int64_t at, int count, bool aligned, float *x)
{
    typedef typename mq_word<D>::type word;
    const word *from = (const word *)base + at;
    mq_group_words<D> group;
    if (aligned && count == MQ_GROUP) {
        for (int i = 0; i < group.pieces; i++) group.piece[i] = ((const uint4 *)from)[i];
    } else {
        for (int i = 0; i < MQ_GROUP; i++) group.words[i] = i < count ? from[i] : (word)0;
    }
    for (int i = 0; i < MQ_GROUP; i++) x[i] = mq_widen<D>(group.words[i]);
}

template <mq_dtype D>
MQ_DEVICE void mq_store_group(void *base, int64_t at, int count, bool aligned, const float *x)
{
    typedef typename mq_word<D>::type word;
    word *to = (word *)base + at;
    mq_group_words<D> group;
    for (int i = 0; i < MQ_GROUP; i++) group.words[i] = mq_narrow<D>(x[i]);
    if (aligned && count == MQ_GROUP) {
        for (int i = 0; i < group.pieces; i++) ((uint4 *)to)[i] = group.piece[i];
    } else {
        for (int i = 0; i < MQ_GROUP; i++)
            if (i < count) to[i] = group.words[i];
    }
}

static inline bool mq_is_aligned(const mq_cuda_matrix *x)
{
    return (uintptr_t)x->data % 16 == 0 && x->ld % MQ_GROUP == 0;
}

/* ---- codes ---- */

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define MQ_HAS_FP8_INSTRUCTIONS 1
#endif
/* Conversions to FP4 belong to the features of one family of architectures (PTX ISA 8.6): sm_100a, sm_120a. */
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define MQ_HAS_FP4_INSTRUCTIONS 1
#endif

#if defined(MQ_HAS_FP8_INSTRUCTIONS)
/* Saturates as formats.def says, infinity too; rounds to nearest, ties to even. NaN loses its sign and is not for
 * it. */
MQ_DEVICE uint32_t mq_cvt_e4m3(float x)
{
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(pair) : "f"(x), "f"(0.0f));
    return pair & 0xffu;
}

MQ_DEVICE uint32_t mq_cvt_e5m2(float x)
{
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %2, %1;" : "=h"(pair) : "f"(x), "f"(0.0f));
    return pair & 0xffu;
}
#endif

#if defined(MQ_HAS_FP4_INSTRUCTIONS)
/* NaN becomes the largest positive number, as formats without NaN have it here. */
MQ_DEVICE uint32_t mq_cvt_e2m1(float x)
{
    uint16_t pair;
    asm("{ .reg .b8 low; cvt.rn.satfinite.e2m1x2.f32 low, %2, %1; mov.b16 %0, {low, low}; }"
        : "=h"(pair) : "f"(x), "f"(0.0f));
    return pair & 0xfu;
}
#endif

template <mq_format F>
MQ_DEVICE uint32_t mq_encode_as(float x)
{
#if defined(MQ_HAS_FP8_INSTRUCTIONS)
    if constexpr (F == MQ_FMT_FP8_E4M3)
        if (x == x) return mq_cvt_e4m3(x);
    if constexpr (F == MQ_FMT_FP8_E5M2)
        if (x == x) return mq_cvt_e5m2(x);
#endif
#if defined(MQ_HAS_FP4_INSTRUCTIONS)
    if constexpr (F == MQ_FMT_FP4_E2M1) return mq_cvt_e2m1(x);
#endif
    return mq_encode(x, mq_codec_of<F>());
}

/* An element's code by the scheme's rules for ties and zero (scheme_codec.h). */
template <typename Rule>
MQ_DEVICE uint32_t mq_encode_element(float x)
{
    if constexpr (Rule::codes == MQ_CODES_PLAIN) return mq_encode_as<Rule::element>(x);
    else if constexpr (Rule::codes == MQ_CODES_NO_NEGATIVE_ZERO) return mq_encode_as<Rule::element>(x + 0.0f);
    else return scheme_encode(x, mq_codec_of<Rule::element>(), Rule::codes);
}

#endif
