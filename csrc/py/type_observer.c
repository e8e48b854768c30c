/* OutputScore, ExpertsScore and OutputGradient: observers on the way back (csrc/model/{score,experts_score}.h). */
#include "py/runtime.h"

#include "core/alloc.h"
#include "model/experts_score.h"
#include "model/score.h"
#include "py/type_quantizer.h"

/* What all types begin with. taken: it is at a place of a Runtime. */
typedef struct ObserverObject {
    PyObject_HEAD
    mq_observer *observer;
    int taken;
} ObserverObject;

typedef struct OutputScoreObject {
    ObserverObject base;
    mq_output_score score;
    PyObject **keeps;          /* arrays [count], then quantizers or NULL [count], then the bias */
    Py_ssize_t count;
} OutputScoreObject;

typedef struct ExpertsScoreObject {
    ObserverObject base;
    mq_experts_score score;
    mq_gemm_kind kind;
    PyObject **quantizers;     /* held: two for each candidate, or NULL, */
    PyObject **keeps;          /* and three arrays */
    _Atomic int busy;
} ExpertsScoreObject;

typedef struct OutputGradientObject {
    ObserverObject base;
    mq_kept_gradient kept;
    PyObject *array;
} OutputGradientObject;

mq_observer *mq_observer_take(mq_state *state, PyObject *object)
{
    ObserverObject *self = (ObserverObject *)object;
    if (!Py_IS_TYPE(object, state->output_score_type) && !Py_IS_TYPE(object, state->output_gradient_type) &&
        !Py_IS_TYPE(object, state->experts_score_type)) {
        PyErr_Format(PyExc_TypeError, "expected an OutputScore, ExpertsScore, OutputGradient or None, got %s",
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    if (self->taken) {
        PyErr_SetString(PyExc_RuntimeError, "this observer is at another place already");
        return NULL;
    }
    self->taken = 1;
    return self->observer;
}

void mq_observer_release(PyObject *object)
{
    ((ObserverObject *)object)->taken = 0;
}

static int observer_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

/* OutputScore ----------------------------------------------------------------------------------------------------- */

static int view_candidate(OutputScoreObject *self, mq_state *state, PyObject *weight, PyObject *quantizer,
                          mq_score_candidate *out)
{
    char name[48], text[96];
    const Py_ssize_t index = self->count;
    PyOS_snprintf(name, sizeof name, "weights[%d]", (int)index);
    if (mq_view_object(state, weight, name, &out->weight, &self->keeps[2 * index]) < 0) return -1;
    self->count++;
    if (out->weight.ndim != 2 || !mq_tensor_is_float(&out->weight)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a matrix of float32, bfloat16 or float16, got %s", name,
                     mq_tensor_describe(&out->weight, text, sizeof text));
        return -1;
    }
    if (quantizer == Py_None) return 0;
    out->input = mq_quantizer_hold(state, quantizer);
    if (out->input == NULL) return -1;
    self->keeps[2 * index + 1] = Py_NewRef(quantizer);
    return 0;
}

static int fill(OutputScoreObject *self, PyObject *weights, PyObject *quantizers, PyObject *bias)
{
    mq_state *state = mq_state_of_object((PyObject *)self);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(weights);
    mq_score_candidate *candidates = mq_alloc_zeroed((size_t)count * sizeof *candidates);
    mq_tensor view;
    mq_error err;
    int rc = -1;
    self->keeps = mq_alloc_zeroed((size_t)(2 * count + 1) * sizeof *self->keeps);
    if (candidates == NULL || self->keeps == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (quantizers != NULL && PySequence_Fast_GET_SIZE(quantizers) != count) {
        PyErr_Format(PyExc_ValueError, "OutputScore: %zd quantizers for %zd weights",
                     PySequence_Fast_GET_SIZE(quantizers), count);
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (view_candidate(self, state, PySequence_Fast_GET_ITEM(weights, i),
                           quantizers ? PySequence_Fast_GET_ITEM(quantizers, i) : Py_None, &candidates[i]) < 0)
            goto done;
    if (bias != Py_None && mq_view_as(state, bias, "bias", MQ_F32, &view, &self->keeps[2 * count]) < 0) goto done;
    for (Py_ssize_t i = 0; i < count && bias != Py_None; i++)
        if (view.ndim != 1 || view.shape[0] != candidates[i].weight.shape[0]) {
            PyErr_SetString(PyExc_ValueError, "bias: expected one number for each row of the weights");
            goto done;
        }
    if (mq_output_score_init(&self->score, candidates, (size_t)count, bias == Py_None ? NULL : &view, &err) == MQ_OK)
        rc = 0;
    else mq_raise(&err);
done:
    mq_free(candidates);
    return rc;
}

static PyObject *score_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weights", "quantizers", "bias", NULL};
    PyObject *weights_object, *quantizers_object = Py_None, *bias = Py_None, *weights, *quantizers = NULL, *self = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:OutputScore", names, &weights_object, &quantizers_object,
                                     &bias))
        return NULL;
    weights = PySequence_Fast(weights_object, "OutputScore: weights must be a sequence of arrays");
    if (weights == NULL) return NULL;
    if (quantizers_object != Py_None)
        quantizers = PySequence_Fast(quantizers_object, "OutputScore: quantizers must be a sequence or None");
    if (quantizers != NULL || quantizers_object == Py_None) self = type->tp_alloc(type, 0);
    if (self != NULL) {
        ((OutputScoreObject *)self)->base.observer = &((OutputScoreObject *)self)->score.observer;
        if (fill((OutputScoreObject *)self, weights, quantizers, bias) < 0) Py_CLEAR(self);
    }
    Py_XDECREF(quantizers);
    Py_DECREF(weights);
    return self;
}

static void score_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    OutputScoreObject *object = (OutputScoreObject *)self;
    PyObject_GC_UnTrack(self);
    mq_output_score_free(&object->score);
    for (Py_ssize_t i = 0; i < object->count; i++) {
        Py_XDECREF(object->keeps[2 * i]);
        if (object->keeps[2 * i + 1] == NULL) continue;
        mq_quantizer_release(object->keeps[2 * i + 1]);
        Py_DECREF(object->keeps[2 * i + 1]);
    }
    if (object->keeps != NULL) Py_XDECREF(object->keeps[2 * object->count]);
    mq_free(object->keeps);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *scores_get(PyObject *self, void *unused)
{
    const mq_output_score *score = &((OutputScoreObject *)self)->score;
    const int64_t count = (int64_t)score->count;
    mq_tensor view;
    (void)unused;
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_F64, 1, &count, &view);
    for (int64_t i = 0; array != NULL && i < count; i++) ((double *)view.data)[i] = score->candidates[i].score;
    return array;
}

PyDoc_STRVAR(score_doc,
"OutputScore(weights, quantizers=None, bias=None)\n--\n\n"
"An observer (Runtime.set_observer) that adds up, for each candidate, sum((gradient * (y' - y))^2) over the outputs y\n"
"of a linear, y' being what the candidate makes of the same inputs: AutoQuantize's gradient score.\n\n"
"weights: arrays [out, in], as the candidates compute with them; they are not copied. quantizers: a Quantizer of the\n"
"inputs or None for each; they cannot change meanwhile. bias: [out], of the linear itself.");

static PyGetSetDef score_properties[] = {
    {"scores", scores_get, NULL, "float64, an entry per candidate: the sums so far.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot score_slots[] = {
    {Py_tp_doc, (void *)score_doc}, {Py_tp_new, score_new}, {Py_tp_dealloc, score_dealloc},
    {Py_tp_traverse, observer_traverse}, {Py_tp_getset, score_properties}, {0, NULL},
};

static PyType_Spec score_spec = {
    .name = "modelq._core.OutputScore", .basicsize = sizeof(OutputScoreObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, .slots = score_slots,
};

/* ExpertsScore ---------------------------------------------------------------------------------------------------- */

static PyObject *experts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"candidates", "compute", NULL};
    long long candidates;
    const char *compute = "float32";
    mq_dtype dtype;
    mq_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|s:ExpertsScore", names, &candidates, &compute)) return NULL;
    if (candidates < 1 || candidates > 4096)
        return PyErr_Format(PyExc_ValueError, "ExpertsScore: %lld candidates", candidates);
    if (mq_dtype_from_name(compute, &dtype) != MQ_OK || (dtype != MQ_F32 && dtype != MQ_BF16))
        return PyErr_Format(PyExc_ValueError, "compute: expected bfloat16 or float32, got '%s'", compute);
    ExpertsScoreObject *self = (ExpertsScoreObject *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->base.observer = &self->score.observer;
    self->kind = dtype == MQ_BF16 ? MQ_GEMM_BF16 : MQ_GEMM_F32;
    self->quantizers = mq_alloc_zeroed((size_t)candidates * 2 * sizeof *self->quantizers);
    self->keeps = mq_alloc_zeroed((size_t)candidates * MQ_SCORE_LINEARS * sizeof *self->keeps);
    if (self->quantizers == NULL || self->keeps == NULL) PyErr_NoMemory();
    else if (mq_experts_score_init(&self->score, (size_t)candidates, &err) == MQ_OK) return (PyObject *)self;
    else mq_raise(&err);
    Py_DECREF(self);
    return NULL;
}

static void release_expert(ExpertsScoreObject *self)
{
    self->score.expert = -1;        /* what it has is of no use without its arrays and quantizers */
    for (size_t i = 0; self->keeps != NULL && i < MQ_SCORE_LINEARS * self->score.count; i++) Py_CLEAR(self->keeps[i]);
    for (size_t i = 0; self->quantizers != NULL && i < 2 * self->score.count; i++) {
        if (self->quantizers[i] == NULL) continue;
        mq_quantizer_release(self->quantizers[i]);
        Py_CLEAR(self->quantizers[i]);
    }
}

static void experts_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ExpertsScoreObject *object = (ExpertsScoreObject *)self;
    PyObject_GC_UnTrack(self);
    release_expert(object);
    mq_experts_score_free(&object->score);
    mq_free(object->quantizers);
    mq_free(object->keeps);
    type->tp_free(self);
    Py_DECREF(type);
}

/* (gate, up, down, quantizer of the input or None, of down's or None) of one candidate. */
static int view_expert(ExpertsScoreObject *self, PyObject *given, size_t index, mq_expert_weights *out)
{
    static const char *const parts[MQ_SCORE_LINEARS] = {"gate", "up", "down"};
    mq_state *state = mq_state_of_object((PyObject *)self);
    const mq_quantizer **places[2] = {&out->input, &out->product};
    PyObject **keep = self->keeps + MQ_SCORE_LINEARS * index;
    PyObject *objects[5];
    if (!PyTuple_Check(given) || !PyArg_UnpackTuple(given, "candidate", 5, 5, &objects[0], &objects[1], &objects[2],
                                                    &objects[3], &objects[4])) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "candidates: expected tuples (gate, up, down, quantizer, quantizer)");
        return -1;
    }
    for (int i = 0; i < MQ_SCORE_LINEARS; i++) {
        if (mq_view_object(state, objects[i], parts[i], &out->linears[i], &keep[i]) < 0) return -1;
        if (out->linears[i].ndim == 2 && mq_tensor_is_float(&out->linears[i])) continue;
        PyErr_Format(PyExc_ValueError, "%s: expected a matrix of float32, bfloat16 or float16", parts[i]);
        return -1;
    }
    for (size_t i = 0; i < 2; i++) {
        if (objects[3 + i] == Py_None) continue;
        *places[i] = mq_quantizer_hold(state, objects[3 + i]);
        if (*places[i] == NULL) return -1;
        self->quantizers[2 * index + i] = Py_NewRef(objects[3 + i]);
    }
    return 0;
}

PyDoc_STRVAR(experts_load_doc,
"load($self, expert, candidates, /)\n--\n\n"
"The weights of one expert by every candidate, in place of another's: tuples (gate, up, down, quantizer of their\n"
"input or None, quantizer of down's input or None), as the candidates compute with them. To be called before\n"
"gradients pass the expert; the arrays are held, and must not change, until the next.");

static PyObject *experts_load(PyObject *self, PyObject *args)
{
    ExpertsScoreObject *object = (ExpertsScoreObject *)self;
    const size_t count = object->score.count;
    PyObject *list_object, *list, *result = NULL;
    long long expert;
    mq_error err;
    int rc = 0;
    if (!PyArg_ParseTuple(args, "LO:load", &expert, &list_object)) return NULL;
    list = PySequence_Fast(list_object, "load: candidates must be a sequence of tuples");
    if (list == NULL) return NULL;
    mq_expert_weights *weights = mq_alloc_zeroed(count * sizeof *weights);
    if (weights == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (PySequence_Fast_GET_SIZE(list) != (Py_ssize_t)count) {
        PyErr_Format(PyExc_ValueError, "load: %zd candidates of %zu", PySequence_Fast_GET_SIZE(list), count);
        goto done;
    }
    release_expert(object);
    for (size_t i = 0; rc == 0 && i < count; i++)
        rc = view_expert(object, PySequence_Fast_GET_ITEM(list, (Py_ssize_t)i), i, &weights[i]);
    if (rc < 0 || mq_enter(&object->busy, "the ExpertsScore") < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_experts_score_load(&object->score, expert, object->kind, weights, &err);
    Py_END_ALLOW_THREADS
    mq_leave(&object->busy);
    result = rc == MQ_OK ? Py_NewRef(Py_None) : mq_raise(&err);
done:
    mq_free(weights);
    Py_DECREF(list);
    return result;
}

static PyObject *experts_scores_get(PyObject *self, void *unused)
{
    const mq_experts_score *score = &((ExpertsScoreObject *)self)->score;
    const int64_t count = (int64_t)score->count;
    mq_tensor view;
    (void)unused;
    PyObject *array = mq_new_array(mq_state_of_object(self), MQ_F64, 1, &count, &view);
    for (int64_t i = 0; array != NULL && i < count; i++) ((double *)view.data)[i] = score->candidates[i].score;
    return array;
}

PyDoc_STRVAR(experts_doc,
"ExpertsScore(candidates, compute='float32')\n--\n\n"
"An observer (Runtime.set_observer) of a layer's experts that adds up, for each of so many candidates,\n"
"sum((gradient * (y' - y))^2) over what the experts together add to the hidden states: AutoQuantize's gradient score.\n"
"compute: of the model. It holds a change of all rows for each candidate.");

static PyMethodDef experts_methods[] = {
    {"load", experts_load, METH_VARARGS, experts_load_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef experts_properties[] = {
    {"scores", experts_scores_get, NULL, "float64, an entry per candidate: the sums so far.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot experts_slots[] = {
    {Py_tp_doc, (void *)experts_doc}, {Py_tp_new, experts_new}, {Py_tp_dealloc, experts_dealloc},
    {Py_tp_traverse, observer_traverse}, {Py_tp_methods, experts_methods}, {Py_tp_getset, experts_properties},
    {0, NULL},
};

static PyType_Spec experts_spec = {
    .name = "modelq._core.ExpertsScore", .basicsize = sizeof(ExpertsScoreObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, .slots = experts_slots,
};

/* OutputGradient -------------------------------------------------------------------------------------------------- */

static PyObject *gradient_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rows", "width", NULL};
    long long rows, width;
    mq_tensor view;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LL:OutputGradient", names, &rows, &width)) return NULL;
    if (rows < 1 || width < 1) return PyErr_Format(PyExc_ValueError, "OutputGradient: rows and width are at least 1");
    OutputGradientObject *self = (OutputGradientObject *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    const int64_t shape[2] = {rows, width};
    self->base.observer = &self->kept.observer;
    self->array = mq_new_array(mq_state_of_object((PyObject *)self), MQ_F32, 2, shape, &view);
    if (self->array == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    for (int64_t i = 0; i < rows * width; i++) ((float *)view.data)[i] = 0.0f;
    mq_kept_gradient_init(&self->kept, view.data, rows, width);
    return (PyObject *)self;
}

static void gradient_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_XDECREF(((OutputGradientObject *)self)->array);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *array_get(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((OutputGradientObject *)self)->array);
}

PyDoc_STRVAR(gradient_doc,
"OutputGradient(rows, width)\n--\n\n"
"An observer (Runtime.set_observer) that keeps the gradient of the loss by a module's output, for all rows of a run.");

static PyGetSetDef gradient_properties[] = {
    {"array", array_get, NULL, "float32 [rows, width], in the order of the run; zero where nothing came by.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot gradient_slots[] = {
    {Py_tp_doc, (void *)gradient_doc}, {Py_tp_new, gradient_new}, {Py_tp_dealloc, gradient_dealloc},
    {Py_tp_traverse, observer_traverse}, {Py_tp_getset, gradient_properties}, {0, NULL},
};

static PyType_Spec gradient_spec = {
    .name = "modelq._core.OutputGradient", .basicsize = sizeof(OutputGradientObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, .slots = gradient_slots,
};

static int observer_init(PyObject *module, mq_state *state)
{
    state->output_score_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &score_spec, NULL);
    state->output_gradient_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &gradient_spec, NULL);
    state->experts_score_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &experts_spec, NULL);
    if (state->output_score_type == NULL || state->output_gradient_type == NULL || state->experts_score_type == NULL)
        return -1;
    if (PyModule_AddType(module, state->output_score_type) < 0) return -1;
    if (PyModule_AddType(module, state->experts_score_type) < 0) return -1;
    return PyModule_AddType(module, state->output_gradient_type);
}

const mq_py_part mq_py_observer = {.init = observer_init};
