/* Run: recorded batches on their way through a Runtime, layer by layer (csrc/model/run.h). */
#include "py/runtime.h"

#include <string.h>

#include "core/alloc.h"

PyDoc_STRVAR(run_doc,
"Recorded batches on their way through a Runtime. Made by Runtime.start.\n\n"
"embed, then layer(0), layer(1), ... each loaded before; then loss, logits or finish. embed starts again.");

const char mq_run_start_doc[] =
"start($self, ids, masks=None, count_padding=False, experts=0)\n--\n\n"
"A Run over batches of token ids.\n\n"
"ids: list of integer arrays [B, T]. masks: list of arrays [B, T] or None, 0 = padding: hidden from attention,\n"
"and left out of statistics unless count_padding. Positions are 0 to T - 1 in every row, as in a transformers\n"
"model called with input_ids and attention_mask. experts: of a layer that has any, so many at least see each token\n"
"(statistics, and the counts of layer()); the result is that of the model's own choice. ValueError names the\n"
"batch, position and value of an id outside the vocabulary.";

/* Views of one call's batches, owned until the run has copied them. */
typedef struct inputs {
    mq_batch_input *batches;
    PyObject **keeps;           /* ids and mask of each batch */
    Py_ssize_t count;
} inputs;

static int view_ids(mq_state *state, PyObject *object, Py_ssize_t index, mq_batch_input *out, PyObject **keep)
{
    char name[48];
    mq_tensor view;
    PyOS_snprintf(name, sizeof name, "ids[%d]", (int)index);
    if (mq_view_as(state, object, name, MQ_I64, &view, keep) < 0) return -1;
    if (view.ndim != 2) {
        PyErr_Format(PyExc_ValueError, "%s: expected shape [B, T], got %d dimensions", name, view.ndim);
        return -1;
    }
    *out = (mq_batch_input){.ids = view.data, .sequences = view.shape[0], .tokens = view.shape[1]};
    return 0;
}

static int view_mask(mq_state *state, PyObject *object, Py_ssize_t index, mq_batch_input *out, PyObject **keep)
{
    char name[48], text[96];
    mq_tensor view;
    PyOS_snprintf(name, sizeof name, "masks[%d]", (int)index);
    PyObject *booleans = mq_as_booleans(object);
    if (booleans == NULL) return -1;
    int rc = mq_view_contiguous(state, booleans, name, &view, keep);
    Py_DECREF(booleans);
    if (rc < 0) return -1;
    if (view.dtype == MQ_BOOL && view.ndim == 2 && view.shape[0] == out->sequences && view.shape[1] == out->tokens) {
        out->mask = view.data;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s is %s, but ids[%zd] is [%lld, %lld]", name,
                 mq_tensor_describe(&view, text, sizeof text), index, (long long)out->sequences,
                 (long long)out->tokens);
    return -1;
}

static void inputs_free(inputs *in)
{
    for (Py_ssize_t i = 0; in->keeps != NULL && i < 2 * in->count; i++) Py_XDECREF(in->keeps[i]);
    mq_free(in->keeps);
    mq_free(in->batches);
}

static int inputs_init(inputs *in, mq_state *state, PyObject *ids, PyObject *masks)
{
    in->count = PySequence_Fast_GET_SIZE(ids);
    in->batches = mq_alloc_array((size_t)in->count, sizeof *in->batches);
    in->keeps = mq_alloc_zeroed((size_t)in->count * 2 * sizeof *in->keeps);
    if (in->batches == NULL || in->keeps == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (masks != NULL && PySequence_Fast_GET_SIZE(masks) != in->count) {
        PyErr_Format(PyExc_ValueError, "masks: %zd for %zd batches", PySequence_Fast_GET_SIZE(masks), in->count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < in->count; i++) {
        if (view_ids(state, PySequence_Fast_GET_ITEM(ids, i), i, &in->batches[i], &in->keeps[2 * i]) < 0) return -1;
        PyObject *mask = masks ? PySequence_Fast_GET_ITEM(masks, i) : Py_None;
        if (mask != Py_None && view_mask(state, mask, i, &in->batches[i], &in->keeps[2 * i + 1]) < 0) return -1;
    }
    return 0;
}

static PyObject *make_run(RuntimeObject *runtime, mq_state *state, const inputs *in, int count_padding,
                          long long experts)
{
    RunObject *self = (RunObject *)state->run_type->tp_alloc(state->run_type, 0);
    mq_error err;
    int rc;
    if (self == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_run_init(&self->run, &runtime->runtime, in->batches, in->count, count_padding, NULL, &err);
    Py_END_ALLOW_THREADS
    if (rc == MQ_OK) {
        self->runtime = (RuntimeObject *)Py_NewRef((PyObject *)runtime);
        self->run.poll = mq_poll_signals;
        self->run.onlooking = experts;
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return mq_raise(&err);
}

PyObject *mq_run_start(PyObject *runtime, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ids", "masks", "count_padding", "experts", NULL};
    PyObject *ids_object, *masks_object = Py_None, *ids = NULL, *masks = NULL, *result = NULL;
    int count_padding = 0;
    long long experts = 0;
    inputs in = {0};
    mq_state *state = mq_state_of_object(runtime);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OpL:start", names, &ids_object, &masks_object, &count_padding,
                                     &experts))
        return NULL;
    if (experts < 0 || experts > ((RuntimeObject *)runtime)->runtime.config.num_experts)
        return PyErr_Format(PyExc_ValueError, "start: experts is %lld, the model has %lld", experts,
                            (long long)((RuntimeObject *)runtime)->runtime.config.num_experts);
    ids = PySequence_Fast(ids_object, "start: ids must be a list of arrays [B, T]");
    if (ids == NULL) return NULL;
    if (masks_object != Py_None) {
        masks = PySequence_Fast(masks_object, "start: masks must be a list of arrays [B, T] or None");
        if (masks == NULL) goto done;
    }
    if (inputs_init(&in, state, ids, masks) == 0)
        result = make_run((RuntimeObject *)runtime, state, &in, count_padding, experts);
done:
    inputs_free(&in);
    Py_XDECREF(masks);
    Py_DECREF(ids);
    return result;
}

static int run_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((RunObject *)self)->runtime);
    return 0;
}

/* Only the reference: the run's memory may be needed until dealloc, and takes part in no cycle. */
static int run_clear(PyObject *self)
{
    (void)self;
    return 0;
}

static void run_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    RunObject *object = (RunObject *)self;
    PyObject_GC_UnTrack(self);
    mq_run_free(&object->run);
    Py_CLEAR(object->runtime);
    type->tp_free(self);
    Py_DECREF(type);
}

int mq_run_enter(RunObject *self, int64_t layer)
{
    if (mq_enter(&self->busy, "the Run") < 0) return -1;
    if (mq_layer_enter(self->runtime, layer) == 0) return 0;
    mq_leave(&self->busy);
    return -1;
}

void mq_run_leave(RunObject *self, int64_t layer)
{
    mq_layer_leave(self->runtime, layer);
    mq_leave(&self->busy);
}

/* The core calls that only take tensors. */
typedef int (*tensors_fn)(mq_run *run, const mq_named_tensor *tensors, size_t count, mq_error *err);

static PyObject *with_tensors(PyObject *self, PyObject *dict, tensors_fn fn)
{
    RunObject *object = (RunObject *)self;
    mq_tensor_map map;
    mq_error err;
    int rc;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    if (mq_run_enter(object, -1) < 0) {
        mq_tensor_map_free(&map);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    rc = fn(&object->run, map.tensors, map.count, &err);
    Py_END_ALLOW_THREADS
    mq_run_leave(object, -1);
    mq_tensor_map_free(&map);
    return rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
}

PyDoc_STRVAR(embed_doc,
"embed($self, tensors)\n--\n\n"
"Looks up the embeddings. tensors: those of Runtime.embed_tensors().");

static PyObject *run_embed(PyObject *self, PyObject *dict)
{
    return with_tensors(self, dict, mq_run_embed);
}

PyDoc_STRVAR(finish_doc,
"finish($self, tensors)\n--\n\n"
"Gives lm_head's input calibrator its statistics, without computing logits. tensors: at least the final norm's\n"
"weight.");

static PyObject *run_finish(PyObject *self, PyObject *dict)
{
    return with_tensors(self, dict, mq_run_finish);
}

PyDoc_STRVAR(layer_doc,
"layer($self, layer, ahead=None)\n--\n\n"
"All batches through one layer, which must be loaded and the next in order.\n\n"
"Of a layer with experts this is the first half: it returns int64 [experts, 2], how many tokens go to each expert,\n"
"all of them and those that are no padding; then `expert` is to be called for each that has any. Else it returns\n"
"None.\n\n"
"ahead: on a device, called without arguments once that computes, to say by Runtime.begin_ahead what will be loaded\n"
"next, which is then sent as far as there is time; and once more when all of that is sent, as long as it returns\n"
"True. On the CPU it is not called.\n\n"
"Calibrators at its points collect once it is done. RuntimeError for a wrong order; after an error or Ctrl-C the\n"
"hidden states are lost, and embed starts again.");

PyObject *mq_expert_tokens(RunObject *self)
{
    const mq_dispatch *dispatch = &self->run.dispatch;
    int64_t shape[2] = {self->runtime->runtime.config.num_experts, 2};
    mq_tensor view;
    if (dispatch->layer < 0) return Py_NewRef(Py_None);
    PyObject *array = mq_new_array(mq_state_of_object((PyObject *)self), MQ_I64, 2, shape, &view);
    int64_t *out = array ? view.data : NULL;
    for (int64_t i = 0; array != NULL && i < shape[0]; i++) {
        out[2 * i] = dispatch->start[i + 1] - dispatch->start[i];
        out[2 * i + 1] = dispatch->counted[i];
    }
    return array;
}

int mq_parse_run_layer(RunObject *self, long long layer)
{
    long long layers = self->runtime->runtime.config.num_hidden_layers;
    if (layer == -1 && PyErr_Occurred()) return -1;
    if (layer >= 0 && layer < layers) return 0;
    PyErr_Format(PyExc_IndexError, "layer %lld of a model of %lld layers", layer, layers);
    return -1;
}

static PyObject *run_layer(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer", "ahead", NULL};
    RunObject *object = (RunObject *)self;
    PyObject *ahead = Py_None;
    mq_meanwhile meanwhile;
    long long layer;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|O:layer", names, &layer, &ahead) ||
        mq_parse_run_layer(object, layer) < 0 || mq_run_enter(object, layer) < 0)
        return NULL;
    if (mq_meanwhile_begin(&meanwhile, object, ahead) < 0) {
        mq_run_leave(object, layer);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    rc = mq_run_layer(&object->run, layer, &err);
    Py_END_ALLOW_THREADS
    mq_meanwhile_end(object);
    PyObject *result = rc == MQ_OK ? mq_expert_tokens(object) : mq_raise(&err);
    mq_run_leave(object, layer);
    return result;
}

PyDoc_STRVAR(expert_doc,
"expert($self, layer, expert, tensors, ahead=None)\n--\n\n"
"The tokens of one expert, after layer(layer), which must still be loaded; experts in order, those without tokens\n"
"may be left out. With the last that has tokens the layer is done. tensors: those of\n"
"Runtime.expert_tensors(layer, expert), in memory only meanwhile. ahead: as in `layer`. Errors as in `layer` and\n"
"`Runtime.load_layer`.");

static PyObject *run_expert(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer", "expert", "tensors", "ahead", NULL};
    RunObject *object = (RunObject *)self;
    PyObject *dict, *ahead = Py_None;
    mq_meanwhile meanwhile;
    mq_tensor_map map;
    long long layer, expert;
    mq_error err;
    int rc = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLO|O:expert", names, &layer, &expert, &dict, &ahead) ||
        mq_parse_run_layer(object, layer) < 0 || mq_check_expert(object->runtime, layer, expert) < 0)
        return NULL;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    if (mq_run_enter(object, layer) < 0) goto done;
    if (mq_meanwhile_begin(&meanwhile, object, ahead) == 0) {
        Py_BEGIN_ALLOW_THREADS
        rc = mq_run_expert(&object->run, layer, expert, map.tensors, map.count, &err);
        Py_END_ALLOW_THREADS
        mq_meanwhile_end(object);
        if (rc != MQ_OK) mq_raise(&err);
    }
    mq_run_leave(object, layer);
    mq_runtime_end_ahead(object->runtime, layer, expert, rc != MQ_OK);
done:
    mq_tensor_map_free(&map);
    return rc == MQ_OK ? Py_NewRef(Py_None) : NULL;
}

int mq_parse_batch(const RunObject *self, PyObject *argument, int64_t *out)
{
    long long batch = PyLong_AsLongLong(argument);
    if (batch == -1 && PyErr_Occurred()) return -1;
    *out = batch;
    if (batch >= 0 && batch < self->run.batch_count) return 0;
    PyErr_Format(PyExc_IndexError, "batch %lld of %lld", batch, (long long)self->run.batch_count);
    return -1;
}

static PyObject *batch_array(PyObject *self, int64_t batch, int64_t width, mq_tensor *view)
{
    const mq_batch *rows = &((RunObject *)self)->run.batches[batch];
    int64_t shape[3] = {rows->sequences, rows->tokens, width};
    return mq_new_array(mq_state_of_object(self), MQ_F32, 3, shape, view);
}

PyDoc_STRVAR(hidden_doc,
"hidden($self, batch)\n--\n\n"
"The hidden states of a batch where the run now is: float32 [B, T, C].");

static PyObject *run_hidden(PyObject *self, PyObject *argument)
{
    RunObject *object = (RunObject *)self;
    mq_tensor view;
    mq_error err;
    int64_t batch;
    if (mq_parse_batch(object, argument, &batch) < 0) return NULL;
    PyObject *array = batch_array(self, batch, object->runtime->runtime.config.hidden_size, &view);
    if (array == NULL || mq_enter(&object->busy, "the Run") < 0) goto fail;
    int rc = mq_run_hidden(&object->run, batch, view.data, &err);
    mq_leave(&object->busy);
    if (rc == MQ_OK) return array;
    mq_raise(&err);
fail:
    Py_XDECREF(array);
    return NULL;
}

int mq_view_hidden(RunObject *self, PyObject *object, const char *name, mq_tensor *view, PyObject **keep)
{
    const mq_runtime *runtime = &self->runtime->runtime;
    const int64_t shape[2] = {self->run.rows, runtime->config.hidden_size};
    const mq_tensor wanted = mq_tensor_make(NULL, runtime->dtype, 2, shape);
    char have[96], expected[96];
    if (mq_view_object(mq_state_of_object((PyObject *)self), object, name, view, keep) < 0) return -1;
    if (view->dtype == runtime->dtype && view->ndim == 2 && memcmp(view->shape, shape, sizeof shape) == 0 &&
        mq_tensor_is_contiguous(view))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected %s, contiguous, got %s", name,
                 mq_tensor_describe(&wanted, expected, sizeof expected), mq_tensor_describe(view, have, sizeof have));
    Py_CLEAR(*keep);
    return -1;
}

PyDoc_STRVAR(state_doc,
"state($self, out=None)\n--\n\n"
"The hidden states of all batches where the run now is, [rows, C] in the dtype of the runtime: for restore. out: an\n"
"array to put them into, which is then returned.");

static PyObject *new_hidden(RunObject *self, mq_tensor *view)
{
    const mq_runtime *runtime = &self->runtime->runtime;
    const int64_t shape[2] = {self->run.rows, runtime->config.hidden_size};
    return mq_new_array(mq_state_of_object((PyObject *)self), runtime->dtype, 2, shape, view);
}

static PyObject *run_state(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"out", NULL};
    RunObject *object = (RunObject *)self;
    PyObject *given = Py_None, *keep = NULL, *result = NULL;
    mq_tensor view;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:state", names, &given)) return NULL;
    if (given != Py_None && mq_view_hidden(object, given, "out", &view, &keep) < 0) return NULL;
    if (given != Py_None && view.readonly) PyErr_SetString(PyExc_ValueError, "out: it is read-only");
    else result = given == Py_None ? new_hidden(object, &view) : Py_NewRef(given);
    if (result != NULL && mq_enter(&object->busy, "the Run") < 0) Py_CLEAR(result);
    if (result != NULL) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(view.data, object->run.hidden, mq_run_state_nbytes(&object->run));
        Py_END_ALLOW_THREADS
        mq_leave(&object->busy);
    }
    Py_XDECREF(keep);
    return result;
}

PyDoc_STRVAR(restore_doc,
"restore($self, state, layer, /)\n--\n\n"
"Goes (back) to where state() was taken, in this run or another over the same batches: layer comes next.");

static PyObject *run_restore(PyObject *self, PyObject *args)
{
    RunObject *object = (RunObject *)self;
    PyObject *given, *keep = NULL, *result = NULL;
    long long layer;
    mq_tensor view;
    mq_error err;
    if (!PyArg_ParseTuple(args, "OL:restore", &given, &layer) ||
        mq_view_hidden(object, given, "state", &view, &keep) < 0)
        return NULL;
    if (mq_enter(&object->busy, "the Run") == 0) {
        const int rc = mq_run_restore(&object->run, view.data, layer, &err);
        mq_leave(&object->busy);
        result = rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
    }
    Py_DECREF(keep);
    return result;
}

PyDoc_STRVAR(logits_doc,
"logits($self, batch, tensors, /)\n--\n\n"
"The logits of a batch after all layers: float32 [B, T, V]. tensors: those of Runtime.head_tensors().");

static PyObject *run_logits(PyObject *self, PyObject *args)
{
    RunObject *object = (RunObject *)self;
    PyObject *index, *dict, *array;
    mq_tensor_map map;
    mq_tensor view;
    mq_error err;
    int64_t batch;
    int rc = -1;
    if (!PyArg_ParseTuple(args, "OO:logits", &index, &dict) || mq_parse_batch(object, index, &batch) < 0) return NULL;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    array = batch_array(self, batch, object->runtime->runtime.config.vocab_size, &view);
    if (array == NULL || mq_run_enter(object, -1) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_run_logits(&object->run, batch, map.tensors, map.count, view.data, &err);
    Py_END_ALLOW_THREADS
    mq_run_leave(object, -1);
    if (rc != MQ_OK) mq_raise(&err);
done:
    mq_tensor_map_free(&map);
    if (rc != MQ_OK) Py_CLEAR(array);
    return array;
}

int32_t *mq_read_labels(RunObject *self, PyObject *object)
{
    mq_state *state = mq_state_of_object((PyObject *)self);
    int64_t vocabulary = self->runtime->runtime.config.vocab_size;
    PyObject *list = PySequence_Fast(object, "loss: labels must be a list of arrays [B, T]"), *keep = NULL;
    int32_t *labels = mq_alloc_array((size_t)self->run.rows, sizeof *labels);
    if (labels == NULL) PyErr_NoMemory();
    if (list != NULL && PySequence_Fast_GET_SIZE(list) != (Py_ssize_t)self->run.batch_count)
        PyErr_Format(PyExc_ValueError, "labels: %zd for %lld batches", PySequence_Fast_GET_SIZE(list),
                     (long long)self->run.batch_count);
    for (int64_t b = 0; b < self->run.batch_count && !PyErr_Occurred(); b++) {
        const mq_batch *batch = &self->run.batches[b];
        mq_batch_input input;
        if (view_ids(state, PySequence_Fast_GET_ITEM(list, b), b, &input, &keep) < 0) break;
        if (input.sequences != batch->sequences || input.tokens != batch->tokens)
            PyErr_Format(PyExc_ValueError, "labels[%lld]: expected shape [%lld, %lld]", (long long)b,
                         (long long)batch->sequences, (long long)batch->tokens);
        for (int64_t i = 0; i < batch->sequences * batch->tokens && !PyErr_Occurred(); i++) {
            if (input.ids[i] >= vocabulary)
                PyErr_Format(PyExc_ValueError, "labels[%lld]: %lld is outside the vocabulary of %lld", (long long)b,
                             (long long)input.ids[i], (long long)vocabulary);
            labels[batch->first + i] = (int32_t)MQ_MAX(input.ids[i], (int64_t)-1);
        }
        Py_CLEAR(keep);
    }
    Py_XDECREF(keep);
    Py_XDECREF(list);
    if (!PyErr_Occurred()) return labels;
    mq_free(labels);
    return NULL;
}

static int compute_loss(RunObject *object, const int32_t *labels, const mq_tensor_map *map, mq_tensor *sums,
                        mq_tensor *counts)
{
    mq_error err;
    int rc;
    if (mq_run_enter(object, -1) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_run_loss(&object->run, labels, map->tensors, map->count, sums->data, counts->data, &err);
    Py_END_ALLOW_THREADS
    mq_run_leave(object, -1);
    if (rc != MQ_OK) mq_raise(&err);
    return rc == MQ_OK ? 0 : -1;
}

PyDoc_STRVAR(loss_doc,
"loss($self, tensors, labels=None)\n--\n\n"
"Negative log likelihood of each next token, in nats, after all layers.\n\n"
"Returns (sums, counts), float64 and int64, an entry per row of every batch in order: the sum over predicted\n"
"tokens, and how many. labels: list of integer arrays [B, T], position t is predicted from t - 1, negative = not\n"
"predicted; by default the ids, where neither the token nor the one before it is padding. tensors: those of\n"
"Runtime.head_tensors().");

static PyObject *run_loss(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tensors", "labels", NULL};
    RunObject *object = (RunObject *)self;
    PyObject *dict, *labels_object = Py_None, *sums = NULL, *counts = NULL, *result = NULL;
    mq_state *state = mq_state_of_object(self);
    mq_tensor sums_view, counts_view;
    mq_tensor_map map;
    int32_t *labels = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:loss", names, &dict, &labels_object)) return NULL;
    if (mq_tensor_map_init(&map, state, dict) < 0) return NULL;
    if (labels_object != Py_None && (labels = mq_read_labels(object, labels_object)) == NULL) goto done;
    sums = mq_new_array(state, MQ_F64, 1, &object->run.sequence_count, &sums_view);
    counts = mq_new_array(state, MQ_I64, 1, &object->run.sequence_count, &counts_view);
    if (sums == NULL || counts == NULL) goto done;
    if (compute_loss(object, labels, &map, &sums_view, &counts_view) == 0) result = PyTuple_Pack(2, sums, counts);
done:
    Py_XDECREF(sums);
    Py_XDECREF(counts);
    mq_free(labels);
    mq_tensor_map_free(&map);
    return result;
}

static PyObject *run_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(mq_run_nbytes(&((RunObject *)self)->run));
}

static PyObject *run_next_layer(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((RunObject *)self)->run.next_layer);
}

static PyMethodDef methods[] = {
    {"embed", run_embed, METH_O, embed_doc},
    {"layer", (PyCFunction)(void (*)(void))run_layer, METH_VARARGS | METH_KEYWORDS, layer_doc},
    {"expert", (PyCFunction)(void (*)(void))run_expert, METH_VARARGS | METH_KEYWORDS, expert_doc},
    {"finish", run_finish, METH_O, finish_doc},
    {"hidden", run_hidden, METH_O, hidden_doc},
    {"state", (PyCFunction)(void (*)(void))run_state, METH_VARARGS | METH_KEYWORDS, state_doc},
    {"restore", run_restore, METH_VARARGS, restore_doc},
    {"logits", run_logits, METH_VARARGS, logits_doc},
    {"loss", (PyCFunction)(void (*)(void))run_loss, METH_VARARGS | METH_KEYWORDS, loss_doc},
    {"backward", (PyCFunction)(void (*)(void))mq_run_backward, METH_VARARGS | METH_KEYWORDS, mq_run_backward_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"nbytes", run_nbytes, NULL, "Bytes held: hidden states, ids, masks, scratch.", NULL},
    {"next_layer", run_next_layer, NULL, "The layer that comes next; -1 before embed and after a failure.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)run_doc},
    {Py_tp_dealloc, run_dealloc},
    {Py_tp_traverse, run_traverse},
    {Py_tp_clear, run_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.Run", .basicsize = sizeof(RunObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

static int run_init(PyObject *module, mq_state *state)
{
    state->run_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->run_type ? PyModule_AddType(module, state->run_type) : -1;
}

const mq_py_part mq_py_run = {.init = run_init};
