/* Runtime: a model's sizes, modules and points, and the layers loaded at the moment (csrc/model/runtime.h). */
#include "py/runtime.h"

#include <string.h>

#include "core/alloc.h"
#include "py/type_quantizer.h"

PyDoc_STRVAR(
    runtime_doc,
    "Runtime(family, config, compute='bfloat16')\n--\n\n"
    "A model of one of the families of archs(), without its weights.\n\n"
    "config: a dict with the flat keys that archs() lists as config_keys (others are ignored), and optionally\n"
    "layer_windows, the attention window of each layer (0 = unlimited), layer_experts, which layers have experts\n"
    "(all, if there are experts and it is not given), layer_ropes (0 none, 1 that of the config, 2 of\n"
    "rope_local_theta), layer_chunks, the size of each layer's chunks of attention (0 = none), and for rope_type\n"
    "longrope two lists of numbers, rope_short_factor and rope_long_factor; name_root and name_head, what names of\n"
    "tensors begin with ('model.') and the head's is ('lm_head'). compute: 'bfloat16' (activations between\n"
    "operations are rounded to bfloat16, as a transformers model in bfloat16 does) or 'float32'.");

static mq_runtime *runtime_of(PyObject *self)
{
    return &((RuntimeObject *)self)->runtime;
}

static int parse_compute(const char *name, mq_dtype *out)
{
    if (mq_dtype_from_name(name, out) == MQ_OK && (*out == MQ_F32 || *out == MQ_BF16)) return 0;
    PyErr_Format(PyExc_ValueError, "Runtime: compute must be 'bfloat16' or 'float32', got '%s'", name);
    return -1;
}

static int start_runtime(RuntimeObject *self, const mq_family *family, const mq_config *config, mq_dtype dtype,
                         const mq_per_layer *layers)
{
    mq_error err;
    self->calibrators = PyDict_New();
    self->quantizers = PyDict_New();
    self->observers = PyDict_New();
    if (self->calibrators == NULL || self->quantizers == NULL || self->observers == NULL) return -1;
    if (mq_runtime_init(&self->runtime, family, config, dtype, layers, &err) != MQ_OK) {
        mq_raise(&err);
        return -1;
    }
    self->ready = 1;
    return 0;
}

static int init_runtime(RuntimeObject *self, const mq_family *family, PyObject *dict, mq_dtype dtype)
{
    mq_config config;
    mq_per_layer layers;
    int rc = mq_read_config(dict, &config, &layers);
    if (rc == 0) rc = start_runtime(self, family, &config, dtype, &layers);
    mq_per_layer_free(&layers);
    return rc;
}

static PyObject *runtime_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"family", "config", "compute", NULL};
    const char *family_name, *compute = "bfloat16";
    PyObject *config;
    mq_dtype dtype;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO!|s:Runtime", names, &family_name, &PyDict_Type, &config,
                                     &compute))
        return NULL;
    const mq_family *family = mq_family_find(family_name);
    if (family == NULL) return PyErr_Format(PyExc_ValueError, "Runtime: unknown family '%s'", family_name);
    if (parse_compute(compute, &dtype) < 0) return NULL;
    PyObject *self = type->tp_alloc(type, 0);
    if (self == NULL || init_runtime((RuntimeObject *)self, family, config, dtype) == 0) return self;
    Py_DECREF(self);
    return NULL;
}

static int runtime_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((RuntimeObject *)self)->calibrators);
    Py_VISIT(((RuntimeObject *)self)->quantizers);
    Py_VISIT(((RuntimeObject *)self)->observers);
    return 0;
}

static int runtime_clear(PyObject *self)
{
    RuntimeObject *object = (RuntimeObject *)self;
    PyObject *name, *observer;
    Py_ssize_t position = 0;
    mq_runtime_leave_device(object);
    if (object->ready) mq_runtime_free(&object->runtime);
    object->ready = 0;
    Py_CLEAR(object->calibrators);
    Py_CLEAR(object->quantizers);
    while (object->observers != NULL && PyDict_Next(object->observers, &position, &name, &observer))
        mq_observer_release(observer);
    Py_CLEAR(object->observers);
    return 0;
}

static void runtime_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    runtime_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* None for an empty string. */
static PyObject *text_or_none(const char *text)
{
    return *text ? PyUnicode_FromString(text) : Py_NewRef(Py_None);
}

/* offset: what is added to the stored weight of a norm. */
static PyObject *module_dict(const mq_module *module, int offset)
{
    PyObject *shape = module->ndim == 1
                          ? Py_BuildValue("(L)", (long long)module->shape[0])
                          : Py_BuildValue("(LL)", (long long)module->shape[0], (long long)module->shape[1]);
    PyObject *expert = module->expert < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(module->expert);
    return Py_BuildValue("{s:s,s:s,s:L,s:N,s:N,s:N,s:N,s:N,s:i}", "name", module->name, "kind",
                         mq_module_kind_name(module->kind), "layer", (long long)module->layer, "shape", shape,
                         "weight", text_or_none(module->weight), "bias", text_or_none(module->bias), "site",
                         text_or_none(module->site), "expert", expert, "offset", offset);
}

static PyObject *runtime_modules(PyObject *self, void *unused)
{
    const mq_runtime *runtime = runtime_of(self);
    const int plus_one = (runtime->family->flags & MQ_FAMILY_NORM_PLUS_ONE) != 0;
    PyObject *list = PyList_New(0);
    (void)unused;
    for (size_t i = 0; list != NULL && i < runtime->module_count; i++) {
        PyObject *dict = module_dict(&runtime->modules[i], plus_one && runtime->modules[i].kind == MQ_MODULE_NORM);
        if (dict == NULL || PyList_Append(list, dict) < 0) Py_CLEAR(list);
        Py_XDECREF(dict);
    }
    return list;
}

static int append_text(PyObject *list, const char *text)
{
    if (*text == '\0') return 0;
    PyObject *string = PyUnicode_FromString(text);
    int rc = string ? PyList_Append(list, string) : -1;
    Py_XDECREF(string);
    return rc;
}

static PyObject *tensor_names(const mq_module *modules, size_t count, int64_t expert)
{
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < count; i++)
        if (modules[i].expert == expert &&
            (append_text(list, modules[i].weight) < 0 || append_text(list, modules[i].bias) < 0))
            Py_CLEAR(list);
    return list;
}

static int parse_layer(PyObject *self, PyObject *object, int64_t *out)
{
    long long layer = PyLong_AsLongLong(object), layers = runtime_of(self)->config.num_hidden_layers;
    if (layer == -1 && PyErr_Occurred()) return -1;
    *out = layer;
    if (layer >= 0 && layer < layers) return 0;
    PyErr_Format(PyExc_IndexError, "layer %lld of a model of %lld layers", layer, layers);
    return -1;
}

PyDoc_STRVAR(layer_tensors_doc,
"layer_tensors($self, layer)\n--\n\n"
"Names of the tensors that load_layer(layer, ...) needs: those of its experts left out.");

static PyObject *runtime_layer_tensors(PyObject *self, PyObject *argument)
{
    const mq_runtime *runtime = runtime_of(self);
    int64_t layer;
    if (parse_layer(self, argument, &layer) < 0) return NULL;
    return tensor_names(runtime->modules + runtime->layer_start[layer],
                        runtime->layer_start[layer + 1] - runtime->layer_start[layer], -1);
}

PyDoc_STRVAR(experts_doc, "experts($self, layer)\n--\n\nHow many experts a layer has; 0 where it has an MLP.");

static PyObject *runtime_experts(PyObject *self, PyObject *argument)
{
    int64_t layer;
    if (parse_layer(self, argument, &layer) < 0) return NULL;
    return PyLong_FromLongLong(runtime_of(self)->layers[layer].experts);
}

PyDoc_STRVAR(expert_tensors_doc,
"expert_tensors($self, layer, expert, /)\n--\n\n"
"Names of the tensors that Run.expert(layer, expert, ...) needs.");

static PyObject *runtime_expert_tensors(PyObject *self, PyObject *args)
{
    PyObject *index;
    int64_t layer;
    long long expert;
    if (!PyArg_ParseTuple(args, "OL:expert_tensors", &index, &expert) || parse_layer(self, index, &layer) < 0)
        return NULL;
    if (mq_check_expert((RuntimeObject *)self, layer, expert) < 0) return NULL;
    return tensor_names(mq_runtime_expert(runtime_of(self), layer, expert), MQ_EXPERT_LINEARS, expert);
}

PyDoc_STRVAR(embed_tensors_doc, "embed_tensors($self)\n--\n\nNames of the tensors that Run.embed needs.");

static PyObject *runtime_embed_tensors(PyObject *self, PyObject *unused)
{
    (void)unused;
    return tensor_names(mq_runtime_outer(runtime_of(self), MQ_ROLE_EMBED), 1, -1);
}

PyDoc_STRVAR(head_tensors_doc, "head_tensors($self)\n--\n\nNames of the tensors that Run.logits and Run.loss need.");

static PyObject *runtime_head_tensors(PyObject *self, PyObject *unused)
{
    (void)unused;
    return tensor_names(mq_runtime_outer(runtime_of(self), MQ_ROLE_FINAL_NORM), 2, -1);
}

PyDoc_STRVAR(load_layer_doc,
"load_layer($self, layer, tensors, /)\n--\n\n"
"Packs the weights of one layer. tensors: {name: array}, exactly those of layer_tensors(layer), float32, bfloat16\n"
"or float16, any strides. ValueError or TypeError names the tensor that is wrong, or that holds NaN or an\n"
"infinity.");

static PyObject *runtime_load_layer(PyObject *self, PyObject *args)
{
    PyObject *index, *dict, *result = NULL;
    mq_tensor_map map;
    mq_error err;
    int64_t layer;
    int rc;
    if (!PyArg_ParseTuple(args, "OO:load_layer", &index, &dict) || parse_layer(self, index, &layer) < 0) return NULL;
    if (mq_tensor_map_init(&map, mq_state_of_object(self), dict) < 0) return NULL;
    _Atomic int *busy = &runtime_of(self)->layers[layer].busy;
    if (mq_enter(busy, "load_layer: the layer") < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_runtime_load_layer(runtime_of(self), layer, map.tensors, map.count, &err);
    Py_END_ALLOW_THREADS
    mq_leave(busy);
    mq_runtime_end_ahead((RuntimeObject *)self, layer, -1, rc != MQ_OK);
    result = rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
done:
    mq_tensor_map_free(&map);
    return result;
}

PyDoc_STRVAR(load_low_rank_doc,
"load_low_rank($self, module, down, up, /)\n--\n\n"
"Puts a branch of low rank beside a linear of a loaded layer: its output grows by up (down x), x being the input\n"
"before it is rounded. down [rank, in], up [out, rank], float. It is dropped with the layer. KeyError: no such one,\n"
"or an expert's.");

static PyObject *runtime_load_low_rank(PyObject *self, PyObject *args)
{
    mq_state *state = mq_state_of_object(self);
    const char *name;
    PyObject *given[2], *keep[2] = {NULL, NULL}, *result = NULL;
    mq_tensor down, up;
    mq_error err;
    int rc;
    if (!PyArg_ParseTuple(args, "sOO:load_low_rank", &name, &given[0], &given[1])) return NULL;
    const mq_module *module = mq_runtime_module(runtime_of(self), name, strlen(name));
    if (module == NULL || module->kind != MQ_MODULE_LINEAR || module->layer < 0 || module->expert >= 0)
        return PyErr_Format(PyExc_KeyError, "%s: no linear of a layer", name);
    if (mq_view_object(state, given[0], "down", &down, &keep[0]) < 0 ||
        mq_view_object(state, given[1], "up", &up, &keep[1]) < 0)
        goto done;
    _Atomic int *busy = &runtime_of(self)->layers[module->layer].busy;
    if (mq_enter(busy, "load_low_rank: the layer") < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_runtime_load_low_rank(runtime_of(self), module, &down, &up, &err);
    Py_END_ALLOW_THREADS
    mq_leave(busy);
    result = rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
done:
    Py_XDECREF(keep[0]);
    Py_XDECREF(keep[1]);
    return result;
}

PyDoc_STRVAR(drop_layer_doc, "drop_layer($self, layer)\n--\n\nFrees the weights of one layer.");

static PyObject *runtime_drop_layer(PyObject *self, PyObject *argument)
{
    int64_t layer;
    if (parse_layer(self, argument, &layer) < 0) return NULL;
    _Atomic int *busy = &runtime_of(self)->layers[layer].busy;
    if (mq_enter(busy, "drop_layer: the layer") < 0) return NULL;
    mq_runtime_drop_layer(runtime_of(self), layer);
    mq_leave(busy);
    Py_RETURN_NONE;
}

/* dict[name] = object, or no such entry if object is None. */
static int attach(PyObject *dict, PyObject *name, PyObject *object)
{
    if (object != Py_None) return PyDict_SetItem(dict, name, object);
    int known = PyDict_Contains(dict, name);
    return known == 1 ? PyDict_DelItem(dict, name) : known;
}

/* The dict of a layer's quantizers, borrowed; made if `make`. NULL without an exception if there is none. */
static PyObject *quantizers_of(RuntimeObject *self, int64_t layer, int make)
{
    PyObject *key = PyLong_FromLongLong(layer), *dict = NULL;
    if (key == NULL) return NULL;
    dict = PyDict_GetItemWithError(self->quantizers, key);
    if (dict == NULL && make && !PyErr_Occurred() && (dict = PyDict_New()) != NULL) {
        int rc = PyDict_SetItem(self->quantizers, key, dict);
        Py_DECREF(dict);
        if (rc < 0) dict = NULL;
    }
    Py_DECREF(key);
    return dict;
}

static _Atomic int *busy_of(RuntimeObject *self, int64_t layer)
{
    return layer < 0 ? &self->outer_busy : &self->runtime.layers[layer].busy;
}

int mq_layer_enter(RuntimeObject *self, int64_t layer)
{
    PyObject *name, *quantizer;
    Py_ssize_t position = 0;
    if (mq_enter(busy_of(self, layer), layer < 0 ? "the model" : "the layer") < 0) return -1;
    PyObject *dict = quantizers_of(self, layer, 0);
    mq_state *state = mq_state_of_object((PyObject *)self);
    while (dict != NULL && PyDict_Next(dict, &position, &name, &quantizer)) mq_quantizer_hold(state, quantizer);
    return 0;
}

void mq_layer_leave(RuntimeObject *self, int64_t layer)
{
    PyObject *name, *quantizer, *dict = quantizers_of(self, layer, 0);
    Py_ssize_t position = 0;
    while (dict != NULL && PyDict_Next(dict, &position, &name, &quantizer)) mq_quantizer_release(quantizer);
    mq_leave(busy_of(self, layer));
}

int mq_check_expert(RuntimeObject *self, int64_t layer, int64_t expert)
{
    int64_t experts = self->runtime.layers[layer].experts;
    if (expert >= 0 && expert < experts) return 0;
    PyErr_Format(PyExc_IndexError, "expert %lld of layer %lld, which has %lld", (long long)expert, (long long)layer,
                 (long long)experts);
    return -1;
}

static mq_point *find_point(PyObject *self, PyObject *name, int64_t *layer)
{
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL) return NULL;
    *layer = -1;
    mq_point *point = mq_runtime_point(runtime_of(self), text, layer);
    if (point == NULL)
        PyErr_Format(PyExc_KeyError,
                     "%s: no such quantizer; expected <linear>.input_quantizer, <linear>.output_quantizer, "
                     "<attention>.{q,k,v}_bmm_quantizer or <experts>.{gate_up,down}_proj_input_quantizer",
                     text);
    return point;
}

PyDoc_STRVAR(set_quantizer_doc,
"set_quantizer($self, name, quantizer, /)\n--\n\n"
"Puts a Quantizer (or None) at a point: it fake-quantizes what passes there, if it is enabled.\n\n"
"name: of the point, such as model.layers.0.self_attn.q_proj.input_quantizer, ...output_quantizer, or\n"
"model.layers.0.self_attn.k_bmm_quantizer. KeyError if there is no such point.");

static PyObject *runtime_set_quantizer(PyObject *self, PyObject *args)
{
    RuntimeObject *object = (RuntimeObject *)self;
    PyObject *name, *given, *dict, *result = NULL;
    const mq_quantizer *quantizer = NULL;
    int64_t layer;
    if (!PyArg_ParseTuple(args, "UO:set_quantizer", &name, &given)) return NULL;
    mq_point *point = find_point(self, name, &layer);
    if (point == NULL) return NULL;
    if (given != Py_None) {
        quantizer = mq_quantizer_hold(mq_state_of_object(self), given);
        if (quantizer == NULL) return NULL;
        mq_quantizer_release(given); /* held while a layer runs; the reference keeps it at its place */
    }
    if (mq_enter(busy_of(object, layer), "set_quantizer: the layer") < 0) return NULL;
    dict = quantizers_of(object, layer, 1);
    if (dict != NULL && attach(dict, name, given) == 0) {
        point->quantizer = quantizer;
        result = Py_NewRef(Py_None);
    }
    mq_leave(busy_of(object, layer));
    return result;
}

PyDoc_STRVAR(
    set_calibrator_doc,
    "set_calibrator($self, name, calibrator, quantized=False, /)\n--\n\n"
    "Puts a Calibrator (or several, a sequence of up to four, or None) at a point, named as in set_quantizer: it "
    "collects\nwhat passes there, padding left out. quantized: at a linear's input, what its quantizer made of it.\n\n"
    "Linears that read the same tensor (same site) share the work. One Calibrator may sit at several points.");

/* One Calibrator, a sequence of them, or None, as a tuple. */
static PyObject *calibrators_of(PyObject *self, PyObject *name, PyObject *given)
{
    PyTypeObject *type = mq_state_of_object(self)->calibrator_type;
    if (given == Py_None) return PyTuple_New(0);
    const int single = Py_IS_TYPE(given, type) || !PySequence_Check(given);
    PyObject *items = single ? PyTuple_Pack(1, given) : PySequence_Tuple(given);
    if (items == NULL) return NULL;
    if (PyTuple_GET_SIZE(items) > MQ_POINT_WATCHERS)
        PyErr_Format(PyExc_ValueError, "%U: %zd calibrators, there is room for %d", name, PyTuple_GET_SIZE(items),
                     MQ_POINT_WATCHERS);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items) && !PyErr_Occurred(); i++)
        if (!Py_IS_TYPE(PyTuple_GET_ITEM(items, i), type))
            PyErr_Format(PyExc_TypeError, "%U: expected a Calibrator, a sequence of them or None, got %.100s", name,
                         Py_TYPE(PyTuple_GET_ITEM(items, i))->tp_name);
    if (PyErr_Occurred()) Py_CLEAR(items);
    return items;
}

static void watch_with(mq_point *point, PyObject *items)
{
    for (Py_ssize_t i = 0; i < MQ_POINT_WATCHERS; i++)
        point->watchers[i].calib = i < PyTuple_GET_SIZE(items)
            ? ((CalibratorObject *)PyTuple_GET_ITEM(items, i))->calib : NULL;
}

static PyObject *runtime_set_calibrator(PyObject *self, PyObject *args)
{
    RuntimeObject *object = (RuntimeObject *)self;
    PyObject *name, *given, *result = NULL;
    int64_t layer;
    int quantized = 0;
    if (!PyArg_ParseTuple(args, "UO|p:set_calibrator", &name, &given, &quantized)) return NULL;
    mq_point *point = find_point(self, name, &layer);
    if (point == NULL) return NULL;
    PyObject *items = calibrators_of(self, name, given);
    if (items == NULL || mq_enter(busy_of(object, layer), "set_calibrator: the layer") < 0) {
        Py_XDECREF(items);
        return NULL;
    }
    if (attach(object->calibrators, name, PyTuple_GET_SIZE(items) > 0 ? items : Py_None) == 0) {
        watch_with(point, items);
        point->watch_quantized = quantized;
        result = Py_NewRef(Py_None);
    }
    mq_leave(busy_of(object, layer));
    Py_DECREF(items);
    return result;
}

PyDoc_STRVAR(set_observer_doc,
"set_observer($self, name, observer, /)\n--\n\n"
"Puts an OutputScore or OutputGradient (or None) at a module's output: a Backward shows it what passes there.\n\n"
"name: of a linear that is no expert's, of a layer's experts (.mlp.experts), or lm_head. KeyError: there is no such\n"
"module. RuntimeError: the observer is at another place.");

/* Keeps the observer and gives up the one that was there before. */
static int exchange_observer(RuntimeObject *self, PyObject *name, PyObject *given, mq_observer *observer,
                             mq_observer **place)
{
    PyObject *before = PyDict_GetItemWithError(self->observers, name);
    if (before == NULL && PyErr_Occurred()) return -1;
    Py_XINCREF(before);
    const int rc = attach(self->observers, name, given);
    if (rc == 0) *place = observer;
    if (rc == 0 && before != NULL) mq_observer_release(before);
    Py_XDECREF(before);
    return rc;
}

static PyObject *runtime_set_observer(PyObject *self, PyObject *args)
{
    RuntimeObject *object = (RuntimeObject *)self;
    PyObject *name, *given;
    Py_ssize_t length;
    mq_observer *observer = NULL;
    if (!PyArg_ParseTuple(args, "UO:set_observer", &name, &given)) return NULL;
    const char *text = PyUnicode_AsUTF8AndSize(name, &length);
    if (text == NULL) return NULL;
    const mq_module *module = mq_runtime_module(runtime_of(self), text, (size_t)length);
    mq_observer **place = module ? mq_runtime_observer(runtime_of(self), module) : NULL;
    if (place == NULL)
        return PyErr_Format(PyExc_KeyError, "%s: no linear, experts or lm_head whose output can be observed", text);
    if (given != Py_None && (observer = mq_observer_take(mq_state_of_object(self), given)) == NULL) return NULL;
    int rc = mq_enter(busy_of(object, module->layer), "set_observer: the layer");
    if (rc == 0) {
        rc = exchange_observer(object, name, given, observer, place);
        mq_leave(busy_of(object, module->layer));
    }
    if (rc == 0) Py_RETURN_NONE;
    if (observer != NULL) mq_observer_release(given);
    return NULL;
}

static PyMethodDef methods[] = {
    {"layer_tensors", runtime_layer_tensors, METH_O, layer_tensors_doc},
    {"experts", runtime_experts, METH_O, experts_doc},
    {"expert_tensors", runtime_expert_tensors, METH_VARARGS, expert_tensors_doc},
    {"embed_tensors", runtime_embed_tensors, METH_NOARGS, embed_tensors_doc},
    {"head_tensors", runtime_head_tensors, METH_NOARGS, head_tensors_doc},
    {"load_layer", runtime_load_layer, METH_VARARGS, load_layer_doc},
    {"begin_ahead", mq_runtime_begin_ahead_method, METH_VARARGS, mq_runtime_begin_ahead_doc},
    {"go_ahead", mq_runtime_go_ahead_method, METH_NOARGS, mq_runtime_go_ahead_doc},
    {"forget_ahead", mq_runtime_forget_ahead_method, METH_NOARGS, mq_runtime_forget_ahead_doc},
    {"load_low_rank", runtime_load_low_rank, METH_VARARGS, load_low_rank_doc},
    {"drop_layer", runtime_drop_layer, METH_O, drop_layer_doc},
    {"set_quantizer", runtime_set_quantizer, METH_VARARGS, set_quantizer_doc},
    {"set_calibrator", runtime_set_calibrator, METH_VARARGS, set_calibrator_doc},
    {"set_observer", runtime_set_observer, METH_VARARGS, set_observer_doc},
    {"start", (PyCFunction)(void (*)(void))mq_run_start, METH_VARARGS | METH_KEYWORDS, mq_run_start_doc},
    {"use_device", (PyCFunction)(void (*)(void))mq_runtime_use_device, METH_VARARGS | METH_KEYWORDS,
     mq_runtime_use_device_doc},
    {NULL, NULL, 0, NULL},
};

static PyObject *runtime_family(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(runtime_of(self)->family->name);
}

static PyObject *runtime_compute(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(mq_dtype_name(runtime_of(self)->dtype));
}

static PyObject *runtime_layers(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(runtime_of(self)->config.num_hidden_layers);
}

static PyObject *key_value(const mq_config *config, const mq_config_key *key)
{
    const char *at = (const char *)config + key->offset;
    int64_t integer;
    double real;
    if (key->type == MQ_CONFIG_IS_REAL) {
        memcpy(&real, at, sizeof real);
        return PyFloat_FromDouble(real);
    }
    memcpy(&integer, at, sizeof integer);
    return PyLong_FromLongLong(integer);
}

static PyObject *runtime_config(PyObject *self, void *unused)
{
    size_t count;
    const mq_config_key *keys = mq_config_keys(&count);
    PyObject *dict = PyDict_New();
    (void)unused;
    for (size_t i = 0; dict != NULL && i < count; i++) {
        if (keys[i].type == MQ_CONFIG_IS_NAME) continue;
        PyObject *value = key_value(&runtime_of(self)->config, &keys[i]);
        if (value == NULL || PyDict_SetItemString(dict, keys[i].name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyGetSetDef properties[] = {
    {"modules", runtime_modules, NULL,
     "Modules in the order of named_modules: name, kind, layer, shape, weight, bias, site, expert, offset (of a norm's "
     "weight).", NULL},
    {"family", runtime_family, NULL, "The row of archs() this model is.", NULL},
    {"compute", runtime_compute, NULL, "'bfloat16' or 'float32'.", NULL},
    {"layers", runtime_layers, NULL, "Number of decoder layers.", NULL},
    {"config", runtime_config, NULL, "The numbers in use, defaults filled in.", NULL},
    {"device", mq_runtime_device, NULL,
     "None, or what is known of the device that computes layers: 'memory' and 'peak', bytes that may be used and that "
     "were; 'copied', how many tensors came to the CPU for statistics or scores, for want of room; 'products', how "
     "many with weights that stay codes took which path (docs/cuda.md).",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)runtime_doc}, {Py_tp_new, runtime_new}, {Py_tp_dealloc, runtime_dealloc},
    {Py_tp_traverse, runtime_traverse}, {Py_tp_clear, runtime_clear}, {Py_tp_methods, methods},
    {Py_tp_getset, properties}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.Runtime", .basicsize = sizeof(RuntimeObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, .slots = slots,
};

static int runtime_init(PyObject *module, mq_state *state)
{
    state->runtime_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->runtime_type ? PyModule_AddType(module, state->runtime_type) : -1;
}

const mq_py_part mq_py_runtime = {.init = runtime_init};
