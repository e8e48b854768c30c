#include "calib/gptq.h"

#include <float.h>
#include <stdatomic.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/gemm.h"
#include "kernels/scales.h"
#include "kernels/search_ops.h"
#include "quant/rows.h"
#include "quant/scale.h"

enum { TILE = 64 };                  /* rows that go through all columns together: whole groups of lanes */

typedef struct gptq_run {
    const mq_gptq_job *job;
    const mq_kernels *kernels;
    const mq_search_ops *ops;
    mq_grid grid;                    /* of the maxima */
    mq_second_level second;
    float largest;
    int64_t rows, n, block, blocks;  /* block: columns of one product */
    mq_packed *panels;               /* [blocks]: U's columns of the block, down to the block */
    char *memory;
    float *scale;                    /* [grid.rows, grid.cols]: what elements are divided by */
    float *amax;
    char *out;
    double *loss;                    /* [tiles] */
    _Atomic int rc;
} gptq_run;

/* Memory of one tile. */
typedef struct tile {
    char *memory;
    int64_t begin, rows;
    float *weight, *error;           /* [TILE, n], in the order of processing; error: of the columns done */
    float *feedback;                 /* [TILE, block] */
    float *target, *lanes, *scale;   /* [block][MQ_LANES] */
    float *row;                      /* [n] */
    void *contiguous;
} tile;

static int is_two_level(const gptq_run *run)
{
    return run->job->quantizer->spec.scale == MQ_FMT_FP8_E4M3;
}

static void make_two_levels(const gptq_run *run, const float *amax, int64_t count, float *scale)
{
    const float second = mq_second_scale(&run->second, run->largest);
    mq_static_amax(&run->second, run->largest, amax, count, scale);
    for (int64_t i = 0; i < count; i++) {   /* the number that the maximum stands for, as it will be read */
        const uint32_t code = mq_encode(scale[i] / (run->largest * second), MQ_CODEC(FP8_E4M3));
        scale[i] = mq_decode(code, MQ_CODEC(FP8_E4M3)) * second;
    }
}

/* Scales of maxima, as the export makes them. What is fed to a group of zeros would be rounded by a scale that stands
 * for nothing: divided by the largest number, it stays zeros. */
static void make_scales(const gptq_run *run, const float *amax, int64_t count, float *scale)
{
    if (is_two_level(run)) make_two_levels(run, amax, count, scale);
    else mq_scales_fp32(amax, count, run->largest, scale);
    for (int64_t i = 0; i < count; i++)
        if (amax[i] == 0.0f) scale[i] = FLT_MAX;
}

static int64_t column_at(const gptq_run *run, int64_t k)
{
    return run->job->order != NULL ? run->job->order[k] : k;
}

/* ---- a tile ---- */

static char *carve(char **at, int64_t count)
{
    char *part = *at;
    *at += MQ_ROUND_UP((size_t)count * sizeof(float), (size_t)MQ_ALIGNMENT);
    return part;
}

static size_t carve_tile(const gptq_run *run, tile *t)
{
    char *at = t->memory;
    t->weight = (float *)(void *)carve(&at, TILE * run->n);
    t->error = (float *)(void *)carve(&at, TILE * run->n);
    t->feedback = (float *)(void *)carve(&at, TILE * run->block);
    t->target = (float *)(void *)carve(&at, MQ_LANES * run->block);
    t->lanes = (float *)(void *)carve(&at, MQ_LANES * run->block);
    t->scale = (float *)(void *)carve(&at, MQ_LANES * run->block);
    t->row = (float *)(void *)carve(&at, run->n);
    t->contiguous = carve(&at, (int64_t)MQ_CEIL_DIV(mq_row_scratch_bytes(run->job->weight), sizeof(float)));
    return (size_t)(at - t->memory);
}

/* Rows beyond the last are zeros. */
static void read_weight(const gptq_run *run, tile *t)
{
    const mq_tensor *weight = run->job->weight;
    memset(t->weight, 0, (size_t)(TILE * run->n) * sizeof *t->weight);
    for (int64_t r = 0; r < t->rows; r++) {
        const void *x = mq_row_contiguous(weight, t->begin + r, t->contiguous);
        run->kernels->to_float[weight->dtype](x, run->n, t->row);
        for (int64_t k = 0; k < run->n; k++) t->weight[r * run->n + k] = t->row[column_at(run, k)];
    }
}

static void write_weight(const gptq_run *run, tile *t)
{
    const mq_dtype dtype = run->job->weight->dtype;
    for (int64_t r = 0; r < t->rows; r++) {
        const float *weight = t->weight + r * run->n, *error = t->error + r * run->n;
        for (int64_t k = 0; k < run->n; k++) t->row[column_at(run, k)] = weight[k] - error[k];
        char *to = run->out + (size_t)((t->begin + r) * run->n) * mq_dtype_size(dtype);
        run->kernels->from_float[dtype](t->row, run->n, to);
    }
}

static float *scale_of(const gptq_run *run, int64_t row, int64_t column)
{
    row = MQ_MIN(row, run->rows - 1);
    return run->scale + row / run->grid.block_rows * run->grid.cols + column / run->grid.block_cols;
}

/* The maxima of the group of columns that begins at `column` (of the block at `first`), as the weights are now. */
static void regroup(const gptq_run *run, tile *t, int64_t first, int64_t column, int64_t group, int64_t row)
{
    const int64_t end = MQ_MIN(column + group, run->n);
    for (int64_t lane = 0; lane < MQ_LANES; lane++) {
        const int64_t at = t->begin + row + lane;
        if (at >= run->rows || row + lane >= t->rows) break;
        float amax = 0.0f;
        for (int64_t k = column; k < end; k++) {
            const float x = t->target[(k - first) * MQ_LANES + lane];
            amax = MQ_MAX(amax, x < 0.0f ? -x : x);
        }
        run->amax[at * run->grid.cols + column / group] = amax;
        make_scales(run, &amax, 1, scale_of(run, at, column));
    }
}

static void fill_scales(const gptq_run *run, tile *t, int64_t first, int64_t begin, int64_t end, int64_t row)
{
    for (int64_t k = begin; k < end; k++)
        for (int64_t lane = 0; lane < MQ_LANES; lane++)
            t->scale[(k - first) * MQ_LANES + lane] = *scale_of(run, t->begin + row + lane, column_at(run, k));
}

/* Sixteen rows through the columns of a block. */
static void round_lanes(const gptq_run *run, tile *t, int64_t first, int64_t row, float *loss)
{
    const int64_t count = MQ_MIN(run->block, run->n - first), n = run->n;
    const int64_t step = run->job->regroup ? run->grid.block_cols : count;
    mq_feedback_tile lanes = {
        .count = count, .target = t->target, .error = t->lanes, .scale = t->scale,
        .feedback = run->job->factor + first * n + first, .ld = n, .curvature = run->job->curvature + first,
        .loss = loss,
    };
    for (int64_t k = 0; k < count; k++)
        for (int64_t lane = 0; lane < MQ_LANES; lane++) {
            const int64_t at = (row + lane) * n + first + k;
            t->lanes[k * MQ_LANES + lane] = t->weight[at];
            t->target[k * MQ_LANES + lane] = t->weight[at] + t->feedback[(row + lane) * run->block + k];
        }
    for (lanes.begin = 0; lanes.begin < count; lanes.begin = lanes.end) {
        lanes.end = MQ_MIN(lanes.begin + step, count);
        if (run->job->regroup) regroup(run, t, first, first + lanes.begin, step, row);
        fill_scales(run, t, first, first + lanes.begin, first + lanes.end, row);
        run->ops->feedback[run->job->quantizer->spec.scheme](&lanes);
    }
    for (int64_t k = 0; k < count; k++)
        for (int64_t lane = 0; lane < MQ_LANES; lane++)
            t->error[(row + lane) * n + first + k] = t->lanes[k * MQ_LANES + lane];
}

/* What the columns before a block add to its own. */
static void feed_block(const gptq_run *run, tile *t, int64_t block)
{
    const mq_gemm_args args = {
        .m = TILE, .a = t->error, .a_dtype = MQ_F32, .lda = run->n, .b = &run->panels[block], .c = t->feedback,
        .c_dtype = MQ_F32, .ldc = run->block, .alpha = 1.0f,
    };
    if (block == 0) memset(t->feedback, 0, (size_t)(TILE * run->block) * sizeof *t->feedback);
    else mq_gemm_run(&args);
}

static void round_tiles(void *argument, int64_t begin, int64_t end, int worker)
{
    gptq_run *run = argument;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        tile t = {.begin = i * TILE, .rows = MQ_MIN((int64_t)TILE, run->rows - i * TILE)};
        float loss[MQ_LANES] = {0.0f};
        t.memory = mq_alloc(carve_tile(run, &t));
        if (t.memory == NULL) {
            atomic_store(&run->rc, MQ_ERR_MEMORY);
            return;
        }
        carve_tile(run, &t);
        read_weight(run, &t);
        for (int64_t block = 0; block < run->blocks; block++) {
            feed_block(run, &t, block);
            for (int64_t row = 0; row < t.rows; row += MQ_LANES) round_lanes(run, &t, block * run->block, row, loss);
        }
        write_weight(run, &t);
        run->loss[i] = 0.0;
        for (int lane = 0; lane < MQ_LANES; lane++) run->loss[i] += (double)loss[lane];
        mq_free(t.memory);
    }
}

/* ---- the whole weight ---- */

static int check(const mq_gptq_job *job, mq_error *err)
{
    const mq_quant_spec *spec = &job->quantizer->spec;
    const mq_tensor *weight = job->weight;
    char text[96];
    if (weight->ndim != 2 || (int)weight->dtype >= MQ_FLOAT_DTYPES)
        return mq_fail(err, MQ_ERR_VALUE, "%s %s: expected a float matrix", job->name,
                       mq_tensor_describe(weight, text, sizeof text));
    if (spec->scheme < 0 || spec->scale == MQ_FMT_E8M0 || spec->dynamic)
        return mq_fail(err, MQ_ERR_VALUE, "%s: GPTQ takes a scheme of `modelq formats` whose scales are known before: "
                       "INT4, INT8, FP8, or NVFP4 in static blocks", job->name);
    if (job->regroup && (spec->block_rows != 1 || spec->block_cols == 0 || job->order != NULL))
        return mq_fail(err, MQ_ERR_VALUE, "%s: only blocks along rows, in the order of the columns, can be scaled anew",
                       job->name);
    const mq_grid grid = mq_grid_make(weight->shape[0], weight->shape[1], spec->block_rows, spec->block_cols);
    if (job->quantizer->amax == NULL || job->quantizer->amax_count != grid.rows * grid.cols)
        return mq_fail(err, MQ_ERR_VALUE, "%s: the quantizer has %lld maxima, GPTQ needs %lld; calibrate first",
                       job->name, (long long)(job->quantizer->amax != NULL ? job->quantizer->amax_count : 0),
                       (long long)(grid.rows * grid.cols));
    return mq_quantizer_ready(job->quantizer, weight->shape[0], weight->shape[1], job->name, err);
}

/* Columns of a product: whole blocks of scales where these are made on the way. */
static int64_t block_of(const mq_gptq_job *job, int64_t group)
{
    int64_t block = MQ_MAX(MQ_MIN(job->block_size, (int64_t)MQ_GPTQ_MAX_BLOCK), (int64_t)1);
    return job->regroup ? MQ_ROUND_UP(block, group) : block;
}

static int pack_panels(gptq_run *run, mq_error *err)
{
    size_t nbytes = 0;
    for (int64_t i = 1; i < run->blocks; i++)
        nbytes += MQ_ROUND_UP(mq_gemm_packed_size(MQ_GEMM_F32, run->block, i * run->block), (size_t)MQ_ALIGNMENT);
    run->panels = mq_alloc_zeroed((size_t)run->blocks * sizeof *run->panels);
    run->memory = mq_alloc(nbytes);
    if (run->panels == NULL || run->memory == NULL) return mq_fail_memory(err, run->job->name, nbytes);
    char *at = run->memory;
    for (int64_t i = 1; i < run->blocks; i++) {
        const int64_t first = i * run->block, count = MQ_MIN(run->block, run->n - first);
        run->panels[i].data = at;
        mq_gemm_pack_transposed(MQ_GEMM_F32, run->job->factor + first, MQ_F32, count, first, run->n, &run->panels[i]);
        at += MQ_ROUND_UP(mq_gemm_packed_size(MQ_GEMM_F32, run->block, first), (size_t)MQ_ALIGNMENT);
    }
    return MQ_OK;
}

static int prepare(gptq_run *run, mq_error *err)
{
    const mq_quantizer *quantizer = run->job->quantizer;
    const int64_t count = run->grid.rows * run->grid.cols, tiles = MQ_CEIL_DIV(run->rows, (int64_t)TILE);
    run->scale = mq_alloc_array((size_t)count, sizeof *run->scale);
    run->loss = mq_alloc_array((size_t)tiles, sizeof *run->loss);
    if (run->scale == NULL || run->loss == NULL)
        return mq_fail_memory(err, run->job->name, (size_t)count * sizeof *run->scale);
    memcpy(run->amax, quantizer->amax, (size_t)count * sizeof *run->amax);
    run->second = (mq_second_level){.amax = quantizer->global_amax, .divisor = quantizer->spec.second_divisor};
    for (int64_t i = 0; run->second.divisor != 0.0f && quantizer->global_amax == 0.0f && i < count; i++)
        run->second.amax = MQ_MAX(run->second.amax, quantizer->amax[i]);
    make_scales(run, run->amax, count, run->scale);
    return pack_panels(run, err);
}

int mq_gptq(const mq_gptq_job *job, mq_tensor *out, float *amax, double *loss, mq_error *err)
{
    int rc = check(job, err);
    if (rc != MQ_OK) return rc;
    const mq_quant_spec *spec = &job->quantizer->spec;
    gptq_run run = {
        .job = job, .kernels = mq_kernels_get(), .ops = mq_search_ops_get(), .rows = job->weight->shape[0],
        .n = job->weight->shape[1], .out = out->data, .amax = amax,
        .grid = mq_grid_make(job->weight->shape[0], job->weight->shape[1], spec->block_rows, spec->block_cols),
        .largest = mq_format_max(mq_scheme_get((mq_scheme)spec->scheme)->element),
    };
    run.block = block_of(job, run.grid.block_cols);
    run.blocks = MQ_CEIL_DIV(run.n, run.block);
    rc = prepare(&run, err);
    if (rc == MQ_OK) mq_parallel_for(MQ_CEIL_DIV(run.rows, (int64_t)TILE), 1, round_tiles, &run);
    if (rc == MQ_OK && atomic_load(&run.rc) != MQ_OK) rc = mq_fail_memory(err, job->name, 0);
    *loss = 0.0;
    for (int64_t i = 0; rc == MQ_OK && i < MQ_CEIL_DIV(run.rows, (int64_t)TILE); i++) *loss += run.loss[i];
    mq_free(run.scale);
    mq_free(run.loss);
    mq_free(run.panels);
    mq_free(run.memory);
    return rc;
}
