#include "quant/quantizer.h"

#include "core/alloc.h"
#include "kernels/kernels.h"
#include "quant/scale.h"

/* At or below this the reference treats an amax as zero (tensor_quant.py, 1 / 2^24). */
static const float tiny_amax = 0x1p-24f;

void mq_quantizer_init(mq_quantizer *quantizer, const mq_quant_spec *spec)
{
    *quantizer = (mq_quantizer){.spec = *spec};
}

void mq_quantizer_free(mq_quantizer *quantizer)
{
    mq_free(quantizer->amax);
    mq_free(quantizer->pre_scale);
    quantizer->amax = quantizer->pre_scale = NULL;
    quantizer->amax_count = quantizer->pre_count = 0;
}

static int replace_values(float **values, int64_t *held, const float *from, int64_t count, mq_error *err)
{
    float *copy = NULL;
    if (from != NULL) {
        copy = mq_alloc_array((size_t)count, sizeof(float));
        if (copy == NULL) return mq_fail_memory(err, "a quantizer's values", (size_t)count * sizeof(float));
        memcpy(copy, from, (size_t)count * sizeof(float));
    }
    mq_free(*values);
    *values = copy;
    *held = from != NULL ? count : 0;
    return MQ_OK;
}

int mq_quantizer_set_amax(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err)
{
    for (int64_t i = 0; values != NULL && i < count; i++)
        if (!(values[i] >= 0.0f && values[i] <= 3.4028234664e38f))
            return mq_fail(err, MQ_ERR_VALUE, "amax: expected finite numbers >= 0, got %g", (double)values[i]);
    return replace_values(&quantizer->amax, &quantizer->amax_count, values, count, err);
}

int mq_quantizer_set_pre_scale(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err)
{
    for (int64_t i = 0; values != NULL && i < count; i++)
        if (!(values[i] - values[i] == 0.0f))
            return mq_fail(err, MQ_ERR_VALUE, "pre_quant_scale: expected finite numbers, got %g", (double)values[i]);
    return replace_values(&quantizer->pre_scale, &quantizer->pre_count, values, count, err);
}

static int64_t expected_amax(const mq_quantizer *quantizer, int64_t rows, int64_t cols)
{
    const mq_quant_spec *spec = &quantizer->spec;
    if (spec->scale == MQ_FMT_E8M0) return 0;
    if (spec->scale == MQ_FMT_FP8_E4M3) return 1;
    if (spec->dynamic) return 0;
    mq_grid grid = mq_grid_make(rows, cols, spec->block_rows, spec->block_cols);
    return grid.rows * grid.cols;
}

int mq_quantizer_ready(const mq_quantizer *quantizer, int64_t rows, int64_t cols, const char *name, mq_error *err)
{
    const mq_quant_spec *spec = &quantizer->spec;
    if (quantizer->pre_scale != NULL && quantizer->pre_count != cols)
        return mq_fail(err, MQ_ERR_VALUE, "%s: pre_quant_scale has %lld values for %lld columns", name,
                       (long long)quantizer->pre_count, (long long)cols);
    if (!quantizer->enabled) return MQ_OK;
    const int64_t expected = expected_amax(quantizer, MQ_MAX(rows, (int64_t)1), cols);
    if (expected == 0) return MQ_OK;
    if (quantizer->amax == NULL) {
        if (spec->kind == MQ_KIND_FLOAT && spec->scale == MQ_FMT_FP32) return MQ_OK; /* a plain cast */
        return mq_fail(err, MQ_ERR_VALUE, "%s: no amax; calibrate first", name);
    }
    if (rows < 0 && spec->block_rows > 0) return MQ_OK;
    if (quantizer->amax_count == expected) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "%s: amax has %lld values, [%lld, %lld] needs %lld", name,
                   (long long)quantizer->amax_count, (long long)rows, (long long)cols, (long long)expected);
}

/* ---- apply ---- */

/* The reference's formulas: _fp8_eager (two roundings, as torch's scalar / tensor), and its integer fake quantization.
 * FP8 without an amax is a plain cast to the element and back. */
static mq_scaled scaled_args(const mq_quant_spec *spec, mq_dtype dtype, const float *amax)
{
    mq_scaled args = {.dtype = dtype, .multiplier = 1.0f, .back = 1.0f};
    const int tiny = amax == NULL || *amax <= tiny_amax;
    if (spec->kind == MQ_KIND_FLOAT) {
        if (amax != NULL) args.multiplier = (1.0f / (tiny ? 1.0f : *amax)) * 448.0f;
        args.back = 1.0f / args.multiplier;
        return args;
    }
    const float bound = (float)((1 << (spec->bits - 1 + (spec->is_unsigned != 0))) - 1);
    args.high = bound;
    args.low = spec->is_unsigned ? 0.0f : spec->narrow_range ? -bound : -bound - 1.0f;
    args.multiplier = tiny ? 0.0f : bound / *amax;
    args.back = tiny ? 1.0f : args.multiplier;
    return args;
}

static void apply_scaled(const mq_quant_spec *spec, const mq_kernels *kernels, const mq_scaled *args)
{
    (spec->kind == MQ_KIND_FLOAT ? kernels->scaled_fp8 : kernels->scaled_int)(args);
}

static void apply_scaled_row(const mq_quantizer *quantizer, const mq_kernels *kernels, const mq_quant_rows *m,
                             int64_t r)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_grid grid = mq_grid_make(m->rows, m->cols, spec->block_rows, spec->block_cols);
    const int64_t size = (int64_t)mq_dtype_size(m->dtype);
    char *y = (char *)m->y + r * m->ldy * size;
    const float *amax = quantizer->amax != NULL ? quantizer->amax + r / grid.block_rows * grid.cols : NULL;
    for (int64_t block = 0; block < grid.cols; block++) {
        const int64_t begin = block * grid.block_cols, n = MQ_MIN(grid.block_cols, m->cols - begin);
        const float found = spec->dynamic ? kernels->amax[m->dtype](y + begin * size, n) : 0.0f;
        mq_scaled args = scaled_args(spec, m->dtype, spec->dynamic ? &found : amax != NULL ? &amax[block] : NULL);
        args.n = n;
        args.x = args.y = y + begin * size;
        apply_scaled(spec, kernels, &args);
    }
}

/* y = x * pre_scale, rounded to the dtype, as the reference multiplies before it quantizes. */
static void prepare_row(const mq_quantizer *quantizer, const mq_kernels *kernels, const mq_quant_rows *m, const char *x,
                        char *y)
{
    enum { PIECE = 512 };
    const int64_t size = (int64_t)mq_dtype_size(m->dtype);
    if (quantizer->pre_scale == NULL) {
        if (x != y) memmove(y, x, (size_t)(m->cols * size));
        return;
    }
    float piece[PIECE];
    for (int64_t i = 0; i < m->cols; i += PIECE) {
        const int64_t n = MQ_MIN((int64_t)PIECE, m->cols - i);
        kernels->to_float[m->dtype](x + i * size, n, piece);
        for (int64_t j = 0; j < n; j++) piece[j] *= quantizer->pre_scale[i + j];
        kernels->from_float[m->dtype](piece, n, y + i * size);
    }
}

/* Whether one scale serves the whole matrix: then tables are worth making, and rows need no copy first. */
static int has_one_scale(const mq_quant_spec *spec)
{
    return spec->scale == MQ_FMT_FP32 && spec->block_rows == 0 && spec->block_cols == 0 && !spec->dynamic;
}

/* Below so many elements, tables cost more than they save. */
enum { TABLES_PAY = 4096 };

static void apply_one_scale(const mq_quantizer *quantizer, const mq_kernels *kernels, const mq_quant_rows *m)
{
    mq_tables tables;
    mq_scaled args = scaled_args(&quantizer->spec, m->dtype, quantizer->amax);
    const int64_t size = (int64_t)mq_dtype_size(m->dtype);
    const int fp8 = quantizer->spec.kind == MQ_KIND_FLOAT;
    args.n = m->cols;
    if (fp8 && kernels->prepare_scaled_fp8 != NULL && m->rows * m->cols >= TABLES_PAY) {
        kernels->prepare_scaled_fp8(&args, &tables);
        args.tables = &tables;
    }
    for (int64_t r = 0; r < m->rows; r++) {
        args.x = (const char *)m->x + r * m->ldx * size;
        args.y = (char *)m->y + r * m->ldy * size;
        apply_scaled(&quantizer->spec, kernels, &args);
    }
}

static void apply_scheme(const mq_quantizer *quantizer, const mq_kernels *kernels, const mq_quant_rows *m)
{
    const mq_scheme id = (mq_scheme)quantizer->spec.scheme;
    const int64_t size = (int64_t)mq_dtype_size(m->dtype);
    mq_tables tables;
    mq_row row = {.scheme = mq_scheme_get(id), .dtype = m->dtype, .n = m->cols, .block = quantizer->spec.block_cols};
    row.second = quantizer->amax != NULL ? mq_scale_second(row.scheme, quantizer->amax[0]) : 1.0f;
    if (kernels->prepare[id] != NULL && m->rows * m->cols >= TABLES_PAY) {
        kernels->prepare[id](&row, &tables);
        row.tables = &tables;
    }
    for (int64_t r = 0; r < m->rows; r++) {
        row.x = (const char *)m->x + r * m->ldx * size;
        row.y = (char *)m->y + r * m->ldy * size;
        kernels->fake_quantize[id](&row);
    }
}

void mq_quantizer_apply(const mq_quantizer *quantizer, const mq_quant_rows *given)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_kernels *kernels = mq_kernels_get();
    const int64_t size = (int64_t)mq_dtype_size(given->dtype);
    const int straight = spec->scale != MQ_FMT_FP32 || has_one_scale(spec);
    mq_quant_rows m = *given;
    if (!quantizer->enabled || !straight || quantizer->pre_scale != NULL) {
        for (int64_t r = 0; r < m.rows; r++)
            prepare_row(quantizer, kernels, &m, (const char *)m.x + r * m.ldx * size, (char *)m.y + r * m.ldy * size);
        m.x = m.y;
        m.ldx = m.ldy;
    }
    if (!quantizer->enabled) return;
    if (spec->scale != MQ_FMT_FP32) apply_scheme(quantizer, kernels, &m);
    else if (has_one_scale(spec)) apply_one_scale(quantizer, kernels, &m);
    else
        for (int64_t r = 0; r < m.rows; r++) apply_scaled_row(quantizer, kernels, &m, r);
}
