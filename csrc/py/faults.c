/* _alloc_fail_at() and _alloc_live(): let tests make the n-th allocation of this module fail. modelq._core and
 * modelq._testing each link their own copy of the core, so both have this function. */
#include "py/state.h"

#include "core/alloc.h"

PyDoc_STRVAR(alloc_fail_at_doc,
"_alloc_fail_at(n, persistent=False)\n--\n\n"
"Tests only: make the n-th allocation from now fail (1 is the next), or every one from the n-th on; 0 ends it.\n\n"
"Returns how many allocations were asked for since the last call that had n > 0.");

static PyObject *alloc_fail_at(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"n", "persistent", NULL};
    unsigned long long n = 0;
    int persistent = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K|p:_alloc_fail_at", names, &n, &persistent)) return NULL;
    return PyLong_FromUnsignedLongLong(mq_alloc_fail_at(n, persistent));
}

PyDoc_STRVAR(alloc_live_doc,
"_alloc_live()\n--\n\n"
"Tests only: how many of this module's allocations were not freed yet.");

static PyObject *alloc_live(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromLongLong(mq_alloc_live());
}

static PyMethodDef methods[] = {
    {"_alloc_live", alloc_live, METH_NOARGS, alloc_live_doc},
    {"_alloc_fail_at", (PyCFunction)(void (*)(void))alloc_fail_at, METH_VARARGS | METH_KEYWORDS, alloc_fail_at_doc},
    {NULL, NULL, 0, NULL},
};

const mq_py_part mq_py_faults = {.methods = methods};
