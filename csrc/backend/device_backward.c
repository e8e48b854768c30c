/* A layer on its way back on a device: room for chunks, and the order in which they come and go. */
#include "backend/device_backward.h"

#include <string.h>

#include "core/alloc.h"

/* ---- room ---- */

typedef struct back_sizes {
    int64_t rows, hidden, q, kv, v, qkv, mixed, inner, experts, top_k;
    int64_t q_lora, kv_lora, kv_a, kv_b;        /* 0 but in latent attention */
    int64_t widest_in, widest_out;      /* of linears */
    size_t size;                        /* of an activation */
    int fused;
} back_sizes;

static back_sizes sizes_of(const mq_device_back_room *room, int64_t rows)
{
    const mq_run *run = room->back->run;
    const mq_config *config = &run->runtime->config;
    const int has_experts = config->num_experts > 0, fused = (run->runtime->family->flags & MQ_FAMILY_FUSED) != 0;
    const int64_t shared = room->experts_only ? 0 : config->shared_intermediate_size;
    const int64_t expert = has_experts ? MQ_MAX(config->moe_intermediate_size, shared) : 0;
    back_sizes sizes = {
        .rows = rows, .hidden = config->hidden_size, .q = mq_dim_of(config, NULL, MQ_DIM_Q),
        .kv = mq_dim_of(config, NULL, MQ_DIM_KV), .v = mq_dim_of(config, NULL, MQ_DIM_V),
        .qkv = mq_dim_of(config, NULL, MQ_DIM_QKV), .mixed = mq_dim_of(config, NULL, MQ_DIM_O),
        .inner = room->experts_only ? expert : MQ_MAX(mq_dim_of(config, NULL, MQ_DIM_INNER), expert),
        .experts = has_experts ? config->num_experts : 0, .top_k = has_experts ? config->num_experts_per_tok : 0,
        .size = mq_dtype_size(run->runtime->dtype), .fused = fused,
    };
    if (config->kv_lora_rank > 0) {
        sizes.q_lora = config->q_lora_rank;
        sizes.kv_lora = config->kv_lora_rank;
        sizes.kv_a = mq_dim_of(config, NULL, MQ_DIM_KV_A);
        sizes.kv_b = mq_dim_of(config, NULL, MQ_DIM_KV_B);
    }
    sizes.widest_in = MQ_MAX(MQ_MAX(sizes.hidden, sizes.inner), MQ_MAX(sizes.mixed, sizes.q));
    sizes.widest_in = MQ_MAX(sizes.widest_in, MQ_MAX(sizes.q_lora, sizes.kv_lora));
    sizes.widest_out = MQ_MAX(sizes.widest_in, MQ_MAX(sizes.v, MQ_MAX(sizes.kv, sizes.experts)));
    sizes.widest_out = MQ_MAX(sizes.widest_out, MQ_MAX(sizes.kv_a, sizes.kv_b));
    if (fused) sizes.widest_out = MQ_MAX(sizes.widest_out, MQ_MAX(sizes.qkv, 2 * sizes.inner));
    return sizes;
}

static void *activations(mq_arena *arena, const back_sizes *sizes, int64_t width)
{
    return mq_arena_take(arena, (size_t)(sizes->rows * width) * sizes->size);
}

static float *singles(mq_arena *arena, const back_sizes *sizes, int64_t width)
{
    return mq_arena_take(arena, (size_t)(sizes->rows * width) * sizeof(float));
}

static void cut_gradients_of_weights(mq_arena *arena, const mq_device_back_room *room, const back_sizes *sizes,
                                     mq_device_back_scratch *out)
{
    const mq_backend *backend = room->device->backend;
    const int64_t most = 4096;      /* sums of so many rows have as many parts as any */
    const mq_cuda_matrix rows = {NULL, MQ_F32, MQ_MIN(sizes->rows, most), sizes->widest_out, sizes->widest_out};
    const mq_cuda_columns_job columns = {.x = rows, .what = MQ_CUDA_SUM};
    const size_t of_columns = backend->columns_workspace(&columns);
    const mq_cuda_norm_job norm = {
        .x = {NULL, MQ_F32, sizes->rows, sizes->widest_in, sizes->widest_in}, .d_weight = (float *)&of_columns,
        .heads = room->back->run->runtime->config.num_attention_heads,
    };
    if (room->back->wanted_count == 0) return;
    out->piece_count = MQ_MAX(room->device->piece_nbytes / (int64_t)sizeof(float), sizes->widest_out);
    out->piece = mq_arena_take(arena, (size_t)out->piece_count * sizeof(float));
    out->sums_nbytes = of_columns + backend->rmsnorm_workspace(&norm);
    out->sums = mq_arena_take(arena, out->sums_nbytes);
    if (sizes->size < sizeof(float)) out->single = singles(arena, sizes, sizes->widest_in);
}

/* For the scores of the layer's linears, whose candidates' weights stay or take each other's place. */
static void cut_scores(mq_arena *arena, const mq_device_back_room *room, const back_sizes *sizes,
                       mq_device_back_scratch *out)
{
    mq_device_score_sizes scores = {.rows = sizes->rows, .columns = sizes->widest_in, .outputs = sizes->widest_out,
                                    .size = sizes->size, .output_size = sizes->size};
    for (int role = 0; role < MQ_ROLE_COUNT && room->layer != NULL; role++) {
        const mq_linear *linear = &room->layer->linears[role];
        const mq_output_score *score = mq_output_score_of(linear->observer);
        if (score == NULL) continue;
        const size_t nbytes = (size_t)(linear->rows * linear->cols) * sizes->size;
        scores.candidates = MQ_MAX(scores.candidates, (int64_t)score->count);
        if (room->kept >> role & 1)
            mq_device_cut_candidates(arena, (int64_t)score->count, 1, nbytes, &out->scores.kept[role]);
        else scores.nbytes = MQ_MAX(scores.nbytes, nbytes);
    }
    if (scores.candidates > 0) mq_device_cut_scores(arena, &scores, &out->scores);
}

/* What both halves need, and the places of rows that come and go. */
static void cut_rows(mq_arena *arena, const mq_device_back_room *room, const back_sizes *sizes,
                     mq_device_back_scratch *out)
{
    const mq_run *run = room->back->run;
    const size_t indices = room->experts_only ? (size_t)sizes->rows * sizeof(int64_t)
                                              : mq_device_indices_nbytes(sizes->rows);
    const mq_layer_context context = mq_run_context(run);
    const size_t ropes = mq_device_ropes_nbytes(context.ropes);
    out->rows = sizes->rows;
    for (int i = 0; i < (room->experts_only ? 1 : 2); i++) {
        out->input[i] = activations(arena, sizes, sizes->hidden);
        out->gradient[i] = singles(arena, sizes, sizes->hidden);
        out->indices[i] = mq_arena_take(arena, indices);
        if (room->experts_only || sizes->experts == 0) continue;
        out->d_experts[i] = singles(arena, sizes, sizes->hidden);
        out->d_choices[i] = singles(arena, sizes, sizes->top_k);
        out->choices[i] = mq_arena_take(arena, (size_t)(sizes->rows * sizes->top_k) * sizeof *out->choices[i]);
    }
    if (!room->experts_only && run->runtime->config.shared_intermediate_size > 0)
        out->identity = mq_arena_take(arena, (size_t)sizes->rows * sizeof *out->identity);
    if (sizes->size < sizeof(float)) out->rounded = activations(arena, sizes, sizes->widest_out);
    cut_gradients_of_weights(arena, room, sizes, out);
    if (!room->experts_only) cut_scores(arena, room, sizes, out);
    else if (room->layer != NULL) mq_device_cut_expert_scores(arena, room, sizes->rows, &out->expert_scores);
    if (room->experts_only) return;
    out->cosine = mq_arena_take(arena, ropes);
    out->sine = mq_arena_take(arena, ropes);
    out->normed = activations(arena, sizes, sizes->hidden);
    out->raw_q = activations(arena, sizes, sizes->q);
    out->raw_k = activations(arena, sizes, sizes->kv);
    out->q = activations(arena, sizes, sizes->q);
    out->k = activations(arena, sizes, sizes->kv);
    out->v = activations(arena, sizes, sizes->v);
    out->joined = activations(arena, sizes, sizes->fused ? sizes->qkv : 0);
    out->q_a = activations(arena, sizes, sizes->q_lora);
    out->q_latent = activations(arena, sizes, sizes->q_lora);
    out->kv_a = activations(arena, sizes, sizes->kv_a);
    out->kv_raw = activations(arena, sizes, sizes->kv_lora);
    out->kv_latent = activations(arena, sizes, sizes->kv_lora);
    out->expanded = activations(arena, sizes, sizes->kv_b);
    out->mixed = activations(arena, sizes, sizes->mixed);
    out->attended = activations(arena, sizes, sizes->hidden);
    out->middle = activations(arena, sizes, sizes->hidden);
    out->maxima = singles(arena, sizes, run->runtime->config.num_attention_heads);
    out->factors = singles(arena, sizes, run->runtime->config.num_attention_heads);
}

static void cut_attention(mq_arena *arena, const mq_device_back_room *room, const back_sizes *sizes, int64_t longest,
                          mq_device_back_scratch *out)
{
    const mq_layer_context context = mq_run_context(room->back->run);
    const mq_backend *backend = room->device->backend;
    const mq_cuda_attention_job job = mq_device_attention(&context, NULL, sizes->rows, sizes->rows, longest);
    out->attention_nbytes = MQ_MAX(backend->attention_workspace(&job), backend->attention_backward_workspace(&job));
    out->attention = mq_arena_take(arena, out->attention_nbytes);
    out->d_normed = singles(arena, sizes, sizes->hidden);
    out->d_q = singles(arena, sizes, sizes->q);
    out->d_k = singles(arena, sizes, sizes->kv);
    out->d_v = singles(arena, sizes, sizes->v);
    out->d_joined = singles(arena, sizes, sizes->fused ? sizes->qkv : 0);
    out->d_q_a = singles(arena, sizes, sizes->q_lora);
    out->d_kv_a = singles(arena, sizes, sizes->kv_a);
    out->d_kv_latent = singles(arena, sizes, sizes->kv_lora);
    out->d_expanded = singles(arena, sizes, sizes->kv_b);
    out->d_mixed = singles(arena, sizes, sizes->mixed);
    out->d_attended = singles(arena, sizes, sizes->hidden);
}

static void cut_other_half(mq_arena *arena, const back_sizes *sizes, mq_device_back_scratch *out)
{
    const int64_t joined = sizes->fused ? 2 * sizes->inner : 0;
    out->mlp_normed = activations(arena, sizes, sizes->hidden);
    out->gate = activations(arena, sizes, sizes->inner);
    out->up = activations(arena, sizes, sizes->inner);
    out->mlp_joined = activations(arena, sizes, joined);
    out->product = activations(arena, sizes, sizes->inner);
    out->output = activations(arena, sizes, sizes->hidden);
    out->router = activations(arena, sizes, sizes->experts);
    out->d_mlp_normed = singles(arena, sizes, sizes->hidden);
    out->d_gate = singles(arena, sizes, sizes->inner);
    out->d_up = singles(arena, sizes, sizes->inner);
    out->d_mlp_joined = singles(arena, sizes, joined);
    out->d_output = singles(arena, sizes, sizes->hidden);
    out->d_router = singles(arena, sizes, sizes->experts);
    out->d_shares = singles(arena, sizes, 1);
    out->shares = singles(arena, sizes, 1);
}

/* Cuts the arena, which may only count. */
static size_t cut(mq_arena *arena, const mq_device_back_room *room, int64_t rows, int64_t longest,
                  mq_device_back_scratch *out)
{
    const back_sizes sizes = sizes_of(room, rows);
    arena->used = 0;
    cut_rows(arena, room, &sizes, out);
    const size_t halves = arena->used;
    if (!room->experts_only) cut_attention(arena, room, &sizes, longest, out);
    const size_t attention = arena->used;
    arena->used = halves;
    cut_other_half(arena, &sizes, out);
    return arena->used = MQ_MAX(arena->used, attention);
}

static size_t needed(const void *context, int64_t rows, int64_t longest)
{
    mq_device_back_scratch scratch = {0};
    mq_arena none = {0};
    return cut(&none, context, rows, longest, &scratch);
}

size_t mq_device_back_nbytes(const mq_device_back_room *room, int64_t rows, int64_t longest)
{
    return needed(room, rows, longest);
}

/* Weights of candidates stay where they would come again with each chunk: as many as leave room for chunks that are
 * half as large as without, or large enough. */
static void keep_weights(mq_device_back_room *room, int64_t rows, int64_t longest)
{
    const mq_device_need need = {needed, room};
    const size_t available = mq_device_available(room->device, &room->device->work);
    const int64_t most = MQ_MIN(rows, MQ_MAX((int64_t)MQ_CHUNK_ROWS, longest));
    if (room->layer == NULL) return;
    const int64_t without = mq_device_most_rows(&need, available, most, longest);
    const int64_t least = MQ_MAX(longest, MQ_MIN((int64_t)MQ_ENOUGH_ROWS, without / 2));
    for (int role = 0; without < rows && role < (room->experts_only ? 1 : (int)MQ_ROLE_COUNT); role++) {
        const uint64_t bit = (uint64_t)1 << role;
        if (!room->experts_only && mq_output_score_of(room->layer->linears[role].observer) == NULL) continue;
        room->kept |= bit;
        if (needed(room, least, longest) > available) room->kept &= ~bit;
    }
}

int mq_device_back_reserve(const mq_device_back_room *wanted, int64_t rows, int64_t longest, mq_device_back *out)
{
    mq_device_back_room room = *wanted;
    const mq_device_need need = {needed, &room};
    mq_device *device = room.device;
    int64_t fit = rows;
    keep_weights(&room, rows, longest);
    int rc = mq_device_fit(device, &need, &fit, longest, out->err);
    if (rc == MQ_ERR_MEMORY && room.layer != NULL && !room.experts_only) {
        room.layer = NULL;      /* scores can be on the host */
        fit = rows;
        rc = mq_device_fit(device, &need, &fit, longest, out->err);
    }
    if (rc != MQ_OK) return rc;
    cut(&device->work, &room, fit, longest, out->scratch);
    if (out->scratch->piece == NULL) return MQ_OK;
    const size_t nbytes = (size_t)out->scratch->piece_count * sizeof(float);
    out->fetched = mq_alloc(nbytes);
    return out->fetched != NULL ? MQ_OK : mq_fail_memory(out->err, "gradients of weights", nbytes);
}

/* ---- chunks ---- */

typedef struct back_chunks {
    mq_device_back it;
    const char *input;          /* (rows of the run, C): before the layer */
    mq_device_chunk chunks[2];
} back_chunks;

/* What one of rows of the host, so many bytes each, has of the chunk, to the device. */
static int send_rows(const mq_device_back *it, void *to, const void *from, size_t stride)
{
    const char *at = (const char *)from + (size_t)it->chunk->first * stride;
    return it->device->backend->copy(to, at, (size_t)it->chunk->rows * stride, it->device->rows, it->err);
}

static int send_chunk(const back_chunks *all, mq_device_chunk *chunk)
{
    const mq_device_back *it = &all->it;
    const mq_device_back_scratch *scratch = it->scratch;
    const mq_backward *back = it->back;
    const mq_routes *routes = it->context->routes;
    const size_t width = (size_t)it->context->config->hidden_size, size = mq_dtype_size(it->context->dtype);
    const int slot = it->slot;
    int rc = mq_device_send_indices(it->device, back->run, chunk, scratch->indices[slot], it->device->rows, it->err);
    chunk->hidden = scratch->input[slot];
    if (rc == MQ_OK) rc = send_rows(it, chunk->hidden, all->input, width * size);
    if (rc == MQ_OK) rc = send_rows(it, scratch->gradient[slot], back->gradient, width * sizeof(float));
    if (rc != MQ_OK || it->layer->experts == 0) return rc;
    const size_t top_k = (size_t)routes->top_k;
    rc = send_rows(it, scratch->d_experts[slot], back->d_experts, width * sizeof(float));
    if (rc == MQ_OK) rc = send_rows(it, scratch->d_choices[slot], back->d_shares, top_k * sizeof *back->d_shares);
    return rc == MQ_OK ? send_rows(it, scratch->choices[slot], routes->experts, top_k * sizeof *routes->experts) : rc;
}

/* Whether what the layer's experts are scored by is on the device. */
static int has_changes(const mq_device_back *it)
{
    const mq_experts_score *score = mq_experts_score_of(it->layer->experts_observer);
    return score != NULL && it->device->changes.score == score && it->device->changes.memory != NULL;
}

static int start_chunk(back_chunks *all, int slot)
{
    mq_device_back *it = &all->it;
    const mq_backend *backend = it->device->backend;
    int rc = mq_backward_poll(it->back, it->err);
    it->slot = slot;
    it->chunk = &all->chunks[slot];
    it->gradient = it->scratch->gradient[slot];
    if (rc == MQ_OK) rc = send_chunk(all, &all->chunks[slot]);
    if (rc == MQ_OK) rc = backend->event_record(it->device->arrived[slot], it->device->rows, it->err);
    if (rc == MQ_OK) rc = backend->event_after(it->device->arrived[slot], it->device->compute, it->err);
    if (rc == MQ_OK && has_changes(it)) rc = mq_device_score_changes(it);
    if (rc == MQ_OK) rc = mq_device_attention_again(it);
    if (rc == MQ_OK) rc = mq_device_other_half(it);
    if (rc == MQ_OK) rc = mq_device_attention_back(it);
    return rc == MQ_OK ? backend->event_record(it->device->computed[slot], it->device->compute, it->err) : rc;
}

/* The gradients of a chunk go back to the host. Where these are not pinned this waits for them: the next chunk is under
 * way by then. */
static int fetch_chunk(const back_chunks *all, int slot)
{
    const mq_device_back *it = &all->it;
    const mq_device_chunk *chunk = &all->chunks[slot];
    const int64_t width = it->context->config->hidden_size;
    const int rc = it->device->backend->event_after(it->device->computed[slot], it->device->rows, it->err);
    if (rc != MQ_OK) return rc;
    return it->device->backend->copy(it->back->gradient + chunk->first * width, it->scratch->gradient[slot],
                                     (size_t)(chunk->rows * width) * sizeof(float), it->device->rows, it->err);
}

static int run_chunks(back_chunks *all)
{
    mq_device *device = all->it.device;
    mq_run *run = all->it.back->run;
    const int64_t most = all->it.scratch->rows;
    all->chunks[0] = mq_device_chunk_from(run, 0, most);
    int rc = start_chunk(all, 0);
    for (int slot = 0; rc == MQ_OK; slot = 1 - slot) {
        const int64_t next = all->chunks[slot].first_sequence + all->chunks[slot].sequences;
        const int more = next < run->sequence_count;
        if (more) {
            all->chunks[1 - slot] = mq_device_chunk_from(run, next, most);
            rc = start_chunk(all, 1 - slot);
        }
        if (rc == MQ_OK) rc = mq_device_meanwhile(device, run, more ? device->computed[slot] : NULL, all->it.err);
        if (rc == MQ_OK) rc = fetch_chunk(all, slot);
        if (!more) break;
    }
    return rc == MQ_OK ? all->it.device->backend->stream_wait(all->it.device->rows, all->it.err) : rc;
}

/* Gradients of hidden states, for as long as they last. */
static void pin(mq_device *device, const mq_backward *back)
{
    const size_t nbytes = (size_t)(back->run->rows * back->run->runtime->config.hidden_size) * sizeof(float);
    const size_t choices = (size_t)(back->run->rows * back->run->runtime->config.num_experts_per_tok);
    mq_device_pin(device, back->gradient, nbytes, 0);
    mq_device_pin(device, back->d_experts, nbytes, 1);
    mq_device_pin(device, back->d_shares, choices * sizeof *back->d_shares, 1);
}

void mq_device_forget_backward(mq_elsewhere *self, const mq_backward *back)
{
    mq_device *device = (mq_device *)(void *)self;
    mq_device_unpin(device, back->gradient);
    mq_device_unpin(device, back->d_experts);
    mq_device_unpin(device, back->d_shares);
}

int mq_device_back_ready(mq_device *device, mq_error *err)
{
    const int rc = device->backend->event_record(device->loaded, device->copies, err);
    return rc == MQ_OK ? device->backend->event_after(device->loaded, device->compute, err) : rc;
}

static int send_identity(const mq_device_back *it)
{
    const mq_device_back_scratch *scratch = it->scratch;
    const size_t nbytes = (size_t)scratch->rows * sizeof *scratch->identity;
    int64_t *rows;
    if (scratch->identity == NULL) return MQ_OK;
    rows = mq_alloc(nbytes);
    if (rows == NULL) return mq_fail_memory(it->err, "indices of rows", nbytes);
    for (int64_t i = 0; i < scratch->rows; i++) rows[i] = i;
    /* It is read before the call returns, since it is not pinned. */
    const int rc = it->device->backend->copy(scratch->identity, rows, nbytes, it->device->compute, it->err);
    mq_free(rows);
    return rc;
}

static int begin(const mq_device_back_room *room, mq_device_back *it)
{
    const mq_run *run = it->back->run;
    const mq_device_back_scratch *scratch = it->scratch;
    int rc = mq_device_back_reserve(room, run->rows, run->longest, it);
    if (rc == MQ_OK)
        rc = mq_device_send_ropes(it->device, it->context->ropes, scratch->cosine, scratch->sine, it->err);
    if (rc == MQ_OK) rc = send_identity(it);
    return rc == MQ_OK ? mq_device_back_ready(it->device, it->err) : rc;
}

int mq_device_back_layer(mq_elsewhere *self, mq_backward *back, int64_t layer, const void *input, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    const mq_layer_context context = mq_run_context(back->run);
    const mq_device_back_room room = {.device = device, .back = back, .layer = &back->run->runtime->layers[layer]};
    mq_device_back_scratch scratch = {0};
    back_chunks all = {
        .input = input, .it = {.device = device, .back = back, .layer = &back->run->runtime->layers[layer],
                               .context = &context, .scratch = &scratch, .expert = -1, .err = err},
    };
    int before;
    if (device->layer != layer)
        return mq_fail(err, MQ_ERR_STATE, "layer %lld is not loaded on the device", (long long)layer);
    int rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    pin(device, back);
    rc = begin(&room, &all.it);
    if (rc == MQ_OK && all.it.layer->experts_observer != NULL && !has_changes(&all.it))
        rc = mq_backward_observe_sum(back, all.it.layer->experts_observer, err);
    if (rc == MQ_OK) rc = run_chunks(&all);
    if (rc == MQ_OK && has_changes(&all.it)) rc = mq_device_take_changes(&all.it);
    rc = mq_device_finish(device, rc, err);
    mq_device_drop_changes(device);
    mq_free(all.it.fetched);
    mq_device_leave(device, before);
    return rc;
}
