/* _core.Quantizer seen from other parts of the extension. */
#ifndef MQ_PY_TYPE_QUANTIZER_H
#define MQ_PY_TYPE_QUANTIZER_H

#include "py/state.h"

#include "quant/quantizer.h"

/* The quantizer inside object, held: its amax and pre_quant_scale cannot be replaced until
 * mq_quantizer_release(object). The caller also keeps a reference to object. NULL with TypeError set if object is no
 * Quantizer. */
const mq_quantizer *mq_quantizer_hold(mq_state *state, PyObject *object);
void mq_quantizer_release(PyObject *object);

#endif
