/* CudaLibrary: what the CUDA library says of itself and of the machine's devices. */
#include "py/type_cuda.h"

#include "py/convert.h"

typedef struct CudaLibraryObject {
    PyObject_HEAD
    mq_backend backend;
} CudaLibraryObject;

int mq_backend_of(mq_state *state, PyObject *object, const mq_backend **out)
{
    if (!Py_IS_TYPE(object, state->cuda_type)) {
        PyErr_Format(PyExc_TypeError, "expected a CudaLibrary, got %s", Py_TYPE(object)->tp_name);
        return -1;
    }
    *out = &((CudaLibraryObject *)object)->backend;
    return 0;
}

static const mq_backend *backend_of(PyObject *self)
{
    return &((CudaLibraryObject *)self)->backend;
}

static PyObject *cuda_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"path", NULL};
    PyObject *path = NULL;
    mq_error err;
    int rc;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&:CudaLibrary", names, PyUnicode_FSConverter, &path)) return NULL;
    CudaLibraryObject *self = (CudaLibraryObject *)type->tp_alloc(type, 0);
    if (self != NULL) {
        const char *bytes = PyBytes_AS_STRING(path);
        Py_BEGIN_ALLOW_THREADS
        rc = mq_backend_open(&self->backend, bytes, &err);
        Py_END_ALLOW_THREADS
        if (rc != MQ_OK) {
            mq_raise(&err);
            Py_CLEAR(self);
        }
    }
    Py_DECREF(path);
    return (PyObject *)self;
}

static void cuda_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    mq_backend_close(&((CudaLibraryObject *)self)->backend);
    type->tp_free(self);
    Py_DECREF(type);
}

static int cuda_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

PyDoc_STRVAR(device_count_doc,
"device_count()\n--\n\n"
"How many devices there are. RuntimeError says what is missing where there is none: driver, its version, GPU.");

static PyObject *device_count(PyObject *self, PyObject *unused)
{
    (void)unused;
    int count = 0, rc;
    mq_error err;
    Py_BEGIN_ALLOW_THREADS
    rc = backend_of(self)->device_count(&count, &err);
    Py_END_ALLOW_THREADS
    return rc == MQ_OK ? PyLong_FromLong(count) : mq_raise(&err);
}

PyDoc_STRVAR(device_doc,
"device(index)\n--\n\n"
"One device: {'name', 'compute_capability': (major, minor), 'multiprocessors', 'total_nbytes', 'free_nbytes'}.");

static PyObject *device_of(PyObject *self, PyObject *argument)
{
    mq_cuda_device device;
    mq_error err;
    int rc;
    const long index = PyLong_AsLong(argument);
    if (index == -1 && PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = backend_of(self)->device_get((int)MQ_MIN(MQ_MAX(index, -1L), 1L << 30), &device, &err);
    Py_END_ALLOW_THREADS
    if (rc != MQ_OK) return mq_raise(&err);
    return Py_BuildValue("{s:s,s:(ii),s:i,s:n,s:n}", "name", device.name, "compute_capability", device.major,
                         device.minor, "multiprocessors", device.multiprocessors, "total_nbytes",
                         (Py_ssize_t)device.total_nbytes, "free_nbytes", (Py_ssize_t)device.free_nbytes);
}

PyDoc_STRVAR(versions_doc,
"versions()\n--\n\n"
"(version of CUDA that the library was made for, that of the driver) as (major, minor); (0, 0) = no driver.");

static PyObject *versions(PyObject *self, PyObject *unused)
{
    (void)unused;
    int library, driver;
    backend_of(self)->versions(&library, &driver);
    return Py_BuildValue("((ii)(ii))", library / 1000, library % 1000 / 10, driver / 1000, driver % 1000 / 10);
}

static PyObject *is_emulated_get(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(backend_of(self)->is_emulated());
}

static PyMethodDef methods[] = {
    {"device_count", device_count, METH_NOARGS, device_count_doc},
    {"device", device_of, METH_O, device_doc},
    {"versions", versions, METH_NOARGS, versions_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"is_emulated", is_emulated_get, NULL, "Whether it runs on the CPU, for tests (cuda/shim).", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(cuda_doc,
"CudaLibrary(path)\n--\n\n"
"modelq's CUDA library, opened. RuntimeError: it does not open, or is of another version of modelq.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)cuda_doc}, {Py_tp_new, cuda_new}, {Py_tp_dealloc, cuda_dealloc},
    {Py_tp_traverse, cuda_traverse}, {Py_tp_methods, methods}, {Py_tp_getset, getset}, {0, NULL},
};

static PyType_Spec spec = {
    .name = "modelq._core.CudaLibrary",
    .basicsize = sizeof(CudaLibraryObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

static int cuda_init(PyObject *module, mq_state *state)
{
    state->cuda_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->cuda_type != NULL ? PyModule_AddType(module, state->cuda_type) : -1;
}

const mq_py_part mq_py_cuda = {.init = cuda_init};
