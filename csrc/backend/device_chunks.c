/* Chunks of whole sequences on their way through a layer on a device: room for them, and the order in which they come
 * and go. */
#include <string.h>

#include "backend/device_parts.h"
#include "core/alloc.h"

/* ---- room ---- */

static size_t table_nbytes(const mq_rope_table *table)
{
    return (size_t)(table->positions * table->rotary) / 2 * sizeof(float);
}

size_t mq_device_ropes_nbytes(const mq_ropes *ropes)
{
    size_t total = 0;
    for (int kind = 0; kind < MQ_ROPE_KINDS; kind++) total += table_nbytes(&ropes->tables[kind]);
    for (int64_t i = 0; i < ropes->stretched_count; i++) total += table_nbytes(&ropes->stretched[i]);
    return total;
}

int64_t mq_device_rope_at(const mq_ropes *ropes, int layer_rope)
{
    const mq_rope_table *wanted = mq_ropes_of(ropes, layer_rope, 0);
    size_t at = 0;
    for (const mq_rope_table *table = ropes->tables; table != wanted; table++) at += table_nbytes(table);
    return (int64_t)(at / sizeof(float));
}

int mq_device_send_ropes(mq_device *device, const mq_ropes *ropes, float *cosine, float *sine, mq_error *err)
{
    int rc = MQ_OK;
    for (int64_t i = 0; rc == MQ_OK && i < MQ_ROPE_KINDS + ropes->stretched_count; i++) {
        const mq_rope_table *table = i < MQ_ROPE_KINDS ? &ropes->tables[i] : &ropes->stretched[i - MQ_ROPE_KINDS];
        const size_t nbytes = table_nbytes(table);
        if (nbytes == 0) continue;
        rc = device->backend->copy(cosine, table->cosine, nbytes, device->compute, err);
        if (rc == MQ_OK) rc = device->backend->copy(sine, table->sine, nbytes, device->compute, err);
        cosine += nbytes / sizeof *cosine;
        sine += nbytes / sizeof *sine;
    }
    return rc;
}

/* A chunk has as many sequences as rows at most. */
size_t mq_device_indices_nbytes(int64_t rows)
{
    return (size_t)(3 * rows + 1) * sizeof(int64_t) + (size_t)rows * (sizeof(int32_t) + sizeof(float) + 1);
}

/* As wide as what any linear reads, and what any puts out: what quantizers make room for, and what points see. */
static void widest_of(const mq_layer_context *context, int64_t *in, int64_t *out)
{
    static const mq_dim read[] = {MQ_DIM_HIDDEN, MQ_DIM_INNER, MQ_DIM_EXPERT, MQ_DIM_SHARED, MQ_DIM_Q, MQ_DIM_O,
                                  MQ_DIM_KV, MQ_DIM_V, MQ_DIM_Q_LORA, MQ_DIM_KV_LORA};
    const mq_config *config = context->config;
    *in = 0;
    for (size_t i = 0; i < MQ_COUNT(read); i++) *in = MQ_MAX(*in, mq_dim_of(config, NULL, read[i]));
    *out = *in;
    if (context->fused)
        *out = MQ_MAX(*out, MQ_MAX(mq_dim_of(config, NULL, MQ_DIM_QKV), mq_dim_of(config, NULL, MQ_DIM_INNER_TWICE)));
    if (config->kv_lora_rank > 0)
        *out = MQ_MAX(*out, MQ_MAX(mq_dim_of(config, NULL, MQ_DIM_KV_A), mq_dim_of(config, NULL, MQ_DIM_KV_B)));
}

/* Of what one linear makes in the place of several, or where something narrow is between two. */
static int64_t joined_width(const mq_layer_context *context)
{
    const mq_config *config = context->config;
    if (context->fused) return MQ_MAX(mq_dim_of(config, NULL, MQ_DIM_QKV), mq_dim_of(config, NULL, MQ_DIM_INNER_TWICE));
    if (config->kv_lora_rank == 0) return 0;
    return MQ_MAX(config->q_lora_rank, mq_dim_of(config, NULL, MQ_DIM_KV_A));
}

/* Cuts the arena, which may only count, for chunks of `rows` rows. attends: they are sequences. */
static size_t cut(mq_arena *arena, const mq_layer_context *context, int64_t rows, int attends, mq_device_scratch *out)
{
    const mq_config *config = context->config;
    const size_t size = mq_dtype_size(context->dtype), table = attends ? mq_device_ropes_nbytes(context->ropes) : 0;
    const int64_t hidden = config->hidden_size, mixed = mq_dim_of(config, NULL, MQ_DIM_O);
    const int64_t expert = MQ_MAX(config->moe_intermediate_size, config->shared_intermediate_size);
    const int64_t inner = MQ_MAX(mq_dim_of(config, NULL, MQ_DIM_INNER), config->num_experts > 0 ? expert : 0);
    const int64_t attended = attends ? rows : 0, latent = config->kv_lora_rank > 0 ? attended : 0;
    const int64_t prepared = context->rank > 0 ? rows : 0;
    const int64_t routes = config->num_experts > 0 ? rows * context->routes->top_k : 0;
    int64_t widest, widest_out;
    widest_of(context, &widest, &widest_out);
    arena->used = 0;
    out->rows = rows;
    out->meta_nbytes = mq_device_indices_nbytes(rows);
    for (int i = 0; i < 2; i++) {
        out->hidden[i] = mq_arena_take(arena, (size_t)(rows * hidden) * size);
        out->meta[i] = mq_arena_take(arena, out->meta_nbytes);
    }
    out->cosine = mq_arena_take(arena, table);
    out->sine = mq_arena_take(arena, table);
    out->normed = out->mixed = mq_arena_take(arena, (size_t)(rows * MQ_MAX(hidden, mixed)) * size);
    out->joined = mq_arena_take(arena, (size_t)(rows * joined_width(context)) * size);
    out->quantized = mq_arena_take(arena, (size_t)(rows * widest) * size);
    out->temporary = mq_arena_take(arena, (size_t)(rows * hidden) * size);
    out->prepared = mq_arena_take(arena, (size_t)(prepared * widest) * size);
    out->low = mq_arena_take(arena, (size_t)(rows * context->rank) * size);
    out->counted = mq_arena_take(arena, context->count_mask != NULL ? (size_t)(rows * widest_out) * size : 0);
    out->router = mq_arena_take(arena, (size_t)(rows * config->num_experts) * size);
    out->experts = mq_arena_take(arena, (size_t)routes * sizeof *out->experts);
    out->shares = mq_arena_take(arena, (size_t)routes * sizeof *out->shares);
    out->factors = mq_arena_take(arena, config->num_experts > 0 ? (size_t)rows * sizeof *out->factors : 0);
    const size_t halves = arena->used;
    out->q = mq_arena_take(arena, (size_t)(attended * mq_dim_of(config, NULL, MQ_DIM_Q)) * size);
    out->k = mq_arena_take(arena, (size_t)(attended * mq_dim_of(config, NULL, MQ_DIM_KV)) * size);
    out->v = mq_arena_take(arena, (size_t)(attended * mq_dim_of(config, NULL, MQ_DIM_V)) * size);
    out->latent = mq_arena_take(arena, (size_t)(latent * config->kv_lora_rank) * size);
    out->expanded = mq_arena_take(arena, (size_t)(latent * mq_dim_of(config, NULL, MQ_DIM_KV_B)) * size);
    out->attention = mq_arena_take(arena, out->attention_nbytes);
    const size_t attention = arena->used;
    arena->used = halves;       /* the MLP's half in the place of the attention's */
    out->gate = mq_arena_take(arena, (size_t)(rows * inner) * size);
    out->up = mq_arena_take(arena, (size_t)(rows * inner) * size);
    return arena->used = MQ_MAX(arena->used, attention);
}

typedef struct forward_need {
    const mq_device *device;
    const mq_run *run;
    int attends;
} forward_need;

static size_t attention_nbytes(const forward_need *need, const mq_layer_context *context, int64_t rows, int64_t longest)
{
    const mq_cuda_attention_job job = mq_device_attention(context, NULL, rows, rows, longest);
    return need->attends ? need->device->backend->attention_workspace(&job) : 0;
}

static size_t forward_nbytes(const void *context, int64_t rows, int64_t longest)
{
    const forward_need *need = context;
    const mq_layer_context layer = mq_run_context(need->run);
    mq_device_scratch scratch = {.attention_nbytes = attention_nbytes(need, &layer, rows, longest)};
    mq_arena none = {0};
    return cut(&none, &layer, rows, need->attends, &scratch);
}

static int too_long(const mq_device *device, const mq_device_need *need, int64_t longest, size_t room, mq_error *err)
{
    int64_t fits = longest;
    while (fits > 0 && need->nbytes(need->context, fits, fits) > room) fits = fits > 16 ? fits / 8 * 7 : fits - 1;
    return mq_fail(err, MQ_ERR_MEMORY,
                   "out of device memory: a sequence of %lld tokens needs %.1f MB beside the weights of a layer, but "
                   "only %.1f of %.1f MB are left for it; sequences of %lld tokens fit (batches of any size do: they "
                   "go through the device in pieces). Allow more by load(..., device_memory=) or MODELQ_CUDA_MEMORY",
                   (long long)longest, (double)need->nbytes(need->context, longest, longest) / 1e6,
                   (double)room / 1e6, (double)device->budget / 1e6, (long long)fits);
}

int64_t mq_device_most_rows(const mq_device_need *need, size_t room, int64_t rows, int64_t longest)
{
    while (rows > longest && need->nbytes(need->context, rows, longest) > room) rows = MQ_MAX(rows / 4 * 3, longest);
    return rows;
}

size_t mq_device_ahead_nbytes(const mq_device *device)
{
    return MQ_MAX(device->spare[0].nbytes, device->layer_weights.nbytes) +
           MQ_MAX(device->spare[1].nbytes, device->expert_weights.nbytes);
}

int mq_device_fit(mq_device *device, const mq_device_need *need, int64_t *rows, int64_t longest, mq_error *err)
{
    const size_t ahead = mq_device_ahead_nbytes(device);
    if (need->nbytes(need->context, longest, longest) > mq_device_available(device, &device->work))
        mq_sums_drop(device);       /* nothing is in them yet: statistics are made where there is room */
    const size_t room = mq_device_available(device, &device->work);
    const int64_t wanted = MQ_MIN(MQ_MAX(*rows, longest), MQ_MAX((int64_t)MQ_CHUNK_ROWS, longest));
    *rows = mq_device_most_rows(need, room, wanted, longest);
    if (ahead < room) {
        const int64_t beside = mq_device_most_rows(need, room - ahead, *rows, longest);
        if (beside >= MQ_MIN(*rows, (int64_t)MQ_ENOUGH_ROWS) &&
            need->nbytes(need->context, beside, longest) <= room - ahead)
            *rows = beside;
    }
    const size_t nbytes = need->nbytes(need->context, *rows, longest);
    if (nbytes > room) return too_long(device, need, longest, room, err);
    return mq_arena_reserve(device, &device->work, nbytes, "the rows of a layer", err);
}

int mq_device_reserve(mq_device *device, mq_run *run, int64_t rows, int64_t longest, mq_device_scratch *out,
                      mq_error *err)
{
    const mq_layer_context context = mq_run_context(run);
    const forward_need forward = {device, run, longest > 0};
    const mq_device_need need = {forward_nbytes, &forward};
    const int rc = mq_device_fit(device, &need, &rows, MQ_MAX(longest, (int64_t)1), err);
    if (rc != MQ_OK) return rc;
    out->attention_nbytes = attention_nbytes(&forward, &context, rows, longest);
    cut(&device->work, &context, rows, forward.attends, out);
    return forward.attends ? mq_device_send_ropes(device, context.ropes, out->cosine, out->sine, err) : MQ_OK;
}

/* ---- chunks ---- */

mq_device_chunk mq_device_chunk_from(const mq_run *run, int64_t first_sequence, int64_t most)
{
    const mq_sequence *sequences = run->sequences;
    const uint8_t *mask = run->count_padding ? NULL : run->mask;
    mq_device_chunk chunk = {.first_sequence = first_sequence, .first = sequences[first_sequence].first};
    for (int64_t i = first_sequence; i < run->sequence_count && chunk.rows + sequences[i].tokens <= most; i++) {
        chunk.rows += sequences[i].tokens;
        chunk.sequences++;
        chunk.longest = MQ_MAX(chunk.longest, sequences[i].tokens);
    }
    chunk.position = chunk.first;
    chunk.units = run->units;
    chunk.unit_count = run->unit_count;
    chunk.mask = mask != NULL ? mask + chunk.first : NULL;
    return chunk;
}

/* Where the parts of a chunk's indices are, on the host or the device. */
static void place_meta(mq_device_chunk *chunk, void *memory)
{
    chunk->starts = memory;
    chunk->index = chunk->starts + chunk->sequences + 1;
    chunk->chunk_first = chunk->index + chunk->rows;
    chunk->positions = (int32_t *)(void *)(chunk->chunk_first + chunk->sequences);
    chunk->growth = (float *)(void *)(chunk->positions + chunk->rows);
    chunk->key_mask = (uint8_t *)(chunk->growth + chunk->rows);
}

/* Of one sequence, whose first row is `row` of the chunk. */
static void fill_sequence(const mq_layer_context *context, const mq_sequence *sequence, mq_device_chunk *here,
                          int64_t row)
{
    const int64_t first = mq_ropes_row(context->ropes, sequence->tokens);
    mq_attention_args args = {.chunk = 1};
    mq_layer_hide_padding(context, sequence, &args);
    *here->chunk_first++ = args.chunk_first;
    for (int64_t t = 0; t < sequence->tokens; t++) {
        here->positions[row + t] = (int32_t)(first + t);
        here->growth[row + t] = context->config->attention_floor > 0 ? mq_layer_growth(context, t) : 1.0f;
    }
}

static void fill_meta(const mq_run *run, mq_device_chunk *chunk, void *memory)
{
    mq_device_chunk here = *chunk;
    const mq_layer_context context = mq_run_context(run);
    place_meta(&here, memory);
    int64_t row = 0;
    for (int64_t s = 0; s < chunk->sequences; s++) {
        const mq_sequence *sequence = &run->sequences[chunk->first_sequence + s];
        here.starts[s] = row;
        fill_sequence(&context, sequence, &here, row);
        row += sequence->tokens;
    }
    here.starts[chunk->sequences] = row;
    chunk->counted = 0;
    for (int64_t i = 0; i < chunk->rows; i++)
        if (chunk->mask == NULL || chunk->mask[i]) here.index[chunk->counted++] = i;
    if (run->mask != NULL) memcpy(here.key_mask, run->mask + chunk->first, (size_t)chunk->rows);
    else memset(here.key_mask, 1, (size_t)chunk->rows);
}

/* Memory of that size, of two places that take turns, once its last copy is done. */
static int next_indices(mq_device *device, size_t nbytes, mq_pinned **out, mq_error *err)
{
    mq_pinned *it = *out = &device->indices[device->next_indices];
    device->next_indices = 1 - device->next_indices;
    const int rc = device->backend->event_wait(it->passed, err);
    return rc == MQ_OK ? mq_pinned_reserve(device, it, nbytes, err) : rc;
}

int mq_device_send_indices(mq_device *device, const mq_run *run, mq_device_chunk *chunk, void *to, void *stream,
                           mq_error *err)
{
    const size_t nbytes = mq_device_indices_nbytes(chunk->rows);
    mq_pinned *here;
    int rc = next_indices(device, nbytes, &here, err);
    if (rc != MQ_OK) return rc;
    fill_meta(run, chunk, here->memory);
    place_meta(chunk, to);
    if (run->mask == NULL) chunk->key_mask = NULL;
    rc = device->backend->copy(to, here->memory, nbytes, stream, err);
    return rc == MQ_OK ? device->backend->event_record(here->passed, stream, err) : rc;
}

int mq_device_meanwhile(mq_device *device, mq_run *run, void *event, mq_error *err)
{
    int rc = MQ_OK, done = 0;
    while (rc == MQ_OK && run->meanwhile != NULL && !done) {
        if (event != NULL) rc = device->backend->event_done(event, &done, err);
        if (rc == MQ_OK && !done) rc = mq_run_meanwhile(run, err);
    }
    return rc;
}

/* Rows and indices of a chunk to their place. */
static int send_chunk(mq_device *device, const mq_run *run, const mq_device_scratch *scratch, int slot,
                      mq_device_chunk *chunk, mq_error *err)
{
    const size_t stride = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    chunk->hidden = scratch->hidden[slot];
    const int rc = mq_device_send_indices(device, run, chunk, scratch->meta[slot], device->rows, err);
    if (rc != MQ_OK) return rc;
    return device->backend->copy(chunk->hidden, run->hidden + (size_t)chunk->first * stride,
                                 (size_t)chunk->rows * stride, device->rows, err);
}

/* Hands a chunk to the streams: it comes on one, and is computed on the other when it is there. */
static int start_chunk(mq_device_pass *pass, const mq_run *run, int slot, mq_device_chunk *chunk)
{
    mq_device *device = pass->device;
    const mq_backend *backend = device->backend;
    int rc = mq_run_poll(run, pass->err);
    if (rc == MQ_OK) rc = send_chunk(device, run, pass->scratch, slot, chunk, pass->err);
    if (rc == MQ_OK) rc = backend->event_record(device->arrived[slot], device->rows, pass->err);
    if (rc == MQ_OK) rc = backend->event_after(device->arrived[slot], device->compute, pass->err);
    pass->chunk = chunk;
    if (rc == MQ_OK) rc = mq_device_run_chunk(pass);
    return rc == MQ_OK ? backend->event_record(device->computed[slot], device->compute, pass->err) : rc;
}

/* The rows of a chunk go back to the host. Where these are not pinned this waits for them: the next chunk is under way
 * by then. */
static int fetch_chunk(mq_device *device, mq_run *run, int slot, const mq_device_chunk *chunk, mq_error *err)
{
    const size_t stride = (size_t)run->runtime->config.hidden_size * mq_dtype_size(run->runtime->dtype);
    const int rc = device->backend->event_after(device->computed[slot], device->rows, err);
    if (rc != MQ_OK) return rc;
    return device->backend->copy(run->hidden + (size_t)chunk->first * stride, chunk->hidden,
                                 (size_t)chunk->rows * stride, device->rows, err);
}

/* What chunks are read from and written to. */
static void pin(mq_device *device, const mq_run *run, const mq_layer *layer)
{
    const mq_routes *routes = &run->dispatch.routes;
    const size_t choices = (size_t)(run->rows * routes->top_k), nbytes = mq_run_state_nbytes(run);
    mq_device_pin(device, run->hidden, nbytes, 0);
    if (layer->experts == 0) return;
    mq_device_pin(device, routes->experts, choices * sizeof *routes->experts, 1);
    mq_device_pin(device, routes->shares, choices * sizeof *routes->shares, 1);
    mq_device_pin(device, run->dispatch.sums, nbytes, 1);
}

static int run_chunks(mq_device *device, mq_run *run, mq_layer *layer, const void *unused, mq_error *err)
{
    const mq_layer_context context = mq_run_context(run);
    mq_device_scratch scratch = {0};
    mq_device_chunk chunks[2];
    mq_device_pass pass = {.device = device, .layer = layer, .context = &context, .scratch = &scratch, .err = err};
    (void)unused;
    mq_device_drop_mixture(device);     /* of experts that were given up */
    pin(device, run, layer);
    int rc = mq_device_reserve(device, run, run->rows, run->longest, &scratch, err);
    if (rc != MQ_OK) return rc;
    chunks[0] = mq_device_chunk_from(run, 0, scratch.rows);
    rc = start_chunk(&pass, run, 0, &chunks[0]);
    for (int slot = 0; rc == MQ_OK; slot = 1 - slot) {
        const int64_t next = chunks[slot].first_sequence + chunks[slot].sequences;
        const int more = next < run->sequence_count;
        if (more) {
            chunks[1 - slot] = mq_device_chunk_from(run, next, scratch.rows);
            rc = start_chunk(&pass, run, 1 - slot, &chunks[1 - slot]);
        }
        if (rc == MQ_OK) rc = mq_device_meanwhile(device, run, more ? device->computed[slot] : NULL, err);
        if (rc == MQ_OK) rc = fetch_chunk(device, run, slot, &chunks[slot], err);
        if (!more) break;
    }
    if (rc == MQ_OK) rc = device->backend->stream_wait(device->rows, err);
    return rc;
}

/* ---- the layer ---- */

static int watched(mq_device *device, mq_run *run, mq_layer *layer, mq_device_work work, const void *context,
                   mq_error *err)
{
    mq_point *points[MQ_LAYER_MAX_POINTS];
    const size_t count = mq_layer_points(layer, points);
    int rc = mq_points_begin(points, count, &run->spare, err);
    if (rc != MQ_OK) return rc;
    mq_sums_begin(device, run, layer, points, count);
    rc = device->backend->event_record(device->loaded, device->copies, err);
    if (rc == MQ_OK) rc = device->backend->event_after(device->loaded, device->compute, err);
    if (rc == MQ_OK) rc = work(device, run, layer, context, err);
    rc = mq_device_finish(device, rc, err);
    const int ended = mq_points_end(points, count, rc == MQ_OK, err);
    return rc == MQ_OK ? ended : rc;
}

int mq_device_watched(mq_device *device, mq_run *run, int64_t index, mq_device_work work, const void *context,
                      mq_error *err)
{
    int before;
    if (device->layer != index)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld is not loaded on the device", (long long)index);
    int rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    rc = watched(device, run, &run->runtime->layers[index], work, context, err);
    mq_device_leave(device, before);
    return rc;
}

int mq_device_run_layer(mq_elsewhere *self, mq_run *run, int64_t layer, mq_error *err)
{
    return mq_device_watched((mq_device *)(void *)self, run, layer, run_chunks, NULL, err);
}
