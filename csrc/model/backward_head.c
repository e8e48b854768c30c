/* From the losses to the last hidden states. The vocabulary goes by in slices twice: for the log-sum-exp of every row,
 * and for the gradients, which come of the same logits once more. */
#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "model/backward.h"

/* Columns of the vocabulary and rows of hidden states at a time. What comes back is a sum over the vocabulary in which
 * the likely tokens cancel nearly; with slices of 4096 the rounding of its partial sums was ten times the error of
 * everything else. */
enum { SLICE = 512, ROWS = 512 };

typedef struct head_pass {
    mq_backward *back;
    float *norm;                     /* weight of the final norm */
    const mq_tensor *weight;         /* (V, C) */
    float *d_weight;                 /* NULL = not wanted */
    mq_linear_weight slice;
    mq_packed back_slice;
    int64_t first, columns;          /* of the vocabulary */
    int32_t *targets;                /* (rows) */
    mq_loss_row *losses;             /* (rows) */
    float *factors;                  /* (rows): one over how many labels the batch has */
    char *normed;                    /* (ROWS, C) */
    float *logits, *gradient;        /* (ROWS, SLICE); the same memory if nobody needs the products any more */
} head_pass;

static const mq_config *config_of(const head_pass *it)
{
    return &it->back->run->runtime->config;
}

static int read_weights(head_pass *it, const mq_named_tensor *tensors, size_t count, mq_error *err)
{
    const mq_runtime *runtime = it->back->run->runtime;
    const mq_module *norm = mq_runtime_outer(runtime, MQ_ROLE_FINAL_NORM);
    const mq_module *head = mq_runtime_outer(runtime, MQ_ROLE_HEAD);
    const mq_tensor *weight = mq_find_tensor(tensors, count, norm->weight, norm->shape, 1, err);
    if (weight == NULL) return err->code;
    it->weight = mq_find_tensor(tensors, count, head->weight, head->shape, 2, err);
    if (it->weight == NULL) return err->code;
    it->d_weight = mq_backward_wanted(it->back, head->weight);
    it->norm = mq_read_norm(runtime, weight, norm->weight, err);
    return it->norm == NULL ? err->code : MQ_OK;
}

static int begin(head_pass *it, mq_error *err)
{
    const mq_run *run = it->back->run;
    const size_t rows = (size_t)run->rows, slice = (size_t)(ROWS * MQ_MIN((int64_t)SLICE, config_of(it)->vocab_size));
    const int needed = run->runtime->head_observer != NULL || mq_logits_change(config_of(it));
    it->targets = mq_alloc_array(rows, sizeof *it->targets);
    it->losses = mq_alloc_array(rows, sizeof *it->losses);
    it->factors = mq_alloc_array(rows, sizeof *it->factors);
    it->normed = mq_alloc((size_t)(ROWS * config_of(it)->hidden_size) * mq_dtype_size(run->runtime->dtype));
    it->gradient = mq_alloc_array(slice, sizeof *it->gradient);
    it->logits = needed ? mq_alloc_array(slice, sizeof *it->logits) : it->gradient;
    if (it->targets && it->losses && it->factors && it->normed && it->logits && it->gradient) return MQ_OK;
    return mq_fail_memory(err, "the gradients of the head", slice * sizeof *it->gradient);
}

static void end(head_pass *it)
{
    if (it->logits != it->gradient) mq_free(it->logits);
    mq_free(it->gradient);
    mq_free(it->normed);
    mq_free(it->factors);
    mq_free(it->losses);
    mq_free(it->targets);
    mq_free(it->norm);
    mq_free(it->back_slice.data);
    mq_linear_free(&it->slice);
}

static void weigh_batches(head_pass *it, const mq_batch_losses *out)
{
    const mq_run *run = it->back->run;
    for (int64_t b = 0; b < run->batch_count; b++) {
        const mq_batch *batch = &run->batches[b];
        const int64_t last = batch->first + batch->sequences * batch->tokens;
        double sum = 0.0;
        int64_t count = 0;
        for (int64_t i = batch->first; i < last; i++) {
            if (it->targets[i] < 0) continue;
            sum += mq_loss_of(&it->losses[i]);
            count++;
        }
        for (int64_t i = batch->first; i < last; i++) it->factors[i] = count > 0 ? (float)(1.0 / (double)count) : 0.0f;
        out->losses[b] = count > 0 ? sum / (double)count : (double)NAN;
        out->counts[b] = count;
    }
}

static int observe(const head_pass *it, int64_t first, int64_t rows, mq_error *err)
{
    const mq_run *run = it->back->run;
    mq_observer *observer = run->runtime->head_observer;
    mq_observed observed = {
        .input = it->normed, .output = it->logits, .gradient = it->gradient, .dtype = run->runtime->dtype,
        .output_dtype = MQ_F32, .rows = rows, .columns = config_of(it)->hidden_size, .width = it->columns,
        .first = first, .total = run->rows, .column = it->first,
        .outputs = config_of(it)->vocab_size, .expert = -1,
    };
    return observer->see(observer, &observed, err);
}

static int has_labels(const int32_t *targets, int64_t rows)
{
    int found = 0;
    for (int64_t i = 0; i < rows; i++) found |= targets[i] >= 0;
    return found;
}

/* Some rows against the slice: gradient (rows, C) += d_logits * slice. */
static int back_rows(head_pass *it, int64_t first, int64_t rows, mq_error *err)
{
    const mq_backward *back = it->back;
    const mq_dtype dtype = back->run->runtime->dtype;
    const int64_t width = config_of(it)->hidden_size;
    const mq_row_sizes sizes = {.rows = rows, .width = width, .dtype = dtype};
    const mq_loss_slice slice = {.rows = rows, .first = it->first, .columns = it->columns, .ld = it->columns};
    const char *hidden = back->run->hidden + (size_t)(first * width) * mq_dtype_size(dtype);
    int rc = mq_backward_poll(back, err);
    if (rc != MQ_OK || !has_labels(it->targets + first, rows)) return rc;
    mq_rmsnorm_forward(it->normed, hidden, it->norm, config_of(it)->rms_norm_eps, &sizes);
    mq_gemm_args args = {
        .m = rows, .a = it->normed, .a_dtype = dtype, .lda = width, .b = &it->slice.packed, .c = it->logits,
        .c_dtype = MQ_F32, .ldc = it->columns, .alpha = 1.0f,
    };
    mq_gemm_run(&args);
    if (it->logits != it->gradient) memcpy(it->gradient, it->logits, (size_t)(rows * it->columns) * sizeof(float));
    const mq_logits_sizes made = {.rows = rows, .columns = it->columns, .ld = it->columns};
    mq_logits_forward(it->gradient, config_of(it), &made);
    mq_loss_backward(it->gradient, it->losses + first, it->targets + first, it->factors + first, &slice);
    mq_logits_backward(it->gradient, it->logits, config_of(it), &made);
    if (back->run->runtime->head_observer != NULL) rc = observe(it, first, rows, err);
    if (rc == MQ_OK && it->d_weight != NULL)
        rc = mq_linear_weight_backward(it->d_weight + it->first * width, it->gradient, it->normed, it->columns, &sizes,
                                       err);
    if (rc == MQ_OK) mq_linear_backward(back->gradient + first * width, it->gradient, &it->back_slice, 1, rows);
    return rc;
}

static int load_slice(head_pass *it, mq_error *err)
{
    const mq_runtime *runtime = it->back->run->runtime;
    const char *name = mq_runtime_outer(runtime, MQ_ROLE_HEAD)->weight;
    mq_tensor part = *it->weight;
    part.shape[0] = it->columns;
    part.data = (char *)part.data + it->first * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
    mq_linear_free(&it->slice);
    mq_free(it->back_slice.data);
    it->back_slice.data = NULL;
    int rc = mq_linear_load(&it->slice, &part, runtime->gemm, name, err);
    return rc == MQ_OK ? mq_linear_load_backward(&it->back_slice, &part, runtime->gemm, name, err) : rc;
}

static int back_elsewhere(const head_pass *it, mq_error *err)
{
    const mq_runtime *runtime = it->back->run->runtime;
    const mq_back_head_request request = {
        .norm = it->norm, .weight = it->weight, .name = mq_runtime_outer(runtime, MQ_ROLE_HEAD)->weight,
        .d_norm = mq_backward_wanted(it->back, mq_runtime_outer(runtime, MQ_ROLE_FINAL_NORM)->weight),
        .d_weight = it->d_weight, .losses = it->losses, .targets = it->targets, .factors = it->factors,
    };
    return runtime->elsewhere->back_head(runtime->elsewhere, it->back, &request, err);
}

static int back_slices(head_pass *it, mq_error *err)
{
    const mq_run *run = it->back->run;
    const int64_t vocabulary = config_of(it)->vocab_size;
    int rc = MQ_OK;
    memset(it->back->gradient, 0, (size_t)(run->rows * config_of(it)->hidden_size) * sizeof(float));
    for (it->first = 0; rc == MQ_OK && it->first < vocabulary; it->first += SLICE) {
        it->columns = MQ_MIN((int64_t)SLICE, vocabulary - it->first);
        rc = load_slice(it, err);
        for (int64_t first = 0; rc == MQ_OK && first < run->rows; first += ROWS)
            rc = back_rows(it, first, MQ_MIN((int64_t)ROWS, run->rows - first), err);
    }
    return rc;
}

static void back_norm(const head_pass *it)
{
    const mq_run *run = it->back->run;
    const mq_row_sizes sizes = {.rows = run->rows, .width = config_of(it)->hidden_size, .dtype = run->runtime->dtype};
    const double eps = config_of(it)->rms_norm_eps;
    float *gradient = it->back->gradient;
    float *wanted = mq_backward_wanted(it->back, mq_runtime_outer(run->runtime, MQ_ROLE_FINAL_NORM)->weight);
    if (wanted != NULL) mq_rmsnorm_weight_backward(wanted, gradient, run->hidden, eps, &sizes);
    mq_rmsnorm_backward(gradient, gradient, run->hidden, it->norm, eps, 0, &sizes);
}

static int check_start(const mq_backward *back, mq_error *err)
{
    const mq_quantizer *quantizer = back->run->runtime->head_input.quantizer;
    if (back->failed || back->next != back->run->runtime->config.num_hidden_layers ||
        back->run->next_layer != back->next)
        return mq_fail(err, MQ_ERR_STATE, "backward of the head: it comes first, once, on a run through all layers");
    if (quantizer != NULL && mq_quantizer_acts(quantizer))
        return mq_fail(err, MQ_ERR_STATE, "backward: lm_head has a quantizer of activations, which has no gradient");
    return MQ_OK;
}

int mq_backward_head(mq_backward *back, const int32_t *labels, const mq_named_tensor *tensors, size_t count,
                     const mq_batch_losses *out, mq_error *err)
{
    head_pass it = {.back = back};
    int rc = check_start(back, err);
    if (rc != MQ_OK) return rc;
    rc = read_weights(&it, tensors, count, err);
    if (rc == MQ_OK) rc = begin(&it, err);
    if (rc == MQ_OK) {
        mq_run_targets(back->run, labels, it.targets);
        rc = mq_run_row_losses(back->run, it.targets, tensors, count, it.losses, err);
    }
    if (rc == MQ_OK) weigh_batches(&it, out);
    if (rc == MQ_OK && back->run->runtime->elsewhere != NULL) {
        rc = back_elsewhere(&it, err);
    } else if (rc == MQ_OK) {
        rc = back_slices(&it, err);
        if (rc == MQ_OK) back_norm(&it);
    }
    if (rc == MQ_OK) {
        mq_run_release(back->run);      /* a copy for every worker, which only layers with experts still need */
        back->next--;
    } else {
        back->failed = 1;
    }
    end(&it);
    return rc;
}
