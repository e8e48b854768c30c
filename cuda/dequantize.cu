/* Matrices from their parts: element * (scale * scale_2) in float32, rounded to the result's dtype. A thread has eight
 * neighbouring elements; where two rows share bytes, of both. */
#include "schemes.cuh"

/* ---- kernels ---- */

typedef struct dequantize_args {
    void *y;
    int64_t rows, cols, ld;
    int64_t groups;               /* of MQ_GROUP columns, in a row */
    mq_blocks blocks;
    bool aligned;
    const uint8_t *codes;
    int64_t row_bytes;
    const void *scales;
    const float *second;
    const char *scheme;           /* for errors: host memory */
} dequantize_args;

static void describe(const dequantize_args &a, char *out, size_t size)
{
    snprintf(out, size, "scheme %s, y [%lld, %lld] at %p, codes at %p", a.scheme, (long long)a.rows, (long long)a.cols,
             a.y, (const void *)a.codes);
}

template <typename Rule, mq_dtype D>
MQ_DEVICE void dequantize_group(const dequantize_args &a, const mq_place &place, int count, uint64_t word, int bits)
{
    const mq_codec codec = mq_codec_of<Rule::element>();
    const uint32_t mask = (1u << codec.bits) - 1u;
    const int64_t first = mq_place_of(place.row, a.blocks.block_rows).row * a.blocks.cols;
    mq_walk walk = mq_walk_from(place.group * MQ_GROUP, &a.blocks);
    float y[MQ_GROUP], scale = 1.0f;
    for (int i = 0; i < MQ_GROUP; i++) {
        y[i] = 0.0f;
        if (i >= count) continue;
        if (i == 0 || walk.within == 0) scale = mq_stored_scale<Rule::scale>(a.scales, first + walk.block, a.second);
        y[i] = mq_decode((uint32_t)(word >> (i * bits)) & mask, codec) * scale;
        mq_walk_step(&walk, &a.blocks);
    }
    mq_store_group<D>(a.y, place.row * a.ld + place.group * MQ_GROUP, count, a.aligned, y);
}

template <typename Rule, mq_dtype D>
static __global__ void dequantize(dequantize_args a)
{
    constexpr bool pairs = Rule::packing == MQ_PACK_ROW_PAIRS;
    constexpr int bits = mq_stored_bits<Rule>();
    const int64_t index = mq_thread_index();
    if (index >= (pairs ? a.rows / 2 : a.rows) * a.groups) return;
    mq_place place = mq_place_of(index, a.groups);
    const int count = (int)MQ_MIN(a.cols - place.group * MQ_GROUP, (int64_t)MQ_GROUP);
    const uint8_t *from = a.codes + place.row * a.row_bytes + place.group * bits;
    const uint64_t word = mq_load_bytes(from, MQ_CEIL_DIV(count * bits, 8));
    if (pairs) place.row *= 2;
    dequantize_group<Rule, D>(a, place, count, word, bits);
    if (!pairs) return;
    place.row++;
    dequantize_group<Rule, D>(a, place, count, word >> 4, bits);
}

/* ---- launcher ---- */

typedef void (*dequantize_kernel)(dequantize_args);

/* What a code is rounded by does not matter here, so fewer rules are left. */
static const dequantize_kernel kernels[MQ_SCHEME_COUNT][MQ_FLOAT_DTYPES] = {
#define MQ_SCHEME(id, name, element, rows, cols, scale, second, quotient, codes, packing, ...) \
    {dequantize<MQ_RULE(element, scale, F32, PLAIN, packing), MQ_F32>, \
     dequantize<MQ_RULE(element, scale, F32, PLAIN, packing), MQ_BF16>, \
     dequantize<MQ_RULE(element, scale, F32, PLAIN, packing), MQ_F16>},
#include "format/schemes.def"
#undef MQ_SCHEME
};

int mq_cuda_block_dequantize(const mq_cuda_block_job *job, void *stream, mq_error *err)
{
    mq_scheme_plan plan;
    int rc = mq_cuda_check_matrix(&job->y, "y", err);
    if (rc == MQ_OK) rc = mq_cuda_plan(job, &job->y, true, &plan, err);
    if (rc != MQ_OK || job->y.rows == 0 || job->y.cols == 0) return rc;
    const int64_t groups = MQ_CEIL_DIV(job->y.cols, (int64_t)MQ_GROUP);
    const dequantize_args a = {job->y.data, job->y.rows, job->y.cols, job->y.ld, groups, plan.blocks,
                               mq_is_aligned(&job->y), job->codes, plan.row_bytes, job->scales, job->scale_2,
                               plan.scheme->name};
    const mq_launch launch = {"dequantize", mq_grid_for((plan.pairs ? a.rows / 2 : a.rows) * groups), stream, err};
    return mq_launch_kernel(&launch, kernels[job->scheme][job->y.dtype], a);
}
