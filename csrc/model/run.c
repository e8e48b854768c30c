#include "model/run.h"

#include <string.h>

#include "core/alloc.h"
#include "core/pool.h"
#include "kernels/row_ops.h"

/* Rows that a unit takes, by whole sequences: enough for the product to use each weight it loads many times. */
enum { UNIT_ROWS = 512, SETTLE_ROWS = 8192 };

static int check_input(const mq_runtime *runtime, const mq_batch_input *input, int64_t batch, mq_error *err)
{
    int64_t vocabulary = runtime->config.vocab_size;
    if (input->sequences <= 0 || input->tokens <= 0)
        return mq_fail(err, MQ_ERR_VALUE, "batch %lld is empty: shape [%lld, %lld]", (long long)batch,
                       (long long)input->sequences, (long long)input->tokens);
    for (int64_t i = 0; i < input->sequences * input->tokens; i++) {
        if (input->ids[i] >= 0 && input->ids[i] < vocabulary) continue;
        return mq_fail(err, MQ_ERR_VALUE,
                       "batch %lld, position [%lld, %lld]: token id %lld is outside the vocabulary of %lld",
                       (long long)batch, (long long)(i / input->tokens), (long long)(i % input->tokens),
                       (long long)input->ids[i], (long long)vocabulary);
    }
    return MQ_OK;
}

static int count_rows(mq_run *run, const mq_batch_input *batches, int64_t count, mq_error *err)
{
    for (int64_t i = 0; i < count; i++) {
        int rc = check_input(run->runtime, &batches[i], i, err);
        if (rc != MQ_OK) return rc;
        run->rows += batches[i].sequences * batches[i].tokens;
        run->sequence_count += batches[i].sequences;
        run->longest = MQ_MAX(run->longest, batches[i].tokens);
    }
    run->batch_count = count;
    return MQ_OK;
}

static int make_ropes(mq_run *run, const mq_batch_input *batches, mq_error *err)
{
    const mq_config *config = &run->runtime->config;
    int rc = mq_ropes_init(&run->ropes, config, run->runtime->layer_ropes, run->longest, err);
    for (int64_t i = 0; rc == MQ_OK && run->runtime->elsewhere != NULL && i < run->batch_count; i++)
        rc = mq_ropes_stretch(&run->ropes, config, batches[i].tokens, err);
    return rc;
}

static int allocate(mq_run *run, const mq_batch_input *batches, int masked, mq_error *err)
{
    size_t rows = (size_t)run->rows, sequences = (size_t)run->sequence_count;
    size_t width = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    run->batches = mq_alloc_array((size_t)run->batch_count, sizeof *run->batches);
    run->sequences = mq_alloc_array(sequences, sizeof *run->sequences);
    run->units = mq_alloc_array(sequences, sizeof *run->units);
    run->ids = mq_alloc_array(rows, sizeof *run->ids);
    run->mask = masked ? mq_alloc_array(rows, 1) : NULL;
    run->hidden = mq_alloc_array(rows, width);
    if (run->batches == NULL || run->sequences == NULL || run->units == NULL || run->ids == NULL ||
        (masked && run->mask == NULL) || run->hidden == NULL)
        return mq_fail_memory(err, "the hidden states of the recorded batches", rows * width);
    return run->cache != NULL ? MQ_OK : make_ropes(run, batches, err);
}

static void record(mq_run *run, const mq_batch_input *batches)
{
    int64_t row = 0, sequence = 0;
    for (int64_t b = 0; b < run->batch_count; b++) {
        const mq_batch_input *input = &batches[b];
        int64_t rows = input->sequences * input->tokens;
        run->batches[b] = (mq_batch){.sequences = input->sequences, .tokens = input->tokens, .first = row};
        for (int64_t i = 0; i < input->sequences; i++)
            run->sequences[sequence++] = (mq_sequence){.first = row + i * input->tokens, .tokens = input->tokens,
                                                       .batch = b, .index = i, .slot = input->slot};
        for (int64_t i = 0; i < rows; i++) run->ids[row + i] = (int32_t)input->ids[i];
        if (run->mask != NULL) {
            if (input->mask == NULL) memset(run->mask + row, 1, (size_t)rows);
            else memcpy(run->mask + row, input->mask, (size_t)rows);
        }
        row += rows;
    }
}

/* Short sequences travel together. */
static void make_units(mq_run *run)
{
    mq_unit *unit = NULL;
    for (int64_t i = 0; i < run->sequence_count; i++) {
        const mq_sequence *sequence = &run->sequences[i];
        if (unit == NULL || unit->rows + sequence->tokens > UNIT_ROWS) {
            unit = &run->units[run->unit_count++];
            *unit = (mq_unit){.first_sequence = i, .first = sequence->first};
        }
        unit->sequences++;
        unit->rows += sequence->tokens;
        run->largest_unit = MQ_MAX(run->largest_unit, unit->rows);
    }
}

int mq_run_init(mq_run *run, mq_runtime *runtime, const mq_batch_input *batches, int64_t count, int count_padding,
                mq_cache *cache, mq_error *err)
{
    int masked = 0;
    memset(run, 0, sizeof *run);
    run->runtime = runtime;
    run->count_padding = count_padding;
    run->cache = cache;
    run->next_layer = run->dispatch.layer = -1;
    if (count <= 0) return mq_fail(err, MQ_ERR_VALUE, "there are no batches to run");
    if (mq_spare_init(&run->spare) != 0) return mq_fail_memory(err, "a lock", sizeof run->spare);
    int rc = count_rows(run, batches, count, err);
    for (int64_t i = 0; i < count; i++) masked |= batches[i].mask != NULL;
    if (rc == MQ_OK) rc = allocate(run, batches, masked, err);
    if (rc != MQ_OK) {
        mq_run_free(run);
        return rc;
    }
    record(run, batches);
    make_units(run);
    return MQ_OK;
}

void mq_run_release(mq_run *run)
{
    for (int i = 0; i < run->workers; i++) mq_free(run->scratch[i].memory);
    mq_free(run->scratch);
    run->scratch = NULL;
    run->workers = 0;
}

void mq_run_free(mq_run *run)
{
    mq_elsewhere *there = run->runtime != NULL ? run->runtime->elsewhere : NULL;
    if (there != NULL) there->forget_run(there, run);
    mq_run_release(run);
    mq_dispatch_free(&run->dispatch);
    mq_ropes_free(&run->ropes);
    mq_free(run->batches);
    mq_free(run->sequences);
    mq_free(run->units);
    mq_free(run->ids);
    mq_free(run->mask);
    mq_free(run->hidden);
    mq_spare_free(&run->spare);
    memset(run, 0, sizeof *run);
}

size_t mq_run_nbytes(const mq_run *run)
{
    size_t rows = (size_t)run->rows;
    size_t width = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    size_t total = rows * (width + sizeof *run->ids + (run->mask ? 1 : 0)) + mq_ropes_nbytes(&run->ropes);
    total += (size_t)run->sequence_count * (sizeof *run->sequences + sizeof *run->units);
    for (int i = 0; i < run->workers; i++) total += run->scratch[i].nbytes;
    return total + mq_dispatch_nbytes(run);
}

mq_layer_context mq_run_context(const mq_run *run)
{
    return (mq_layer_context){
        .config = &run->runtime->config, .dtype = run->runtime->dtype, .sequences = run->sequences,
        .ropes = run->cache ? &run->cache->ropes : &run->ropes, .sequence_count = run->sequence_count,
        .key_mask = run->mask, .count_mask = run->count_padding ? NULL : run->mask, .routes = &run->dispatch.routes,
        .round_routes = run->runtime->dtype == MQ_BF16 && !(run->runtime->family->flags & MQ_FAMILY_ROUTER_F32),
        .sums = run->dispatch.sums, .rank = run->runtime->rank,
        .fused = (run->runtime->family->flags & MQ_FAMILY_FUSED) != 0,
        .shared_inputs = (run->runtime->family->flags & MQ_FAMILY_SHARED_INPUTS) != 0, .cache = run->cache,
        .cache_layer = run->next_layer,
    };
}

int mq_run_reserve(mq_run *run, mq_error *err)
{
    int wanted = mq_pool_max_threads();
    mq_layer_context context = mq_run_context(run);
    mq_scratch probe = {0};
    size_t nbytes = mq_scratch_init(&probe, &context, run->largest_unit, run->longest);
    if (run->workers == wanted && run->scratch[0].nbytes >= nbytes) return MQ_OK;
    mq_run_release(run);
    run->scratch = mq_alloc_zeroed((size_t)wanted * sizeof *run->scratch);
    if (run->scratch == NULL) return mq_fail_memory(err, "scratch", (size_t)wanted * sizeof *run->scratch);
    run->workers = wanted;
    for (int i = 0; i < wanted; i++) {
        run->scratch[i].memory = mq_alloc(nbytes);
        if (run->scratch[i].memory == NULL) {
            mq_run_release(run);
            return mq_fail_memory(err, "scratch", nbytes * (size_t)wanted);
        }
        mq_scratch_init(&run->scratch[i], &context, run->largest_unit, run->longest);
    }
    return MQ_OK;
}

double mq_embedding_factor(const mq_runtime *runtime)
{
    float factor = (float)runtime->config.embedding_multiplier, rounded;
    if (!runtime->config.embedding_multiplier_rounded) return (double)factor;
    mq_row_ops_of(runtime->dtype)->from_f32(&rounded, &factor, 1);
    mq_row_ops_of(runtime->dtype)->to_f32(&factor, &rounded, 1);
    return (double)factor;
}

int mq_run_embed(mq_run *run, const mq_named_tensor *tensors, size_t count, mq_error *err)
{
    const mq_module *module = mq_runtime_outer(run->runtime, MQ_ROLE_EMBED);
    const mq_tensor *weight = mq_find_tensor(tensors, count, module->weight, module->shape, 2, err);
    mq_row_sizes sizes = {.rows = run->rows, .width = run->runtime->config.hidden_size, .dtype = run->runtime->dtype};
    if (weight == NULL) return err->code;
    mq_embed_forward(run->hidden, run->ids, weight, &sizes);
    mq_scale_forward(run->hidden, mq_embedding_factor(run->runtime), &sizes);
    run->next_layer = 0;
    run->dispatch.layer = -1;
    return MQ_OK;
}

size_t mq_run_state_nbytes(const mq_run *run)
{
    return (size_t)(run->rows * run->runtime->config.hidden_size) * mq_dtype_size(run->runtime->dtype);
}

int mq_run_restore(mq_run *run, const void *state, int64_t layer, mq_error *err)
{
    if (layer < 0 || layer > run->runtime->config.num_hidden_layers)
        return mq_fail(err, MQ_ERR_VALUE, "restore: layer %lld of a model of %lld", (long long)layer,
                       (long long)run->runtime->config.num_hidden_layers);
    memcpy(run->hidden, state, mq_run_state_nbytes(run));
    run->next_layer = layer;
    run->dispatch.layer = -1;
    return MQ_OK;
}

int mq_run_poll(const mq_run *run, mq_error *err)
{
    const int rc = run->poll != NULL ? run->poll(run->poll_context) : MQ_OK;
    if (rc != MQ_OK) err->code = rc;
    return rc;
}

int mq_run_meanwhile(mq_run *run, mq_error *err)
{
    int more = 0;
    if (run->meanwhile == NULL) return MQ_OK;
    const int rc = run->meanwhile(run->meanwhile_context, &more, err);
    if (rc != MQ_OK || !more) run->meanwhile = NULL;
    return rc;
}

typedef struct step_job {
    mq_run *run;
    mq_step_fn step;
    void *context;
    int64_t first;                /* step of index 0 */
    _Atomic int rc;               /* the first failure */
    pthread_mutex_t mutex;
    mq_error *err;
} step_job;

static void note_failure(step_job *job, int rc, const mq_error *err)
{
    int expected = MQ_OK;
    pthread_mutex_lock(&job->mutex);
    if (atomic_compare_exchange_strong(&job->rc, &expected, rc)) {
        *job->err = *err;
        job->err->code = rc;
    }
    pthread_mutex_unlock(&job->mutex);
}

static void run_step(step_job *job, int64_t index, int worker)
{
    mq_run *run = job->run;
    mq_error err = {.code = MQ_OK, .text = ""};
    int rc = MQ_OK;
    if (atomic_load_explicit(&job->rc, memory_order_relaxed) != MQ_OK) return;
    /* Worker 0 is the thread that called: the only one that may talk to the caller. */
    if (worker == 0 && run->poll != NULL) rc = run->poll(run->poll_context);
    if (worker >= run->workers) rc = mq_fail(&err, MQ_ERR_STATE, "the thread pool grew during a run");
    if (rc == MQ_OK) rc = job->step(run, job->context, job->first + index, &run->scratch[worker], &err);
    if (rc != MQ_OK) note_failure(job, rc, &err);
}

static void run_range(void *argument, int64_t begin, int64_t end, int worker)
{
    for (int64_t i = begin; i < end; i++) run_step(argument, i, worker);
}

static int run_steps(step_job *job, int64_t count)
{
    int64_t threads = mq_pool_threads(), shared = count / threads * threads;
    if (threads > 1) mq_parallel_for(shared, 1, run_range, job);
    else shared = 0;
    for (int64_t i = shared; i < count; i++) run_step(job, i, 0);
    return atomic_load(&job->rc);
}

/* Statistics that are sums need the order of the data: now and then the workers meet, and what they collected is
 * settled, over all of them. How often has no influence on the result. */
static int run_and_settle(step_job *job, const mq_steps *steps, mq_point **points, size_t count)
{
    const int64_t least = 2 * mq_pool_threads(), wanted = SETTLE_ROWS / steps->rows;
    const int64_t between = mq_points_must_settle(points, count) ? MQ_MAX(least, wanted) : steps->count;
    int rc = MQ_OK;
    for (job->first = 0; rc == MQ_OK && job->first < steps->count; job->first += between) {
        rc = run_steps(job, MQ_MIN(between, steps->count - job->first));
        if (rc == MQ_OK) rc = mq_points_settle(points, count, job->err);
    }
    return rc;
}

int mq_run_steps(mq_run *run, mq_layer *layer, const mq_steps *steps, mq_error *err)
{
    step_job job = {.run = run, .step = steps->step, .context = steps->context, .err = err};
    mq_point *points[MQ_LAYER_MAX_POINTS];
    const size_t count = mq_layer_points(layer, points);
    if (pthread_mutex_init(&job.mutex, NULL) != 0) return mq_fail_memory(err, "a lock", sizeof job.mutex);
    int rc = mq_points_begin(points, count, &run->spare, err);
    if (rc == MQ_OK) {
        rc = run_and_settle(&job, steps, points, count);
        int ended = mq_points_end(points, count, rc == MQ_OK, err);
        if (rc == MQ_OK) rc = ended;
    }
    pthread_mutex_destroy(&job.mutex);
    return rc;
}

static int forward_unit(mq_run *run, void *layer, int64_t index, const mq_scratch *scratch, mq_error *err)
{
    const mq_unit *unit = &run->units[index];
    mq_layer_context context = mq_run_context(run);
    size_t stride = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    return mq_layer_forward(layer, &context, unit, run->hidden + (size_t)unit->first * stride, scratch, err);
}

static int check_order(const mq_run *run, int64_t layer, mq_error *err)
{
    if (layer < 0 || layer >= run->runtime->config.num_hidden_layers)
        return mq_fail(err, MQ_ERR_VALUE, "layer %lld of a model of %lld layers", (long long)layer,
                       (long long)run->runtime->config.num_hidden_layers);
    if (run->next_layer < 0) return mq_fail(err, MQ_ERR_STATE, "layer %lld: embed comes first", (long long)layer);
    if (run->next_layer != layer)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld: the next layer is %lld", (long long)layer,
                       (long long)run->next_layer);
    if (run->dispatch.layer == layer)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld: its expert %lld comes next", (long long)layer,
                       (long long)run->dispatch.next);
    if (!run->runtime->layers[layer].loaded)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld is not loaded", (long long)layer);
    return MQ_OK;
}

int mq_run_layer(mq_run *run, int64_t index, mq_error *err)
{
    mq_elsewhere *there = run->runtime->elsewhere;
    mq_layer *layer;
    int rc = check_order(run, index, err);
    if (rc != MQ_OK) return rc;
    layer = &run->runtime->layers[index];
    rc = mq_layer_check(layer, &run->runtime->config, err);
    if (rc == MQ_OK && there == NULL) rc = mq_run_reserve(run, err);
    if (rc == MQ_OK && layer->experts > 0) rc = mq_dispatch_begin(run, err);
    if (rc != MQ_OK) return rc;
    mq_steps steps = {.count = run->unit_count, .rows = run->largest_unit, .step = forward_unit, .context = layer};
    rc = there != NULL ? there->layer(there, run, index, err) : mq_run_steps(run, layer, &steps, err);
    if (rc != MQ_OK) run->next_layer = -1;
    else if (layer->experts > 0) mq_dispatch_rows(run, index);
    else run->next_layer = index + 1;
    return rc;
}
