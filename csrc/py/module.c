/* modelq._core: the extension module. Each part adds its functions and types; this file only lists them. */
#include "py/state.h"

#include "core/mq.h"

static const mq_py_part *const parts[] = {
    &mq_py_archs, &mq_py_backward, &mq_py_blocks, &mq_py_calibrator, &mq_py_cuda, &mq_py_cuda_arrays, &mq_py_decoder,
    &mq_py_faults, &mq_py_formats, &mq_py_gram_loss, &mq_py_ndarray, &mq_py_observer, &mq_py_quantizer, &mq_py_repack,
    &mq_py_run, &mq_py_runtime, &mq_py_search, &mq_py_straight_through, &mq_py_system,
};

static int core_exec(PyObject *module)
{
    mq_state *state = mq_state_of(module);
    for (size_t i = 0; i < MQ_COUNT(parts); i++) {
        if (parts[i]->methods != NULL && PyModule_AddFunctions(module, parts[i]->methods) < 0) return -1;
        if (parts[i]->init != NULL && parts[i]->init(module, state) < 0) return -1;
    }
    return PyModule_AddStringConstant(module, "__version__", MQ_VERSION);
}

static int core_traverse(PyObject *module, visitproc visit, void *arg)
{
    mq_state *state = mq_state_of(module);
    if (state == NULL) return 0;
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) Py_VISIT(state->dtype_objects[i]);
    Py_VISIT(state->quantizer_type);
    Py_VISIT(state->runtime_type);
    Py_VISIT(state->run_type);
    Py_VISIT(state->calibrator_type);
    Py_VISIT(state->gram_loss_type);
    Py_VISIT(state->backward_type);
    Py_VISIT(state->cuda_type);
    Py_VISIT(state->decoder_type);
    Py_VISIT(state->output_score_type);
    Py_VISIT(state->experts_score_type);
    Py_VISIT(state->output_gradient_type);
    return 0;
}

static int core_clear(PyObject *module)
{
    mq_state *state = mq_state_of(module);
    if (state == NULL) return 0;
    for (int i = 0; i < MQ_DTYPE_COUNT; i++) Py_CLEAR(state->dtype_objects[i]);
    Py_CLEAR(state->quantizer_type);
    Py_CLEAR(state->runtime_type);
    Py_CLEAR(state->run_type);
    Py_CLEAR(state->calibrator_type);
    Py_CLEAR(state->gram_loss_type);
    Py_CLEAR(state->backward_type);
    Py_CLEAR(state->cuda_type);
    Py_CLEAR(state->decoder_type);
    Py_CLEAR(state->output_score_type);
    Py_CLEAR(state->experts_score_type);
    Py_CLEAR(state->output_gradient_type);
    return 0;
}

static void core_free(void *module)
{
    core_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, core_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as NumPy's C API */
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "modelq._core",
    .m_doc = "The C core of modelq.",
    .m_size = sizeof(mq_state),
    .m_slots = slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
    .m_free = core_free,
};

mq_state *mq_state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
