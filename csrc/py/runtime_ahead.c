/* Runtime.begin_ahead and the others: weights that are sent to a device while it computes something else. */
#include "py/runtime.h"

#include "core/alloc.h"

const char mq_runtime_begin_ahead_doc[] =
"begin_ahead($self, layer, expert, tensors, /)\n--\n\n"
"Weights of a layer (expert None), or of one of its experts, that will be loaded after what is at work now, in\n"
"whatever order layers come. They are sent to the device by go_ahead, or while Run.layer or Run.expert waits.\n"
"load_layer and Run.expert then find there what they are given as the same arrays; anything else is loaded anew, so\n"
"arrays must not be written to until then.\n\n"
"tensors: {name: array}, some of layer_tensors(layer) or expert_tensors(layer, expert), each linear's bias with its\n"
"weight; norms are left out. What was ahead before is forgotten, unless it is the same. Returns whether there is room\n"
"for them on the device; without a device there is none. ValueError, TypeError as in load_layer.";

const char mq_runtime_go_ahead_doc[] =
"go_ahead($self)\n--\n\n"
"Send one of the weights of begin_ahead. Returns whether there are more. ValueError, MemoryError: it cannot be sent.";

const char mq_runtime_forget_ahead_doc[] =
"forget_ahead($self)\n--\n\nLet go of what begin_ahead was given; what was sent is of no use any more.";

static void free_map(mq_tensor_map *map)
{
    if (map != NULL) mq_tensor_map_free(map);
    mq_free(map);
}

static mq_tensor_map *make_map(mq_state *state, PyObject *tensors)
{
    mq_tensor_map *map = mq_alloc_zeroed(sizeof *map);
    if (map == NULL) PyErr_NoMemory();
    else if (mq_tensor_map_init(map, state, tensors) == 0) return map;
    mq_free(map);
    return NULL;
}

void mq_runtime_drop_ahead(RuntimeObject *self)
{
    mq_tensor_map *map = self->ahead;
    mq_runtime_forget_ahead(&self->runtime);
    self->ahead = NULL;
    free_map(map);
}

/* Without an exception where another thread has it. */
static int try_enter(_Atomic int *busy)
{
    int expected = 0;
    return atomic_compare_exchange_strong(busy, &expected, 1);
}

void mq_runtime_end_ahead(RuntimeObject *self, int64_t layer, int64_t expert, int failed)
{
    if (self->ahead == NULL || self->ahead_layer != layer || self->ahead_expert != expert) return;
    if (!try_enter(&self->ahead_busy)) return;      /* whoever is at it sees what has become of it */
    if (failed) {
        mq_runtime_drop_ahead(self);
    } else {
        mq_tensor_map *map = self->ahead;
        self->ahead = NULL;
        self->runtime.ahead.layer = -1;
        free_map(map);
    }
    mq_leave(&self->ahead_busy);
}

/* 0 with *expert, -1 for None; or -1 with an exception set. */
static int parse_part(RuntimeObject *self, long long layer, PyObject *given, int64_t *expert)
{
    const long long layers = self->runtime.config.num_hidden_layers;
    *expert = -1;
    if (layer < 0 || layer >= layers) {
        PyErr_Format(PyExc_IndexError, "layer %lld of a model of %lld layers", layer, layers);
        return -1;
    }
    if (given == Py_None) return 0;
    *expert = PyLong_AsLongLong(given);
    return *expert == -1 && PyErr_Occurred() ? -1 : mq_check_expert(self, layer, *expert);
}

/* Takes the map over. */
static int begin(RuntimeObject *self, int64_t layer, int64_t expert, mq_tensor_map *map, int *room)
{
    mq_tensor_map *before = self->ahead;
    mq_error err;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_runtime_begin_ahead(&self->runtime, layer, expert, map->tensors, map->count, room, &err);
    Py_END_ALLOW_THREADS
    self->ahead = map;
    self->ahead_layer = layer;
    self->ahead_expert = expert;
    free_map(before);
    if (rc != MQ_OK || !*room) mq_runtime_drop_ahead(self);
    if (rc != MQ_OK) mq_raise(&err);
    return rc == MQ_OK ? 0 : -1;
}

PyObject *mq_runtime_begin_ahead_method(PyObject *object, PyObject *args)
{
    RuntimeObject *self = (RuntimeObject *)object;
    PyObject *given, *tensors;
    long long layer;
    int64_t expert;
    int room = 0, rc = -1;
    if (!PyArg_ParseTuple(args, "LOO:begin_ahead", &layer, &given, &tensors) ||
        parse_part(self, layer, given, &expert) < 0)
        return NULL;
    mq_tensor_map *map = make_map(mq_state_of_object(object), tensors);
    if (map == NULL) return NULL;
    if (mq_enter(&self->ahead_busy, "begin_ahead") == 0) {
        rc = begin(self, layer, expert, map, &room);
        mq_leave(&self->ahead_busy);
    } else {
        free_map(map);
    }
    return rc == 0 ? PyBool_FromLong(room) : NULL;
}

PyObject *mq_runtime_go_ahead_method(PyObject *object, PyObject *unused)
{
    RuntimeObject *self = (RuntimeObject *)object;
    mq_error err;
    int rc, more = 0;
    (void)unused;
    if (mq_enter(&self->ahead_busy, "go_ahead") < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_runtime_ahead(&self->runtime, &more, &err);
    Py_END_ALLOW_THREADS
    mq_leave(&self->ahead_busy);
    return rc == MQ_OK ? PyBool_FromLong(more) : mq_raise(&err);
}

PyObject *mq_runtime_forget_ahead_method(PyObject *object, PyObject *unused)
{
    RuntimeObject *self = (RuntimeObject *)object;
    (void)unused;
    if (mq_enter(&self->ahead_busy, "forget_ahead") < 0) return NULL;
    mq_runtime_drop_ahead(self);
    mq_leave(&self->ahead_busy);
    Py_RETURN_NONE;
}

/* ---- while a run waits ---- */

/* Calls it, and forgets it unless it wants to be called again. */
static int ask(mq_meanwhile *it, mq_error *err)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *result = PyObject_CallNoArgs(it->ahead);
    const int again = result != NULL ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    PyGILState_Release(gil);
    if (again <= 0) it->ahead = NULL;
    it->asked = 1;
    return err->code = again >= 0 ? MQ_OK : MQ_ERR_INTERRUPTED;     /* then the exception is set */
}

static int go_on(void *context, int *more, mq_error *err)
{
    mq_meanwhile *it = context;
    RuntimeObject *self = it->runtime;
    int rc = MQ_OK, left = 0;
    if (it->ahead != NULL && (!it->asked || self->runtime.ahead.layer < 0)) {
        rc = ask(it, err);
        left = self->runtime.ahead.layer >= 0;
    } else {
        if (!try_enter(&self->ahead_busy)) return MQ_OK;
        rc = mq_runtime_ahead(&self->runtime, &left, err);
        mq_leave(&self->ahead_busy);
    }
    *more = rc == MQ_OK && (left || it->ahead != NULL);
    return rc;
}

int mq_meanwhile_begin(mq_meanwhile *it, RunObject *run, PyObject *ahead)
{
    *it = (mq_meanwhile){.runtime = run->runtime, .ahead = ahead};
    if (ahead == Py_None) return 0;
    if (!PyCallable_Check(ahead)) {
        PyErr_Format(PyExc_TypeError, "ahead: expected a callable or None, got %.100s", Py_TYPE(ahead)->tp_name);
        return -1;
    }
    run->run.meanwhile = go_on;
    run->run.meanwhile_context = it;
    return 0;
}

void mq_meanwhile_end(RunObject *run)
{
    run->run.meanwhile = NULL;
}
