#include "testing/operands.h"

int mq_operands_take(mq_operands *set, mq_state *state, PyObject *object)
{
    if (mq_view_object(state, object, "operand", &set->view[set->count], &set->keep[set->count]) < 0) return -1;
    set->count++;
    if (mq_tensor_is_contiguous(&set->view[set->count - 1])) return 0;
    PyErr_SetString(PyExc_ValueError, "operands must be contiguous");
    return -1;
}

int mq_operands_take_all(mq_operands *set, mq_state *state, PyObject *tuple)
{
    *set = (mq_operands){.count = 0};
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple) && i < MQ_MOST_OPERANDS; i++)
        if (mq_operands_take(set, state, PyTuple_GET_ITEM(tuple, i)) < 0) return -1;
    return 0;
}

void mq_operands_release(mq_operands *set)
{
    for (int i = 0; i < set->count; i++) Py_XDECREF(set->keep[i]);
}

mq_row_sizes mq_rows_of(const mq_tensor *x)
{
    return (mq_row_sizes){.rows = x->shape[0], .width = mq_tensor_count(x) / x->shape[0], .dtype = x->dtype};
}
