/* What a job on a matrix asks for, checked. No kernels. */
#include "schemes.cuh"

/* The shapes that mq_block_shapes (csrc/quant/block.h) refuses, which has the words for users; here they are a
 * mistake of the caller. */
static const char *wrong_shape(const mq_scheme_plan *plan, const mq_cuda_matrix *x, int64_t block_cols)
{
    const mq_scheme_row *scheme = plan->scheme;
    if (block_cols > 0 && scheme->block_cols == 0) return "the scheme has no blocks along rows";
    if (scheme->block_rows == 1 && scheme->scale != MQ_FMT_FP32 && x->cols % plan->blocks.block_cols != 0)
        return "the last block of a row is short";
    if (scheme->packing == MQ_PACK_ROW && plan->blocks.block_cols % MQ_GROUP != 0)
        return "blocks do not end at whole bytes";
    if (scheme->packing == MQ_PACK_ROW_PAIRS && x->rows % 2 != 0) return "rows are packed in pairs";
    return NULL;
}

int mq_cuda_plan(const mq_cuda_block_job *job, const mq_cuda_matrix *of, bool stores, mq_scheme_plan *plan,
                 mq_error *err)
{
    if ((unsigned)job->scheme >= (unsigned)MQ_SCHEME_COUNT)
        return mq_fail(err, MQ_ERR_VALUE, "scheme %d does not exist", (int)job->scheme);
    const mq_scheme_row *scheme = mq_scheme_get(job->scheme);
    const int64_t block_cols = job->block_cols > 0 ? job->block_cols : scheme->block_cols;
    plan->scheme = scheme;
    plan->blocks = mq_blocks_of(of, scheme->block_rows, block_cols);
    plan->bits = mq_format_get(scheme->element)->codec.bits;
    plan->pairs = stores && scheme->packing == MQ_PACK_ROW_PAIRS;
    plan->row_bytes = scheme->packing == MQ_PACK_ROW ? MQ_CEIL_DIV(of->cols * plan->bits, (int64_t)8) : of->cols;
    plan->largest = mq_format_max(scheme->element);
    plan->divisor = job->second_divisor > 0.0f ? job->second_divisor : scheme->second_divisor;
    const char *wrong = stores ? wrong_shape(plan, of, job->block_cols) : NULL;
    if (wrong == NULL && stores && (job->codes == NULL || job->scales == NULL)) wrong = "codes and scales are needed";
    if (wrong == NULL && stores && scheme->second_divisor != 0.0f && job->scale_2 == NULL) wrong = "scale_2 is needed";
    if (wrong == NULL) return MQ_OK;
    char text[128];
    mq_cuda_describe_matrix(of, text, sizeof text);
    return mq_fail(err, MQ_ERR_VALUE, "scheme %s of %s: %s", scheme->name, text, wrong);
}
