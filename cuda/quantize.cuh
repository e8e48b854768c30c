/* The arguments of the kernels of quantize.cu and fake_quantize.cu, and what both do with a group of elements. Two
 * files, as each makes an instance per rule and dtype, and compilers are slow. */
#ifndef MODELQ_QUANTIZE_CUH
#define MODELQ_QUANTIZE_CUH

#include "schemes.cuh"

/* Division of 32-bit numbers by one divisor, without dividing (Granlund and Montgomery, "Division by invariant integers
 * using multiplication", 1994, figure 4.1). */
typedef struct mq_divider {
    uint32_t multiplier;
    int first, second;             /* shifts */
} mq_divider;

static inline mq_divider mq_divider_by(int64_t divisor)
{
    int bits = 0;
    while (((int64_t)1 << bits) < divisor) bits++;
    const uint64_t more = ((uint64_t)1 << bits) - (uint64_t)divisor;
    const mq_divider by = {(uint32_t)((more << 32) / (uint64_t)divisor + 1), MQ_MIN(bits, 1), MQ_MAX(bits - 1, 0)};
    return by;
}

MQ_DEVICE uint32_t mq_divide(uint32_t n, const mq_divider &by)
{
    const uint32_t high = (uint32_t)((uint64_t)by.multiplier * n >> 32);
    return (high + ((n - high) >> by.first)) >> by.second;
}

typedef struct mq_quantize_args {
    const void *x;
    void *y;                       /* of fake quantization */
    int64_t rows, cols, ldx, ldy;
    int64_t groups;                /* of MQ_GROUP columns, in a row; of MQ_WIDE (quantize_wide.cuh) where `wide` */
    bool wide;
    bool small;                    /* wide: indices of groups fit 32 bits, and blocks are parts of rows: */
    mq_divider by_groups, by_block;     /* in a row, and in a block */
    mq_blocks blocks;
    const float *amax;             /* [blocks]; NULL: `lanes` threads have a block between them and find its own */
    const float *second;           /* [1], of two-level schemes */
    int lanes;
    bool aligned_x, aligned_y;
    uint8_t *codes;
    int64_t row_bytes;
    void *scales;                  /* NULL: not wanted */
    unsigned long long *bad_row;   /* NULL: not wanted */
    const char *scheme;            /* for errors: host memory */
} mq_quantize_args;

typedef void (*mq_quantize_kernel)(mq_quantize_args);

mq_quantize_kernel mq_quantize_kernel_of(mq_scheme scheme, mq_dtype dtype, bool wide);
mq_quantize_kernel mq_fake_quantize_kernel_of(mq_scheme scheme, mq_dtype dtype, bool wide);

/* The scales of a block are stored by who has its first element. */
template <typename Rule>
MQ_DEVICE float mq_scale_of_block(const mq_quantize_args &a, const mq_place &down, const mq_walk &walk, float own)
{
    const int64_t block = down.row * a.blocks.cols + walk.block;
    const bool stores = walk.within == 0 && down.group == 0;
    return mq_make_scale<Rule>(a.amax != NULL ? a.amax[block] : own, a.second, stores ? a.scales : NULL, block);
}

/* codes [MQ_GROUP] of columns group * MQ_GROUP ... of a row, and the scales they were divided by. count: how many there
 * are, 0 for a thread without work, which yet takes part in finding maxima: whole warps must call. */
template <typename Rule, mq_dtype D>
MQ_DEVICE void mq_quantize_group(const mq_quantize_args &a, const mq_place &place, int count, uint32_t *codes,
                                 float *scales)
{
    float x[MQ_GROUP], scale = 1.0f;
    uint32_t largest = 0;
    const int64_t col = place.group * MQ_GROUP;
    mq_load_group<D>(a.x, place.row * a.ldx + col, count, a.aligned_x, x);
    for (int i = 0; i < MQ_GROUP; i++) largest = MQ_MAX(largest, mq_magnitude(x[i]));
    if (largest >= 0x7f800000u && a.bad_row != NULL) atomicMin(a.bad_row, (unsigned long long)place.row);
    if (a.amax == NULL) largest = mq_lanes_max(largest, a.lanes);
    const mq_place down = mq_place_of(place.row, a.blocks.block_rows);
    mq_walk walk = mq_walk_from(col, &a.blocks);
    for (int i = 0; i < MQ_GROUP; i++) {
        codes[i] = 0;
        scales[i] = 1.0f;
        if (i >= count) continue;
        if (i == 0 || walk.within == 0) scale = mq_scale_of_block<Rule>(a, down, walk, mq_float_of(largest));
        float quotient = x[i] / scale;
        if constexpr (Rule::quotient == MQ_QUOTIENT_DTYPE) quotient = mq_round_to<D>(quotient);
        codes[i] = mq_encode_element<Rule>(quotient);
        scales[i] = scale;
        mq_walk_step(&walk, &a.blocks);
    }
}

/* Which group a thread has in a matrix of `rows` rows; count 0 behind the end. */
MQ_DEVICE mq_place mq_group_of(int64_t rows, int64_t groups, int64_t cols, int *count)
{
    const int64_t index = mq_thread_index();
    const mq_place place = mq_place_of(index, groups), nowhere = {0, 0};
    *count = 0;
    if (index >= rows * groups) return nowhere;
    *count = (int)MQ_MIN(cols - place.group * MQ_GROUP, (int64_t)MQ_GROUP);
    return place;
}

#endif
