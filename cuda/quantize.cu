/* Codes and scales of a matrix by a row of schemes.def. A thread has eight neighbouring elements, whose codes are whole
 * bytes however narrow they are; where two rows share bytes it has those eight columns of both. */
#include "amax.cuh"
#include "quantize_wide.cuh"

/* ---- kernels ---- */

template <typename Rule, mq_dtype D>
static __global__ void quantize(mq_quantize_args a)
{
    constexpr bool pairs = Rule::packing == MQ_PACK_ROW_PAIRS;
    constexpr int bits = mq_stored_bits<Rule>();
    uint32_t codes[MQ_GROUP];
    float scales[MQ_GROUP];
    uint64_t word = 0;
    int count;
    mq_place place = mq_group_of(pairs ? a.rows / 2 : a.rows, a.groups, a.cols, &count);
    uint8_t *to = a.codes + place.row * a.row_bytes + place.group * bits;
    if (pairs) place.row *= 2;
    mq_quantize_group<Rule, D>(a, place, count, codes, scales);
    for (int i = 0; i < MQ_GROUP; i++) word |= (uint64_t)codes[i] << (i * bits);
    if (pairs) {
        place.row++;
        mq_quantize_group<Rule, D>(a, place, count, codes, scales);
        for (int i = 0; i < MQ_GROUP; i++) word |= (uint64_t)codes[i] << (i * bits + 4);
    }
    mq_store_bytes(to, word, MQ_CEIL_DIV(count * bits, 8));
}

/* Codes of eight elements as they lie next to each other; where two rows share bytes, from bit `first` of each on. */
template <typename Rule>
MQ_DEVICE uint64_t pack(const uint32_t *codes, int first)
{
    uint64_t word = 0;
    for (int i = 0; i < MQ_GROUP; i++) word |= (uint64_t)codes[i] << (i * mq_stored_bits<Rule>() + first);
    return word;
}

/* A row's sixteen columns into words: one for each half. */
template <typename Rule, mq_dtype D>
MQ_DEVICE void quantize_row(const mq_quantize_args &a, const mq_wide_place &at, int first, uint64_t *words)
{
    mq_group_words<D> groups[2];
    uint32_t largest;
    const float scale = mq_wide_load<Rule, D>(a, at, groups, &largest);
    for (int half = 0; half < 2; half++) {
        float x[MQ_GROUP];
        uint32_t codes[MQ_GROUP];
        for (int i = 0; i < MQ_GROUP; i++) x[i] = mq_widen<D>(groups[half].words[i]);
        mq_wide_codes<Rule, D>(x, scale, largest, codes);
        words[half] |= pack<Rule>(codes, first);
    }
}

template <typename Rule, mq_dtype D>
static __global__ void quantize_wide(mq_quantize_args a)
{
    constexpr bool pairs = Rule::packing == MQ_PACK_ROW_PAIRS;
    constexpr int bits = mq_stored_bits<Rule>();
    const int64_t rows = pairs ? a.rows / 2 : a.rows, step = pairs ? 2 : 1;
    const mq_wide_place at = mq_wide_place_of(a, rows, step, 0);
    uint8_t *to = a.codes + at.row / step * a.row_bytes + at.col * bits / 8;
    uint64_t words[2] = {0, 0};
    quantize_row<Rule, D>(a, at, 0, words);
    if constexpr (pairs) quantize_row<Rule, D>(a, mq_wide_place_of(a, rows, step, 1), 4, words);
    if (!at.works) return;
    if (bits == 8 && (uintptr_t)to % 16 == 0) {
        const uint4 both = {(uint32_t)words[0], (uint32_t)(words[0] >> 32), (uint32_t)words[1],
                            (uint32_t)(words[1] >> 32)};
        *(uint4 *)to = both;
    } else if (bits == 4) {
        mq_store_bytes(to, words[0] | words[1] << 32, 8);
    } else {
        for (int half = 0; half < 2; half++) mq_store_bytes(to + half * bits, words[half], bits);
    }
}

mq_quantize_kernel mq_quantize_kernel_of(mq_scheme scheme, mq_dtype dtype, bool wide)
{
#define MQ_OF_DTYPES(kernel, ...) \
    {kernel<__VA_ARGS__, MQ_F32>, kernel<__VA_ARGS__, MQ_BF16>, kernel<__VA_ARGS__, MQ_F16>}
    static const mq_quantize_kernel table[MQ_SCHEME_COUNT][2][MQ_FLOAT_DTYPES] = {
#define MQ_SCHEME(id, name, element, rows, cols, scale, second, quotient, codes, packing, ...) \
        {MQ_OF_DTYPES(quantize, MQ_RULE(element, scale, quotient, codes, packing)), \
         MQ_OF_DTYPES(quantize_wide, MQ_RULE(element, scale, quotient, codes, packing))},
#include "format/schemes.def"
#undef MQ_SCHEME
    };
    return table[scheme][wide][dtype];
}

/* The tensor's scale of a two-level scheme, and maxima that make the scales which calibration chose. */
typedef struct second_args {
    const float *tensor;          /* [1] amax */
    const float *block_amax;      /* [count], or NULL */
    float *second, *out;          /* [1], [count] */
    int64_t count;
    float divisor, largest;
} second_args;

static void describe(const second_args &a, char *out, size_t size)
{
    snprintf(out, size, "%lld block maxima at %p, divisor %g", (long long)a.count, (const void *)a.block_amax,
             (double)a.divisor);
}

static __global__ void second_level(second_args a)
{
    const int64_t i = mq_thread_index();
    if (i == 0) *a.second = mq_second_scale_of(*a.tensor, a.divisor, a.largest);
    if (i < a.count) a.out[i] = mq_static_amax_of(a.block_amax[i], *a.tensor, a.divisor, a.largest);
}

/* ---- launchers ---- */

static void describe(const mq_quantize_args &a, char *out, size_t size)
{
    snprintf(out, size, "scheme %s, x [%lld, %lld] at %p, blocks of [%lld, %lld], %s", a.scheme, (long long)a.rows,
             (long long)a.cols, a.x, (long long)a.blocks.block_rows, (long long)a.blocks.block_cols,
             a.amax != NULL ? "with amax" : "which find their amax");
}

/* Whether sixteens of columns lie in one block. */
static bool is_wide(const mq_scheme_plan *plan, const mq_cuda_matrix *x)
{
    return x->cols % MQ_WIDE == 0 && plan->blocks.block_cols % MQ_WIDE == 0;
}

/* Threads that have a block between them, if they can find its maximum by exchange within a warp; else 0. */
static int lanes_of(const mq_scheme_plan *plan, const mq_cuda_matrix *x)
{
    const int64_t block = plan->blocks.block_cols, lanes = block / (is_wide(plan, x) ? (int)MQ_WIDE : (int)MQ_GROUP);
    const bool fits = block % MQ_GROUP == 0 && lanes >= 1 && lanes <= MQ_WARP && (lanes & (lanes - 1)) == 0 &&
                      x->cols % block == 0;
    return plan->scheme->block_rows == 1 && fits ? (int)lanes : 0;
}

enum { HEAD_FLOATS = 4 };   /* of the workspace: the tensor's amax and scale; then an amax per block, aligned */

static bool needs_block_amax(const mq_cuda_block_job *job, const mq_scheme_plan *plan)
{
    if (plan->scheme->second_divisor != 0.0f && job->block_amax != NULL) return true;
    if (plan->scheme->second_divisor == 0.0f && job->amax != NULL) return false;
    return lanes_of(plan, &job->x) == 0;
}

size_t mq_cuda_block_workspace(const mq_cuda_block_job *job)
{
    mq_scheme_plan plan;
    mq_error err;
    if (mq_cuda_plan(job, &job->x, false, &plan, &err) != MQ_OK) return 0;
    const int64_t blocks = needs_block_amax(job, &plan) ? plan.blocks.rows * plan.blocks.cols : 0;
    if (plan.scheme->second_divisor == 0.0f && blocks == 0) return 0;
    return (size_t)(HEAD_FLOATS + blocks) * sizeof(float);
}

/* The whole tensor's scale into args->second, and what calibration chose for blocks into args->amax. */
static int find_second(const mq_cuda_block_job *job, const mq_scheme_plan *plan, mq_quantize_args *args, void *stream,
                       mq_error *err)
{
    float *workspace = (float *)job->workspace, *second = job->scale_2 != NULL ? job->scale_2 : workspace + 1;
    second_args a = {job->amax, job->block_amax, second, NULL, 0, plan->divisor, plan->largest};
    if (job->block_amax != NULL) {
        a.count = plan->blocks.rows * plan->blocks.cols;
        a.out = workspace + HEAD_FLOATS;
        args->amax = a.out;
    }
    if (a.tensor == NULL) {
        const mq_cuda_matrix chosen = {(void *)job->block_amax, MQ_F32, 1, a.count, a.count};
        const mq_cuda_matrix *of = job->block_amax != NULL ? &chosen : &job->x;
        const mq_blocks whole = mq_blocks_of(of, 0, 0);
        const int rc = mq_cuda_amax_blocks(of, &whole, workspace, stream, err);
        if (rc != MQ_OK) return rc;
        a.tensor = workspace;
    }
    args->second = second;
    const mq_launch launch = {"second_level", mq_grid_for(MQ_MAX(a.count, (int64_t)1)), stream, err};
    return mq_launch_kernel(&launch, second_level, a);
}

static int run(const mq_cuda_block_job *job, const mq_scheme_plan *plan, bool fake, void *stream, mq_error *err)
{
    mq_quantize_args a = {};
    int rc = MQ_OK;
    if (mq_cuda_block_workspace(job) > job->workspace_nbytes)
        return mq_fail(err, MQ_ERR_VALUE, "scheme %s needs a workspace of %zu bytes, not %zu", plan->scheme->name,
                       mq_cuda_block_workspace(job), job->workspace_nbytes);
    a.x = job->x.data;
    a.rows = job->x.rows;
    a.cols = job->x.cols;
    a.ldx = job->x.ld;
    a.wide = is_wide(plan, &job->x);
    a.groups = MQ_CEIL_DIV(job->x.cols, (int64_t)(a.wide ? (int)MQ_WIDE : (int)MQ_GROUP));
    a.blocks = plan->blocks;
    a.small = a.rows * a.groups <= (int64_t)UINT32_MAX - MQ_THREADS && a.blocks.block_rows == 1;
    a.by_groups = mq_divider_by(a.groups);
    a.by_block = mq_divider_by(MQ_MAX(a.blocks.block_cols / MQ_WIDE, (int64_t)1));
    a.lanes = lanes_of(plan, &job->x);
    a.aligned_x = mq_is_aligned(&job->x);
    a.bad_row = (unsigned long long *)job->bad_row;
    a.scheme = plan->scheme->name;
    if (plan->scheme->second_divisor != 0.0f) rc = find_second(job, plan, &a, stream, err);
    else if (job->amax != NULL) a.amax = job->amax;
    if (rc == MQ_OK && a.amax == NULL && a.lanes == 0) {
        float *amax = (float *)job->workspace + HEAD_FLOATS;
        rc = mq_cuda_amax_blocks(&job->x, &plan->blocks, amax, stream, err);
        a.amax = amax;
    }
    if (rc != MQ_OK) return rc;
    const int64_t threads = (plan->pairs ? a.rows / 2 : a.rows) * a.groups;
    const mq_launch launch = {fake ? "fake_quantize" : "quantize", mq_grid_for(threads), stream, err};
    if (fake) {
        a.y = job->y.data;
        a.ldy = job->y.ld;
        a.aligned_y = mq_is_aligned(&job->y);
        return mq_launch_kernel(&launch, mq_fake_quantize_kernel_of(job->scheme, job->x.dtype, a.wide), a);
    }
    a.codes = job->codes;
    a.row_bytes = plan->row_bytes;
    a.scales = job->scales;
    return mq_launch_kernel(&launch, mq_quantize_kernel_of(job->scheme, job->x.dtype, a.wide), a);
}

int mq_cuda_block_quantize(const mq_cuda_block_job *job, void *stream, mq_error *err)
{
    mq_scheme_plan plan;
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_plan(job, &job->x, true, &plan, err);
    if (rc != MQ_OK || job->x.rows == 0 || job->x.cols == 0) return rc;
    return run(job, &plan, false, stream, err);
}

int mq_cuda_block_fake_quantize(const mq_cuda_block_job *job, void *stream, mq_error *err)
{
    mq_scheme_plan plan;
    int rc = mq_cuda_check_matrix(&job->x, "x", err);
    if (rc == MQ_OK) rc = mq_cuda_check_same(&job->x, &job->y, "y", err);
    if (rc == MQ_OK) rc = mq_cuda_plan(job, &job->x, false, &plan, err);
    if (rc != MQ_OK || job->x.rows == 0 || job->x.cols == 0) return rc;
    return run(job, &plan, true, stream, err);
}
