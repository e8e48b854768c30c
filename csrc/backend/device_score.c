/* mq_output_score on a device: what each candidate makes of a linear's input, and how far that is from what the linear
 * made, weighed by the gradient. Weights come one candidate after the other. */
#include "backend/device_backward.h"
#include "core/alloc.h"

void mq_device_cut_scores(mq_arena *arena, const mq_device_score_sizes *sizes, mq_device_scores *out)
{
    out->count = sizes->candidates;
    out->weight = mq_arena_take(arena, sizes->nbytes);
    out->bias = mq_arena_take(arena, (size_t)sizes->outputs * sizes->output_size);
    out->input = mq_arena_take(arena, (size_t)(sizes->rows * sizes->columns) * sizes->size);
    out->output = mq_arena_take(arena, (size_t)(sizes->rows * sizes->outputs) * sizes->output_size);
    out->sums = mq_arena_take(arena, (size_t)(sizes->rows * sizes->candidates) * sizeof *out->sums);
}

/* The rows of the candidate's weight that make the observed columns, after what still reads the one before. */
static int load_weight(const mq_device_back *it, const mq_score_candidate *candidate, const mq_observed *observed,
                       mq_cuda_matrix *weight)
{
    mq_device *device = it->device;
    const mq_backend *backend = device->backend;
    mq_tensor part = candidate->weight;
    part.shape[0] = observed->width;
    part.data = (char *)part.data + observed->column * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
    *weight = (mq_cuda_matrix){it->scratch->scores.weight, observed->dtype, observed->width, observed->columns,
                               observed->columns};
    int rc = backend->event_record(device->loaded, device->compute, it->err);
    if (rc == MQ_OK) rc = backend->event_after(device->loaded, device->copies, it->err);
    if (rc == MQ_OK) rc = mq_device_upload(device, &part, weight, it->err);
    if (rc == MQ_OK) rc = mq_finding_weight(device, weight, "the weight of a candidate", it->err);
    return rc == MQ_OK ? mq_device_back_ready(device, it->err) : rc;
}

/* The linear's own, in the dtype of its outputs, through that of its inputs. */
static int load_bias(const mq_device_back *it, const mq_output_score *score, const mq_observed *observed)
{
    const size_t nbytes = (size_t)observed->width * mq_dtype_size(observed->output_dtype);
    float *rounded = mq_read_vector(&score->bias, observed->dtype, "a candidate's bias", it->err);
    void *made = mq_alloc(nbytes);
    int rc = rounded == NULL ? it->err->code : made == NULL ? mq_fail_memory(it->err, "a bias", nbytes) : MQ_OK;
    if (rc == MQ_OK) {
        const mq_tensor part = mq_tensor_make(rounded + observed->column, MQ_F32, 1, &observed->width);
        mq_read_row(made, observed->output_dtype, &part, 0);
        rc = it->device->backend->copy(it->scratch->scores.bias, made, nbytes, it->device->compute, it->err);
    }
    mq_free(made);
    mq_free(rounded);
    return rc;
}

/* The observed input as the candidate has it. */
static int quantize(const mq_device_back *it, const mq_output_score *score, size_t index, mq_cuda_matrix *input)
{
    mq_device *device = it->device;
    const mq_quantizer *quantizer = score->candidates[index].input;
    const size_t place = MQ_MIN(index, (size_t)MQ_QUANTIZERS - 1);     /* layers have none at work meanwhile */
    mq_cuda_matrix out = *input;
    if (quantizer == NULL || !mq_quantizer_acts(quantizer)) return MQ_OK;
    out.data = it->scratch->scores.input;
    const mq_device_rows rows = {.x = *input, .y = out, .steps = MQ_QUANT_ALL};
    *input = out;
    return mq_device_quantizer_apply(&device->quantizers[place], device->backend, device->index, quantizer, &rows,
                                     device->compute, it->err);
}

/* sums (rows) of one candidate. */
static int compare(const mq_device_back *it, const mq_output_score *score, size_t index, const mq_observed *observed)
{
    mq_device *device = it->device;
    const mq_device_scores *room = &it->scratch->scores;
    const mq_cuda_matrix was = {(void *)(uintptr_t)observed->output, observed->output_dtype, observed->rows,
                                observed->width, observed->width};
    mq_cuda_gemm_job product = {
        .a = {(void *)(uintptr_t)observed->input, observed->dtype, observed->rows, observed->columns,
              observed->columns},
        .out = was, .transpose_b = 1, .alpha = 1.0f, .bias = score->bias.data != NULL ? room->bias : NULL,
        .workspace = device->workspace,
    };
    product.out.data = room->output;
    const mq_cuda_score_job job = {.gradient = observed->gradient, .made = product.out, .was = was,
                                   .sums = room->sums + (int64_t)index * observed->rows};
    int rc = load_weight(it, &score->candidates[index], observed, &product.b);
    if (rc == MQ_OK) rc = quantize(it, score, index, &product.a);
    if (rc == MQ_OK) rc = device->backend->gemm_run(device->gemm, &product, device->compute, it->err);
    return rc == MQ_OK ? device->backend->score(&job, device->compute, it->err) : rc;
}

int mq_device_score(const mq_device_back *it, mq_output_score *score, const mq_observed *observed)
{
    const mq_backend *backend = it->device->backend;
    const int64_t rows = observed->rows;
    const size_t nbytes = score->count * (size_t)rows * sizeof(double);
    int rc = mq_output_score_check(score, observed, it->err);
    if (rc == MQ_OK && score->bias.data != NULL) rc = load_bias(it, score, observed);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++) rc = compare(it, score, i, observed);
    if (rc != MQ_OK) return rc;
    double *sums = mq_alloc(nbytes);
    if (sums == NULL) return mq_fail_memory(it->err, "scores", nbytes);
    rc = backend->copy(sums, it->scratch->scores.sums, nbytes, it->device->compute, it->err);
    if (rc == MQ_OK) rc = backend->stream_wait(it->device->compute, it->err);
    for (size_t i = 0; rc == MQ_OK && i < score->count; i++)
        for (int64_t row = 0; row < rows; row++) score->candidates[i].score += sums[(int64_t)i * rows + row];
    mq_free(sums);
    return rc;
}
