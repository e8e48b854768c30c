/* Runtime.use_device: where a runtime's layers are computed. */
#include "py/runtime.h"
#include "py/type_cuda.h"

const char mq_runtime_use_device_doc[] =
"use_device($self, library, index=0, memory=0, cublas=None, host_statistics=False)\n--\n\n"
"Compute layers, logits and losses on a CUDA device from now on, by a CudaLibrary; None: on the CPU again.\n\n"
"memory: bytes of the device that may be used, 0 = nine tenths of what is free. cublas: the path of cuBLASLt; None:\n"
"as the loader finds it. host_statistics: those other than maxima are made on the CPU, from copies of what passes, as\n"
"where there is no room for them. Weights that are loaded are dropped. ValueError: the family needs what a device\n"
"does not compute; MemoryError: not even workspace fits; RuntimeError: something else is missing.";

static int drop_layers(RuntimeObject *self)
{
    mq_runtime *runtime = &self->runtime;
    for (int64_t i = 0; i < runtime->config.num_hidden_layers; i++) {
        if (mq_enter(&runtime->layers[i].busy, "use_device: a layer") < 0) return -1;
        mq_runtime_drop_layer(runtime, i);
        mq_leave(&runtime->layers[i].busy);
    }
    return 0;
}

void mq_runtime_leave_device(RuntimeObject *self)
{
    mq_runtime_drop_ahead(self);
    self->runtime.elsewhere = NULL;
    mq_device_free(self->device);
    self->device = NULL;
    Py_CLEAR(self->library);
}

static int take_device(RuntimeObject *self, PyObject *library, const mq_device_options *options)
{
    const mq_backend *backend;
    mq_error err;
    int rc;
    if (mq_backend_of(mq_state_of_object((PyObject *)self), library, &backend) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_device_supports(&self->runtime, &err);
    if (rc == MQ_OK) rc = mq_device_new(backend, options, &self->device, &err);
    Py_END_ALLOW_THREADS
    if (rc != MQ_OK) {
        mq_raise(&err);
        return -1;
    }
    self->library = Py_NewRef(library);
    self->runtime.elsewhere = mq_device_elsewhere(self->device);
    return 0;
}

PyObject *mq_runtime_use_device(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"library", "index", "memory", "cublas", "host_statistics", NULL};
    RuntimeObject *self = (RuntimeObject *)object;
    PyObject *library;
    Py_ssize_t memory = 0;
    mq_device_options options = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|inzp:use_device", names, &library, &options.index, &memory,
                                     &options.cublas, &options.host_statistics))
        return NULL;
    if (memory < 0 || options.index < 0) {
        PyErr_SetString(PyExc_ValueError, "use_device: index and memory must not be negative");
        return NULL;
    }
    options.budget = (size_t)memory;
    if (drop_layers(self) < 0) return NULL;
    mq_runtime_leave_device(self);
    if (library != Py_None && take_device(self, library, &options) < 0) return NULL;
    Py_RETURN_NONE;
}

/* {path: how many products of weights that stay codes took it}, of those that were taken. */
static PyObject *products_of(const mq_device *device)
{
    PyObject *dict = PyDict_New();
    const char *name;
    for (int path = 0; dict != NULL && (name = mq_device_path_name(path)) != NULL; path++) {
        const int64_t count = mq_device_products(device, path);
        PyObject *number = count > 0 ? PyLong_FromLongLong(count) : NULL;
        if (count > 0 && (number == NULL || PyDict_SetItemString(dict, name, number) < 0)) Py_CLEAR(dict);
        Py_XDECREF(number);
    }
    return dict;
}

PyObject *mq_runtime_device(PyObject *object, void *unused)
{
    const RuntimeObject *self = (RuntimeObject *)object;
    (void)unused;
    if (self->device == NULL) Py_RETURN_NONE;
    PyObject *products = products_of(self->device);
    if (products == NULL) return NULL;
    return Py_BuildValue("{s:n,s:n,s:n,s:N}", "memory", (Py_ssize_t)mq_device_budget(self->device), "peak",
                         (Py_ssize_t)mq_device_peak(self->device), "copied",
                         (Py_ssize_t)mq_device_copied(self->device), "products", products);
}
