#include "py/convert.h"

PyObject *mq_raise(const mq_error *err)
{
    PyObject *type = PyExc_RuntimeError;
    switch (err->code) {
    case MQ_ERR_VALUE: type = PyExc_ValueError; break;
    case MQ_ERR_TYPE: type = PyExc_TypeError; break;
    case MQ_ERR_MEMORY: type = PyExc_MemoryError; break;
    case MQ_ERR_IO: type = PyExc_OSError; break;
    case MQ_ERR_INTERRUPTED: return NULL; /* the exception is already set */
    default: break;
    }
    PyErr_SetString(type, err->text);
    return NULL;
}

PyObject *mq_result(PyObject *result, int rc, const mq_error *err)
{
    if (rc == MQ_OK) return result;
    Py_DECREF(result);
    return mq_raise(err);
}

int mq_poll_signals(void *unused)
{
    (void)unused;
    PyGILState_STATE gil = PyGILState_Ensure();
    int rc = PyErr_CheckSignals() == 0 ? MQ_OK : MQ_ERR_INTERRUPTED;
    PyGILState_Release(gil);
    return rc;
}

mq_state *mq_state_of_object(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}
