/* From the last hidden states to what is read off them: logits and loss. The head's weight is packed a slice of the
 * vocabulary at a time, and each slice meets all rows, so that neither all logits nor the packed head ever exist. */
#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"
#include "model/run.h"

enum { SLICE = 4096, ROWS = 128 };  /* columns of the vocabulary, rows of hidden states per task */

typedef struct head_job {
    mq_run *run;
    float *norm;                    /* weight of the final norm */
    const mq_tensor *weight;        /* (V, C) */
    const mq_stored_weight *stored; /* not NULL: what stands for it, and weight is without data */
    mq_tensor numbers;              /* made of stored; owned */
    mq_linear_weight slice;
    int64_t first_row, rows;        /* of the run */
    int64_t first, columns;         /* of the vocabulary */
    char *scratch;                  /* per worker: normed rows, and logits where they are not the result */
    size_t scratch_size;
    int workers;
    float *logits;                  /* (rows, V), or NULL */
    mq_loss_row *losses;            /* (rows), or NULL */
    const int32_t *labels;          /* (rows): what each row predicts, < 0 = nothing */
    _Atomic int rc;
} head_job;

static mq_config const *config_of(const head_job *job)
{
    return &job->run->runtime->config;
}

static size_t normed_size(const head_job *job)
{
    return MQ_ROUND_UP((size_t)(ROWS * config_of(job)->hidden_size) * mq_dtype_size(job->run->runtime->dtype),
                       (size_t)MQ_ALIGNMENT);
}

static int check_end(const mq_run *run, const char *what, mq_error *err)
{
    if (run->next_layer == run->runtime->config.num_hidden_layers) return MQ_OK;
    return mq_fail(err, MQ_ERR_STATE, "%s: the run has not been through all layers (next is %lld of %lld)", what,
                   (long long)run->next_layer, (long long)run->runtime->config.num_hidden_layers);
}

static int read_norm(head_job *job, const mq_named_tensor *tensors, size_t count, mq_error *err)
{
    const mq_module *norm = mq_runtime_outer(job->run->runtime, MQ_ROLE_FINAL_NORM);
    const mq_tensor *weight = mq_find_tensor(tensors, count, norm->weight, norm->shape, 1, err);
    if (weight == NULL) return err->code;
    job->norm = mq_read_norm(job->run->runtime, weight, norm->weight, err);
    return job->norm == NULL ? err->code : MQ_OK;
}

static int head_begin(head_job *job, const mq_named_tensor *tensors, size_t count, mq_error *err)
{
    const mq_module *head = mq_runtime_outer(job->run->runtime, MQ_ROLE_HEAD);
    int64_t columns = MQ_MIN((int64_t)SLICE, config_of(job)->vocab_size);
    int rc = read_norm(job, tensors, count, err);
    if (rc != MQ_OK) return rc;
    const mq_named_tensor *found = mq_find_weight(tensors, count, head, err);
    if (found == NULL) return err->code;
    job->weight = &found->tensor;
    job->stored = found->stored;
    if (job->run->runtime->head_input.quantizer != NULL) {
        rc = mq_quantizer_ready(job->run->runtime->head_input.quantizer, -1, config_of(job)->hidden_size,
                                "lm_head.input_quantizer", err);
        if (rc != MQ_OK) return rc;
    }
    job->workers = mq_pool_max_threads();
    job->scratch_size = normed_size(job) + (job->logits ? 0 : (size_t)(ROWS * columns) * sizeof(float));
    job->scratch = mq_alloc_array((size_t)job->workers, job->scratch_size);
    return job->scratch ? MQ_OK : mq_fail_memory(err, "scratch of the head", job->scratch_size * (size_t)job->workers);
}

static void head_end(head_job *job)
{
    mq_linear_free(&job->slice);
    mq_free(job->numbers.data);
    mq_free(job->norm);
    mq_free(job->scratch);
}

/* normed (rows, C) = norm(hidden): the input of lm_head. */
static void norm_rows(const head_job *job, char *normed, int64_t first, int64_t rows)
{
    const mq_runtime *runtime = job->run->runtime;
    int64_t width = runtime->config.hidden_size;
    mq_row_sizes sizes = {.rows = rows, .width = width, .dtype = runtime->dtype};
    const char *hidden = job->run->hidden + (size_t)((job->first_row + first) * width) * mq_dtype_size(runtime->dtype);
    mq_rmsnorm_forward(normed, hidden, job->norm, runtime->config.rms_norm_eps, &sizes);
}

static void quantize_rows(const mq_runtime *runtime, char *normed, int64_t rows, mq_quant_steps steps)
{
    const mq_quantizer *quantizer = runtime->head_input.quantizer;
    int64_t width = runtime->config.hidden_size;
    if (quantizer == NULL || !mq_quantizer_acts(quantizer)) return;
    mq_quant_rows quant = {.x = normed, .y = normed, .dtype = runtime->dtype, .rows = rows, .cols = width, .ldx = width,
                           .ldy = width, .steps = steps};
    mq_quantizer_apply(quantizer, &quant);
}

static void head_rows(head_job *job, char *scratch, int64_t first, int64_t rows)
{
    const mq_runtime *runtime = job->run->runtime;
    int64_t ld = job->logits ? runtime->config.vocab_size : job->columns;
    float *logits = job->logits ? job->logits + first * ld + job->first : (float *)(void *)(scratch + normed_size(job));
    mq_loss_slice slice = {.rows = rows, .first = job->first, .columns = job->columns, .ld = ld};
    norm_rows(job, scratch, first, rows);
    quantize_rows(runtime, scratch, rows, MQ_QUANT_ALL);
    mq_gemm_args args = {
        .m = rows, .a = scratch, .a_dtype = runtime->dtype, .lda = runtime->config.hidden_size, .b = &job->slice.packed,
        .c = logits, .c_dtype = MQ_F32, .ldc = ld, .alpha = 1.0f,
    };
    mq_gemm_run(&args);
    const mq_logits_sizes sizes = {.rows = rows, .columns = job->columns, .ld = ld};
    mq_logits_forward(logits, &runtime->config, &sizes);
    if (job->losses != NULL) mq_loss_forward(job->losses + first, logits, job->labels + first, &slice);
}

static void head_tasks(void *argument, int64_t begin, int64_t end, int worker)
{
    head_job *job = argument;
    if (atomic_load_explicit(&job->rc, memory_order_relaxed) != MQ_OK) return;
    if (worker == 0 && job->run->poll != NULL) {
        int rc = job->run->poll(job->run->poll_context);
        if (rc != MQ_OK) atomic_store(&job->rc, rc);
        if (rc != MQ_OK) return;
    }
    head_rows(job, job->scratch + (size_t)worker * job->scratch_size, begin, end - begin);
}

/* All rows of the job against all slices of the vocabulary. */
static int head_forward(head_job *job, mq_error *err)
{
    const mq_module *head = mq_runtime_outer(job->run->runtime, MQ_ROLE_HEAD);
    int64_t vocabulary = config_of(job)->vocab_size;
    mq_elsewhere *there = job->run->runtime->elsewhere;
    if (there != NULL) {
        const mq_head_request request = {
            .run = job->run, .norm = job->norm, .weight = job->weight, .stored = job->stored, .name = head->weight,
            .rows = job->rows, .first_row = job->first_row, .logits = job->logits, .losses = job->losses,
            .labels = job->labels,
        };
        return there->head(there, &request, err);
    }
    if (job->stored != NULL) {
        const int made = mq_stored_numbers(job->stored, &job->numbers, head->weight, err);
        if (made != MQ_OK) return made;
        job->weight = &job->numbers;
    }
    for (job->first = 0; job->first < vocabulary; job->first += SLICE) {
        mq_tensor part = *job->weight;
        job->columns = part.shape[0] = MQ_MIN((int64_t)SLICE, vocabulary - job->first);
        part.data = (char *)part.data + job->first * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
        mq_linear_free(&job->slice);
        int rc = mq_linear_load(&job->slice, &part, job->run->runtime->gemm, head->weight, err);
        if (rc != MQ_OK) return rc;
        mq_parallel_for(job->rows, ROWS, head_tasks, job);
        rc = atomic_load(&job->rc);
        if (rc != MQ_OK) return mq_fail(err, rc, "interrupted");
    }
    return MQ_OK;
}

int mq_run_logits(mq_run *run, int64_t batch, const mq_named_tensor *tensors, size_t count, float *out, mq_error *err)
{
    const mq_batch *rows = &run->batches[batch];
    head_job job = {.run = run, .logits = out, .first_row = rows->first, .rows = rows->sequences * rows->tokens};
    int rc = check_end(run, "logits", err);
    if (rc == MQ_OK) rc = head_begin(&job, tensors, count, err);
    if (rc == MQ_OK) rc = head_forward(&job, err);
    head_end(&job);
    return rc;
}

/* By default the token after it, if neither is padding. */
void mq_run_targets(const mq_run *run, const int32_t *labels, int32_t *targets)
{
    for (int64_t s = 0; s < run->sequence_count; s++) {
        const mq_sequence *sequence = &run->sequences[s];
        int64_t last = sequence->first + sequence->tokens - 1;
        targets[last] = -1;
        for (int64_t i = sequence->first; i < last; i++) {
            int hidden = labels == NULL && run->mask != NULL && !(run->mask[i] && run->mask[i + 1]);
            targets[i] = hidden ? -1 : (labels ? labels : run->ids)[i + 1];
        }
    }
}

static void sum_losses(const mq_run *run, const mq_loss_row *losses, const int32_t *targets, double *sums,
                       int64_t *counts)
{
    for (int64_t s = 0; s < run->sequence_count; s++) {
        const mq_sequence *sequence = &run->sequences[s];
        sums[s] = 0.0;
        counts[s] = 0;
        for (int64_t i = sequence->first; i < sequence->first + sequence->tokens; i++) {
            if (targets[i] < 0) continue;
            sums[s] += mq_loss_of(&losses[i]);
            counts[s]++;
        }
    }
}

int mq_run_row_losses(mq_run *run, const int32_t *targets, const mq_named_tensor *tensors, size_t count,
                      mq_loss_row *losses, mq_error *err)
{
    head_job job = {.run = run, .rows = run->rows, .labels = targets, .losses = losses};
    int rc = check_end(run, "loss", err);
    if (rc == MQ_OK) rc = head_begin(&job, tensors, count, err);
    if (rc == MQ_OK) {
        mq_loss_begin(losses, run->rows);
        rc = head_forward(&job, err);
    }
    head_end(&job);
    return rc;
}

int mq_run_loss(mq_run *run, const int32_t *labels, const mq_named_tensor *tensors, size_t count, double *sums,
                int64_t *counts, mq_error *err)
{
    size_t rows = (size_t)run->rows;
    int32_t *targets = mq_alloc_array(rows, sizeof *targets);
    mq_loss_row *losses = mq_alloc_array(rows, sizeof *losses);
    int rc = targets == NULL || losses == NULL ? mq_fail_memory(err, "the losses", rows * sizeof *losses) : MQ_OK;
    if (rc == MQ_OK) {
        mq_run_targets(run, labels, targets);
        rc = mq_run_row_losses(run, targets, tensors, count, losses, err);
    }
    if (rc == MQ_OK) sum_losses(run, losses, targets, sums, counts);
    mq_free(losses);
    mq_free(targets);
    return rc;
}

static int collect_rows(head_job *job, mq_point *point, mq_error *err)
{
    mq_elsewhere *there = job->run->runtime->elsewhere;
    const mq_runtime *runtime = job->run->runtime;
    const uint8_t *mask = job->run->count_padding ? NULL : job->run->mask;
    int64_t width = runtime->config.hidden_size;
    int rc = MQ_OK;
    if (there != NULL) return there->head_statistics(there, job->run, job->norm, ROWS, err);
    for (int64_t first = 0; rc == MQ_OK && first < job->run->rows; first += ROWS) {
        int64_t rows = MQ_MIN((int64_t)ROWS, job->run->rows - first);
        mq_calib_rows part = {.x = job->scratch, .dtype = runtime->dtype, .rows = rows, .width = width, .ld = width,
                              .mask = mask ? mask + first : NULL, .chunk = first};
        norm_rows(job, job->scratch, first, rows);
        quantize_rows(runtime, job->scratch, rows, point->watch_quantized ? MQ_QUANT_ALL : MQ_QUANT_PREPARE);
        rc = mq_point_collect(point, &part, err);
        if (rc == MQ_OK) rc = mq_points_settle(&point, 1, err);
    }
    return rc;
}

int mq_run_finish(mq_run *run, const mq_named_tensor *tensors, size_t count, mq_error *err)
{
    mq_point *point = &run->runtime->head_input;
    head_job job = {.run = run};
    int rc = check_end(run, "finish", err);
    if (rc != MQ_OK || !mq_point_has_calib(point)) return rc;
    rc = read_norm(&job, tensors, count, err);
    if (rc != MQ_OK) return rc;
    job.scratch = mq_alloc(normed_size(&job));
    rc = job.scratch ? mq_points_begin(&point, 1, &run->spare, err)
                     : mq_fail_memory(err, "scratch of the head", normed_size(&job));
    if (rc == MQ_OK) {
        rc = collect_rows(&job, point, err);
        int ended = mq_points_end(&point, 1, rc == MQ_OK, err);
        if (rc == MQ_OK) rc = ended;
    }
    head_end(&job);
    return rc;
}

int mq_run_hidden(const mq_run *run, int64_t batch, float *out, mq_error *err)
{
    const mq_batch *rows = &run->batches[batch];
    int64_t width = run->runtime->config.hidden_size;
    if (run->next_layer < 0) return mq_fail(err, MQ_ERR_STATE, "hidden: embed comes first");
    const char *from = run->hidden + (size_t)(rows->first * width) * mq_dtype_size(run->runtime->dtype);
    mq_row_ops_of(run->runtime->dtype)->to_f32(out, from, rows->sequences * rows->tokens * width);
    return MQ_OK;
}
