/* mq_output_score on a device: what each candidate makes of a linear's input, and how far that is from what the linear
 * made, weighed by the gradient. Weights come one candidate after the other, in the place of the one before; or, where
 * chunks would have them sent again and there is room, they stay. */
#include "backend/device_backward.h"
#include "core/alloc.h"

/* ---- candidates ---- */

void mq_device_cut_candidates(mq_arena *arena, int64_t count, int stay, size_t nbytes, mq_device_candidates *out)
{
    const size_t stride = MQ_ROUND_UP(nbytes, (size_t)MQ_ALIGN_DEVICE);
    *out = (mq_device_candidates){.memory = mq_arena_take(arena, stay ? stride * (size_t)count : nbytes),
                                  .stride = stay ? stride : 0};
}

int mq_device_load_candidate(const mq_device_back *it, mq_device_candidates *all, size_t index, const mq_tensor *w,
                             mq_cuda_matrix *weight)
{
    mq_device *device = it->device;
    const mq_backend *backend = device->backend;
    int rc = MQ_OK;
    *weight = (mq_cuda_matrix){all->memory + index * all->stride, it->context->dtype, w->shape[0], w->shape[1],
                               w->shape[1]};
    if ((int64_t)index < all->there) return rc;
    if (all->stride == 0) {
        rc = backend->event_record(device->loaded, device->compute, it->err);
        if (rc == MQ_OK) rc = backend->event_after(device->loaded, device->copies, it->err);
    }
    if (rc == MQ_OK) rc = mq_device_upload(device, w, weight, it->err);
    if (rc == MQ_OK) rc = mq_finding_weight(device, weight, "the weight of a candidate", it->err);
    if (rc == MQ_OK && all->stride != 0) all->there = (int64_t)index + 1;
    return rc;
}

int mq_device_as_candidate(const mq_device_back *it, const mq_quantizer *quantizer, size_t place, void *memory,
                           mq_cuda_matrix *in)
{
    mq_device *device = it->device;
    const size_t last = MQ_QUANTIZERS - 1;      /* layers have none at work meanwhile */
    mq_cuda_matrix out = *in;
    if (quantizer == NULL || !mq_quantizer_acts(quantizer)) return MQ_OK;
    out.data = memory;
    const mq_device_rows rows = {.x = *in, .y = out, .steps = MQ_QUANT_ALL};
    *in = out;
    return mq_device_quantizer_apply(&device->quantizers[MQ_MIN(place, last)], device->backend, device->index,
                                     quantizer, &rows, device->compute, it->err);
}

/* ---- linears ---- */

void mq_device_cut_scores(mq_arena *arena, const mq_device_score_sizes *sizes, mq_device_scores *out)
{
    out->count = sizes->candidates;
    mq_device_cut_candidates(arena, 1, 0, sizes->nbytes, &out->one);
    out->bias = mq_arena_take(arena, (size_t)sizes->outputs * sizes->output_size);
    out->input = mq_arena_take(arena, (size_t)(sizes->rows * sizes->columns) * sizes->size);
    out->output = mq_arena_take(arena, (size_t)(sizes->rows * sizes->outputs) * sizes->output_size);
    out->sums = mq_arena_take(arena, (size_t)(sizes->rows * sizes->candidates) * sizeof *out->sums);
}

/* Where the linear's candidates are. */
static mq_device_candidates *place_of(const mq_device_back *it, const mq_output_score *score)
{
    mq_device_scores *scores = &it->scratch->scores;
    for (int role = 0; it->layer != NULL && role < MQ_ROLE_COUNT; role++)
        if (it->layer->linears[role].observer == &score->observer && scores->kept[role].memory != NULL)
            return &scores->kept[role];
    return &scores->one;
}

/* The rows of the candidate's weight that make the observed columns. */
static int load_weight(const mq_device_back *it, const mq_output_score *score, size_t index,
                       const mq_observed *observed, mq_cuda_matrix *weight)
{
    mq_tensor part = score->candidates[index].weight;
    part.shape[0] = observed->width;
    part.data = (char *)part.data + observed->column * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
    const int rc = mq_device_load_candidate(it, place_of(it, score), index, &part, weight);
    return rc == MQ_OK ? mq_device_back_ready(it->device, it->err) : rc;
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
    int rc = load_weight(it, score, index, observed, &product.b);
    if (rc == MQ_OK) rc = mq_device_as_candidate(it, score->candidates[index].input, index, room->input, &product.a);
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
