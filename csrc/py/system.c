/* cpu_info() and the size of the thread pool. */
#include "py/convert.h"

#include "core/cpu.h"
#include "core/pool.h"

PyDoc_STRVAR(cpu_info_doc,
"cpu_info()\n--\n\n"
"What this process computes with: {'isa', 'features', 'threads'}.\n\n"
"isa is the kernel table in use (MODELQ_ISA caps it); threads the size of the pool (MODELQ_NUM_THREADS).");

static PyObject *cpu_info(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    char features[256];
    mq_cpu_feature_names(features, sizeof features);
    return Py_BuildValue("{s:s,s:s,s:i}", "isa", mq_isa_name(mq_cpu_isa()), "features", features, "threads",
                         mq_pool_max_threads());
}

PyDoc_STRVAR(set_threads_doc,
"set_threads(n)\n--\n\n"
"Use n threads from now on (n >= 1); 0 goes back to MODELQ_NUM_THREADS or the processor's cores.");

static PyObject *set_threads(PyObject *module, PyObject *argument)
{
    (void)module;
    long n = PyLong_AsLong(argument);
    if (n == -1 && PyErr_Occurred()) return NULL;
    if (n < 0 || n > 256) return PyErr_Format(PyExc_ValueError, "set_threads: expected 0 to 256, got %ld", n);
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = mq_pool_set_threads((int)n);
    Py_END_ALLOW_THREADS
    if (rc != MQ_OK) return PyErr_Format(PyExc_RuntimeError, "set_threads: called from inside a job");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"cpu_info", cpu_info, METH_NOARGS, cpu_info_doc},
    {"set_threads", set_threads, METH_O, set_threads_doc},
    {NULL, NULL, 0, NULL},
};

static int system_init(PyObject *module, mq_state *state)
{
    (void)module;
    (void)state;
    const char *problem = mq_cpu_isa_problem();
    if (problem == NULL) return 0;
    PyErr_SetString(PyExc_ImportError, problem);
    return -1;
}

const mq_py_part mq_py_system = {.methods = methods, .init = system_init};
