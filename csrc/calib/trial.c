#include "calib/trial.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/kernels.h"
#include "kernels/search_ops.h"
#include "quant/rows.h"
#include "quant/scale.h"

enum { TILE = 96 };                  /* rows at a time: what their differences take stays in the cache */

/* Where losses go: one sum, or one per maximum. Maxima of single rows are decided within a tile; what is said of taller
 * cells is added up over the tiles, in order. */
typedef enum grain { WHOLE, BY_ROW, BY_CELL } grain;

typedef struct trial_job {
    const mq_trial *trial;
    const mq_kernels *kernels;
    const mq_search_ops *ops;
    mq_grid grid;                    /* of the maxima */
    grain grain;
    int64_t rows, n, block_rows, pieces, tiles;   /* pieces: tiles of a row of cells */
    int64_t cells;                   /* of a tile */
    int64_t first, last;             /* candidates to do */
    const float *amax;               /* as mq_trial's, of the candidates to do */
    float global_amax;               /* beside amax, where scales have static levels */
    double *partial;                 /* [tiles, count, cells] unless by row */
    float *best;                     /* [maxima], by row */
    _Atomic int rc;
} trial_job;

/* What one tile needs, in one piece of memory. */
typedef struct tile {
    char *memory;
    int64_t begin, rows;
    float *weight, *quantized, *amax;
    void *row, *contiguous, *difference, *gram;
    double *values, *losses;
} tile;

static int is_static_levels(const mq_quant_spec *spec)
{
    return spec->scale == MQ_FMT_FP8_E4M3 && !spec->dynamic;
}

/* Two-level scales of dynamic blocks have the tensor's amax alone; other dynamic scales are made row by row. */
static mq_grid grid_of(const mq_trial *trial)
{
    const mq_quant_spec *spec = trial->spec;
    const int whole = spec->scale != MQ_FMT_FP32 && spec->dynamic;
    return mq_grid_make(trial->weight->shape[0], trial->weight->shape[1],
                        whole ? 0 : spec->dynamic ? 1 : spec->block_rows, whole ? 0 : spec->block_cols);
}

int64_t mq_trial_amax_count(const mq_trial *trial)
{
    const mq_grid grid = grid_of(trial);
    return grid.rows * grid.cols;
}

static float rounded(mq_dtype dtype, float x)
{
    if (dtype == MQ_BF16) return mq_float_of(mq_encode_float(x, MQ_CODEC(BF16)) << 16);
    return dtype == MQ_F16 ? mq_decode_float(mq_encode_float(x, MQ_CODEC(FP16)), MQ_CODEC(FP16)) : x;
}

static float factored(const mq_trial *trial, float amax, float factor)
{
    return rounded(trial->amax_dtype, amax * factor);
}

/* ---- a tile ---- */

static char *carve(char **at, size_t nbytes)
{
    char *part = *at;
    *at += MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGNMENT);
    return part;
}

/* With memory NULL, only counts: returns the bytes. */
static size_t carve_tile(const trial_job *job, tile *t)
{
    const size_t n = (size_t)job->n, element = mq_dtype_size(job->trial->weight->dtype);
    const mq_gram_loss *gram = job->trial->gram;
    const int64_t values = gram != NULL ? TILE * gram->blocks : job->grid.cols;
    char *at = t->memory;
    t->weight = (float *)(void *)carve(&at, n * sizeof(float));
    t->quantized = (float *)(void *)carve(&at, n * sizeof(float));
    t->amax = (float *)(void *)carve(&at, (size_t)job->grid.cols * sizeof(float));
    t->row = carve(&at, n * element);
    t->contiguous = carve(&at, mq_row_scratch_bytes(job->trial->weight));
    t->difference = carve(&at, gram != NULL ? TILE * n * mq_dtype_size(mq_gram_loss_dtype(gram)) : 0);
    t->gram = carve(&at, gram != NULL ? mq_gram_loss_scratch(TILE) : 0);
    t->values = (double *)(void *)carve(&at, (size_t)values * sizeof(double));
    t->losses = (double *)(void *)carve(&at, (size_t)(job->trial->count * job->cells) * sizeof(double));
    return (size_t)(at - t->memory);
}

static int64_t cell_of(const trial_job *job, int64_t row, int64_t column)
{
    if (job->grain == WHOLE) return 0;
    return column / job->grid.block_cols + (job->grain == BY_ROW ? row * job->grid.cols : 0);
}

/* The row's maxima times the candidate's factor, as the row's quantizer takes them. */
static void set_amax(const trial_job *job, const mq_candidate *candidate, int64_t r, float *out, mq_quant_row *row)
{
    const mq_trial *trial = job->trial;
    const mq_quant_spec *spec = trial->spec;
    const float largest = spec->scale == MQ_FMT_FP32 ? 0.0f : mq_format_max(spec->element);
    if (job->amax == NULL) return;
    const float *from = job->amax + r / job->grid.block_rows * job->grid.cols;
    for (int64_t i = 0; i < job->grid.cols; i++) out[i] = factored(trial, from[i], candidate->factor);
    if (spec->scale == MQ_FMT_FP32) row->amax = out;
    else if (is_static_levels(spec)) {
        const mq_second_level second = {.amax = job->global_amax, .divisor = spec->second_divisor};
        mq_static_amax(&second, largest, out, job->grid.cols, out);
        row->amax = out;
        row->second = mq_second_scale(&second, largest);
    } else {
        const mq_second_level second = {.amax = out[0], .divisor = spec->second_divisor};
        row->second = mq_second_scale(&second, largest);
    }
}

/* t->quantized = Q(weight * scale) of row r. */
static void quantize(const trial_job *job, const mq_candidate *candidate, int64_t r, tile *t)
{
    const mq_dtype dtype = job->trial->weight->dtype;
    mq_quant_row row = {.dtype = dtype, .n = job->n, .x = t->row, .y = t->row, .second = 1.0f};
    const float *from = t->weight;
    if (candidate->scale != NULL) {
        job->ops->multiply(t->quantized, t->weight, candidate->scale, job->n);
        from = t->quantized;
    }
    job->kernels->from_float[dtype](from, job->n, t->row);
    set_amax(job, candidate, r, t->amax, &row);
    mq_quant_row_apply(job->trial->spec, &row);
    job->kernels->to_float[dtype](t->row, job->n, t->quantized);
}

static void add_squares(const trial_job *job, const mq_candidate *candidate, int64_t r, tile *t, double *losses)
{
    const int64_t block = job->grain == WHOLE ? MQ_MAX(job->n, (int64_t)1) : job->grid.block_cols;
    float *squares = t->amax;        /* done with for this row, and as many */
    if (candidate->back != NULL) job->ops->multiply(t->quantized, t->quantized, candidate->back, job->n);
    job->ops->squared_errors(t->weight, t->quantized, job->n, block, squares);
    for (int64_t i = 0; i * block < job->n; i++) losses[cell_of(job, r, i * block)] += (double)squares[i];
}

static void keep_difference(const trial_job *job, const mq_candidate *candidate, int64_t r, tile *t)
{
    const mq_dtype dtype = mq_gram_loss_dtype(job->trial->gram);
    char *to = (char *)t->difference + (size_t)(r * job->n) * mq_dtype_size(dtype);
    job->ops->residual(t->quantized, t->weight, t->quantized, candidate->back, job->n);
    job->kernels->from_float[dtype](t->quantized, job->n, to);
}

static void add_gram(const trial_job *job, tile *t, double *losses)
{
    const mq_gram_loss *gram = job->trial->gram;
    mq_gram_loss_rows(gram, t->difference, t->rows, t->gram, t->values);
    for (int64_t r = 0; r < t->rows; r++)
        for (int64_t b = 0; b < gram->blocks; b++)
            losses[cell_of(job, r, b * gram->block)] += t->values[r * gram->blocks + b];
}

static void try_candidate(const trial_job *job, int64_t c, tile *t)
{
    const mq_tensor *weight = job->trial->weight;
    const mq_candidate *candidate = &job->trial->candidates[c];
    double *losses = t->losses + c * job->cells;
    for (int64_t r = 0; r < t->rows; r++) {
        const void *x = mq_row_contiguous(weight, t->begin + r, t->contiguous);
        job->kernels->to_float[weight->dtype](x, job->n, t->weight);
        quantize(job, candidate, t->begin + r, t);
        if (job->trial->gram == NULL) add_squares(job, candidate, r, t, losses);
        else keep_difference(job, candidate, r, t);
    }
    if (job->trial->gram != NULL) add_gram(job, t, losses);
}

static int64_t least_of(const double *losses, int64_t count, int64_t stride)
{
    int64_t best = 0;
    for (int64_t c = 1; c < count; c++)
        if (losses[c * stride] < losses[best * stride]) best = c;
    return best;
}

static float best_amax(const trial_job *job, int64_t at, const double *losses, int64_t stride)
{
    const int64_t best = least_of(losses, job->trial->count, stride);
    return factored(job->trial, job->amax[at], job->trial->candidates[best].factor);
}

static void store(const trial_job *job, int64_t index, const tile *t)
{
    const int64_t count = job->trial->count, first = t->begin * job->grid.cols;
    if (job->grain == BY_ROW)
        for (int64_t i = 0; i < t->rows * job->grid.cols; i++)
            job->best[first + i] = best_amax(job, first + i, t->losses + i, job->cells);
    else
        memcpy(job->partial + (index * count + job->first) * job->cells, t->losses + job->first * job->cells,
               (size_t)((job->last - job->first) * job->cells) * sizeof(double));
}

static void try_tiles(void *argument, int64_t begin, int64_t end, int worker)
{
    trial_job *job = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        tile t = {0};
        const int64_t top = i / job->pieces * job->block_rows;
        const size_t nbytes = carve_tile(job, &t);
        t.memory = mq_alloc(nbytes);
        if (t.memory == NULL) {
            atomic_store(&job->rc, MQ_ERR_MEMORY);
            return;
        }
        carve_tile(job, &t);
        memset(t.losses, 0, (size_t)(job->trial->count * job->cells) * sizeof(double));
        t.begin = top + i % job->pieces * TILE;
        t.rows = MQ_MAX(MQ_MIN(MQ_MIN(t.begin + TILE, top + job->block_rows), job->rows) - t.begin, (int64_t)0);
        for (int64_t c = job->first; c < job->last; c++) try_candidate(job, c, &t);
        store(job, i, &t);
        mq_free(t.memory);
    }
}

/* ---- the whole weight ---- */

typedef struct scale_job {
    const trial_job *trial;
    const float *scale;
    char *out;
    _Atomic int rc;
} scale_job;

static void scale_rows(void *argument, int64_t begin, int64_t end, int worker)
{
    scale_job *job = argument;
    const mq_tensor *weight = job->trial->trial->weight;
    const mq_kernels *kernels = job->trial->kernels;
    const int64_t n = job->trial->n;
    char *contiguous = mq_alloc(mq_row_scratch_bytes(weight));
    float *x = mq_alloc_array((size_t)n, sizeof *x);
    (void)worker;
    if (contiguous == NULL || x == NULL) atomic_store(&job->rc, MQ_ERR_MEMORY);
    else
        for (int64_t r = begin; r < end; r++) {
            kernels->to_float[weight->dtype](mq_row_contiguous(weight, r, contiguous), n, x);
            job->trial->ops->multiply(x, x, job->scale, n);
            kernels->from_float[weight->dtype](x, n, job->out + (size_t)(r * n) * mq_dtype_size(weight->dtype));
        }
    mq_free(contiguous);
    mq_free(x);
}

/* The maxima of the weight, its columns scaled first unless scale is NULL. */
static int find_amax(const trial_job *job, const float *scale, float *amax, mq_error *err)
{
    const mq_tensor *weight = job->trial->weight;
    const size_t nbytes = (size_t)(job->rows * job->n) * mq_dtype_size(weight->dtype);
    if (scale == NULL) return mq_amax(weight, &job->grid, amax, err);
    scale_job scaling = {.trial = job, .scale = scale, .out = mq_alloc(nbytes)};
    if (scaling.out == NULL) return mq_fail_memory(err, job->trial->name, nbytes);
    mq_parallel_for(job->rows, mq_rows_per_chunk(job->n), scale_rows, &scaling);
    const mq_tensor scaled = mq_tensor_make(scaling.out, weight->dtype, 2, weight->shape);
    int rc = atomic_load(&scaling.rc) == MQ_OK ? mq_amax(&scaled, &job->grid, amax, err)
                                               : mq_fail_memory(err, job->trial->name, nbytes);
    mq_free(scaling.out);
    return rc;
}

static int has_scales(const mq_trial *trial)
{
    int found = 0;
    for (int64_t c = 0; c < trial->count; c++) found |= trial->candidates[c].scale != NULL;
    return found;
}

static int has_factors(const mq_trial *trial)
{
    int found = 0;
    for (int64_t c = 0; c < trial->count; c++) found |= trial->candidates[c].factor != 1.0f;
    return found;
}

/* Whether rows find the maxima of their blocks by themselves; they multiply them by nothing. */
static int rows_find_amax(const mq_trial *trial)
{
    const mq_quant_spec *spec = trial->spec;
    return spec->scale == MQ_FMT_E8M0 ||
           (spec->scale == MQ_FMT_FP32 && (spec->block_rows == 1 || spec->dynamic) && !has_factors(trial));
}

static int check(const mq_trial *trial, mq_error *err)
{
    char text[96];
    if (trial->weight->ndim != 2)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: expected 2 dimensions", trial->name,
                       mq_tensor_describe(trial->weight, text, sizeof text));
    if ((int)trial->weight->dtype >= MQ_FLOAT_DTYPES)
        return mq_fail(err, MQ_ERR_TYPE, "%s %s: expected float32, bfloat16 or float16", trial->name,
                       mq_tensor_describe(trial->weight, text, sizeof text));
    if (trial->gram != NULL && trial->gram->n != trial->weight->shape[1])
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: the Gram matrix has %lld channels", trial->name,
                       mq_tensor_describe(trial->weight, text, sizeof text), (long long)trial->gram->n);
    if (trial->count < 1) return mq_fail(err, MQ_ERR_VALUE, "%s: no candidates", trial->name);
    if (trial->spec->scale == MQ_FMT_E8M0 && has_factors(trial))
        return mq_fail(err, MQ_ERR_VALUE, "%s: there are no maxima to multiply", trial->name);
    return MQ_OK;
}

static trial_job job_make(const mq_trial *trial, grain grain)
{
    trial_job job = {.trial = trial, .kernels = mq_kernels_get(), .ops = mq_search_ops_get(), .grid = grid_of(trial),
                     .rows = trial->weight->shape[0], .n = trial->weight->shape[1]};
    job.grain = grain == BY_CELL && job.grid.block_rows == 1 ? BY_ROW : grain;
    job.block_rows = job.grain == BY_CELL ? job.grid.block_rows : TILE;
    job.pieces = MQ_CEIL_DIV(job.block_rows, (int64_t)TILE);
    job.tiles = MQ_CEIL_DIV(job.rows, job.block_rows) * job.pieces;
    job.cells = job.grain == WHOLE ? 1 : job.grain == BY_ROW ? TILE * job.grid.cols : job.grid.cols;
    return job;
}

/* amax: NULL where rows find their own. */
static int run(trial_job *job, const float *amax, int64_t first, int64_t last, mq_error *err)
{
    job->amax = amax;
    job->global_amax = job->trial->global_amax;
    for (int64_t i = 0; amax != NULL && job->trial->global_amax == 0.0f && i < job->grid.rows * job->grid.cols; i++)
        job->global_amax = MQ_MAX(job->global_amax, amax[i]);
    job->first = first;
    job->last = last;
    mq_parallel_for(job->tiles, 1, try_tiles, job);
    return atomic_load(&job->rc) == MQ_OK ? MQ_OK : mq_fail_memory(err, job->trial->name, 0);
}

/* Candidates one by one where the maxima of the scaled weight must be known before any row. */
static int run_scaled(trial_job *job, float *amax, mq_error *err)
{
    int rc = MQ_OK;
    for (int64_t c = 0; rc == MQ_OK && c < job->trial->count; c++) {
        rc = find_amax(job, job->trial->candidates[c].scale, amax, err);
        if (rc == MQ_OK) rc = run(job, amax, c, c + 1, err);
    }
    return rc;
}

int mq_trial_losses(const mq_trial *trial, double *losses, mq_error *err)
{
    float *amax = NULL;
    int rc = check(trial, err);
    if (rc != MQ_OK) return rc;
    trial_job job = job_make(trial, WHOLE);
    const size_t count = (size_t)(job.grid.rows * job.grid.cols);
    job.partial = mq_alloc_array((size_t)(job.tiles * trial->count), sizeof *job.partial);
    amax = trial->amax == NULL ? mq_alloc_array(count, sizeof *amax) : NULL;
    if (job.partial == NULL || (amax == NULL && trial->amax == NULL)) {
        rc = mq_fail_memory(err, trial->name, count * sizeof *amax);
        goto done;
    }
    if (trial->amax != NULL) rc = run(&job, trial->amax, 0, trial->count, err);
    else if (has_scales(trial) && rows_find_amax(trial)) rc = run(&job, NULL, 0, trial->count, err);
    else if (has_scales(trial)) rc = run_scaled(&job, amax, err);
    else {
        rc = find_amax(&job, NULL, amax, err);
        if (rc == MQ_OK) rc = run(&job, amax, 0, trial->count, err);
    }
    for (int64_t c = 0; rc == MQ_OK && c < trial->count; c++) {
        losses[c] = 0.0;
        for (int64_t i = 0; i < job.tiles; i++) losses[c] += job.partial[i * trial->count + c];
    }
done:
    mq_free(job.partial);
    mq_free(amax);
    return rc;
}

/* losses of taller cells, summed over their tiles into the first of these. */
static void choose_cells(const trial_job *job, float *amax)
{
    const int64_t size = job->trial->count * job->cells;
    for (int64_t row = 0; row < job->grid.rows; row++) {
        double *sums = job->partial + row * job->pieces * size;
        for (int64_t piece = 1; piece < job->pieces; piece++)
            for (int64_t i = 0; i < size; i++) sums[i] += sums[piece * size + i];
        for (int64_t i = 0; i < job->cells; i++)
            amax[row * job->cells + i] = best_amax(job, row * job->cells + i, sums + i, job->cells);
    }
}

int mq_trial_best_amax(const mq_trial *trial, float *amax, mq_error *err)
{
    int rc = check(trial, err);
    if (rc != MQ_OK) return rc;
    trial_job job = job_make(trial, BY_CELL);
    if (trial->gram != NULL && job.grid.cols > 1 && job.grid.block_cols % trial->gram->block != 0)
        return mq_fail(err, MQ_ERR_VALUE, "%s: the Gram matrix has blocks of %lld columns, the weight's have %lld",
                       trial->name, (long long)trial->gram->block, (long long)job.grid.block_cols);
    if (has_scales(trial) || trial->spec->scale == MQ_FMT_E8M0)
        return mq_fail(err, MQ_ERR_VALUE, "%s: there are no maxima to choose", trial->name);
    const size_t count = (size_t)(job.grid.rows * job.grid.cols);
    const size_t partial = (size_t)(job.tiles * trial->count * job.cells);
    float *start = mq_alloc_array(count, sizeof *start);
    job.partial = job.grain == BY_ROW ? NULL : mq_alloc_array(partial, sizeof *job.partial);
    if (start == NULL || (job.grain != BY_ROW && job.partial == NULL)) {
        rc = mq_fail_memory(err, trial->name, count * sizeof *start);
        goto done;
    }
    if (trial->amax == NULL) rc = mq_amax(trial->weight, &job.grid, start, err);
    else memcpy(start, trial->amax, count * sizeof *start);
    job.best = amax;
    if (rc == MQ_OK) rc = run(&job, start, 0, trial->count, err);
    if (rc == MQ_OK && job.grain != BY_ROW) choose_cells(&job, amax);
done:
    mq_free(job.partial);
    mq_free(start);
    return rc;
}
