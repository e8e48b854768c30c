/* _core.GramLoss seen from other parts of the extension. */
#ifndef MQ_PY_TYPE_GRAM_LOSS_H
#define MQ_PY_TYPE_GRAM_LOSS_H

#include "py/state.h"

#include "calib/gram_loss.h"

/* What object holds, NULL for None; -1 with TypeError set if it is neither. It never changes once made. */
int mq_gram_loss_of(mq_state *state, PyObject *object, const mq_gram_loss **out);

#endif
