#include "core/error.h"

#include <stdarg.h>
#include <stdio.h>

int mq_fail(mq_error *err, int code, const char *format, ...)
{
    if (err == NULL) return code;
    err->code = code;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return code;
}

int mq_fail_memory(mq_error *err, const char *what, size_t nbytes)
{
    return mq_fail(err, MQ_ERR_MEMORY, "out of memory: %s needs %zu bytes", what, nbytes);
}
