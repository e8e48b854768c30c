/* _core.Quantizer seen from other parts of the extension. */
#ifndef MQ_PY_TYPE_QUANTIZER_H
#define MQ_PY_TYPE_QUANTIZER_H

#include "py/state.h"

#include "backend/device_quantizer.h"

/* The quantizer inside object, held: its amax and pre_quant_scale cannot be replaced until
 * mq_quantizer_release(object). The caller also keeps a reference to object. NULL with TypeError set if object is no
 * Quantizer. */
const mq_quantizer *mq_quantizer_hold(mq_state *state, PyObject *object);
void mq_quantizer_release(PyObject *object);

/* Where a Quantizer keeps its numbers on a device; it holds the CudaLibrary that they were made by. */
mq_device_quantizer *mq_quantizer_on_device(PyObject *object, PyObject *library);

#endif
