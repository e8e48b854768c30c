/* Decoder: a Runtime with all of its weights, and the keys and values of its sequences (csrc/model/decoder.h). */
#include "py/runtime.h"

#include "core/alloc.h"
#include "model/decoder.h"

typedef struct DecoderObject {
    PyObject_HEAD
    mq_decoder decoder;
    RuntimeObject *runtime;
    mq_tensor_map embedding;    /* keeps its array */
    _Atomic int busy;
} DecoderObject;

PyDoc_STRVAR(decoder_doc,
"Decoder(runtime, embedding, head, /)\n--\n\n"
"Sequences of tokens on their way through a Runtime, token by token, their keys and values kept.\n\n"
"runtime: with all layers loaded by the first call of forward; it should be nobody else's. embedding, head: {name:\n"
"array}, those of Runtime.embed_tensors() and Runtime.head_tensors(). Begins with one empty sequence.");

static int decoder_fill(DecoderObject *self, mq_state *state, PyObject *embedding, PyObject *head)
{
    mq_tensor_map outer;
    mq_error err;
    int rc;
    if (mq_tensor_map_init(&self->embedding, state, embedding) < 0) return -1;
    if (mq_tensor_map_init(&outer, state, head) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_decoder_init(&self->decoder, &self->runtime->runtime, self->embedding.tensors, self->embedding.count,
                         outer.tensors, outer.count, &err);
    Py_END_ALLOW_THREADS
    mq_tensor_map_free(&outer);
    if (rc != MQ_OK) mq_raise(&err);
    self->decoder.poll = mq_poll_signals;
    return rc == MQ_OK ? 0 : -1;
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *runtime, *embedding, *head;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0)
        return PyErr_Format(PyExc_TypeError, "Decoder takes no keyword arguments");
    mq_state *state = PyType_GetModuleState(type);
    if (!PyArg_ParseTuple(args, "O!OO:Decoder", state->runtime_type, &runtime, &embedding, &head)) return NULL;
    DecoderObject *self = (DecoderObject *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->runtime = (RuntimeObject *)Py_NewRef(runtime);
    if (decoder_fill(self, state, embedding, head) == 0) return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static int decoder_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((DecoderObject *)self)->runtime);
    return 0;
}

/* As a Run's: it takes part in no cycle of its own. */
static int decoder_clear(PyObject *self)
{
    (void)self;
    return 0;
}

static void decoder_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    DecoderObject *object = (DecoderObject *)self;
    PyObject_GC_UnTrack(self);
    mq_decoder_free(&object->decoder);
    mq_tensor_map_free(&object->embedding);
    Py_CLEAR(object->runtime);
    type->tp_free(self);
    Py_DECREF(type);
}

static void leave(DecoderObject *self, int64_t layers)
{
    for (int64_t layer = -1; layer < layers; layer++) mq_layer_leave(self->runtime, layer);
    mq_leave(&self->busy);
}

/* The decoder and every layer of its runtime, for one call. */
static int enter(DecoderObject *self)
{
    if (mq_enter(&self->busy, "the Decoder") < 0) return -1;
    for (int64_t layer = -1; layer < self->runtime->runtime.config.num_hidden_layers; layer++) {
        if (mq_layer_enter(self->runtime, layer) == 0) continue;
        leave(self, layer);
        return -1;
    }
    return 0;
}

static void leave_all(DecoderObject *self)
{
    leave(self, self->runtime->runtime.config.num_hidden_layers);
}

PyDoc_STRVAR(load_expert_doc,
"load_expert($self, layer, expert, tensors, /)\n--\n\n"
"Packs the weights of one expert, which stay. tensors: those of Runtime.expert_tensors(layer, expert).");

static PyObject *decoder_load_expert(PyObject *self, PyObject *args)
{
    DecoderObject *object = (DecoderObject *)self;
    long long layer, expert, layers = object->runtime->runtime.config.num_hidden_layers;
    PyObject *dict;
    mq_tensor_map map;
    mq_error err;
    int rc = -1;
    if (!PyArg_ParseTuple(args, "LLO:load_expert", &layer, &expert, &dict)) return NULL;
    if (layer < 0 || layer >= layers)
        return PyErr_Format(PyExc_IndexError, "layer %lld of a model of %lld layers", layer, layers);
    if (mq_check_expert(object->runtime, layer, expert) < 0) return NULL;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    if (enter(object) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_decoder_load_expert(&object->decoder, layer, expert, map.tensors, map.count, &err);
    Py_END_ALLOW_THREADS
    leave_all(object);
    if (rc != MQ_OK) mq_raise(&err);
done:
    mq_tensor_map_free(&map);
    return rc == MQ_OK ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(reset_doc, "reset($self, sequences, /)\n--\n\nBegins anew, with so many empty sequences.");

static PyObject *decoder_reset(PyObject *self, PyObject *argument)
{
    DecoderObject *object = (DecoderObject *)self;
    long long sequences = PyLong_AsLongLong(argument);
    mq_error err;
    if ((sequences == -1 && PyErr_Occurred()) || mq_enter(&object->busy, "the Decoder") < 0) return NULL;
    const int rc = mq_decoder_reset(&object->decoder, sequences, &err);
    mq_leave(&object->busy);
    return rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
}

PyDoc_STRVAR(keep_doc,
"keep($self, sequence, length, /)\n--\n\n"
"Forgets the tokens of a sequence from position length on. ValueError: it has no such sequence, or is shorter.");

static PyObject *decoder_keep(PyObject *self, PyObject *args)
{
    DecoderObject *object = (DecoderObject *)self;
    long long sequence, length;
    mq_error err;
    if (!PyArg_ParseTuple(args, "LL:keep", &sequence, &length) || mq_enter(&object->busy, "the Decoder") < 0)
        return NULL;
    const int rc = mq_decoder_keep(&object->decoder, sequence, length, &err);
    mq_leave(&object->busy);
    return rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
}

/* The tokens of one call, owned until it is over. */
typedef struct inputs {
    mq_batch_input *each;
    PyObject **keeps;
    Py_ssize_t count;
    int64_t tokens;             /* of all */
} inputs;

static void inputs_free(inputs *in)
{
    for (Py_ssize_t i = 0; in->keeps != NULL && i < in->count; i++) Py_XDECREF(in->keeps[i]);
    mq_free(in->keeps);
    mq_free(in->each);
}

static int read_input(inputs *in, mq_state *state, Py_ssize_t index, PyObject *sequence, PyObject *ids)
{
    char name[48];
    mq_tensor view;
    PyOS_snprintf(name, sizeof name, "ids[%d]", (int)index);
    const long long slot = PyLong_AsLongLong(sequence);
    if (slot == -1 && PyErr_Occurred()) return -1;
    if (mq_view_as(state, ids, name, MQ_I64, &view, &in->keeps[index]) < 0) return -1;
    if (view.ndim != 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected one row of token ids, got %d dimensions", name, view.ndim);
        return -1;
    }
    in->each[index] = (mq_batch_input){.ids = view.data, .sequences = 1, .tokens = view.shape[0], .slot = slot};
    in->tokens += view.shape[0];
    return 0;
}

static int inputs_init(inputs *in, mq_state *state, PyObject *sequences, PyObject *ids)
{
    PyObject *slots = PySequence_Fast(sequences, "forward: sequences must be a sequence of integers");
    PyObject *rows = slots ? PySequence_Fast(ids, "forward: ids must be a sequence of arrays") : NULL;
    int rc = rows ? 0 : -1;
    if (rc == 0 && PySequence_Fast_GET_SIZE(slots) != PySequence_Fast_GET_SIZE(rows)) {
        PyErr_Format(PyExc_ValueError, "forward: %zd sequences, but ids for %zd", PySequence_Fast_GET_SIZE(slots),
                     PySequence_Fast_GET_SIZE(rows));
        rc = -1;
    }
    if (rc == 0) {
        in->count = PySequence_Fast_GET_SIZE(rows);
        in->each = mq_alloc_array((size_t)in->count, sizeof *in->each);
        in->keeps = mq_alloc_zeroed((size_t)in->count * sizeof *in->keeps);
        if (in->each == NULL || in->keeps == NULL) {
            PyErr_NoMemory();
            rc = -1;
        }
    }
    for (Py_ssize_t i = 0; rc == 0 && i < in->count; i++)
        rc = read_input(in, state, i, PySequence_Fast_GET_ITEM(slots, i), PySequence_Fast_GET_ITEM(rows, i));
    Py_XDECREF(slots);
    Py_XDECREF(rows);
    return rc;
}

PyDoc_STRVAR(forward_doc,
"forward($self, sequences, ids, every=False)\n--\n\n"
"Further tokens of some of the sequences: ids[i], integers [T], follow what sequences[i] has been through.\n\n"
"Returns the logits of the token that comes after the last of each, float32 [len(ids), V]; every: after each token,\n"
"[tokens, V], sequence by sequence. After an error or Ctrl-C the sequences are where they were. RuntimeError: a layer\n"
"or an expert that is needed is not loaded.");

static PyObject *decoder_forward(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sequences", "ids", "every", NULL};
    DecoderObject *object = (DecoderObject *)self;
    PyObject *sequences, *ids, *array = NULL;
    inputs in = {0};
    mq_tensor view;
    mq_error err;
    int every = 0, rc = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|p:forward", names, &sequences, &ids, &every)) return NULL;
    if (inputs_init(&in, mq_state_of_object(self), sequences, ids) < 0) goto done;
    const int64_t shape[2] = {every ? in.tokens : (int64_t)in.count, object->runtime->runtime.config.vocab_size};
    array = mq_new_array(mq_state_of_object(self), MQ_F32, 2, shape, &view);
    if (array == NULL || enter(object) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_decoder_forward(&object->decoder, in.each, in.count, every, view.data, &err);
    Py_END_ALLOW_THREADS
    leave_all(object);
    if (rc != MQ_OK) mq_raise(&err);
done:
    if (rc != MQ_OK) Py_CLEAR(array);
    inputs_free(&in);
    return array;
}

static PyObject *decoder_lengths(PyObject *self, void *unused)
{
    const mq_cache *cache = &((DecoderObject *)self)->decoder.cache;
    PyObject *list = PyList_New(cache->slots);
    (void)unused;
    for (int64_t i = 0; list != NULL && i < cache->slots; i++) {
        PyObject *length = PyLong_FromLongLong(cache->lengths[i]);
        if (length == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, (Py_ssize_t)i, length);
    }
    return list;
}

static PyObject *decoder_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(mq_decoder_nbytes(&((DecoderObject *)self)->decoder));
}

static PyMethodDef methods[] = {
    {"load_expert", decoder_load_expert, METH_VARARGS, load_expert_doc},
    {"reset", decoder_reset, METH_O, reset_doc},
    {"keep", decoder_keep, METH_VARARGS, keep_doc},
    {"forward", (PyCFunction)(void (*)(void))decoder_forward, METH_VARARGS | METH_KEYWORDS, forward_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"lengths", decoder_lengths, NULL, "How many tokens each sequence has been through.", NULL},
    {"nbytes", decoder_nbytes, NULL, "Bytes held: packed weights, keys, values. The embedding is its array's.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)decoder_doc}, {Py_tp_new, decoder_new}, {Py_tp_dealloc, decoder_dealloc},
    {Py_tp_traverse, decoder_traverse}, {Py_tp_clear, decoder_clear}, {Py_tp_methods, methods},
    {Py_tp_getset, properties}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.Decoder", .basicsize = sizeof(DecoderObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, .slots = slots,
};

static int decoder_init(PyObject *module, mq_state *state)
{
    state->decoder_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->decoder_type ? PyModule_AddType(module, state->decoder_type) : -1;
}

const mq_py_part mq_py_decoder = {.init = decoder_init};
