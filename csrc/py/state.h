/* Module state: every type, exception and cached object of one module instance. */
#ifndef MQ_PY_STATE_H
#define MQ_PY_STATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core/tensor.h"

typedef struct mq_state {
    PyObject *dtype_objects[MQ_DTYPE_COUNT]; /* NumPy dtype per mq_dtype, made at first use (py/ndarray.c) */
    PyTypeObject *quantizer_type;
    PyTypeObject *runtime_type;
    PyTypeObject *run_type;
    PyTypeObject *calibrator_type;
    PyTypeObject *gram_loss_type;
    PyTypeObject *backward_type;
    PyTypeObject *cuda_type;
    PyTypeObject *decoder_type;
    PyTypeObject *output_score_type;
    PyTypeObject *experts_score_type;
    PyTypeObject *output_gradient_type;
} mq_state;

mq_state *mq_state_of(PyObject *module);

/* One method table and one set-up function per file of this folder; module.c lists them. */
typedef struct mq_py_part {
    PyMethodDef *methods;                            /* module functions, may be NULL */
    int (*init)(PyObject *module, mq_state *state);  /* adds types and constants, may be NULL */
} mq_py_part;

extern const mq_py_part mq_py_archs;
extern const mq_py_part mq_py_backward;
extern const mq_py_part mq_py_blocks;
extern const mq_py_part mq_py_calibrator;
extern const mq_py_part mq_py_cuda;
extern const mq_py_part mq_py_cuda_arrays;
extern const mq_py_part mq_py_decoder;
extern const mq_py_part mq_py_faults;
extern const mq_py_part mq_py_formats;
extern const mq_py_part mq_py_gram_loss;
extern const mq_py_part mq_py_ndarray;
extern const mq_py_part mq_py_observer;
extern const mq_py_part mq_py_quantizer;
extern const mq_py_part mq_py_repack;
extern const mq_py_part mq_py_run;
extern const mq_py_part mq_py_runtime;
extern const mq_py_part mq_py_search;
extern const mq_py_part mq_py_straight_through;
extern const mq_py_part mq_py_system;

#endif
