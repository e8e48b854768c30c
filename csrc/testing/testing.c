/* The module modelq._testing: this file only lists its parts (testing.h says how to add one). */
#include "testing/testing.h"

static const mq_py_part *const parts[] = {
    &mq_py_ndarray, &mq_py_faults, &mq_testing_backward, &mq_testing_gemm, &mq_testing_ops,
};

static int testing_exec(PyObject *module)
{
    mq_state *state = mq_state_of(module);
    for (size_t i = 0; i < MQ_COUNT(parts); i++) {
        if (parts[i]->methods != NULL && PyModule_AddFunctions(module, parts[i]->methods) < 0) return -1;
        if (parts[i]->init != NULL && parts[i]->init(module, state) < 0) return -1;
    }
    return 0;
}

static int testing_traverse(PyObject *module, visitproc visit, void *arg)
{
    mq_state *state = mq_state_of(module);
    if (state == NULL) return 0;
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) Py_VISIT(state->dtype_objects[i]);
    return 0;
}

static int testing_clear(PyObject *module)
{
    mq_state *state = mq_state_of(module);
    if (state == NULL) return 0;
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) Py_CLEAR(state->dtype_objects[i]);
    return 0;
}

static void testing_free(void *module)
{
    testing_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, testing_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "modelq._testing",
    .m_doc = "Internals of modelq, for its tests.",
    .m_size = sizeof(mq_state),
    .m_slots = slots,
    .m_traverse = testing_traverse,
    .m_clear = testing_clear,
    .m_free = testing_free,
};

mq_state *mq_state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

PyMODINIT_FUNC PyInit__testing(void)
{
    return PyModuleDef_Init(&definition);
}
