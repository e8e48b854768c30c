/* From core errors to Python exceptions, and the GIL around one core call. */
#ifndef MQ_PY_CONVERT_H
#define MQ_PY_CONVERT_H

#include "py/state.h"

#include "core/error.h"

/* Raises the exception for err->code and returns NULL. */
PyObject *mq_raise(const mq_error *err);

/* result, or, where rc is no MQ_OK, NULL with err's exception, and result is released. */
PyObject *mq_result(PyObject *result, int rc, const mq_error *err);

/* A progress and interrupt poll for long core calls, called without the GIL: takes it, runs pending signal handlers,
 * and returns MQ_ERR_INTERRUPTED with the exception set if one raised (Ctrl-C). */
int mq_poll_signals(void *unused);

/* The module that a method was defined in: types are heap types that cannot be subclassed. */
mq_state *mq_state_of_object(PyObject *self);

#endif
