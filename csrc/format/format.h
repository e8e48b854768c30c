/* Number formats and block schemes: descriptors, tables, and the one encode and decode that serves every format.
 *
 * mq_encode and mq_decode are always inlined: with a descriptor known at compile time (MQ_CODEC(FP8_E4M3)) they become
 * a branch-free codec of that format, which the compiler vectorises. Reads as C11 and as C++17/CUDA: rows are
 * positional. */
#ifndef MQ_FORMAT_H
#define MQ_FORMAT_H

#include <string.h>

#include "core/mq.h"

typedef enum mq_format {
#define MQ_FORMAT(id, ...) MQ_FMT_##id,
#include "format/formats.def"
#undef MQ_FORMAT
    MQ_FMT_COUNT
} mq_format;

typedef enum mq_kind { MQ_KIND_FLOAT, MQ_KIND_INT, MQ_KIND_SCALE } mq_kind;
typedef enum mq_special { MQ_SPECIAL_NONE, MQ_SPECIAL_FN, MQ_SPECIAL_IEEE } mq_special;
typedef enum mq_rounding { MQ_ROUND_EVEN, MQ_ROUND_UP, MQ_ROUND_TIES_DOWN } mq_rounding;
typedef enum mq_overflow { MQ_OVERFLOW_SATURATE, MQ_OVERFLOW_INFINITY } mq_overflow;

/* What encode and decode need to know. */
typedef struct mq_codec {
    mq_kind kind;
    int bits, exponent_bits, mantissa_bits, bias, is_signed;
    mq_special special;
    mq_rounding rounding;
    mq_overflow overflow;
} mq_codec;

#if defined(__cplusplus)
/* Functions: device code may use their results, but no object of a class type at file scope. */
#define MQ_FORMAT(id, name, kind, bits, ebits, mbits, bias, sign, special, round, over, ...) \
    MQ_INLINE MQ_HD constexpr mq_codec mq_codec_##id(void) \
    { \
        return mq_codec{MQ_KIND_##kind, bits, ebits, mbits, bias, sign, MQ_SPECIAL_##special, MQ_ROUND_##round, \
                        MQ_OVERFLOW_##over}; \
    }
#define MQ_CODEC(id) (mq_codec_##id())
#else
#define MQ_FORMAT(id, name, kind, bits, ebits, mbits, bias, sign, special, round, over, ...) \
    static const mq_codec mq_codec_##id = {MQ_KIND_##kind, bits, ebits, mbits, bias, sign, MQ_SPECIAL_##special, \
                                           MQ_ROUND_##round, MQ_OVERFLOW_##over};
#define MQ_CODEC(id) (mq_codec_##id)
#endif
#include "format/formats.def"
#undef MQ_FORMAT

typedef struct mq_format_row {
    const char *name;
    mq_codec codec;
    const char *dtype;            /* NumPy / ml_dtypes name of one code, NULL if sub-byte */
    const char *safetensors;      /* tag in a safetensors header, NULL if always packed */
    int dlpack;                   /* DLDataTypeCode */
    const char *compressed_type;  /* "float" or "int", the words of compressed-tensors */
} mq_format_row;

typedef enum mq_scheme {
#define MQ_SCHEME(id, ...) MQ_SCHEME_##id,
#include "format/schemes.def"
#undef MQ_SCHEME
    MQ_SCHEME_COUNT
} mq_scheme;

typedef enum mq_quotient { MQ_QUOTIENT_F32, MQ_QUOTIENT_DTYPE } mq_quotient;
typedef enum mq_codes { MQ_CODES_PLAIN, MQ_CODES_NO_NEGATIVE_ZERO, MQ_CODES_TIES_DOWN } mq_codes;
typedef enum mq_packing { MQ_PACK_NONE, MQ_PACK_ROW, MQ_PACK_ROW_PAIRS } mq_packing;
typedef enum mq_activations {
    MQ_ACTIVATIONS_NONE, MQ_ACTIVATIONS_SAME, MQ_ACTIVATIONS_FP8, MQ_ACTIVATIONS_FP8_TOKEN, MQ_ACTIVATIONS_INT8
} mq_activations;

typedef struct mq_scheme_row {
    const char *name;
    mq_format element;
    int block_rows, block_cols;   /* 0: the whole extent */
    mq_format scale;
    float second_divisor;         /* 0: no second level */
    mq_quotient quotient;
    mq_codes codes;
    mq_packing packing;
    mq_activations activations;
    const char *modelopt, *modelopt_weight_only, *modelopt_fp8_input; /* quant_algo, or NULL */
    const char *compressed_tensors, *compressed_tensors_weight_only;  /* format, or NULL */
    const char *autoawq, *gptq, *fp8;                                 /* quant_method, or NULL */
} mq_scheme_row;

const mq_format_row *mq_format_get(mq_format format);
const mq_scheme_row *mq_scheme_get(mq_scheme scheme);
float mq_format_max(mq_format format);             /* largest finite value */
float mq_format_smallest_normal(mq_format format); /* 1 for integers */
float mq_format_smallest(mq_format format);        /* smallest positive value */
int mq_format_find(const char *name, mq_format *out); /* MQ_OK or MQ_ERR_VALUE */
int mq_scheme_find(const char *name, mq_scheme *out);

MQ_INLINE MQ_HD uint32_t mq_bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

MQ_INLINE MQ_HD float mq_float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The magnitude code of the largest finite value. */
MQ_INLINE MQ_HD uint32_t mq_codec_max_code(mq_codec c)
{
    uint32_t ones = (1u << (c.exponent_bits + c.mantissa_bits)) - 1u;
    if (c.special == MQ_SPECIAL_FN) return ones - 1u;
    if (c.special == MQ_SPECIAL_IEEE) return ones - (1u << c.mantissa_bits);
    return ones;
}

/* float32 pattern of a normal magnitude code of a format with at most 8 exponent and 23 mantissa bits. */
MQ_INLINE MQ_HD uint32_t mq_codec_widen(uint32_t code, mq_codec c)
{
    return (code << (23 - c.mantissa_bits)) + ((uint32_t)(127 - c.bias) << 23);
}

/* Subnormals: adding a power of two whose last place is the format's smallest step rounds to whole steps. */
MQ_INLINE MQ_HD uint32_t mq_encode_subnormal(float magnitude, mq_codec c)
{
    float magic = mq_float_of((uint32_t)(127 + 24 - c.bias - c.mantissa_bits) << 23);
    float sum = magnitude + magic;
    uint32_t steps = mq_bits_of(sum) - mq_bits_of(magic);
    if (c.rounding != MQ_ROUND_TIES_DOWN) return steps;
    float half_step = mq_float_of((uint32_t)(127 - c.bias - c.mantissa_bits) << 23);
    return steps - (uint32_t)((sum - magic) - magnitude == half_step);
}

MQ_INLINE MQ_HD uint32_t mq_encode_magnitude(uint32_t magnitude, mq_codec c)
{
    uint32_t shift = (uint32_t)(23 - c.mantissa_bits);
    uint32_t half = 1u << (shift - 1u), odd = (magnitude >> shift) & 1u;
    if (c.overflow == MQ_OVERFLOW_SATURATE) {
        uint32_t largest = mq_codec_widen(mq_codec_max_code(c), c);
        magnitude = magnitude > largest ? largest : magnitude;
    }
    if (c.rounding == MQ_ROUND_TIES_DOWN) odd = 0;
    uint32_t normal = ((magnitude + half - 1u + odd) >> shift) - ((uint32_t)(127 - c.bias) << c.mantissa_bits);
    /* Exponents are float32's, subnormals included: bfloat16. */
    if (c.exponent_bits == 8 && c.overflow != MQ_OVERFLOW_SATURATE) return normal;
    uint32_t subnormal = mq_encode_subnormal(mq_float_of(magnitude), c);
    uint32_t smallest_normal = (uint32_t)(128 - c.bias) << 23;
    uint32_t code = magnitude < smallest_normal ? subnormal : normal;
    if (c.overflow == MQ_OVERFLOW_SATURATE) return code;
    uint32_t infinity = ((1u << c.exponent_bits) - 1u) << c.mantissa_bits;
    return code > infinity ? infinity : code;
}

/* NaN: all ones for 8 bits (as CUDA and torch), the quiet NaN for wider ones; the largest value where there is none. */
MQ_INLINE MQ_HD uint32_t mq_codec_nan(mq_codec c)
{
    if (c.special == MQ_SPECIAL_NONE) return mq_codec_max_code(c);
    if (c.bits <= 8) return (1u << (c.exponent_bits + c.mantissa_bits)) - 1u;
    return (((1u << (c.exponent_bits + 1)) - 1u) << (c.mantissa_bits - 1));
}

MQ_INLINE MQ_HD uint32_t mq_encode_float(float x, mq_codec c)
{
    uint32_t bits = mq_bits_of(x), magnitude = bits & 0x7fffffffu;
    if (c.mantissa_bits == 23) return bits;
    uint32_t sign = (bits >> 31) << (c.bits - 1);
    uint32_t code = mq_encode_magnitude(magnitude, c);
    uint32_t nan = mq_codec_nan(c) | (c.special == MQ_SPECIAL_NONE ? 0u : sign);
    return magnitude > 0x7f800000u ? nan : code | sign;
}

/* Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits. NaN becomes 0. */
MQ_INLINE MQ_HD uint32_t mq_encode_int(float x, mq_codec c)
{
    float high = (float)((1 << (c.bits - 1)) - 1), low = -high - 1.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    x = x == x ? x : 0.0f;
    return (mq_bits_of(x + 12582912.0f) - 0x4b400000u) & ((1u << c.bits) - 1u);
}

/* The next power of two at or above |x|, 2^-127 at least, 2^127 at most. */
MQ_INLINE MQ_HD uint32_t mq_encode_scale(float x)
{
    uint32_t magnitude = mq_bits_of(x) & 0x7fffffffu;
    uint32_t exponent = magnitude >> 23, rest = magnitude & 0x7fffffu;
    uint32_t code = exponent == 0 ? (uint32_t)(rest > 0x400000u) : exponent + (uint32_t)(rest != 0);
    code = code > 254u ? 254u : code;
    return magnitude > 0x7f800000u ? 255u : code;
}

MQ_INLINE MQ_HD uint32_t mq_encode(float x, mq_codec c)
{
    if (c.kind == MQ_KIND_INT) return mq_encode_int(x, c);
    if (c.kind == MQ_KIND_SCALE) return mq_encode_scale(x);
    return mq_encode_float(x, c);
}

MQ_INLINE MQ_HD float mq_decode_float(uint32_t code, mq_codec c)
{
    if (c.mantissa_bits == 23) return mq_float_of(code);
    uint32_t magnitude = code & ((1u << (c.bits - 1)) - 1u), sign = (code >> (c.bits - 1)) << 31;
    float step = c.bias + c.mantissa_bits - 1 <= 126
        ? mq_float_of((uint32_t)(128 - c.bias - c.mantissa_bits) << 23)
        : mq_float_of(1u << (22 + 128 - c.bias - c.mantissa_bits));
    uint32_t subnormal = mq_bits_of((float)(int32_t)magnitude * step);
    uint32_t bits = magnitude < (1u << c.mantissa_bits) ? subnormal : mq_codec_widen(magnitude, c);
    if (c.special == MQ_SPECIAL_IEEE) {
        uint32_t infinity = ((1u << c.exponent_bits) - 1u) << c.mantissa_bits;
        uint32_t rest = (magnitude - infinity) << (23 - c.mantissa_bits);
        bits = magnitude >= infinity ? 0x7f800000u | rest : bits;
    }
    if (c.special == MQ_SPECIAL_FN) bits = magnitude > mq_codec_max_code(c) ? 0x7fc00000u : bits;
    return mq_float_of(bits | sign);
}

MQ_INLINE MQ_HD float mq_decode(uint32_t code, mq_codec c)
{
    if (c.kind == MQ_KIND_INT) {
        int32_t sign = (int32_t)(1u << (c.bits - 1));
        return (float)(((int32_t)code ^ sign) - sign);
    }
    if (c.kind == MQ_KIND_SCALE) return mq_float_of(code == 255u ? 0x7fc00000u : code == 0u ? 0x400000u : code << 23);
    return mq_decode_float(code, c);
}

#endif
