#include "quant/prepare.h"

#include <math.h>

void mq_hadamard(float *x, int64_t count)
{
    for (int64_t half = 1; half < count; half *= 2)
        for (int64_t i = 0; i < count; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    const float norm = (float)(1.0 / sqrt((double)count));
    for (int64_t i = 0; i < count; i++) x[i] *= norm;
}

/* The row as float32, a piece at a time. */
typedef struct pieces {
    const mq_kernels *kernels;
    mq_dtype dtype;
    int64_t cols, size; /* of a piece */
    float x[MQ_ROTATE_MAX];
} pieces;

static int64_t load_piece(pieces *p, const void *row, int64_t begin)
{
    const int64_t n = MQ_MIN(p->size, p->cols - begin);
    p->kernels->to_float[p->dtype]((const char *)row + begin * (int64_t)mq_dtype_size(p->dtype), n, p->x);
    return n;
}

static void store_piece(const pieces *p, void *row, int64_t begin, int64_t n)
{
    p->kernels->from_float[p->dtype](p->x, n, (char *)row + begin * (int64_t)mq_dtype_size(p->dtype));
}

void mq_prepare_row(const mq_quantizer *quantizer, const mq_kernels *kernels, mq_dtype dtype, int64_t cols,
                    const void *x, void *y)
{
    pieces p = {.kernels = kernels, .dtype = dtype, .cols = cols, .size = MQ_ROTATE_MAX};
    if (quantizer->pre_scale == NULL && x != y) memmove(y, x, (size_t)cols * mq_dtype_size(dtype));
    for (int64_t i = 0; quantizer->pre_scale != NULL && i < cols; i += p.size) {
        const int64_t n = load_piece(&p, x, i);
        for (int64_t j = 0; j < n; j++) p.x[j] *= quantizer->pre_scale[i + j];
        store_piece(&p, y, i, n);
    }
    if (quantizer->rotate == 0) return;
    p.size = quantizer->rotate;
    for (int64_t i = 0; i < cols; i += p.size) {
        const int64_t n = load_piece(&p, y, i);
        mq_hadamard(p.x, n);
        store_piece(&p, y, i, n);
    }
}

void mq_shift_row(const mq_quantizer *quantizer, const mq_kernels *kernels, mq_dtype dtype, int64_t cols,
                  float sign, void *y)
{
    pieces p = {.kernels = kernels, .dtype = dtype, .cols = cols, .size = MQ_ROTATE_MAX};
    for (int64_t i = 0; i < cols; i += p.size) {
        const int64_t n = load_piece(&p, y, i);
        for (int64_t j = 0; j < n; j++) p.x[j] += sign * quantizer->bias[i + j];
        store_piece(&p, y, i, n);
    }
}
