/* Errors are values: a function returns MQ_OK or a negative code and has filled the caller's mq_error.
 * No globals, no thread locals: the Python layer owns the struct while the GIL is released. */
#ifndef MQ_ERROR_H
#define MQ_ERROR_H

#include "core/mq.h"

typedef struct mq_error {
    int code;
    char text[512];
} mq_error;

/* Fills err (if not NULL) and returns code, so that `return mq_fail(err, ...)` reads well. */
int mq_fail(mq_error *err, int code, const char *format, ...) MQ_PRINTF(3, 4);

/* The common case of a failed allocation; what says what was to be held. */
int mq_fail_memory(mq_error *err, const char *what, size_t nbytes);

#endif
