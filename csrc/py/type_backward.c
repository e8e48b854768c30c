/* Backward: gradients on their way back through the layers of a Run (csrc/model/backward.h). */
#include "py/runtime.h"

#include <string.h>

#include "core/alloc.h"

typedef struct BackwardObject {
    PyObject_HEAD
    mq_backward back;
    RunObject *run;
    mq_weight_gradient *wanted;
    PyObject **keeps;           /* name and array of each */
    Py_ssize_t count;
    PyObject *input;            /* hidden states before the layer whose experts are to come */
} BackwardObject;

const char mq_run_backward_doc[] =
"backward($self, gradients=None)\n--\n\n"
"A Backward, which takes the gradients of the losses back through the layers of this run: each batch's mean\n"
"cross-entropy, added up over the batches. The run must be behind the last layer; if the model has experts, it has to\n"
"start again afterwards. On a device if the run's runtime has one.\n\n"
"gradients: {name of a tensor of weights: float32 array of its shape}, which are added to. KeyError: no such tensor.\n"
"RuntimeError: the device does not compute the way back (Runtime.device['backward']).";

static const mq_module *module_of_tensor(const mq_runtime *runtime, const char *name, int *bias)
{
    for (size_t i = 0; i < runtime->module_count; i++) {
        const mq_module *module = &runtime->modules[i];
        *bias = strcmp(module->bias, name) == 0;
        if (strcmp(module->weight, name) == 0 || *bias) return module;
    }
    return NULL;
}

static int view_wanted(BackwardObject *self, PyObject *name, PyObject *array)
{
    char have[96], expected[96];
    int bias;
    mq_tensor view;
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL) return -1;
    const mq_module *module = module_of_tensor(&self->run->runtime->runtime, text, &bias);
    if (module == NULL || *text == '\0') {
        PyErr_Format(PyExc_KeyError, "%s: no tensor of this model's weights", text);
        return -1;
    }
    const mq_tensor wanted = mq_tensor_make(NULL, MQ_F32, bias ? 1 : module->ndim, module->shape);
    const Py_ssize_t at = self->count;
    if (mq_view_object(mq_state_of_object((PyObject *)self), array, text, &view, &self->keeps[2 * at]) < 0) return -1;
    self->keeps[2 * at + 1] = Py_NewRef(name);
    self->count++;
    self->wanted[at] = (mq_weight_gradient){.name = text, .values = view.data};
    if (view.dtype == MQ_F32 && view.ndim == wanted.ndim && mq_tensor_is_contiguous(&view) && !view.readonly &&
        memcmp(view.shape, wanted.shape, (size_t)view.ndim * sizeof *view.shape) == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "gradient of %s: expected %s, contiguous and writable, got %s", text,
                 mq_tensor_describe(&wanted, expected, sizeof expected), mq_tensor_describe(&view, have, sizeof have));
    return -1;
}

static int view_all_wanted(BackwardObject *self, PyObject *dict)
{
    PyObject *name, *array;
    Py_ssize_t position = 0;
    const size_t count = (size_t)PyDict_GET_SIZE(dict);
    self->wanted = mq_alloc_array(count, sizeof *self->wanted);
    self->keeps = mq_alloc_zeroed(2 * count * sizeof *self->keeps);
    if (self->wanted == NULL || self->keeps == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    while (PyDict_Next(dict, &position, &name, &array))
        if (view_wanted(self, name, array) < 0) return -1;
    return 0;
}

PyObject *mq_run_backward(PyObject *run, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gradients", NULL};
    mq_state *state = mq_state_of_object(run);
    PyObject *dict = NULL;
    mq_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O!:backward", names, &PyDict_Type, &dict)) return NULL;
    BackwardObject *self = (BackwardObject *)state->backward_type->tp_alloc(state->backward_type, 0);
    if (self == NULL) return NULL;
    self->run = (RunObject *)Py_NewRef(run);
    if (dict != NULL && view_all_wanted(self, dict) < 0) goto failed;
    if (mq_enter(&self->run->busy, "the Run") < 0) goto failed;
    const int rc = mq_backward_init(&self->back, &self->run->run, self->wanted, (size_t)self->count, &err);
    mq_leave(&self->run->busy);
    if (rc == MQ_OK) return (PyObject *)self;
    mq_raise(&err);
failed:
    Py_DECREF(self);
    return NULL;
}

static int backward_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((BackwardObject *)self)->run);
    return 0;
}

/* Takes part in no cycle of its own: what it holds may be needed until dealloc. */
static int backward_clear(PyObject *self)
{
    (void)self;
    return 0;
}

static void backward_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    BackwardObject *object = (BackwardObject *)self;
    PyObject_GC_UnTrack(self);
    mq_backward_free(&object->back);
    for (Py_ssize_t i = 0; object->keeps != NULL && i < 2 * object->count; i++) Py_XDECREF(object->keeps[i]);
    mq_free(object->keeps);
    mq_free(object->wanted);
    Py_XDECREF(object->input);
    Py_XDECREF(object->run);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(head_doc,
"head($self, tensors, labels=None)\n--\n\n"
"The losses, and their gradients by the last hidden states. Comes first, and once.\n\n"
"Returns (losses, counts), float64 and int64, an entry per batch: the mean over its labels (NaN: it has none) and how\n"
"many there are. tensors: those of Runtime.head_tensors(). labels as in Run.loss.");

static PyObject *backward_head(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tensors", "labels", NULL};
    BackwardObject *object = (BackwardObject *)self;
    PyObject *dict, *labels_object = Py_None, *losses = NULL, *counts = NULL, *result = NULL;
    mq_state *state = mq_state_of_object(self);
    mq_tensor losses_view, counts_view;
    mq_tensor_map map;
    mq_error err;
    int32_t *labels = NULL;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:head", names, &dict, &labels_object)) return NULL;
    if (mq_tensor_map_init(&map, state, dict) < 0) return NULL;
    if (labels_object != Py_None && (labels = mq_read_labels(object->run, labels_object)) == NULL) goto done;
    losses = mq_new_array(state, MQ_F64, 1, &object->run->run.batch_count, &losses_view);
    counts = mq_new_array(state, MQ_I64, 1, &object->run->run.batch_count, &counts_view);
    if (losses == NULL || counts == NULL || mq_run_enter(object->run, -1) < 0) goto done;
    mq_batch_losses out = {.losses = losses_view.data, .counts = counts_view.data};
    Py_BEGIN_ALLOW_THREADS
    rc = mq_backward_head(&object->back, labels, map.tensors, map.count, &out, &err);
    Py_END_ALLOW_THREADS
    mq_run_leave(object->run, -1);
    result = rc == MQ_OK ? PyTuple_Pack(2, losses, counts) : mq_raise(&err);
done:
    Py_XDECREF(losses);
    Py_XDECREF(counts);
    mq_free(labels);
    mq_tensor_map_free(&map);
    return result;
}

PyDoc_STRVAR(layer_doc,
"layer($self, layer, state, tensors, ahead=None)\n--\n\n"
"Back through one layer, from the last to the first. state: what Run.state() said before the layer; it is not\n"
"copied, and must not change before the layer is done. tensors: those of Runtime.layer_tensors(layer); the layer\n"
"stays loaded.\n\n"
"Of a layer with experts this is the first step: it returns what Run.layer returns, and then `expert` is to be called\n"
"for each that has tokens. Else it returns None. ahead: as in Run.layer; the part that comes next is one before.");

static PyObject *backward_layer(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer", "state", "tensors", "ahead", NULL};
    BackwardObject *object = (BackwardObject *)self;
    PyObject *state, *dict, *ahead = Py_None, *keep = NULL, *result = NULL;
    mq_meanwhile meanwhile;
    long long layer;
    mq_tensor_map map;
    mq_tensor view;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LOO|O:layer", names, &layer, &state, &dict, &ahead) ||
        mq_parse_run_layer(object->run, layer) < 0)
        return NULL;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    if (mq_view_hidden(object->run, state, "state", &view, &keep) < 0 || mq_run_enter(object->run, layer) < 0)
        goto done;
    if (mq_meanwhile_begin(&meanwhile, object->run, ahead) < 0) {
        mq_run_leave(object->run, layer);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    rc = mq_backward_layer(&object->back, layer, view.data, map.tensors, map.count, &err);
    Py_END_ALLOW_THREADS
    mq_meanwhile_end(object->run);
    mq_runtime_end_ahead(object->run->runtime, layer, -1, rc != MQ_OK);
    const int waits = object->back.input == view.data;
    result = rc != MQ_OK ? mq_raise(&err) : waits ? mq_expert_tokens(object->run) : Py_NewRef(Py_None);
    mq_run_leave(object->run, layer);
    if (rc == MQ_OK && waits) {
        Py_XSETREF(object->input, keep);
        keep = NULL;
    }
done:
    Py_XDECREF(keep);
    mq_tensor_map_free(&map);
    return result;
}

PyDoc_STRVAR(expert_doc,
"expert($self, layer, expert, tensors, ahead=None)\n--\n\n"
"Back through one expert, after layer(layer, ...), which must still be loaded; experts in order, those without tokens\n"
"may be left out. With the last that has tokens the layer is done. tensors: Runtime.expert_tensors(layer, expert).\n"
"ahead: as in layer.");

static PyObject *backward_expert(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer", "expert", "tensors", "ahead", NULL};
    BackwardObject *object = (BackwardObject *)self;
    PyObject *dict, *ahead = Py_None;
    mq_meanwhile meanwhile;
    long long layer, expert;
    mq_tensor_map map;
    mq_error err;
    int rc = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLO|O:expert", names, &layer, &expert, &dict, &ahead) ||
        mq_parse_run_layer(object->run, layer) < 0 || mq_check_expert(object->run->runtime, layer, expert) < 0)
        return NULL;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    if (mq_run_enter(object->run, layer) < 0) goto done;
    if (mq_meanwhile_begin(&meanwhile, object->run, ahead) == 0) {
        Py_BEGIN_ALLOW_THREADS
        rc = mq_backward_expert(&object->back, layer, expert, map.tensors, map.count, &err);
        Py_END_ALLOW_THREADS
        mq_meanwhile_end(object->run);
        if (rc != MQ_OK) mq_raise(&err);
    }
    mq_run_leave(object->run, layer);
    mq_runtime_end_ahead(object->run->runtime, layer, expert, rc != MQ_OK);
    if (object->back.input == NULL) Py_CLEAR(object->input);
done:
    mq_tensor_map_free(&map);
    return rc == MQ_OK ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(embed_doc,
"embed($self)\n--\n\n"
"The gradient of the embedding, if it was asked for; after all layers.");

static PyObject *backward_embed(PyObject *self, PyObject *unused)
{
    BackwardObject *object = (BackwardObject *)self;
    mq_error err;
    int rc;
    (void)unused;
    if (mq_run_enter(object->run, -1) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_backward_embed(&object->back, &err);
    Py_END_ALLOW_THREADS
    mq_run_leave(object->run, -1);
    return rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
}

PyDoc_STRVAR(gradient_doc,
"gradient($self, batch)\n--\n\n"
"The gradient of the losses by a batch's hidden states where the way back now is: float32 [B, T, C].");

static PyObject *backward_gradient(PyObject *self, PyObject *argument)
{
    BackwardObject *object = (BackwardObject *)self;
    const mq_run *run = &object->run->run;
    const int64_t width = run->runtime->config.hidden_size;
    int64_t batch;
    mq_tensor view;
    if (mq_parse_batch(object->run, argument, &batch) < 0) return NULL;
    if (object->back.failed || object->back.input != NULL ||
        object->back.next == run->runtime->config.num_hidden_layers)
        return PyErr_Format(PyExc_RuntimeError, "gradient: the head comes first, and layers one after the other");
    const mq_batch *rows = &run->batches[batch];
    const int64_t shape[3] = {rows->sequences, rows->tokens, width};
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_F32, 3, shape, &view);
    if (array == NULL || mq_enter(&object->run->busy, "the Run") < 0) {
        Py_XDECREF(array);
        return NULL;
    }
    memcpy(view.data, object->back.gradient + rows->first * width,
           (size_t)(rows->sequences * rows->tokens * width) * sizeof(float));
    mq_leave(&object->run->busy);
    return array;
}

static PyObject *backward_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(mq_backward_nbytes(&((BackwardObject *)self)->back));
}

static PyObject *backward_next_layer(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((BackwardObject *)self)->back.next);
}

static PyMethodDef methods[] = {
    {"head", (PyCFunction)(void (*)(void))backward_head, METH_VARARGS | METH_KEYWORDS, head_doc},
    {"layer", (PyCFunction)(void (*)(void))backward_layer, METH_VARARGS | METH_KEYWORDS, layer_doc},
    {"expert", (PyCFunction)(void (*)(void))backward_expert, METH_VARARGS | METH_KEYWORDS, expert_doc},
    {"embed", backward_embed, METH_NOARGS, embed_doc},
    {"gradient", backward_gradient, METH_O, gradient_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"nbytes", backward_nbytes, NULL, "Bytes held: gradients of hidden states, scratch.", NULL},
    {"next_layer", backward_next_layer, NULL,
     "The layer that comes next; as many as there are: the head; -1: all are done.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(backward_doc,
"Gradients on their way back through the layers of a Run. Made by Run.backward.\n\n"
"head, then layer(last), ..., layer(0); then embed. After an error or Ctrl-C it is of no more use.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)backward_doc}, {Py_tp_dealloc, backward_dealloc}, {Py_tp_traverse, backward_traverse},
    {Py_tp_clear, backward_clear}, {Py_tp_methods, methods}, {Py_tp_getset, properties}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.Backward", .basicsize = sizeof(BackwardObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

static int backward_init(PyObject *module, mq_state *state)
{
    state->backward_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->backward_type ? PyModule_AddType(module, state->backward_type) : -1;
}

const mq_py_part mq_py_backward = {.init = backward_init};
