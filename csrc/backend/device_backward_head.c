/* From the losses to the last hidden states on a device (backward_head.c): as many rows as there is room for, and the
 * vocabulary goes by them in slices. */
#include "backend/device_backward.h"
#include "core/alloc.h"

/* Columns of the vocabulary: few, for what backward_head.c says of sums in which likely tokens cancel. */
enum { SLICE = 512, LEAST_ROWS = 16 };

typedef struct head {
    mq_device_back it;              /* chunk: the rows at work */
    const mq_back_head_request *request;
    mq_device_back_scratch scratch;
    int64_t most;                   /* rows that there is room for */
    int scores;                     /* and whether for candidates' logits, if they are scored */
    mq_cuda_matrix weight;          /* (width, C): of the slice */
    int64_t first, width;           /* of the slice */
    float *norm;                    /* (C) */
    void *hidden, *normed;          /* (rows, C) */
    float *gradient, *logits, *d_logits;    /* (rows, C), (rows, SLICE); one of both if nobody needs the logits more */
    mq_cuda_loss_row *losses;       /* (rows) each: */
    int32_t *targets;
    float *factors;
} head;

static const mq_runtime *runtime_of(const head *it)
{
    return it->it.back->run->runtime;
}

static int64_t slice_of(const head *it)
{
    return MQ_MIN((int64_t)SLICE, runtime_of(it)->config.vocab_size);
}

static size_t cut(head *it, mq_arena *arena, int64_t rows)
{
    const int64_t hidden = runtime_of(it)->config.hidden_size, slice = slice_of(it);
    const size_t size = mq_dtype_size(runtime_of(it)->dtype), all = (size_t)(rows * hidden);
    const size_t logits = (size_t)(rows * slice) * sizeof(float);
    const int wanted = it->it.back->wanted_count > 0, is_narrow = size < sizeof(float);
    const int apart = runtime_of(it)->head_observer != NULL || mq_logits_change(&runtime_of(it)->config);
    const mq_cuda_norm_job norm = {.x = {NULL, runtime_of(it)->dtype, rows, hidden, hidden}, .heads = 1,
                                   .d_weight = (float *)&size};
    const mq_output_score *score = mq_output_score_of(runtime_of(it)->head_observer);
    const mq_device_score_sizes scores = {
        .rows = rows, .columns = hidden, .outputs = slice,
        .candidates = score != NULL && it->scores ? (int64_t)score->count : 0,
        .nbytes = (size_t)(slice * hidden) * size, .size = size, .output_size = sizeof(float),
    };
    mq_device_back_scratch *scratch = &it->scratch;
    arena->used = 0;
    it->norm = mq_arena_take(arena, (size_t)hidden * sizeof *it->norm);
    it->weight.data = mq_arena_take(arena, (size_t)(slice * hidden) * size);
    it->hidden = mq_arena_take(arena, all * size);
    it->normed = mq_arena_take(arena, all * size);
    it->gradient = mq_arena_take(arena, all * sizeof *it->gradient);
    it->d_logits = mq_arena_take(arena, logits);
    it->logits = apart ? mq_arena_take(arena, logits) : it->d_logits;
    it->losses = mq_arena_take(arena, (size_t)rows * sizeof *it->losses);
    it->targets = mq_arena_take(arena, (size_t)rows * sizeof *it->targets);
    it->factors = mq_arena_take(arena, (size_t)rows * sizeof *it->factors);
    scratch->rounded = is_narrow ? mq_arena_take(arena, (size_t)(rows * slice) * size) : NULL;
    scratch->single = wanted && is_narrow ? mq_arena_take(arena, all * sizeof(float)) : NULL;
    scratch->piece_count = wanted ? MQ_MAX(it->it.device->piece_nbytes / (int64_t)sizeof(float), hidden) : 0;
    scratch->piece = mq_arena_take(arena, (size_t)scratch->piece_count * sizeof(float));
    scratch->sums_nbytes = wanted ? it->it.device->backend->rmsnorm_workspace(&norm) : 0;
    scratch->sums = mq_arena_take(arena, scratch->sums_nbytes);
    scratch->scores = (mq_device_scores){0};
    if (scores.candidates > 0) mq_device_cut_scores(arena, &scores, &scratch->scores);
    return arena->used;
}

/* As many rows as there is room for, if there is any for the fewest that are tried. */
static int64_t fit(head *it, size_t room)
{
    mq_arena none = {0};
    int64_t rows = MQ_MIN(it->it.back->run->rows, (int64_t)MQ_CHUNK_ROWS * 4);
    while (rows > LEAST_ROWS && cut(it, &none, rows) > room) rows = rows / 4 * 3;
    return rows;
}

static int reserve(head *it)
{
    mq_device *device = it->it.device;
    const size_t room = mq_device_available(device, &device->work);
    mq_arena none = {0};
    it->scores = 1;
    int64_t rows = fit(it, room);
    if (cut(it, &none, rows) > room) {
        it->scores = 0;             /* they can be made on the host */
        rows = fit(it, room);
    }
    it->most = rows;
    const int rc = mq_arena_reserve(device, &device->work, cut(it, &none, rows), "rows on their way back from lm_head",
                                    it->it.err);
    if (rc != MQ_OK) return rc;
    cut(it, &device->work, rows);
    if (it->scratch.piece == NULL) return MQ_OK;
    it->it.fetched = mq_alloc((size_t)it->scratch.piece_count * sizeof(float));
    if (it->it.fetched != NULL) return MQ_OK;
    return mq_fail_memory(it->it.err, "gradients of weights", (size_t)it->scratch.piece_count * sizeof(float));
}

static int copy(const head *it, void *to, const void *from, size_t nbytes)
{
    return it->it.device->backend->copy(to, from, nbytes, it->it.device->compute, it->it.err);
}

static mq_cuda_norm_job norm_of(const head *it)
{
    const mq_config *config = &runtime_of(it)->config;
    return (mq_cuda_norm_job){
        .x = mq_device_back_matrix(&it->it, it->hidden, config->hidden_size), .weight = it->norm, .heads = 1,
        .y = mq_device_back_matrix(&it->it, it->normed, config->hidden_size), .eps = (float)config->rms_norm_eps,
    };
}

/* What the rows at work begin with. */
static int enter_rows(const head *it)
{
    const mq_run *run = it->it.back->run;
    const mq_backend *backend = it->it.device->backend;
    const int64_t width = run->runtime->config.hidden_size, first = it->it.chunk->first;
    const size_t rows = (size_t)it->it.chunk->rows, stride = (size_t)width * mq_dtype_size(run->runtime->dtype);
    const mq_cuda_norm_job norm = norm_of(it);
    int rc = copy(it, it->hidden, run->hidden + (size_t)first * stride, rows * stride);
    if (rc == MQ_OK) rc = copy(it, it->losses, it->request->losses + first, rows * sizeof *it->losses);
    if (rc == MQ_OK) rc = copy(it, it->targets, it->request->targets + first, rows * sizeof *it->targets);
    if (rc == MQ_OK) rc = copy(it, it->factors, it->request->factors + first, rows * sizeof *it->factors);
    if (rc == MQ_OK) rc = backend->rmsnorm(&norm, it->it.device->compute, it->it.err);
    if (rc != MQ_OK) return rc;
    return backend->fill(it->gradient, 0, rows * (size_t)width * sizeof *it->gradient, it->it.device->compute,
                         it->it.err);
}

/* Through the final norm, and to the host. */
static int leave_rows(const head *it)
{
    const mq_backend *backend = it->it.device->backend;
    const int64_t width = runtime_of(it)->config.hidden_size;
    const size_t vector = (size_t)width * sizeof(float);
    float *to = it->it.back->gradient + it->it.chunk->first * width;
    mq_cuda_norm_job norm = norm_of(it);
    int rc = MQ_OK;
    norm.d_out = norm.d_in = it->gradient;
    if (it->request->d_norm != NULL) {
        norm.d_weight = it->scratch.piece;
        norm.workspace = it->scratch.sums;
        norm.workspace_nbytes = it->scratch.sums_nbytes;
        rc = backend->fill(norm.d_weight, 0, vector, it->it.device->compute, it->it.err);
    }
    if (rc == MQ_OK) rc = backend->rmsnorm_backward(&norm, it->it.device->compute, it->it.err);
    if (rc == MQ_OK && it->request->d_norm != NULL) rc = mq_device_back_fetch(&it->it, it->request->d_norm, 1, width);
    if (rc == MQ_OK) rc = copy(it, to, it->gradient, (size_t)it->it.chunk->rows * vector);
    return rc == MQ_OK ? backend->stream_wait(it->it.device->compute, it->it.err) : rc;
}

/* Columns first to first + width of the vocabulary, after what still reads the ones before. */
static int load_slice(head *it)
{
    mq_device *device = it->it.device;
    const mq_backend *backend = device->backend;
    mq_error *err = it->it.err;
    mq_tensor part = *it->request->weight;
    const int64_t hidden = runtime_of(it)->config.hidden_size;
    part.shape[0] = it->width;
    part.data = (char *)part.data + it->first * part.stride[0] * (int64_t)mq_dtype_size(part.dtype);
    it->weight = (mq_cuda_matrix){it->weight.data, runtime_of(it)->dtype, it->width, hidden, hidden};
    int rc = backend->event_record(device->loaded, device->compute, err);
    if (rc == MQ_OK) rc = backend->event_after(device->loaded, device->copies, err);
    if (rc == MQ_OK) rc = mq_device_upload(device, &part, &it->weight, err);
    if (rc == MQ_OK) rc = mq_finding_weight(device, &it->weight, it->request->name, err);
    if (rc == MQ_OK) rc = backend->event_record(device->loaded, device->copies, err);
    return rc == MQ_OK ? backend->event_after(device->loaded, device->compute, err) : rc;
}

static int observe(const head *it)
{
    const mq_runtime *runtime = runtime_of(it);
    const mq_observed observed = {
        .input = it->normed, .output = it->logits, .gradient = it->d_logits, .dtype = runtime->dtype,
        .output_dtype = MQ_F32, .rows = it->it.chunk->rows, .columns = runtime->config.hidden_size,
        .width = it->width, .first = it->it.chunk->first, .total = it->it.back->run->rows, .column = it->first,
        .outputs = runtime->config.vocab_size, .expert = -1,
    };
    return mq_device_observe(&it->it, runtime->head_observer, &observed);
}

/* d_logits (rows, width), of the logits that are made once more. */
static int make_gradients(const head *it)
{
    mq_device *device = it->it.device;
    const mq_backend *backend = device->backend;
    const mq_config *config = &runtime_of(it)->config;
    const int64_t hidden = config->hidden_size;
    const mq_cuda_matrix logits = mq_device_back_single(&it->it, it->logits, it->width);
    const mq_cuda_matrix changed = mq_device_back_single(&it->it, it->d_logits, it->width);
    const mq_cuda_softcap_job cap = {.x = changed, .divisor = (float)config->logits_scaling,
                                     .cap = (float)config->final_logit_softcapping};
    const mq_cuda_softcap_job uncap = {.x = logits, .gradient = changed, .divisor = cap.divisor, .cap = cap.cap};
    const mq_cuda_loss_job loss = {.logits = changed, .labels = it->targets, .first = it->first, .state = it->losses,
                                   .factors = it->factors, .gradient = changed};
    const mq_cuda_gemm_job product = {
        .a = mq_device_back_matrix(&it->it, it->normed, hidden), .b = it->weight, .out = logits, .transpose_b = 1,
        .alpha = 1.0f, .workspace = device->workspace,
    };
    const int changes = mq_logits_change(config);
    int rc = backend->gemm_run(device->gemm, &product, device->compute, it->it.err);
    if (rc == MQ_OK && it->logits != it->d_logits)
        rc = copy(it, it->d_logits, it->logits, (size_t)(logits.rows * logits.cols) * sizeof(float));
    if (rc == MQ_OK && changes) rc = backend->softcap(&cap, device->compute, it->it.err);
    if (rc == MQ_OK) rc = backend->loss_backward(&loss, device->compute, it->it.err);
    return rc == MQ_OK && changes ? backend->softcap_backward(&uncap, device->compute, it->it.err) : rc;
}

/* The rows at work against the slice: gradient (rows, C) += d_logits * slice. */
static int step(const head *it)
{
    mq_device *device = it->it.device;
    const int64_t hidden = runtime_of(it)->config.hidden_size;
    float *wanted = it->request->d_weight;
    mq_cuda_gemm_job job = {
        .b = it->weight, .out = mq_device_back_single(&it->it, it->gradient, hidden), .alpha = 1.0f, .beta = 1.0f,
        .workspace = device->workspace,
    };
    int rc = make_gradients(it);
    if (rc == MQ_OK && runtime_of(it)->head_observer != NULL) rc = observe(it);
    if (rc == MQ_OK && wanted != NULL)
        rc = mq_device_back_weight(&it->it, wanted + it->first * hidden, it->d_logits, it->width, it->normed, hidden);
    if (rc == MQ_OK) rc = mq_device_back_narrow(&it->it, it->d_logits, it->width, &job.a);
    return rc == MQ_OK ? device->backend->gemm_run(device->gemm, &job, device->compute, it->it.err) : rc;
}

static int run_rows(head *it)
{
    const int64_t vocabulary = runtime_of(it)->config.vocab_size;
    int rc = enter_rows(it);
    for (it->first = 0; rc == MQ_OK && it->first < vocabulary; it->first += SLICE) {
        it->width = MQ_MIN((int64_t)SLICE, vocabulary - it->first);
        rc = mq_backward_poll(it->it.back, it->it.err);
        if (rc == MQ_OK) rc = load_slice(it);
        if (rc == MQ_OK) rc = step(it);
    }
    return rc == MQ_OK ? leave_rows(it) : rc;
}

static int run_head(head *it)
{
    const mq_run *run = it->it.back->run;
    int rc = reserve(it);
    if (rc == MQ_OK)
        rc = copy(it, it->norm, it->request->norm, (size_t)run->runtime->config.hidden_size * sizeof *it->norm);
    for (int64_t first = 0; rc == MQ_OK && first < run->rows; first += it->most) {
        const mq_device_chunk rows = {.first = first, .rows = MQ_MIN(it->most, run->rows - first)};
        it->it.chunk = &rows;
        rc = run_rows(it);
    }
    return rc;
}

int mq_device_back_head(mq_elsewhere *self, mq_backward *back, const mq_back_head_request *request, mq_error *err)
{
    mq_device *device = (mq_device *)(void *)self;
    const mq_layer_context context = mq_run_context(back->run);
    head it = {.request = request, .it = {.device = device, .back = back, .context = &context, .expert = -1,
                                          .err = err}};
    int before, rc = mq_device_enter(device, &before, err);
    if (rc != MQ_OK) return rc;
    it.it.scratch = &it.scratch;
    rc = run_head(&it);
    rc = mq_device_finish(device, rc, err);
    mq_free(it.it.fetched);
    mq_device_leave(device, before);
    return rc;
}
