/* What the runtime's operations share: matrices as kernels see them, a group of columns per thread, sums in a fixed
 * order, and exp. */
#ifndef MODELQ_ROWS_CUH
#define MODELQ_ROWS_CUH

#include <math.h>

#include "convert.cuh"

enum { MQ_ACTIVATION_DTYPES = 2 };      /* MQ_F32, MQ_BF16 */

/* ---- places ---- */

typedef struct mq_view {
    void *data;
    int64_t ld;
    bool aligned;              /* groups of MQ_GROUP columns may be moved 16 bytes at a time */
} mq_view;

static inline mq_view mq_view_of(const mq_cuda_matrix *matrix)
{
    const mq_view view = {matrix->data, matrix->ld, mq_is_aligned(matrix)};
    return view;
}

/* Float32 without gaps, as gradients are. */
static inline mq_view mq_view_of_rows(const float *rows, int64_t cols)
{
    const mq_view view = {(void *)(uintptr_t)rows, cols, (uintptr_t)rows % 16 == 0 && cols % MQ_GROUP == 0};
    return view;
}

/* Up to MQ_GROUP neighbouring columns of a row; count 0: none. */
typedef struct mq_span {
    int64_t row, col;
    int count;
} mq_span;

MQ_DEVICE mq_span mq_span_at(int64_t row, int64_t col, int64_t cols)
{
    const mq_span span = {row, col, (int)MQ_MAX(MQ_MIN(cols - col, (int64_t)MQ_GROUP), (int64_t)0)};
    return span;
}

/* A thread's own, of a matrix of `groups` groups a row. */
MQ_DEVICE mq_span mq_span_of(int64_t rows, int64_t cols, int64_t groups)
{
    const int64_t index = mq_thread_index();
    const mq_place place = mq_place_of(index, groups);
    return mq_span_at(place.row, place.group * MQ_GROUP, index < rows * groups ? cols : 0);
}

static inline int64_t mq_groups_of(int64_t cols)
{
    return MQ_CEIL_DIV(cols, (int64_t)MQ_GROUP);
}

template <mq_dtype D>
MQ_DEVICE void mq_load_span(const mq_view &view, const mq_span &span, float *x)
{
    mq_load_group<D>(view.data, span.row * view.ld + span.col, span.count, view.aligned, x);
}

template <mq_dtype D>
MQ_DEVICE void mq_store_span(const mq_view &view, const mq_span &span, const float *x)
{
    mq_store_group<D>(view.data, span.row * view.ld + span.col, span.count, view.aligned, x);
}

/* ---- sums ---- */

MQ_DEVICE float mq_exchange(float value, int distance)
{
    return mq_float_of(__shfl_xor_sync(0xffffffffu, mq_bits_of(value), distance));
}

MQ_DEVICE double mq_exchange(double value, int distance)
{
    uint32_t words[2];
    memcpy(words, &value, sizeof words);
    for (int i = 0; i < 2; i++) words[i] = __shfl_xor_sync(0xffffffffu, words[i], distance);
    memcpy(&value, words, sizeof value);
    return value;
}

/* The sum over each `lanes` neighbouring threads (a power of two), the same bits in all of them. Whole warps call. */
template <typename T>
MQ_DEVICE T mq_lanes_sum(T value, int lanes)
{
    for (int offset = 1; offset < lanes; offset <<= 1) value += mq_exchange(value, offset);
    return value;
}

/* What the block's threads have, folded in order of the warps, in all of them. slot: 0 and 1 in turn from call to call
 * of one T and fold in a kernel, so that one barrier is enough. */
template <typename T, typename Fold>
MQ_DEVICE T mq_block_fold(T value, int slot, Fold fold)
{
    MQ_SHARED(T, partial, 2 * (MQ_THREADS / MQ_WARP));
    T *const own = partial + slot * (MQ_THREADS / MQ_WARP);
    for (int offset = 1; offset < MQ_WARP; offset <<= 1) value = fold(value, mq_exchange(value, offset));
    if (threadIdx.x % MQ_WARP == 0) own[threadIdx.x / MQ_WARP] = value;
    __syncthreads();
    T total = own[0];
    for (int i = 1; i < MQ_THREADS / MQ_WARP; i++) total = fold(total, own[i]);
    return total;
}

struct mq_adds {
    template <typename T> MQ_HD T operator()(T a, T b) const { return a + b; }
};

/* Passes over NaN. */
struct mq_larger {
    MQ_HD float operator()(float a, float b) const { return b > a ? b : a == a ? a : b; }
};

template <typename T>
MQ_DEVICE T mq_block_sum(T value, int slot)
{
    return mq_block_fold(value, slot, mq_adds());
}

/* ---- exp ---- */

/* The polynomial of csrc/kernels/softmax.inc, fused: within 2 units in the last place. Below 2^-126 it is zero, for
 * x above 88 infinity; NaN is NaN. Not the device's own instruction: the bits are those of the emulation, and it takes
 * about as long. */
MQ_DEVICE float mq_exp(float x)
{
    const float clamped = x > 88.0f ? 88.0f : x < -87.3365447f ? -87.3365447f : x;
    const float shifted = fmaf(clamped, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
    float r = fmaf(n, -0.693359375f, clamped);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    const float value = p * mq_float_of((mq_bits_of(shifted) - 0x4b400000u + 127u) << 23);
    if (x > 88.0f) return INFINITY;
    return x < -87.3365447f ? 0.0f : x == x ? value : x;
}

/* 1 / (1 + exp(-x)). */
MQ_DEVICE float mq_sigmoid(float x)
{
    return 1.0f / (1.0f + mq_exp(-x));
}

/* ---- launchers ---- */

int mq_cuda_check_activations(const mq_cuda_matrix *matrix, const char *name, mq_error *err);
int mq_cuda_check_shape(const mq_cuda_matrix *matrix, int64_t rows, int64_t cols, const char *name, mq_error *err);
/* Of which a caller has to give nbytes. */
int mq_cuda_check_workspace(const void *workspace, size_t nbytes, size_t needed, const char *name, mq_error *err);

/* A thread for every group of every row. */
static inline dim3 mq_grid_of_groups(int64_t rows, int64_t cols)
{
    return mq_grid_for(rows * mq_groups_of(cols));
}

static inline dim3 mq_grid_of_blocks(int64_t blocks)
{
    return dim3((unsigned)MQ_MIN(blocks, (int64_t)UINT32_MAX));
}

static inline bool mq_is_empty(const mq_cuda_matrix *matrix)
{
    return matrix->rows == 0 || matrix->cols == 0;
}

#endif
