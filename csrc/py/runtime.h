/* What the types around a Runtime share: type_{runtime,run,backward,observer,calibrator}.c. */
#ifndef MQ_PY_RUNTIME_H
#define MQ_PY_RUNTIME_H

#include "py/convert.h"
#include "py/ndarray.h"

#include "backend/device.h"
#include "model/backward.h"

typedef struct RuntimeObject {
    PyObject_HEAD
    mq_runtime runtime;
    PyObject *calibrators;   /* {name of a point: its Calibrator}, keeping them alive */
    PyObject *quantizers;    /* {layer: {name of a point: its Quantizer}}, layer -1 for what is outside the layers */
    PyObject *observers;     /* {name of a module: the observer of its output} */
    _Atomic int outer_busy;  /* as mq_layer.busy, for layer -1 */
    int ready;
    mq_device *device;       /* where layers are computed; NULL = here */
    PyObject *library;       /* the CudaLibrary of that */
    struct mq_tensor_map *ahead;    /* weights on their way there before they are wanted, or NULL */
    int64_t ahead_layer, ahead_expert;  /* of what: expert -1 = of none */
    _Atomic int ahead_busy;
} RuntimeObject;

typedef struct RunObject {
    PyObject_HEAD
    mq_run run;
    RuntimeObject *runtime;
    _Atomic int busy;
} RunObject;

typedef struct CalibratorObject {
    PyObject_HEAD
    mq_calib *calib;
} CalibratorObject;

/* A dict {name: array} as views; a quantized weight may be a tuple (parts, scheme, dtype, block_size) as
 * _core.dequantize takes them. keeps holds one reference per tensor and one per name. */
typedef struct mq_tensor_map {
    mq_named_tensor *tensors;
    mq_stored_weight *stored;       /* one per tensor */
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

/* labels, a list of arrays [B, T], as one int32 array over all rows, to be freed with mq_free. NULL with an exception
 * set on failure. */
int32_t *mq_read_labels(RunObject *run, PyObject *labels);
/* int64 [experts, 2], how many tokens go to each expert of the layer whose experts come next, or None: a new object. */
PyObject *mq_expert_tokens(RunObject *run);
/* object as hidden states of the run, [rows, C] of its dtype, contiguous: 0, or -1 with an exception set. */
int mq_view_hidden(RunObject *run, PyObject *object, const char *name, mq_tensor *view, PyObject **keep);
/* 0 with *batch, or -1 with IndexError set. */
int mq_parse_batch(const RunObject *run, PyObject *argument, int64_t *batch);
int mq_parse_run_layer(RunObject *run, long long layer);      /* the same of a layer; -1 too if an error is pending */
/* The run and one layer of its runtime (-1: what is outside them), for one call. */
int mq_run_enter(RunObject *run, int64_t layer);
void mq_run_leave(RunObject *run, int64_t layer);

/* Run.backward(gradients=None), see type_backward.c. */
PyObject *mq_run_backward(PyObject *run, PyObject *args, PyObject *kwargs);
extern const char mq_run_backward_doc[];

/* The observer inside object, marked as being at a place until mq_observer_release. NULL with an exception set if
 * object is none, or is at a place already. */
mq_observer *mq_observer_take(mq_state *state, PyObject *object);
void mq_observer_release(PyObject *object);

/* The dictionary of a model's sizes, see runtime_config.c: 0, or -1 with an exception set. layers is to be freed. */
int mq_read_config(PyObject *dict, mq_config *config, mq_per_layer *layers);
void mq_per_layer_free(mq_per_layer *layers);

/* Runtime.start(ids, masks=None, count_padding=False), see type_run.c. */
PyObject *mq_run_start(PyObject *runtime, PyObject *args, PyObject *kwargs);
extern const char mq_run_start_doc[];

/* Runtime.use_device(library, index=0, memory=0, cublas=None) and Runtime.device, see runtime_device.c. */
PyObject *mq_runtime_use_device(PyObject *runtime, PyObject *args, PyObject *kwargs);
extern const char mq_runtime_use_device_doc[];
PyObject *mq_runtime_device(PyObject *runtime, void *unused);
void mq_runtime_leave_device(RuntimeObject *runtime);

/* Runtime.begin_ahead(layer, expert, tensors), .go_ahead() and .forget_ahead(), see runtime_ahead.c. */
PyObject *mq_runtime_begin_ahead_method(PyObject *runtime, PyObject *args);
PyObject *mq_runtime_go_ahead_method(PyObject *runtime, PyObject *unused);
PyObject *mq_runtime_forget_ahead_method(PyObject *runtime, PyObject *unused);
extern const char mq_runtime_begin_ahead_doc[], mq_runtime_go_ahead_doc[], mq_runtime_forget_ahead_doc[];
/* Lets go of the tensors ahead, if they are that part's, which is loaded or was to be; after a failure they are
 * forgotten. */
void mq_runtime_end_ahead(RuntimeObject *runtime, int64_t layer, int64_t expert, int failed);
void mq_runtime_drop_ahead(RuntimeObject *runtime);     /* whatever they are of */

/* What a call that computes does meanwhile: ahead, a callable or None, is called, which may begin something; then that
 * goes on, and when it is done ahead is called again, as long as it answers True. -1 with an exception set if it is
 * neither. */
typedef struct mq_meanwhile {
    RuntimeObject *runtime;
    PyObject *ahead;            /* NULL: it is not to be called again */
    int asked;                  /* it was called */
} mq_meanwhile;
int mq_meanwhile_begin(mq_meanwhile *it, RunObject *run, PyObject *ahead);
void mq_meanwhile_end(RunObject *run);

#endif
