/* What type_runtime.c, type_run.c and type_calibrator.c share. */
#ifndef MQ_PY_RUNTIME_H
#define MQ_PY_RUNTIME_H

#include "py/convert.h"
#include "py/ndarray.h"

#include "model/run.h"

typedef struct RuntimeObject {
    PyObject_HEAD
    mq_runtime runtime;
    PyObject *calibrators;   /* {name of a point: its Calibrator}, keeping them alive */
    PyObject *quantizers;    /* {layer: {name of a point: its Quantizer}}, layer -1 for what is outside the layers */
    _Atomic int outer_busy;  /* as mq_layer.busy, for layer -1 */
    int ready;
} RuntimeObject;

typedef struct CalibratorObject {
    PyObject_HEAD
    mq_calib *calib;
} CalibratorObject;

/* A dict {name: array} as views. keeps holds one reference per tensor and one per name. */
typedef struct mq_tensor_map {
    mq_named_tensor *tensors;
    PyObject **keeps;
    size_t count;
} mq_tensor_map;

int mq_tensor_map_init(mq_tensor_map *map, mq_state *state, PyObject *dict);  /* 0, or -1 with an exception set */
void mq_tensor_map_free(mq_tensor_map *map);

/* object != 0 as a NumPy array, for masks of whatever kind of numbers. NULL with an exception set on failure. */
PyObject *mq_as_booleans(PyObject *object);

/* Takes a layer (-1: the points outside the layers) for a computation: its quantizers cannot change until it is left.
 * RuntimeError if another thread has it. */
int mq_layer_enter(RuntimeObject *runtime, int64_t layer);
void mq_layer_leave(RuntimeObject *runtime, int64_t layer);

/* IndexError if the layer has no such expert. */
int mq_check_expert(RuntimeObject *runtime, int64_t layer, int64_t expert);

/* Takes or gives back a busy flag; enter raises RuntimeError if it is taken. */
int mq_enter(_Atomic int *busy, const char *what);
void mq_leave(_Atomic int *busy);

/* Runtime.start(ids, masks=None, count_padding=False), see type_run.c. */
PyObject *mq_run_start(PyObject *runtime, PyObject *args, PyObject *kwargs);
extern const char mq_run_start_doc[];

#endif
