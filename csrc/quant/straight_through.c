#include "quant/straight_through.h"

#include <math.h>

#include "kernels/kernels.h"
#include "quant/prepare.h"
#include "quant/scale.h"

enum { PIECE = MQ_ROTATE_MAX };     /* columns at a time: whole rotated blocks */

typedef struct piece {
    const mq_quantizer *quantizer;
    const mq_kernels *kernels;
    mq_dtype dtype;
    int64_t row, begin, n;
    float x[PIECE], gradient[PIECE], limit[PIECE];
} piece;

static void rotate(const mq_quantizer *quantizer, float *x, int64_t n)
{
    for (int64_t i = 0; quantizer->rotate != 0 && i < n; i += quantizer->rotate)
        mq_hadamard(x + i, MQ_MIN(quantizer->rotate, n - i));
}

static void round_to_dtype(piece *p)
{
    uint16_t narrow[PIECE];
    if (p->dtype == MQ_F32) return;
    p->kernels->from_float[p->dtype](p->x, p->n, narrow);
    p->kernels->to_float[p->dtype](narrow, p->n, p->x);
}

/* x as it is rounded, by the steps of mq_prepare_row and mq_shift_row. */
static void prepare(piece *p)
{
    const mq_quantizer *quantizer = p->quantizer;
    if (quantizer->pre_scale != NULL) {
        for (int64_t j = 0; j < p->n; j++) p->x[j] *= quantizer->pre_scale[p->begin + j];
        round_to_dtype(p);
    }
    if (quantizer->rotate != 0) {
        rotate(quantizer, p->x, p->n);
        round_to_dtype(p);
    }
    if (quantizer->bias != NULL) {
        for (int64_t j = 0; j < p->n; j++) p->x[j] -= quantizer->bias[p->begin + j];
        round_to_dtype(p);
    }
}

/* The largest magnitude that each column can hold. */
static void fill_limits(piece *p, const mq_grid *grid)
{
    const float *amax = p->quantizer->amax;
    if (p->quantizer->amax_count == 1) {
        for (int64_t j = 0; j < p->n; j++) p->limit[j] = amax[0];
        return;
    }
    amax += p->row / grid->block_rows * grid->cols;
    for (int64_t j = 0; j < p->n;) {
        const int64_t block = (p->begin + j) / grid->block_cols;
        const int64_t end = MQ_MIN((block + 1) * grid->block_cols - p->begin, p->n);
        for (; j < end; j++) p->limit[j] = amax[block];
    }
}

static void mask(piece *p, const mq_grid *grid, const void *x)
{
    p->kernels->to_float[p->dtype](x, p->n, p->x);
    prepare(p);
    fill_limits(p, grid);
    for (int64_t j = 0; j < p->n; j++) p->gradient[j] = fabsf(p->x[j]) <= p->limit[j] ? p->gradient[j] : 0.0f;
}

static void gradient_piece(piece *p, const mq_grid *grid, const mq_gradient_rows *m)
{
    const int64_t at = (p->row * m->cols + p->begin) * (int64_t)mq_dtype_size(m->dtype);
    const float *pre_scale = p->quantizer->pre_scale;
    p->kernels->to_float[m->dtype]((const char *)m->gradient + at, p->n, p->gradient);
    if (p->quantizer->enabled && p->quantizer->amax != NULL) mask(p, grid, (const char *)m->x + at);
    rotate(p->quantizer, p->gradient, p->n);        /* Sylvester's matrix is its own transpose */
    for (int64_t j = 0; pre_scale != NULL && j < p->n; j++) p->gradient[j] *= pre_scale[p->begin + j];
    p->kernels->from_float[m->dtype](p->gradient, p->n, (char *)m->out + at);
}

void mq_quantizer_gradient(const mq_quantizer *quantizer, const mq_gradient_rows *m, int64_t begin, int64_t end)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_grid grid = mq_grid_make(m->rows, m->cols, spec->block_rows, spec->block_cols);
    piece p = {.quantizer = quantizer, .kernels = mq_kernels_get(), .dtype = m->dtype};
    for (p.row = begin; p.row < end; p.row++)
        for (p.begin = 0; p.begin < m->cols; p.begin += PIECE) {
            p.n = MQ_MIN((int64_t)PIECE, m->cols - p.begin);
            gradient_piece(&p, &grid, m);
        }
}
