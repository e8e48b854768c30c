#include "model/decoder.h"

#include <string.h>

#include "core/alloc.h"

static int load_outer(mq_decoder *decoder, const mq_named_tensor *outer, size_t count, mq_error *err)
{
    const mq_runtime *runtime = decoder->runtime;
    const mq_module *norm = mq_runtime_outer(runtime, MQ_ROLE_FINAL_NORM);
    const mq_module *head = mq_runtime_outer(runtime, MQ_ROLE_HEAD);
    const mq_tensor *weight = mq_find_tensor(outer, count, norm->weight, norm->shape, 1, err);
    if (weight != NULL) decoder->norm = mq_read_norm(runtime, weight, norm->weight, err);
    if (decoder->norm == NULL) return err->code;
    const mq_named_tensor *found = mq_find_weight(outer, count, head, err);
    if (found == NULL) return err->code;
    if (found->stored != NULL)
        return mq_linear_load_stored(&decoder->head, found->stored, runtime->gemm, head->weight, err);
    return mq_linear_load(&decoder->head, &found->tensor, runtime->gemm, head->weight, err);
}

static size_t expert_weights(const mq_runtime *runtime)
{
    if (!(runtime->family->flags & MQ_FAMILY_MOE)) return 0;
    return (size_t)(runtime->config.num_hidden_layers * runtime->config.num_experts) * MQ_EXPERT_LINEARS;
}

int mq_decoder_init(mq_decoder *decoder, mq_runtime *runtime, const mq_named_tensor *embedding, size_t embeddings,
                    const mq_named_tensor *outer, size_t count, mq_error *err)
{
    const mq_module *embed = mq_runtime_outer(runtime, MQ_ROLE_EMBED);
    const size_t experts = expert_weights(runtime);
    *decoder = (mq_decoder){.runtime = runtime};
    const mq_tensor *table = mq_find_tensor(embedding, embeddings, embed->weight, embed->shape, 2, err);
    if (table == NULL) return err->code;
    decoder->embedding = (mq_named_tensor){.name = embed->weight, .tensor = *table};
    int rc = load_outer(decoder, outer, count, err);
    if (rc == MQ_OK && experts > 0) {
        decoder->experts = mq_alloc_zeroed(experts * sizeof *decoder->experts);
        if (decoder->experts == NULL) rc = mq_fail_memory(err, "the experts", experts * sizeof *decoder->experts);
    }
    if (rc == MQ_OK) rc = mq_decoder_reset(decoder, 1, err);
    if (rc != MQ_OK) mq_decoder_free(decoder);
    return rc;
}

void mq_decoder_free(mq_decoder *decoder)
{
    if (decoder->runtime == NULL) return;
    for (size_t i = 0; decoder->experts != NULL && i < expert_weights(decoder->runtime); i++)
        mq_linear_free(&decoder->experts[i]);
    mq_free(decoder->experts);
    mq_linear_free(&decoder->head);
    mq_free(decoder->norm);
    mq_cache_free(&decoder->cache);
    memset(decoder, 0, sizeof *decoder);
}

static size_t weight_nbytes(const mq_linear_weight *weight)
{
    return weight->packed.data ? mq_packed_nbytes(&weight->packed) : 0;
}

size_t mq_decoder_nbytes(const mq_decoder *decoder)
{
    const mq_runtime *runtime = decoder->runtime;
    size_t total = weight_nbytes(&decoder->head) + mq_cache_nbytes(&decoder->cache);
    for (int64_t i = 0; i < runtime->config.num_hidden_layers; i++)
        for (int role = 0; role < MQ_ROLE_COUNT; role++)
            total += weight_nbytes(&runtime->layers[i].linears[role].weight);
    for (size_t i = 0; decoder->experts != NULL && i < expert_weights(runtime); i++)
        total += weight_nbytes(&decoder->experts[i]);
    return total;
}

static mq_linear_weight *expert_of(const mq_decoder *decoder, int64_t layer, int64_t expert)
{
    return decoder->experts + (layer * decoder->runtime->config.num_experts + expert) * MQ_EXPERT_LINEARS;
}

int mq_decoder_load_expert(mq_decoder *decoder, int64_t layer, int64_t expert, const mq_named_tensor *tensors,
                           size_t count, mq_error *err)
{
    mq_linear_weight *weights = expert_of(decoder, layer, expert);
    const int rc = mq_runtime_load_expert(decoder->runtime, layer, expert, tensors, count, err);
    if (rc != MQ_OK) return rc;
    for (int i = 0; i < MQ_EXPERT_LINEARS; i++) mq_linear_free(&weights[i]);
    mq_runtime_take_expert(decoder->runtime, layer, weights);
    return MQ_OK;
}

int mq_decoder_reset(mq_decoder *decoder, int64_t slots, mq_error *err)
{
    mq_cache fresh;
    if (slots <= 0) return mq_fail(err, MQ_ERR_VALUE, "a decoder has one sequence or more, got %lld", (long long)slots);
    const int rc = mq_cache_init(&fresh, &decoder->runtime->config, decoder->runtime->layer_ropes,
                                 decoder->runtime->dtype, slots, err);
    if (rc != MQ_OK) return rc;
    mq_cache_free(&decoder->cache);
    decoder->cache = fresh;
    return MQ_OK;
}

static int check_slot(const mq_decoder *decoder, int64_t slot, mq_error *err)
{
    if (slot >= 0 && slot < decoder->cache.slots) return MQ_OK;
    return mq_fail(err, MQ_ERR_VALUE, "sequence %lld of %lld", (long long)slot, (long long)decoder->cache.slots);
}

int mq_decoder_keep(mq_decoder *decoder, int64_t slot, int64_t length, mq_error *err)
{
    const int rc = check_slot(decoder, slot, err);
    if (rc != MQ_OK) return rc;
    int64_t *have = &decoder->cache.lengths[slot];
    if (length < 0 || length > *have)
        return mq_fail(err, MQ_ERR_VALUE, "sequence %lld: %lld positions to keep of %lld", (long long)slot,
                       (long long)length, (long long)*have);
    *have = length;
    return MQ_OK;
}

/* Room in the cache for what comes, once it is known to be sound. */
static int make_room(mq_decoder *decoder, const mq_batch_input *inputs, int64_t count, mq_error *err)
{
    int64_t positions = 0;
    for (int64_t i = 0; i < count; i++) {
        const int rc = check_slot(decoder, inputs[i].slot, err);
        if (rc != MQ_OK) return rc;
        for (int64_t j = 0; j < i; j++)
            if (inputs[j].slot == inputs[i].slot)
                return mq_fail(err, MQ_ERR_VALUE, "sequence %lld is there twice", (long long)inputs[i].slot);
        positions = MQ_MAX(positions, decoder->cache.lengths[inputs[i].slot] + inputs[i].tokens);
    }
    return mq_cache_reserve(&decoder->cache, &decoder->runtime->config, positions, err);
}

/* With the first tokens: everything is loaded by then. */
static int gather(mq_decoder *decoder, mq_error *err)
{
    const size_t experts = decoder->experts ? expert_weights(decoder->runtime) : 0;
    if (decoder->gathered) return MQ_OK;
    mq_linear_weight **others = mq_alloc_array(experts + 1, sizeof *others);
    if (others == NULL) return mq_fail_memory(err, "the weights", (experts + 1) * sizeof *others);
    for (size_t i = 0; i < experts; i++) others[i] = &decoder->experts[i];
    others[experts] = &decoder->head;
    const int rc = mq_runtime_gather(decoder->runtime, others, experts + 1, err);
    mq_free(others);
    decoder->gathered = rc == MQ_OK;
    return rc;
}

static int run_experts(const mq_decoder *decoder, mq_run *run, int64_t layer, mq_error *err)
{
    const int64_t *start = run->dispatch.start;
    int rc = MQ_OK;
    for (int64_t e = 0; rc == MQ_OK && run->dispatch.layer == layer; e++) {
        const mq_linear_weight *weights = expert_of(decoder, layer, e);
        if (start[e] == start[e + 1]) continue;
        if (weights->packed.data == NULL)
            return mq_fail(err, MQ_ERR_STATE, "layer %lld: expert %lld is not loaded", (long long)layer, (long long)e);
        rc = mq_run_held_expert(run, layer, e, weights, err);
    }
    return rc;
}

/* The rows whose next token is asked for, one after the other; returns how many. */
static int64_t gather_rows(const mq_run *run, int every, char *out)
{
    const size_t width = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    if (every) {
        memcpy(out, run->hidden, (size_t)run->rows * width);
        return run->rows;
    }
    for (int64_t i = 0; i < run->sequence_count; i++) {
        const mq_sequence *sequence = &run->sequences[i];
        memcpy(out + (size_t)i * width, run->hidden + (size_t)(sequence->first + sequence->tokens - 1) * width, width);
    }
    return run->sequence_count;
}

static int run_head(const mq_decoder *decoder, const mq_run *run, int every, float *logits, mq_error *err)
{
    const mq_runtime *runtime = decoder->runtime;
    const mq_config *config = &runtime->config;
    const mq_quantizer *quantizer = runtime->head_input.quantizer;
    const size_t nbytes = (size_t)((every ? run->rows : run->sequence_count) * config->hidden_size) *
                          mq_dtype_size(runtime->dtype);
    if (quantizer != NULL) {
        const int rc = mq_quantizer_ready(quantizer, -1, config->hidden_size, "lm_head.input_quantizer", err);
        if (rc != MQ_OK) return rc;
    }
    char *rows = mq_alloc(nbytes);
    if (rows == NULL) return mq_fail_memory(err, "the head's input", nbytes);
    mq_row_sizes sizes = {.width = config->hidden_size, .dtype = runtime->dtype};
    sizes.rows = gather_rows(run, every, rows);
    mq_rmsnorm_forward(rows, rows, decoder->norm, config->rms_norm_eps, &sizes);
    if (quantizer != NULL && mq_quantizer_acts(quantizer)) {
        mq_quant_rows quant = {.x = rows, .y = rows, .dtype = runtime->dtype, .rows = sizes.rows, .cols = sizes.width,
                               .ldx = sizes.width, .ldy = sizes.width, .steps = MQ_QUANT_ALL};
        mq_quantizer_apply(quantizer, &quant);
    }
    mq_gemm_args product = {
        .m = sizes.rows, .a = rows, .a_dtype = runtime->dtype, .lda = sizes.width, .b = &decoder->head.packed,
        .c = logits, .c_dtype = MQ_F32, .ldc = config->vocab_size, .alpha = 1.0f,
    };
    mq_gemm_run(&product);
    const mq_logits_sizes made = {.rows = sizes.rows, .columns = config->vocab_size, .ld = config->vocab_size};
    mq_logits_forward(logits, config, &made);
    mq_free(rows);
    return MQ_OK;
}

int mq_decoder_forward(mq_decoder *decoder, const mq_batch_input *inputs, int64_t count, int every, float *logits,
                       mq_error *err)
{
    mq_run run;
    int rc = make_room(decoder, inputs, count, err);
    if (rc == MQ_OK) rc = gather(decoder, err);
    if (rc == MQ_OK) rc = mq_run_init(&run, decoder->runtime, inputs, count, 0, &decoder->cache, err);
    if (rc != MQ_OK) return rc;
    run.poll = decoder->poll;
    run.poll_context = decoder->poll_context;
    rc = mq_run_embed(&run, &decoder->embedding, 1, err);
    for (int64_t i = 0; rc == MQ_OK && i < decoder->runtime->config.num_hidden_layers; i++) {
        rc = mq_run_layer(&run, i, err);
        if (rc == MQ_OK) rc = run_experts(decoder, &run, i, err);
    }
    if (rc == MQ_OK) rc = run_head(decoder, &run, every, logits, err);
    for (int64_t i = 0; rc == MQ_OK && i < count; i++) decoder->cache.lengths[inputs[i].slot] += inputs[i].tokens;
    mq_run_free(&run);
    return rc;
}
