#include "quant/quantizer.h"

#include "core/alloc.h"
#include "kernels/scales.h"
#include "quant/prepare.h"

void mq_quantizer_init(mq_quantizer *quantizer, const mq_quant_spec *spec)
{
    *quantizer = (mq_quantizer){.spec = *spec};
}

static void drop_ranges(mq_quantizer *quantizer)
{
    if (!quantizer->lent) {
        mq_free(quantizer->amax);
        mq_free(quantizer->block_amax);
    }
    quantizer->amax = quantizer->block_amax = NULL;
    quantizer->lent = 0;
}

void mq_quantizer_free(mq_quantizer *quantizer)
{
    drop_ranges(quantizer);
    mq_free(quantizer->pre_scale);
    mq_free(quantizer->bias);
    quantizer->pre_scale = quantizer->bias = NULL;
    quantizer->amax_count = quantizer->pre_count = quantizer->bias_count = 0;
}

/* A copy of values, which may be NULL. */
static int copy_values(float **copy, const float *from, int64_t count, mq_error *err)
{
    *copy = NULL;
    if (from == NULL) return MQ_OK;
    *copy = mq_alloc_array((size_t)count, sizeof(float));
    if (*copy == NULL) return mq_fail_memory(err, "a quantizer's values", (size_t)count * sizeof(float));
    memcpy(*copy, from, (size_t)count * sizeof(float));
    return MQ_OK;
}

static int replace_values(float **values, int64_t *held, const float *from, int64_t count, mq_error *err)
{
    float *copy;
    int rc = copy_values(&copy, from, count, err);
    if (rc != MQ_OK) return rc;
    mq_free(*values);
    *values = copy;
    *held = from != NULL ? count : 0;
    return MQ_OK;
}

/* Whether its blocks' maxima are kept, and the tensor's beside them. */
static int has_static_levels(const mq_quant_spec *spec)
{
    return spec->scale == MQ_FMT_FP8_E4M3 && !spec->dynamic;
}

mq_second_level mq_quantizer_second(const mq_quantizer *quantizer)
{
    mq_second_level second = {.amax = quantizer->global_amax, .divisor = quantizer->spec.second_divisor};
    for (int64_t i = 0; quantizer->global_amax == 0.0f && i < quantizer->amax_count; i++)
        second.amax = MQ_MAX(second.amax, quantizer->amax[i]);
    return second;
}

static int make_block_amax(mq_quantizer *quantizer, mq_error *err)
{
    const int64_t count = quantizer->amax_count;
    mq_free(quantizer->block_amax);
    quantizer->block_amax = NULL;
    if (!has_static_levels(&quantizer->spec) || quantizer->amax == NULL) return MQ_OK;
    quantizer->block_amax = mq_alloc_array((size_t)count, sizeof(float));
    if (quantizer->block_amax == NULL)
        return mq_fail_memory(err, "a quantizer's values", (size_t)count * sizeof(float));
    const mq_second_level second = mq_quantizer_second(quantizer);
    mq_static_amax(&second, mq_format_max(quantizer->spec.element), quantizer->amax, count, quantizer->block_amax);
    return MQ_OK;
}

static int is_amax(float value)
{
    return value >= 0.0f && value <= 3.4028234664e38f;
}

int mq_quantizer_set_amax(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err)
{
    for (int64_t i = 0; values != NULL && i < count; i++)
        if (!is_amax(values[i]))
            return mq_fail(err, MQ_ERR_VALUE, "amax: expected finite numbers >= 0, got %g", (double)values[i]);
    float *copy;
    int rc = copy_values(&copy, values, count, err);
    if (rc != MQ_OK) return rc;
    drop_ranges(quantizer);
    quantizer->amax = copy;
    quantizer->amax_count = values != NULL ? count : 0;
    return make_block_amax(quantizer, err);
}

int mq_quantizer_lend(mq_quantizer *quantizer, float *memory, mq_error *err)
{
    if (quantizer->amax == NULL || quantizer->block_amax == NULL)
        return mq_fail(err, MQ_ERR_VALUE, "lend: only the amax of static blocks with scales in (4, 3) lies elsewhere");
    const size_t count = (size_t)quantizer->amax_count;
    memcpy(memory, quantizer->amax, count * sizeof *memory);
    memcpy(memory + count, quantizer->block_amax, count * sizeof *memory);
    drop_ranges(quantizer);
    quantizer->amax = memory;
    quantizer->block_amax = memory + count;
    quantizer->lent = 1;
    return MQ_OK;
}

/* Its own copy of an amax that is lent. */
static int take_back(mq_quantizer *quantizer, mq_error *err)
{
    float *copy;
    if (!quantizer->lent) return MQ_OK;
    const int rc = copy_values(&copy, quantizer->amax, quantizer->amax_count, err);
    if (rc != MQ_OK) return rc;
    drop_ranges(quantizer);
    quantizer->amax = copy;
    return MQ_OK;
}

int mq_quantizer_set_global_amax(mq_quantizer *quantizer, float value, mq_error *err)
{
    if (!has_static_levels(&quantizer->spec))
        return mq_fail(err, MQ_ERR_VALUE, "global_amax: only static blocks with scales in (4, 3) have one");
    if (!is_amax(value))
        return mq_fail(err, MQ_ERR_VALUE, "global_amax: expected a finite number >= 0, got %g", (double)value);
    const int rc = take_back(quantizer, err);
    if (rc != MQ_OK) return rc;
    quantizer->global_amax = value;
    return make_block_amax(quantizer, err);
}

static int check_finite(const float *values, int64_t count, const char *what, mq_error *err)
{
    for (int64_t i = 0; values != NULL && i < count; i++)
        if (!(values[i] - values[i] == 0.0f))
            return mq_fail(err, MQ_ERR_VALUE, "%s: expected finite numbers, got %g", what, (double)values[i]);
    return MQ_OK;
}

int mq_quantizer_set_pre_scale(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err)
{
    int rc = check_finite(values, count, "pre_quant_scale", err);
    return rc == MQ_OK ? replace_values(&quantizer->pre_scale, &quantizer->pre_count, values, count, err) : rc;
}

int mq_quantizer_set_bias(mq_quantizer *quantizer, const float *values, int64_t count, mq_error *err)
{
    int rc = check_finite(values, count, "bias", err);
    return rc == MQ_OK ? replace_values(&quantizer->bias, &quantizer->bias_count, values, count, err) : rc;
}

int mq_quantizer_set_rotate(mq_quantizer *quantizer, int64_t columns, mq_error *err)
{
    if (columns < 0 || columns > MQ_ROTATE_MAX || (columns & (columns - 1)) != 0)
        return mq_fail(err, MQ_ERR_VALUE, "rotate: expected a power of two up to %d, or 0, got %lld",
                       (int)MQ_ROTATE_MAX, (long long)columns);
    quantizer->rotate = columns;
    return MQ_OK;
}

static int same_values(const float *a, int64_t a_count, const float *b, int64_t b_count)
{
    if (a_count != b_count || (a == NULL) != (b == NULL)) return 0;
    return a == NULL || memcmp(a, b, (size_t)a_count * sizeof *a) == 0;
}

int mq_quantizer_same(const mq_quantizer *a, const mq_quantizer *b)
{
    if (a == b) return 1;
    return a->enabled == b->enabled && a->rotate == b->rotate && memcmp(&a->spec, &b->spec, sizeof a->spec) == 0 &&
           same_values(&a->global_amax, 1, &b->global_amax, 1) &&
           same_values(a->amax, a->amax_count, b->amax, b->amax_count) &&
           same_values(a->pre_scale, a->pre_count, b->pre_scale, b->pre_count) &&
           same_values(a->bias, a->bias_count, b->bias, b->bias_count);
}

static int64_t expected_amax(const mq_quantizer *quantizer, int64_t rows, int64_t cols)
{
    const mq_quant_spec *spec = &quantizer->spec;
    if (spec->scale == MQ_FMT_E8M0) return 0;
    if (spec->scale == MQ_FMT_FP8_E4M3 && spec->dynamic) return 1;
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
    if (quantizer->rotate != 0 && cols % quantizer->rotate != 0)
        return mq_fail(err, MQ_ERR_VALUE, "%s: rotates blocks of %lld columns, which do not divide %lld", name,
                       (long long)quantizer->rotate, (long long)cols);
    if (quantizer->bias != NULL && quantizer->bias_count != cols)
        return mq_fail(err, MQ_ERR_VALUE, "%s: bias has %lld values for %lld columns", name,
                       (long long)quantizer->bias_count, (long long)cols);
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

/* The reference's formulas. FP8 without an amax is a plain cast to the element and back; integers are then zeros. */
static mq_scaled scaled_args(const mq_quant_spec *spec, mq_dtype dtype, const float *amax)
{
    mq_scaled_numbers numbers = {.multiplier = 1.0f, .back = 1.0f};
    if (spec->kind == MQ_KIND_FLOAT) {
        if (amax != NULL) numbers = mq_scaled_fp8_numbers(*amax);
    } else {
        const float bound = (float)((1 << (spec->bits - 1 + (spec->is_unsigned != 0))) - 1);
        const float low = spec->is_unsigned ? 0.0f : spec->narrow_range ? -bound : -bound - 1.0f;
        numbers = mq_scaled_int_numbers(amax == NULL ? 0.0f : *amax, low, bound);
    }
    return (mq_scaled){.dtype = dtype, .multiplier = numbers.multiplier, .back = numbers.back, .low = numbers.low,
                       .high = numbers.high};
}

static void apply_scaled(const mq_quant_spec *spec, const mq_kernels *kernels, const mq_scaled *args)
{
    (spec->kind == MQ_KIND_FLOAT ? kernels->scaled_fp8 : kernels->scaled_int)(args);
}

/* A row whose scales are float32 numbers, block by block. cast: FP8 without an amax is one. */
static void apply_scaled_blocks(const mq_quant_spec *spec, const mq_quant_row *row, int cast)
{
    const mq_kernels *kernels = mq_kernels_get();
    const int64_t size = (int64_t)mq_dtype_size(row->dtype);
    const int64_t length = spec->block_cols > 0 ? spec->block_cols : MQ_MAX(row->n, (int64_t)1);
    for (int64_t begin = 0, block = 0; begin < row->n; begin += length, block++) {
        const int64_t n = MQ_MIN(length, row->n - begin);
        const char *x = (const char *)row->x + begin * size;
        const float amax = row->amax != NULL ? row->amax[block] : cast ? 0.0f : kernels->amax[row->dtype](x, n);
        mq_scaled args = scaled_args(spec, row->dtype, cast ? NULL : &amax);
        args.n = n;
        args.x = x;
        args.y = (char *)row->y + begin * size;
        apply_scaled(spec, kernels, &args);
    }
}

void mq_quant_row_apply(const mq_quant_spec *spec, const mq_quant_row *given)
{
    if (spec->scale == MQ_FMT_FP32) {
        apply_scaled_blocks(spec, given, 0);
        return;
    }
    const mq_row row = {.scheme = mq_scheme_get((mq_scheme)spec->scheme), .dtype = given->dtype, .n = given->n,
                        .block = spec->block_cols, .x = given->x, .y = given->y, .amax = given->amax,
                        .second = given->second};
    mq_kernels_get()->fake_quantize[spec->scheme](&row);
}

static void apply_scaled_row(const mq_quantizer *quantizer, const mq_quant_rows *m, int64_t r)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_grid grid = mq_grid_make(m->rows, m->cols, spec->block_rows, spec->block_cols);
    char *y = (char *)m->y + r * m->ldy * (int64_t)mq_dtype_size(m->dtype);
    mq_quant_row row = {.dtype = m->dtype, .n = m->cols, .x = y, .y = y};
    if (quantizer->amax != NULL && !spec->dynamic) row.amax = quantizer->amax + r / grid.block_rows * grid.cols;
    apply_scaled_blocks(spec, &row, row.amax == NULL && !spec->dynamic);
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
    const int64_t blocks = MQ_CEIL_DIV(m->cols, quantizer->spec.block_cols);
    mq_tables tables;
    mq_row row = {.scheme = mq_scheme_get(id), .dtype = m->dtype, .n = m->cols, .block = quantizer->spec.block_cols,
                  .second = 1.0f};
    if (row.scheme->second_divisor != 0.0f) {
        const mq_second_level second = mq_quantizer_second(quantizer);
        row.second = mq_second_scale(&second, mq_format_max(row.scheme->element));
    }
    if (kernels->prepare[id] != NULL && quantizer->block_amax == NULL && m->rows * m->cols >= TABLES_PAY) {
        kernels->prepare[id](&row, &tables);
        row.tables = &tables;
    }
    for (int64_t r = 0; r < m->rows; r++) {
        if (quantizer->block_amax != NULL) row.amax = quantizer->block_amax + r * blocks;
        row.x = (const char *)m->x + r * m->ldx * size;
        row.y = (char *)m->y + r * m->ldy * size;
        kernels->fake_quantize[id](&row);
    }
}

/* x to y, with what comes before rounding; then the matrix is y alone. */
static void prepare_rows(const mq_quantizer *quantizer, const mq_kernels *kernels, mq_quant_rows *m)
{
    const int prepares = m->steps != MQ_QUANT_PREPARED && mq_quantizer_prepares(quantizer);
    const int64_t size = (int64_t)mq_dtype_size(m->dtype);
    for (int64_t r = 0; r < m->rows; r++) {
        const char *x = (const char *)m->x + r * m->ldx * size;
        char *y = (char *)m->y + r * m->ldy * size;
        if (prepares) mq_prepare_row(quantizer, kernels, m->dtype, m->cols, x, y);
        else if (x != y) memmove(y, x, (size_t)(m->cols * size));
    }
    m->x = m->y;
    m->ldx = m->ldy;
}

static void shift_rows(const mq_quantizer *quantizer, const mq_kernels *kernels, const mq_quant_rows *m, float sign)
{
    const int64_t size = (int64_t)mq_dtype_size(m->dtype);
    for (int64_t r = 0; quantizer->bias != NULL && r < m->rows; r++)
        mq_shift_row(quantizer, kernels, m->dtype, m->cols, sign, (char *)m->y + r * m->ldy * size);
}

void mq_quantizer_apply(const mq_quantizer *quantizer, const mq_quant_rows *given)
{
    const mq_quant_spec *spec = &quantizer->spec;
    const mq_kernels *kernels = mq_kernels_get();
    const int straight = spec->scale != MQ_FMT_FP32 || has_one_scale(spec);
    const int rounds = quantizer->enabled && given->steps != MQ_QUANT_PREPARE;
    mq_quant_rows m = *given;
    if (!rounds || !straight || quantizer->bias != NULL || mq_quantizer_prepares(quantizer))
        prepare_rows(quantizer, kernels, &m);
    if (!rounds) return;
    shift_rows(quantizer, kernels, &m, -1.0f);
    if (spec->scale != MQ_FMT_FP32) apply_scheme(quantizer, kernels, &m);
    else if (has_one_scale(spec)) apply_one_scale(quantizer, kernels, &m);
    else
        for (int64_t r = 0; r < m.rows; r++) apply_scaled_row(quantizer, &m, r);
    shift_rows(quantizer, kernels, &m, 1.0f);
}
